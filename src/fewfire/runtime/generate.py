"""Prefill and cached decode of one text: token ids in, token ids out, with the time both took.

T new tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from fewfire.config import ModelConfig, check
from fewfire.model.cache import Cache
from fewfire.model.encoder_decoder import EncoderDecoder
from fewfire.model.moe import Observer
from fewfire.routing import Routing
from fewfire.runtime.banks import ExpertCounts
from fewfire.runtime.engine import NativeDecoder, PagedCache
from fewfire.runtime.packed import experts_of
from fewfire.runtime.sampling import Sampler, Sampling

CHUNK_TOKENS = 512  # of a prompt that torch reads at a time


class LanguageModel(Protocol):
    """What can be generated from: the modules of `model/`, or what runs in their place."""

    config: ModelConfig

    def new_cache(self) -> Cache: ...

    def hidden(self, ids_BT: Tensor, cache: Cache | None = None, *, observe: Observer | None = None) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Limits:
    """Where a generation ends. `context` bounds prompt and new tokens together; memory is taken as the text grows.

    `context` None is the model's own. `prefill_chunk` prompt tokens are read at a time (None: what the model likes).
    """

    max_tokens: int = 256
    context: int | None = None
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        check(self.max_tokens >= 0, f"max_tokens ({self.max_tokens}) must not be negative")
        check(self.context is None or self.context >= 1, f"context ({self.context}) must be at least 1 token")
        check(
            self.prefill_chunk is None or self.prefill_chunk >= 1,
            f"prefill_chunk ({self.prefill_chunk}) must be at least 1 token",
        )


@dataclass
class Measured:
    """What one generation cost so far. Speeds are None where there was too little to time."""

    prompt_tokens: int
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    finish_reason: Literal["stop", "length", "context"] | None = None
    expert_calls: int = 0  # distinct experts asked for, summed over layers and steps
    experts: ExpertCounts | None = None  # of a pack's native experts: what was wanted, found and read
    token_ids: list[int] = field(default_factory=list)

    @property
    def prefill_tokens_per_s(self) -> float | None:
        return self.prompt_tokens / self.prefill_s if self.prefill_s > 0 else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """New tokens after the first (which prefill gives) per second spent on them."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 and self.decode_s > 0 else None


class Generation(Iterator[int]):
    """The new tokens of one text, one at a time; `measured` is up to date between them.

    Ends after `limits.max_tokens`, at the context's end, or after a token of `eos_ids`, which is given out too.
    An encoder-decoder reads the prompt with its encoder; the new tokens are the decoder's.
    Nothing runs before the first `next`. Time that the caller takes between tokens is not counted.
    Raises: ConfigError on an empty prompt, an id outside the vocabulary, or more tokens than the context holds.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt_ids: Sequence[int],
        *,
        sampling: Sampling | None = None,
        limits: Limits | None = None,
        eos_ids: Sequence[int] = (),
    ):
        self.model, self.limits = model, limits or Limits()
        self.eos_ids = frozenset(eos_ids)
        self.context = check_context(model.config, self.limits.context, prompt_ids)
        self.sampler = Sampler(sampling or Sampling(), prompt_ids)
        self.measured = Measured(len(prompt_ids))
        self._experts = experts_of(model) if isinstance(model, nn.Module) else None
        self._before = None if self._experts is None else self._experts.counts()
        self._cache = model.new_cache()
        if isinstance(self._cache, PagedCache):
            self._cache.reserve(min(self.context, len(prompt_ids) + self.limits.max_tokens))
        self._prompt_ids = list(prompt_ids)
        self._pending = self._prompt_ids  # what the next step reads
        self._memory: dict[str, Any] = {}  # what the decoder is given besides, of an encoder-decoder

    def __next__(self) -> int:
        measured = self.measured
        if measured.finish_reason is None and measured.new_tokens >= self.limits.max_tokens:
            measured.finish_reason = "length"
        if measured.finish_reason is None and measured.prompt_tokens + measured.new_tokens >= self.context:
            measured.finish_reason = "context"
        if measured.finish_reason is not None:
            raise StopIteration
        start = time.perf_counter()
        if measured.new_tokens == 0 and isinstance(self.model, EncoderDecoder):
            self._encode(self.model)
        token = self.sampler.choose(self._step())
        seconds = time.perf_counter() - start
        if measured.new_tokens == 0:
            measured.prefill_s = seconds
        else:
            measured.decode_s += seconds
        measured.new_tokens += 1
        measured.token_ids.append(token)
        self._pending = [token]
        if self._experts is not None and self._before is not None:
            measured.experts = self._experts.counts().since(self._before)
            measured.expert_calls = measured.experts.total.hits + measured.experts.total.misses
        if token in self.eos_ids:
            measured.finish_reason = "stop"
        return token

    def stop(self) -> None:
        """End here: the caller has seen what it waited for (a stop string)."""
        self.measured.finish_reason = self.measured.finish_reason or "stop"

    @torch.inference_mode()
    def _encode(self, model: EncoderDecoder) -> None:
        start = model.config.decoder_start_token_id
        check(start is not None, "config.json names no decoder_start_token_id; add it")
        assert start is not None
        self._memory = {"memory": model.encode(torch.tensor([self._prompt_ids]), observe=self._observer)}
        self._pending = [start]

    @torch.inference_mode()
    def _step(self) -> Tensor:
        """Logits (V,) after the pending tokens, which are read in chunks."""
        ids_1T = torch.tensor([self._pending], dtype=torch.int64)
        for chunk_1T in ids_1T.split(self.limits.prefill_chunk or self._chunk_tokens, dim=1):
            hidden_1TD = self.model.hidden(chunk_1T, self._cache, observe=self._observer, **self._memory)
        return self.model.logits(hidden_1TD[:, -1])[0]

    @property
    def _observer(self) -> Observer | None:
        """Native experts count themselves."""
        return self._count if self._experts is None else None

    def _count(self, layer: int, routing: Routing) -> None:
        ids = routing.ids_TK if routing.kept_TK is None else routing.ids_TK[routing.kept_TK]
        self.measured.expert_calls += ids.numel() if routing.ids_TK.shape[0] == 1 else int(ids.unique().numel())

    @property
    def _chunk_tokens(self) -> int:
        return self.model.chunk_tokens if isinstance(self.model, NativeDecoder) else CHUNK_TOKENS


def check_context(config: ModelConfig, context: int | None, prompt_ids: Sequence[int]) -> int:
    """The context in tokens that applies. Raises ConfigError where prompt, context and model disagree."""
    limit = config.max_context if context is None else context
    check(
        limit <= config.max_context,
        f"context ({limit}) exceeds the {config.max_context} tokens that the model was made for; "
        f"use {config.max_context} or less",
    )
    check(len(prompt_ids) > 0, "the prompt is empty; give at least one token")
    check(
        len(prompt_ids) <= limit,
        f"the prompt has {len(prompt_ids)} tokens, the context holds {limit}; shorten the one or raise the other",
    )
    wrong = next((i for i in prompt_ids if not 0 <= i < config.vocab_size), None)
    check(
        wrong is None,
        f"token id {wrong} is outside the model's vocabulary of {config.vocab_size}; "
        "use the tokenizer that belongs to the model",
    )
    return limit
