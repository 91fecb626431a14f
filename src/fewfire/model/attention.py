"""Grouped-query attention, its masks, and the context of one forward pass that all layers share.

B batch, T new tokens, S all tokens (cached and new), H heads, G key-value heads, d head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewfire.config import AttentionConfig, NormConfig, RelativeBiasConfig, RopeConfig
from fewfire.model.cache import LayerCache
from fewfire.model.norm import Norm, normalise
from fewfire.model.rope import cos_sin, rotate


@dataclass
class Context:
    """What one forward pass knows besides activations; masks and angles are computed once and shared by layers.

    `positions_BT` of the new tokens, `key_positions_BS` of all columns, `visible_BS` False where a column is padding
    (None: no padding). `past` counts cached columns. `scratch` holds what layers hand on to one another.
    `memory_BSD` is what cross-attention reads, `memory_visible_BS` False where it is padding.
    """

    positions_BT: Tensor
    key_positions_BS: Tensor
    visible_BS: Tensor | None
    past: int
    memory_BSD: Tensor | None = None
    memory_visible_BS: Tensor | None = None
    scratch: dict[str, Tensor] = field(default_factory=dict)
    _masks: dict[tuple, Tensor] = field(default_factory=dict)
    _angles: dict[RopeConfig, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.key_positions_BS.shape[1]

    def angles(self, rope: RopeConfig) -> tuple[Tensor, Tensor]:
        """cos, sin (B, T, R/2) at the new tokens' positions."""
        if rope not in self._angles:
            self._angles[rope] = cos_sin(rope, self.positions_BT, int(self.key_positions_BS.max()) + 1)
        return self._angles[rope]

    @property
    def real_BT(self) -> Tensor | None:
        """Bool, False where a new token is padding; None when none is."""
        return None if self.visible_BS is None else self.visible_BS[:, self.past :]

    def mask(self, window: int | None, chunk: int | None) -> Tensor | None:
        """Bool (B or 1, 1, T, S), True = visible; None where causal says it all: no padding, and all or one new."""
        length = self.length
        bounded = (window is not None and window < length) or (chunk is not None and chunk < length)
        if self.visible_BS is None and not bounded and (self.past == 0 or self.past == length - 1):
            return None
        return self.full_mask(window, chunk)

    def full_mask(self, window: int | None = None, chunk: int | None = None) -> Tensor:
        """`mask`, spelled out also where it is plain causal."""
        key = (window, chunk)
        if key not in self._masks:
            self._masks[key] = self._build_mask(window, chunk)
        return self._masks[key]

    def _build_mask(self, window: int | None, chunk: int | None) -> Tensor:
        length = self.length
        rows = slice(0, 1) if self.visible_BS is None else slice(None)  # no padding: all rows are alike
        query_B1T1 = self.positions_BT[rows, None, :, None]
        key_B11S = self.key_positions_BS[rows, None, None, :]
        mask = key_B11S <= query_B1T1
        if window is not None:
            mask = mask & (key_B11S > query_B1T1 - window)
        if chunk is not None:
            mask = mask & (key_B11S // chunk == query_B1T1 // chunk)
        if self.visible_BS is not None:
            mask = mask & self.visible_BS[:, None, None, :]
            columns = torch.arange(length)
            itself = columns[None, None, None, :] == (self.past + torch.arange(length - self.past))[None, None, :, None]
            mask = mask | itself  # a padding row sees itself: no row of all -inf, and nobody reads its output
        return mask


def attend(
    q_BHTd: Tensor,
    k_BGSd: Tensor,
    v_BGSe: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    causal: bool,
    logit_cap: float | None = None,
    sinks_H: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T, masked) v -> (B, H, T, e). `mask` None: plain causal if `causal`, else full.

    `logit_cap` c: scores become c tanh(scores / c) (Grok-1). `sinks_H`: one more logit per head that takes
    probability and gives nothing (gpt-oss). `bias`: added to the scores (T5). Softmax is float32.
    """
    groups = q_BHTd.shape[1] // k_BGSd.shape[1]
    if logit_cap is None and sinks_H is None and bias is None:
        plain = causal and mask is None and q_BHTd.shape[2] > 1  # one new token sees all there is
        return F.scaled_dot_product_attention(
            q_BHTd, k_BGSd, v_BGSe, attn_mask=mask, is_causal=plain, scale=scale, enable_gqa=groups > 1
        )
    if groups > 1:
        k_BGSd, v_BGSe = k_BGSd.repeat_interleave(groups, dim=1), v_BGSe.repeat_interleave(groups, dim=1)
    scores = (q_BHTd @ k_BGSd.transpose(-1, -2)).float() * scale
    if logit_cap is not None:
        scores = logit_cap * torch.tanh(scores / logit_cap)
    if bias is not None:
        scores = scores + bias.float()
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
    if sinks_H is not None:
        column = sinks_H.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat((scores, column), dim=-1), dim=-1)[..., :-1].to(v_BGSe.dtype) @ v_BGSe
    return torch.softmax(scores, dim=-1).to(v_BGSe.dtype) @ v_BGSe


def visible_mask(visible_BS: Tensor | None) -> Tensor | None:
    """(B, 1, 1, S) for attention that is not causal; None where nothing is padding."""
    return None if visible_BS is None else visible_BS[:, None, None, :]


def relative_buckets(distance: Tensor, config: RelativeBiasConfig, *, bidirectional: bool) -> Tensor:
    """T5's bucket of each key position - query position: exact while near, logarithmic up to `max_distance`.

    Bidirectional buckets are split between the two sides; else later keys share bucket 0. Source: T5 (1910.10683), 2.1.
    """
    count, offset = config.num_buckets, torch.zeros_like(distance)
    if bidirectional:
        count //= 2
        offset, near = (distance > 0).long() * count, distance.abs()
    else:
        near = (-distance).clamp(min=0)
    exact = count // 2
    growth = torch.log(near.float() / exact) / math.log(config.max_distance / exact) * (count - exact)
    far = (exact + growth.clamp(min=0).long()).clamp(max=count - 1)
    return offset + torch.where(near < exact, near, far)


class Attention(nn.Module):
    """Grouped-query attention as `AttentionConfig` says, with an optional cache of post-rope keys and values."""

    def __init__(self, model_dim: int, config: AttentionConfig, norm: NormConfig):
        super().__init__()
        self.config, self.norm_eps = config, norm.eps
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
        self.q = nn.Linear(model_dim, heads * width * (2 if config.output_gate else 1), bias=config.qkv_bias)
        self.k = nn.Linear(model_dim, kv_heads * width, bias=config.qkv_bias)
        self.v = nn.Linear(model_dim, kv_heads * width, bias=config.qkv_bias)
        self.out = nn.Linear(heads * width, model_dim, bias=config.out_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm in ("head", "full"):
            full = config.qk_norm == "full"
            self.q_norm = Norm(heads * width if full else width, norm)
            self.k_norm = Norm(kv_heads * width if full else width, norm)
        self.sinks = nn.Parameter(torch.zeros(heads)) if config.sinks else None
        self.relative_bias = None
        if config.relative_bias is not None and config.relative_bias.owner:
            self.relative_bias = nn.Embedding(config.relative_bias.num_buckets, heads)

    def forward(self, x_BTD: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); appends to `cache` in place when given."""
        config = self.config
        q_BHTd, k_BGTd, v_BGTd, gate = self._project(x_BTD)
        if config.rope is not None:
            cos, sin = context.angles(config.rope)
            q_BHTd = rotate(q_BHTd, cos, sin, config.rope.pairing)
            k_BGTd = rotate(k_BGTd, cos, sin, config.rope.pairing)
            if config.qk_norm == "l2":
                q_BHTd, k_BGTd = normalise(q_BHTd, self.norm_eps), normalise(k_BGTd, self.norm_eps)
        if config.temperature is not None:
            strength, floor = config.temperature
            steps = torch.floor((context.positions_BT.float() + 1) / floor)
            q_BHTd = q_BHTd * (1 + strength * torch.log1p(steps))[:, None, :, None].to(q_BHTd.dtype)
        if cache is not None:
            k_BGTd, v_BGTd = cache.grow("keys", k_BGTd), cache.grow("values", v_BGTd)
        mask = context.mask(config.window, config.chunk) if config.causal else visible_mask(context.visible_BS)
        y_BHTd = attend(
            q_BHTd,
            k_BGTd,
            v_BGTd,
            mask,
            scale=config.scale,
            causal=config.causal,
            logit_cap=config.logit_cap,
            sinks_H=self.sinks,
            bias=self._bias(context),
        )
        y_BTH = y_BHTd.transpose(1, 2).flatten(2)
        if gate is not None:
            y_BTH = y_BTH * torch.sigmoid(gate)
        return self.out(y_BTH)

    def _bias(self, context: Context) -> Tensor | None:
        """T5's (B, H, T, S) bias: made by the first layer of a stack, shared by the others."""
        relative = self.config.relative_bias
        if relative is None:
            return None
        if self.relative_bias is not None:
            distance_BTS = context.key_positions_BS[:1, None, :] - context.positions_BT[:1, :, None]
            buckets_BTS = relative_buckets(distance_BTS, relative, bidirectional=not self.config.causal)
            context.scratch["relative_bias"] = self.relative_bias(buckets_BTS).permute(0, 3, 1, 2)
        return context.scratch["relative_bias"]

    def _project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries (B, H, T, d), keys and values (B, G, T, d), and the output gate (B, T, H*d) where there is one."""
        config, gate = self.config, None
        q, k, v = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        if config.output_gate:
            q, gate = q.unflatten(-1, (config.num_heads, 2 * config.head_dim)).chunk(2, dim=-1)
            q, gate = q.flatten(2), gate.flatten(2)
        if config.qk_norm == "full":
            assert self.q_norm is not None and self.k_norm is not None
            q, k = self.q_norm(q), self.k_norm(k)
        if config.clip_qkv is not None:
            q, k, v = (t.clamp(-config.clip_qkv, config.clip_qkv) for t in (q, k, v))
        q = q.unflatten(-1, (config.num_heads, config.head_dim))
        k = k.unflatten(-1, (config.num_kv_heads, config.head_dim))
        v = v.unflatten(-1, (config.num_kv_heads, config.head_dim))
        if config.qk_norm == "head":
            assert self.q_norm is not None and self.k_norm is not None
            q, k = self.q_norm(q), self.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), gate


class CrossAttention(nn.Module):
    """Attention of the new tokens to `context.memory_BSD`; its keys and values are cached at the first call."""

    def __init__(self, model_dim: int, config: AttentionConfig):
        super().__init__()
        self.config = config
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = nn.Linear(model_dim, width, bias=config.qkv_bias)
        self.k = nn.Linear(model_dim, kv_width, bias=config.qkv_bias)
        self.v = nn.Linear(model_dim, kv_width, bias=config.qkv_bias)
        self.out = nn.Linear(width, model_dim, bias=config.out_bias)

    def forward(self, x_BTD: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""

        def heads(x_BTH: Tensor) -> Tensor:
            return x_BTH.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

        assert context.memory_BSD is not None
        k_BGSd = None if cache is None else cache.get("cross_keys")
        v_BGSd = None if cache is None else cache.get("cross_values")
        if k_BGSd is None or v_BGSd is None:
            k_BGSd, v_BGSd = heads(self.k(context.memory_BSD)), heads(self.v(context.memory_BSD))
            if cache is not None:
                cache["cross_keys"], cache["cross_values"] = k_BGSd, v_BGSd
        assert isinstance(k_BGSd, Tensor) and isinstance(v_BGSd, Tensor)
        mask = visible_mask(context.memory_visible_BS)
        y_BHTd = attend(heads(self.q(x_BTD)), k_BGSd, v_BGSd, mask, scale=self.config.scale, causal=False)
        return self.out(y_BHTd.transpose(1, 2).flatten(2))
