"""Multi-head latent attention (MLA) with its compact cache, and DeepSeek sparse attention's indexer.

B batch, T new tokens, S all tokens, H heads, n width without position, r rotated width, v value width, c latent rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewfire import kernels
from fewfire.config import IndexerConfig, LatentAttentionConfig, NormConfig
from fewfire.errors import ConfigError
from fewfire.model.attention import Context, attend
from fewfire.model.cache import LayerCache
from fewfire.model.norm import Norm
from fewfire.model.rope import rotate

SELECTED = "selected_BTS"  # in Context.scratch: what the last full indexer let through, absent when everything


class LatentAttention(nn.Module):
    """MLA: keys and values are one latent a token, expanded per head; one rotated key is shared by all heads.

    The cache holds the normed latent and the rotated key (c + r numbers a token). With a cache the expansion is
    absorbed into queries and outputs, so that nothing per head is made of what is cached.
    Exactness: absorbed and expanded forms agree up to float32 rounding. Source: DeepSeek-V2 (2405.04434), 2.1.
    """

    def __init__(self, model_dim: int, config: LatentAttentionConfig, norm: NormConfig):
        super().__init__()
        self.config = config
        latent_norm = NormConfig("rms", config.latent_eps)
        q_dim = config.num_heads * (config.nope_dim + config.rope_dim)
        self.q = self.q_down = self.q_down_norm = self.q_up = None
        if config.q_rank is None:
            self.q = nn.Linear(model_dim, q_dim, bias=False)
        else:
            self.q_down = nn.Linear(model_dim, config.q_rank, bias=config.bias)
            self.q_down_norm = Norm(config.q_rank, latent_norm)
            self.q_up = nn.Linear(config.q_rank, q_dim, bias=False)
        self.kv_down = nn.Linear(model_dim, config.kv_rank + config.rope_dim, bias=config.bias)
        self.kv_down_norm = Norm(config.kv_rank, latent_norm)
        self.kv_up = nn.Linear(config.kv_rank, config.num_heads * (config.nope_dim + config.value_dim), bias=False)
        self.out = nn.Linear(config.num_heads * config.value_dim, model_dim, bias=config.bias)
        self.indexer = None
        if config.indexer is not None and not config.indexer.shared:
            if config.q_rank is None:
                raise ConfigError("an indexer reads the query latent, and q_rank is unset; set q_rank (q_lora_rank)")
            self.indexer = Indexer(model_dim, config.q_rank, config.indexer)

    def forward(self, x_BTD: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); appends to `cache` in place when given."""
        config = self.config
        cos, sin = context.angles(config.rope)
        if self.q is not None:
            residual_BTq, q_BTH = x_BTD, self.q(x_BTD)
        else:
            assert self.q_down is not None and self.q_down_norm is not None and self.q_up is not None
            residual_BTq = self.q_down_norm(self.q_down(x_BTD))
            q_BTH = self.q_up(residual_BTq)
        q_BHTd = q_BTH.unflatten(-1, (config.num_heads, -1)).transpose(1, 2)
        q_BHTn, q_BHTr = q_BHTd.split((config.nope_dim, config.rope_dim), dim=-1)
        q_BHTr = rotate(q_BHTr, cos, sin, config.rope.pairing)
        latent_BTc, key_BTr = self.kv_down(x_BTD).split((config.kv_rank, config.rope_dim), dim=-1)
        latent_B1Sc = self.kv_down_norm(latent_BTc)[:, None]
        key_B1Sr = rotate(key_BTr[:, None], cos, sin, config.rope.pairing)
        if cache is not None:
            latent_B1Sc, key_B1Sr = cache.grow("latents", latent_B1Sc), cache.grow("rope_keys", key_B1Sr)
        mask = self._mask(x_BTD, residual_BTq, context, cache)
        expand = self._expanded if cache is None else self._absorbed
        y_BHTv = expand(q_BHTn, q_BHTr, latent_B1Sc, key_B1Sr, mask)
        return self.out(y_BHTv.transpose(1, 2).flatten(2))

    def _mask(self, x_BTD: Tensor, residual_BTq: Tensor, context: Context, cache: LayerCache | None) -> Tensor | None:
        """The causal mask, and what the indexer selects of it: this layer's, or the last full layer's if shared."""
        if self.indexer is not None:
            context.scratch.pop(SELECTED, None)
            selected_BTS = self.indexer(x_BTD, residual_BTq, context, self.config, cache)
            if selected_BTS is not None:
                context.scratch[SELECTED] = selected_BTS
        if self.config.indexer is None or SELECTED not in context.scratch:
            return context.mask(None, None)
        return context.full_mask() & context.scratch[SELECTED][:, None]

    def _up_weights(self) -> tuple[Tensor, Tensor]:
        """(H, n, c) that makes keys of a latent and (H, v, c) that makes values."""
        weight_HDc = self.kv_up.weight.unflatten(0, (self.config.num_heads, -1))
        key_Hnc, value_Hvc = weight_HDc.split((self.config.nope_dim, self.config.value_dim), dim=1)
        return key_Hnc, value_Hvc

    def _expanded(
        self, q_BHTn: Tensor, q_BHTr: Tensor, latent_B1Sc: Tensor, key_B1Sr: Tensor, mask: Tensor | None
    ) -> Tensor:
        config = self.config
        kv_BHSd = self.kv_up(latent_B1Sc[:, 0]).unflatten(-1, (config.num_heads, -1)).transpose(1, 2)
        k_BHSn, v_BHSv = kv_BHSd.split((config.nope_dim, config.value_dim), dim=-1)
        k_BHSd = torch.cat((k_BHSn, key_B1Sr.expand(-1, config.num_heads, -1, -1)), dim=-1)
        return attend(torch.cat((q_BHTn, q_BHTr), dim=-1), k_BHSd, v_BHSv, mask, scale=config.scale, causal=True)

    def _absorbed(
        self, q_BHTn: Tensor, q_BHTr: Tensor, latent_B1Sc: Tensor, key_B1Sr: Tensor, mask: Tensor | None
    ) -> Tensor:
        key_Hnc, value_Hvc = self._up_weights()
        q_BHTc = q_BHTn @ key_Hnc.to(q_BHTn.dtype)
        k_B1Sd = torch.cat((latent_B1Sc, key_B1Sr), dim=-1)
        q_BHTd = torch.cat((q_BHTc, q_BHTr), dim=-1)
        y_BHTc = attend(q_BHTd, k_B1Sd, latent_B1Sc, mask, scale=self.config.scale, causal=True)
        return y_BHTc @ value_Hvc.to(y_BHTc.dtype).transpose(1, 2)


