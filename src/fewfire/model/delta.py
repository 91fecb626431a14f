"""Mixers with a recurrent state instead of a cache that grows: gated delta net, lightning attention, Mamba-1.

B batch, T tokens, C channels, H heads, k key width, v value width, W convolution width, N state width.
Padding changes no state: a state depends on the real tokens alone, wherever the padding lies.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewfire.config import DeltaNetConfig, LightningConfig, MambaConfig, NormConfig
from fewfire.model.attention import Context
from fewfire.model.cache import LayerCache
from fewfire.model.feedforward import ACTIVATIONS
from fewfire.model.norm import Norm

CHUNK = 64  # tokens solved at once by the chunked delta rule


def state_of(cache: LayerCache | None, name: str) -> Tensor | None:
    """The named state, None before the first token."""
    state = None if cache is None else cache.get(name)
    assert state is None or isinstance(state, Tensor)
    return state


def short_convolution(
    x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, past_BPC: Tensor | None, real_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over the real tokens: (B, T, C) and the last P = W - 1 real inputs (B, P, C).

    `past_BPC` continues an earlier call; None is zeros. Outputs at padding mean nothing.
    """
    num_past = weight_CW.shape[1] - 1
    if past_BPC is None:
        past_BPC = x_BTC.new_zeros((x_BTC.shape[0], num_past, x_BTC.shape[2]))
    window_BSC = torch.cat((past_BPC, x_BTC), dim=1)
    order_BS1 = None
    if real_BT is not None:  # padding moves before the past, so that every window holds real tokens only
        window_BSC = window_BSC * torch.cat((real_BT.new_ones(past_BPC.shape[:2]), real_BT), 1)[..., None]
        real_BS = torch.cat((real_BT.new_ones(past_BPC.shape[:2]), real_BT), dim=1)
        order_BS1 = torch.argsort(real_BS.int(), dim=1, stable=True)[..., None]
        window_BSC = window_BSC.gather(1, order_BS1.expand_as(window_BSC))
    y_BCT = F.conv1d(window_BSC.transpose(1, 2), weight_CW[:, None], bias_C, groups=weight_CW.shape[0])
    y_BTC, left_BPC = y_BCT.transpose(1, 2), window_BSC[:, window_BSC.shape[1] - num_past :]
    if order_BS1 is not None:
        padded_BSC = F.pad(y_BTC, (0, 0, num_past, 0))
        y_BTC = torch.zeros_like(padded_BSC).scatter(1, order_BS1.expand_as(padded_BSC), padded_BSC)[:, num_past:]
    return y_BTC, left_BPC


def delta_rule(
    q_BHTk: Tensor, k_BHTk: Tensor, v_BHTv: Tensor, decay_BHT: Tensor, beta_BHT: Tensor, state_BHkv: Tensor
) -> tuple[Tensor, Tensor]:
    """The gated delta rule by its recurrence, the definition: (B, H, T, v) and the state after.

    S = exp(decay) S;  S += k (x) beta (v - S^T k);  y = S^T q.  Source: Gated DeltaNet (2412.06464), equation 10.
    """
    outputs = []
    for t in range(q_BHTk.shape[2]):
        state_BHkv = state_BHkv * decay_BHT[:, :, t, None, None].exp()
        known_BHv = torch.einsum("bhk,bhkv->bhv", k_BHTk[:, :, t], state_BHkv)
        change_BHv = beta_BHT[:, :, t, None] * (v_BHTv[:, :, t] - known_BHv)
        state_BHkv = state_BHkv + k_BHTk[:, :, t, :, None] * change_BHv[:, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_BHTk[:, :, t], state_BHkv))
    return torch.stack(outputs, dim=2) if outputs else torch.zeros_like(v_BHTv), state_BHkv


