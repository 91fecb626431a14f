"""The decoder-only language model: embedding, blocks, final norm, head. Token ids in, logits out; knows no text.

B sequences, T new tokens each, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewfire.config import ModelConfig
from fewfire.errors import ConfigError
from fewfire.model.attention import Context
from fewfire.model.block import Block
from fewfire.model.cache import Cache
from fewfire.model.moe import Observer
from fewfire.model.norm import Norm


class HeadBias(nn.Module):
    """What a tied head adds of its own."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab_size))


class Decoder(nn.Module):
    """A causal language model as `ModelConfig` describes it. The same module trains, runs and is the reference."""

    has_encoder = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        if bool(config.encoder) != self.has_encoder:
            raise ConfigError(f"{type(self).__name__} does not fit this model's encoder; build it by build_model")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.model_dim)
        learned = config.learned_positions
        self.positions = None if learned is None else nn.Embedding(learned, config.model_dim)
        first, num_layers = len(config.encoder), len(config.layers)
        self.layers = nn.ModuleList(
            Block(config, layer, index, num_layers, first + index) for index, layer in enumerate(config.layers)
        )
        self.norm = Norm(config.model_dim, config.norm)
        self.head: nn.Module | None = None
        if not config.tied_head:
            self.head = nn.Linear(config.model_dim, config.vocab_size, bias=config.head_bias)
        elif config.head_bias:
            self.head = HeadBias(config.vocab_size)

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
        x_BTD = self._embed(ids_BT)
        if self.positions is not None:
            limit = self.positions.num_embeddings
            if context.length > limit:
                raise ConfigError(f"{context.length} tokens exceed the model's {limit} positions; shorten the text")
            x_BTD = x_BTD + self.positions(context.positions_BT)
        return self._run(x_BTD, context, cache, observe)

    def _embed(self, ids_BT: Tensor) -> Tensor:
        x_BTD = self.embed(ids_BT)
        return x_BTD if self.config.embed_scale == 1.0 else x_BTD * self.config.embed_scale

    def _run(self, x_BTD: Tensor, context: Context, cache: Cache | None, observe: Observer | None) -> Tensor:
        for index, block in enumerate(self.layers):
            x_BTD = block(x_BTD, context, None if cache is None else cache.layers[index], observe)
        return self.norm(x_BTD)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32."""
        if isinstance(self.head, nn.Linear):
            out = self.head(hidden)
        else:
            bias = self.head.bias.to(hidden.dtype) if isinstance(self.head, HeadBias) else None
            out = torch.nn.functional.linear(hidden, self.embed.weight.to(hidden.dtype), bias)
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
