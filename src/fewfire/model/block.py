"""One block of a decoder or an encoder: mixer, optional cross-attention, feed-forward, and how they are added up."""

from __future__ import annotations

from torch import Tensor, nn

from fewfire.config import (
    AttentionConfig,
    DeltaNetConfig,
    FeedForwardConfig,
    LatentAttentionConfig,
    LayerConfig,
    LightningConfig,
    MambaConfig,
    ModelConfig,
    MoEConfig,
)
from fewfire.errors import ConfigError
from fewfire.model.attention import Attention, Context, CrossAttention
from fewfire.model.cache import LayerCache
from fewfire.model.delta import DeltaNet, Lightning, Mamba
from fewfire.model.feedforward import FeedForward
from fewfire.model.latent import LatentAttention
from fewfire.model.moe import MoELayer, Observer
from fewfire.model.norm import Norm


def build_mixer(config: ModelConfig, layer: LayerConfig, index: int, num_layers: int) -> nn.Module:
    """The module that mixes tokens in layer `index` of a stack of `num_layers`."""
    dim, mixer = config.model_dim, layer.mixer
    if isinstance(mixer, AttentionConfig):
        return Attention(dim, mixer, config.norm)
    if isinstance(mixer, LatentAttentionConfig):
        return LatentAttention(dim, mixer, config.norm)
    if isinstance(mixer, DeltaNetConfig):
        return DeltaNet(dim, mixer, config.norm)
    if isinstance(mixer, LightningConfig):
        return Lightning(dim, mixer, config.norm, depth=index / (num_layers - 1 + 1e-5))
    if isinstance(mixer, MambaConfig):
        return Mamba(dim, mixer, config.norm)
    raise ConfigError(f"layer {index} mixes tokens by {type(mixer).__name__}, which belongs in no block; use attention")


class Block(nn.Module):
    """x += mixer(norm(x)); x += ffn(norm(x)). `number` is what observers know the layer by.

    `sandwich`: what is added is normed too (Grok-1). `normed_residual`: x = alpha norm(x) + beta block(norm(x))
    (MiniMax-Text-01). With `layer.cross`, cross-attention to `context.memory` comes between (T5).
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig, index: int, num_layers: int, number: int | None = None):
        super().__init__()
        dim = config.model_dim
        self.residual_scale = config.residual_scale
        self.residuals: tuple[tuple[float, float], tuple[float, float]] | None = None
        if config.normed_residual is not None:
            full, linear, ffn = (config.normed_residual[i : i + 2] for i in (0, 2, 4))
            mixing = linear if isinstance(layer.mixer, LightningConfig) else full
            self.residuals = ((mixing[0], mixing[1]), (ffn[0], ffn[1]))
        self.attention_norm, self.ffn_norm = Norm(dim, config.norm), Norm(dim, config.norm)
        self.attention_post_norm = Norm(dim, config.norm) if config.sandwich else None
        self.ffn_post_norm = Norm(dim, config.norm) if config.sandwich else None
        self.attention = build_mixer(config, layer, index, num_layers)
        self.cross = self.cross_norm = None
        if layer.cross is not None:
            self.cross, self.cross_norm = CrossAttention(dim, layer.cross), Norm(dim, config.norm)
        self.ffn: nn.Module
        if isinstance(layer.ffn, MoEConfig):
            self.ffn = MoELayer(dim, layer.ffn, index if number is None else number)
        else:
            assert isinstance(layer.ffn, FeedForwardConfig)
            self.ffn = FeedForward(dim, layer.ffn)

    def forward(self, x_BTD: Tensor, context: Context, cache: LayerCache | None, observe: Observer | None) -> Tensor:
        normed = self.attention_norm(x_BTD)
        added = self.attention(normed, context, cache)
        if self.attention_post_norm is not None:
            added = self.attention_post_norm(added)
        x_BTD = self._add(x_BTD, normed, added, 0)
        if self.cross is not None and self.cross_norm is not None:
            x_BTD = x_BTD + self.cross(self.cross_norm(x_BTD), context, cache)
        normed = self.ffn_norm(x_BTD)
        added = self.ffn(normed, observe) if isinstance(self.ffn, MoELayer) else self.ffn(normed)
        if self.ffn_post_norm is not None:
            added = self.ffn_post_norm(added)
        return self._add(x_BTD, normed, added, 1)

    def _add(self, x_BTD: Tensor, normed_BTD: Tensor, added_BTD: Tensor, half: int) -> Tensor:
        if self.residuals is not None:
            alpha, beta = self.residuals[half]
            return normed_BTD * alpha + added_BTD * beta
        return x_BTD + (added_BTD if self.residual_scale == 1.0 else added_BTD * self.residual_scale)