def delta_rule_chunked(
    q_BHTk: Tensor, k_BHTk: Tensor, v_BHTv: Tensor, decay_BHT: Tensor, beta_BHT: Tensor, state_BHkv: Tensor
) -> tuple[Tensor, Tensor]:
    """`delta_rule`, 64 tokens at once: the changes of a chunk solve a triangular system. Equal up to rounding."""
    outputs = []
    for start in range(0, q_BHTk.shape[2], CHUNK):
        part = slice(start, start + CHUNK)
        q, k, v, beta = q_BHTk[:, :, part], k_BHTk[:, :, part], v_BHTv[:, :, part], beta_BHT[:, :, part, None]
        total_BHt = decay_BHT[:, :, part].cumsum(dim=-1)
        since_BHt1 = total_BHt.exp()[..., None]
        between_BHtt = (total_BHt[..., :, None] - total_BHt[..., None, :]).tril().exp().tril()
        system_BHtt = (beta * (k @ k.transpose(-1, -2)) * between_BHtt).tril(-1)
        known_BHtv = beta * (v - since_BHt1 * (k @ state_BHkv))
        change_BHtv = torch.linalg.solve_triangular(system_BHtt, known_BHtv, upper=False, unitriangular=True)
        outputs.append(since_BHt1 * (q @ state_BHkv) + (q @ k.transpose(-1, -2) * between_BHtt) @ change_BHtv)
        until_BHt1 = (total_BHt[..., -1:] - total_BHt).exp()[..., None]
        state_BHkv = since_BHt1[..., -1:, :] * state_BHkv + (k * until_BHt1).transpose(-1, -2) @ change_BHtv
    return torch.cat(outputs, dim=2) if outputs else torch.zeros_like(v_BHTv), state_BHkv


