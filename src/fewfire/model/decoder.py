"""The decoder-only language model: embedding, blocks, final norm, head. Token ids in, logits out; knows no text.

B sequences, T new tokens each, D model width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fewfire.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig, MoEConfig
from fewfire.errors import ConfigError
from fewfire.model.attention import Attention, Context
from fewfire.model.cache import Cache, LayerCache
from fewfire.model.feedforward import FeedForward
from fewfire.model.moe import MoELayer, Observer
from fewfire.model.norm import Norm

MIXERS: dict[type, type[nn.Module]] = {AttentionConfig: Attention}


class Block(nn.Module):
    """x += mixer(norm(x)); x += ffn(norm(x)). With `sandwich`, what is added is normed too (Grok-1)."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, index: int):
        super().__init__()
        if type(layer.mixer) not in MIXERS:
            raise ConfigError(
                f"layer {index} mixes tokens by {type(layer.mixer).__name__}, which cannot be run yet; "
                f"what runs: {', '.join(kind.__name__ for kind in MIXERS)}"
            )
        dim = config.model_dim
        self.residual_scale = config.residual_scale
        self.attention_norm, self.ffn_norm = Norm(dim, config.norm), Norm(dim, config.norm)
        self.attention_post_norm = Norm(dim, config.norm) if config.sandwich else None
        self.ffn_post_norm = Norm(dim, config.norm) if config.sandwich else None
        self.attention = MIXERS[type(layer.mixer)](dim, layer.mixer, config.norm)
        self.ffn: nn.Module
        if isinstance(layer.ffn, MoEConfig):
            self.ffn = MoELayer(dim, layer.ffn, index)
        else:
            assert isinstance(layer.ffn, FeedForwardConfig)
            self.ffn = FeedForward(dim, layer.ffn)

    def forward(
        self, x_BTD: Tensor, context: Context, cache: LayerCache | None, observe: Observer | None
    ) -> Tensor:
        added = self.attention(self.attention_norm(x_BTD), context, cache)
        if self.attention_post_norm is not None:
            added = self.attention_post_norm(added)
        x_BTD = x_BTD + (added if self.residual_scale == 1.0 else added * self.residual_scale)
        normed = self.ffn_norm(x_BTD)
        added = self.ffn(normed, observe) if isinstance(self.ffn, MoELayer) else self.ffn(normed)
        if self.ffn_post_norm is not None:
            added = self.ffn_post_norm(added)
        return x_BTD + (added if self.residual_scale == 1.0 else added * self.residual_scale)


class Decoder(nn.Module):
    """A causal language model as `ModelConfig` describes it. The same module trains, runs and is the reference."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.encoder:
            raise ConfigError("this model has an encoder; a Decoder has none: build it as an encoder-decoder")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.model_dim)
        learned = config.learned_positions
        self.positions = None if learned is None else nn.Embedding(learned, config.model_dim)
        self.layers = nn.ModuleList(Block(config, layer, index) for index, layer in enumerate(config.layers))
        self.norm = Norm(config.model_dim, config.norm)
        self.head = None if config.tied_head else nn.Linear(config.model_dim, config.vocab_size, bias=config.head_bias)

    def new_cache(self) -> Cache:
        """An empty cache for one batch of sequences."""
        return Cache(len(self.layers))

    def forward(
        self,
        ids_BT: Tensor,
        cache: Cache | None = None,
        *,
        mask_BT: Tensor | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """Logits (B, T, V) float32 of `ids_BT`, the continuation of what `cache` holds.

        `mask_BT`: False where a token is padding (its logits mean nothing). `cache` is extended in place.
        """
        return self.logits(self.hidden(ids_BT, cache, mask_BT=mask_BT, observe=observe))

    def hidden(
        self,
        ids_BT: Tensor,
        cache: Cache | None = None,
        *,
        mask_BT: Tensor | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """(B, T, D) after the final norm: what the head reads."""
        context = make_context(ids_BT, cache, mask_BT)
        x_BTD = self.embed(ids_BT)
        if self.config.embed_scale != 1.0:
            x_BTD = x_BTD * self.config.embed_scale
        if self.positions is not None:
            limit = self.positions.num_embeddings
            if context.length > limit:
                raise ConfigError(f"{context.length} tokens exceed the model's {limit} positions; shorten the text")
            x_BTD = x_BTD + self.positions(context.positions_BT)
        for index, block in enumerate(self.layers):
            x_BTD = block(x_BTD, context, None if cache is None else cache.layers[index], observe)
        return self.norm(x_BTD)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32."""
        if self.head is None:
            out = torch.nn.functional.linear(hidden, self.embed.weight.to(hidden.dtype))
        else:
            out = self.head(hidden)
        return out.float() if self.config.logit_scale == 1.0 else out.float() * self.config.logit_scale


def make_context(ids_BT: Tensor, cache: Cache | None, mask_BT: Tensor | None) -> Context:
    """Positions and visibility of `ids_BT` behind what `cache` holds. Padding does not advance positions."""
    batch, num_new = ids_BT.shape
    past = 0 if cache is None else cache.length
    visible_BS = (None if mask_BT is None else mask_BT.bool()) if cache is None else cache.see(mask_BT, batch, num_new)
    if visible_BS is None:
        key_positions = torch.arange(past + num_new)[None].expand(batch, -1)
    else:
        key_positions = (visible_BS.long().cumsum(dim=1) - 1).clamp(min=0)
    return Context(key_positions[:, past:], key_positions, visible_BS, past)


@torch.no_grad()
def initialise(model: nn.Module, num_layers: int, seed: int, std: float = 0.02) -> None:
    """Draw every weight from N(0, std^2), what feeds the residual by std / sqrt(2 layers) (GPT-2); norms 1, biases 0.

    The same seed gives the same weights whatever ran before.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if parameter.dim() < 2:
            continue  # norms, biases, sinks keep their constructors' values
        scale = std / math.sqrt(2 * num_layers) if leaf == "down" or name.endswith((".out.weight", ".down.weight")) else std
        parameter.normal_(std=scale, generator=generator)