class Indexer(nn.Module):
    """Scores every earlier token for every query with a few small heads; only the best `top_k` are attended to.

    Its keys are cached beside the latents. Scores are float32; equal ones (a ReLU makes exact zeros) go to the
    earlier token, so that prefill and decode agree. No gradient passes through the choice.
    Source: DeepSeek-V3.2-Exp report, equation 1.
    """

    def __init__(self, model_dim: int, q_rank: int, config: IndexerConfig):
        super().__init__()
        self.config = config
        self.q_up = nn.Linear(q_rank, config.num_heads * config.head_dim, bias=False)
        self.k = nn.Linear(model_dim, config.head_dim, bias=False)
        self.k_norm = Norm(config.head_dim, NormConfig("layer", 1e-6, bias=True))
        self.head_weights = nn.Linear(model_dim, config.num_heads, bias=False)

    @torch.no_grad()
    def forward(
        self, x_BTD: Tensor, q_BTq: Tensor, context: Context, latent: LatentAttentionConfig, cache: LayerCache | None
    ) -> Tensor | None:
        """Bool (B, T, S), True = selected (also tokens that the mask hides); None when all S tokens are."""
        config = self.config
        cos, sin = context.angles(latent.rope)
        k_B1Sd = rotate(self.k_norm(self.k(x_BTD))[:, None], cos, sin, config.pairing)
        if cache is not None:
            k_B1Sd = cache.grow("indexer_keys", k_B1Sd)
        length = k_B1Sd.shape[2]
        if length <= config.top_k:
            return None
        q_BHTd = self.q_up(q_BTq).unflatten(-1, (config.num_heads, -1)).transpose(1, 2)
        q_BHTd = rotate(q_BHTd, cos, sin, config.pairing)
        with torch.autocast(x_BTD.device.type, enabled=False):
            scores_BHTS = F.relu(q_BHTd.float() @ k_B1Sd.float().transpose(-1, -2) * config.head_dim**-0.5)
            weights_BTH = self.head_weights(x_BTD.to(self.head_weights.weight.dtype)).float() * config.num_heads**-0.5
            scores_BTS = torch.einsum("bth,bhts->bts", weights_BTH, scores_BHTS)
        scores_BTS = scores_BTS.masked_fill(~context.full_mask()[:, 0], float("-inf"))
        _, ids_Rk = kernels.top_k(scores_BTS.flatten(0, 1), config.top_k)
        selected_RS = torch.zeros((ids_Rk.shape[0], length), dtype=torch.bool).scatter_(1, ids_Rk, True)
        return selected_RS.view_as(scores_BTS)
