"""The encoder-decoder language model (Switch Transformer on T5): two token sequences in, logits out; knows no text.

B sequences, S encoder tokens, T decoder tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewfire.config import ModelConfig
from fewfire.errors import ConfigError
from fewfire.model.attention import Context
from fewfire.model.block import Block
from fewfire.model.cache import Cache
from fewfire.model.decoder import Decoder
from fewfire.model.moe import Observer
from fewfire.model.norm import Norm


class Memory(NamedTuple):
    """What the decoder reads of the encoder: states, and False where they are padding (None: nowhere)."""

    states_BSD: Tensor
    visible_BS: Tensor | None


class Encoder(nn.Module):
    """Blocks that see the whole sequence, then a norm. The embedding is the decoder's."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        num_layers = len(config.encoder)
        self.layers = nn.ModuleList(
            Block(config, layer, index, num_layers) for index, layer in enumerate(config.encoder)
        )
        self.norm = Norm(config.model_dim, config.norm)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor | None, observe: Observer | None) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        context = column_context(x_BSD.shape[1], 0, mask_BS)
        for block in self.layers:
            x_BSD = block(x_BSD, context, None, observe)
        return self.norm(x_BSD)


class EncoderDecoder(Decoder):
    """An encoder, and a decoder whose blocks also attend to it. Observers number decoder layers behind the encoder's.

    An expert's capacity counts the tokens of one call, padding included, as the published code does: with a cache
    and a capacity that binds, decoding is not what one long call would give.
    """

    has_encoder = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.encoder = Encoder(config)

    def encode(self, ids_BS: Tensor, *, mask_BS: Tensor | None = None, observe: Observer | None = None) -> Memory:
        """Encoder states of `ids_BS`. `mask_BS`: False where a token is padding."""
        visible_BS = None if mask_BS is None else mask_BS.bool()
        return Memory(self.encoder(self._embed(ids_BS), visible_BS, observe), visible_BS)

    def teacher_forced(
        self,
        ids_BS: Tensor,
        decoder_ids_BT: Tensor,
        *,
        mask_BS: Tensor | None = None,
        mask_BT: Tensor | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """Logits (B, T, V) float32 of `decoder_ids_BT` after `ids_BS` was read: both stacks at once."""
        memory = self.encode(ids_BS, mask_BS=mask_BS, observe=observe)
        return self(decoder_ids_BT, memory=memory, mask_BT=mask_BT, observe=observe)

    def forward(
        self,
        ids_BT: Tensor,
        cache: Cache | None = None,
        *,
        memory: Memory | None = None,
        mask_BT: Tensor | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """Logits (B, T, V) float32 of decoder tokens `ids_BT`, the continuation of what `cache` holds.

        Raises: ConfigError without `memory`, which `encode` gives.
        """
        return self.logits(self.hidden(ids_BT, cache, memory=memory, mask_BT=mask_BT, observe=observe))

    def hidden(
        self,
        ids_BT: Tensor,
        cache: Cache | None = None,
        *,
        memory: Memory | None = None,
        mask_BT: Tensor | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """(B, T, D) after the final norm: what the head reads."""
        if memory is None:
            raise ConfigError("an encoder-decoder needs what its encoder read; pass memory=model.encode(ids)")
        num_new, past = ids_BT.shape[1], 0 if cache is None else cache.length
        if cache is None:
            visible_BS = None if mask_BT is None else mask_BT.bool()
        else:
            visible_BS = cache.see(mask_BT, ids_BT.shape[0], num_new)
        context = column_context(num_new, past, visible_BS)
        context.memory_BSD, context.memory_visible_BS = memory
        return self._run(self._embed(ids_BT), context, cache, observe)


def column_context(num_new: int, past: int, visible_BS: Tensor | None) -> Context:
    """Positions are columns, padding counted: all that relative positions need."""
    columns_1S = torch.arange(past + num_new)[None]
    return Context(columns_1S[:, past:], columns_1S, visible_BS, past)