class DeltaNet(nn.Module):
    """Gated delta net (Qwen3-Next): short convolution, gated delta rule in float32, gated norm, projection.

    `qkvz` and `ba` lie in the hub's order: per key head [q | k | v of its value heads | z of its value heads].
    """

    def __init__(self, model_dim: int, config: DeltaNetConfig, norm: NormConfig):
        super().__init__()
        self.config = config
        keys, values = config.num_key_heads * config.key_dim, config.num_value_heads * config.value_dim
        channels = 2 * keys + values
        self.qkvz = nn.Linear(model_dim, 2 * keys + 2 * values, bias=False)
        self.ba = nn.Linear(model_dim, 2 * config.num_value_heads, bias=False)
        self.conv = nn.Conv1d(channels, channels, config.conv_kernel, groups=channels, bias=False)
        self.a_log = nn.Parameter(torch.zeros(config.num_value_heads))
        self.dt_bias = nn.Parameter(torch.ones(config.num_value_heads))
        self.norm = Norm(config.value_dim, NormConfig("rms", norm.eps))
        self.out = nn.Linear(values, model_dim, bias=False)

    def forward(self, x_BTD: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); moves the convolution's and the recurrent state in `cache`."""
        config, real_BT = self.config, context.real_BT
        q, k, v, z_BTHv, beta_BHT, decay_BHT = self._project(x_BTD)
        mixed_BTC = torch.cat((q, k, v), dim=-1)
        mixed_BTC, past = short_convolution(mixed_BTC, self.conv.weight[:, 0], None, state_of(cache, "conv"), real_BT)
        keys = config.num_key_heads * config.key_dim
        q, k, v = ACTIVATIONS[config.activation](mixed_BTC).float().split((keys, keys, v.shape[-1]), dim=-1)
        repeats = config.num_value_heads // config.num_key_heads

        def heads(x_BTC: Tensor, width: int) -> Tensor:
            return x_BTC.unflatten(-1, (-1, width)).transpose(1, 2)

        q_BHTk = unit(heads(q, config.key_dim)).repeat_interleave(repeats, dim=1) * config.key_dim**-0.5
        k_BHTk = unit(heads(k, config.key_dim)).repeat_interleave(repeats, dim=1)
        if real_BT is not None:
            beta_BHT, decay_BHT = beta_BHT * real_BT[:, None], decay_BHT * real_BT[:, None]
        state = state_of(cache, "state")
        if state is None:
            state = q.new_zeros((q.shape[0], config.num_value_heads, config.key_dim, config.value_dim))
        rule = delta_rule if x_BTD.shape[1] == 1 else delta_rule_chunked
        with torch.autocast(x_BTD.device.type, enabled=False):  # a state that decays and adds needs float32
            y_BHTv, state = rule(q_BHTk, k_BHTk, heads(v, config.value_dim), decay_BHT, beta_BHT, state)
        if cache is not None:
            cache["conv"], cache["state"] = past, state
        y_BTHv = self.norm(y_BHTv.transpose(1, 2)) * F.silu(z_BTHv.float())
        return self.out(y_BTHv.to(x_BTD.dtype).flatten(2))

    def _project(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """q, k, v (B, T, channels), the gate z (B, T, H, v), beta and log decay (B, H, T) float32."""
        config = self.config
        repeats = config.num_value_heads // config.num_key_heads
        per_head = (config.key_dim, config.key_dim, repeats * config.value_dim, repeats * config.value_dim)
        q, k, v, z = self.qkvz(x_BTD).unflatten(-1, (config.num_key_heads, -1)).split(per_head, dim=-1)
        b, a = self.ba(x_BTD).unflatten(-1, (config.num_key_heads, -1)).split((repeats, repeats), dim=-1)
        beta_BTH = torch.sigmoid(b.flatten(2).float())
        decay_BTH = -self.a_log.float().exp() * F.softplus(a.flatten(2).float() + self.dt_bias.float())
        z_BTHv = z.flatten(2).unflatten(-1, (config.num_value_heads, config.value_dim))
        return q.flatten(2), k.flatten(2), v.flatten(2), z_BTHv, beta_BTH.transpose(1, 2), decay_BTH.transpose(1, 2)


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, with the 1e-6 inside the root that the published kernels have."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)


class Lightning(nn.Module):
    """MiniMax-Text-01's linear attention: S = exp(-rate) S + k (x) v, y = S^T q, with one fixed rate a head.

    `depth` is layer / (num_layers - 1 + 1e-5), 0-1: deeper layers forget more slowly. Source: 2501.08313, section 2.2.
    """

    def __init__(self, model_dim: int, config: LightningConfig, norm: NormConfig, depth: float):
        super().__init__()
        self.config = config
        inner = config.num_heads * config.head_dim
        self.qkv = nn.Linear(model_dim, 3 * inner, bias=False)
        self.gate = nn.Linear(model_dim, inner, bias=False)
        self.norm = Norm(inner, NormConfig("rms", 1e-6))
        self.out = nn.Linear(inner, model_dim, bias=False)
        base = 2.0 ** (-8.0 / config.num_heads)
        self.rates = [base ** (head + 1) * (1 - depth + 1e-5) for head in range(config.num_heads)]

    def forward(self, x_BTD: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); moves the state in `cache`."""
        config, real_BT = self.config, context.real_BT
        qkv_BTC = ACTIVATIONS[config.activation](self.qkv(x_BTD)).float()
        qkv_BHTd = qkv_BTC.unflatten(-1, (config.num_heads, -1)).transpose(1, 2)
        decay_BHT = -torch.tensor(self.rates)[None, :, None].expand(*qkv_BHTd.shape[:3])
        if real_BT is not None:
            qkv_BHTd, decay_BHT = qkv_BHTd * real_BT[:, None, :, None], decay_BHT * real_BT[:, None]
        q_BHTd, k_BHTd, v_BHTd = qkv_BHTd.chunk(3, dim=-1)
        state = state_of(cache, "state")
        if state is None:
            state = x_BTD.new_zeros((x_BTD.shape[0], config.num_heads, config.head_dim, config.head_dim)).float()
        with torch.autocast(x_BTD.device.type, enabled=False):
            y_BHTd, state = self._scan(q_BHTd, k_BHTd, v_BHTd, decay_BHT, state)
        if cache is not None:
            cache["state"] = state
        y_BTH = self.norm(y_BHTd.transpose(1, 2).flatten(2).to(x_BTD.dtype))
        return self.out(torch.sigmoid(self.gate(x_BTD)) * y_BTH)

    @staticmethod
    def _scan(q: Tensor, k: Tensor, v: Tensor, decay_BHT: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for start in range(0, q.shape[2], CHUNK):
            part = slice(start, start + CHUNK)
            total_BHt = decay_BHT[:, :, part].cumsum(dim=-1)
            since_BHt1 = total_BHt.exp()[..., None]
            between_BHtt = (total_BHt[..., :, None] - total_BHt[..., None, :]).tril().exp().tril()
            inside = (q[:, :, part] @ k[:, :, part].transpose(-1, -2) * between_BHtt) @ v[:, :, part]
            outputs.append(since_BHt1 * (q[:, :, part] @ state) + inside)
            until_BHt1 = (total_BHt[..., -1:] - total_BHt).exp()[..., None]
            state = since_BHt1[..., -1:, :] * state + (k[:, :, part] * until_BHt1).transpose(-1, -2) @ v[:, :, part]
        return torch.cat(outputs, dim=2) if outputs else torch.zeros_like(v), state


class Mamba(nn.Module):
    """Jamba's Mamba-1 mixer, with RMS norms on the time step, B and C. Source: Jamba (2403.19887); Mamba (2312.00752).

    h = exp(dt A) h + dt B u;  y = C h + D u, per channel, float32.
    """

    def __init__(self, model_dim: int, config: MambaConfig, norm: NormConfig):
        super().__init__()
        self.config = config
        inner, state, rank = config.inner_dim, config.state_dim, config.dt_rank
        self.add_module("in", nn.Linear(model_dim, 2 * inner, bias=config.proj_bias))
        self.conv = nn.Conv1d(inner, inner, config.conv_kernel, groups=inner, bias=config.conv_bias)
        self.x = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt = nn.Linear(rank, inner, bias=True)
        plain = NormConfig("rms", norm.eps)
        self.dt_norm, self.b_norm, self.c_norm = Norm(rank, plain), Norm(state, plain), Norm(state, plain)
        self.a_log = nn.Parameter(torch.arange(1, state + 1).float().log().repeat(inner, 1))
        self.d = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, model_dim, bias=config.proj_bias)

    def forward(self, x_BTD: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); moves the convolution's and the recurrent state in `cache`."""
        config, real_BT = self.config, context.real_BT
        u_BTC, gate_BTC = self.get_submodule("in")(x_BTD).chunk(2, dim=-1)
        u_BTC, past = short_convolution(u_BTC, self.conv.weight[:, 0], self.conv.bias, state_of(cache, "conv"), real_BT)
        u_BTC = ACTIVATIONS[config.activation](u_BTC)
        dt, b, c = self.x(u_BTC).split((config.dt_rank, config.state_dim, config.state_dim), dim=-1)
        step_BTC = F.softplus(self.dt(self.dt_norm(dt)).float())
        if real_BT is not None:
            step_BTC = step_BTC * real_BT[..., None]
        b_BTN, c_BTN, u = self.b_norm(b).float(), self.c_norm(c).float(), u_BTC.float()
        rates_CN = -self.a_log.float().exp()
        state_BCN = state_of(cache, "state")
        if state_BCN is None:
            state_BCN = u.new_zeros((u.shape[0], config.inner_dim, config.state_dim))
        outputs = []
        for t in range(u.shape[1]):
            step_BC1 = step_BTC[:, t, :, None]
            state_BCN = state_BCN * (step_BC1 * rates_CN).exp() + step_BC1 * b_BTN[:, t, None] * u[:, t, :, None]
            outputs.append((state_BCN * c_BTN[:, t, None]).sum(dim=-1))
        if cache is not None:
            cache["conv"], cache["state"] = past, state_BCN
        y_BTC = (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(u)) + u * self.d.float()
        return self.out((y_BTC * F.silu(gate_BTC.float())).to(x_BTD.dtype))
