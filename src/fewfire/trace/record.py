"""A model reads texts, and what its routers chose is kept. Documents stand alone: each begins with an empty cache.

T tokens, L MoE layers, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewfire.config import ModelConfig, check
from fewfire.data import read_documents
from fewfire.errors import ConfigError
from fewfire.model.encoder_decoder import EncoderDecoder
from fewfire.routing import Routing
from fewfire.runtime.generate import CHUNK_TOKENS
from fewfire.runtime.packed import account_of
from fewfire.tokenizer import Tokenizer
from fewfire.trace.file import Trace

MAX_TOKENS, CONTEXT = 32_768, 2048
Progress = Callable[[int, int], None]  # tokens read, tokens in all


def record(
    module: nn.Module,
    tokenizer: Tokenizer | None,
    data: str | Path | Sequence[str | Path],
    *,
    field: str = "text",
    max_tokens: int = MAX_TOKENS,
    context: int | None = None,
    model: str = "",
    progress: Progress = lambda done, total: None,
) -> Trace:
    """The routing of `data` (files, folders, JSONL, Parquet: as `fewfire eval` reads texts) in `module`.

    A text longer than `context` tokens (default: 2048, or the model's own if less) becomes several documents, the first
    with what the tokenizer puts before texts. At most `max_tokens` are read. Weights are kept as float16. The trace's
    memory is part of the module's budget.
    Raises: ConfigError for data without text, a model without routers, tokenizer or plain text; BudgetError where the
    trace does not fit the memory budget; FormatError for malformed data.
    """
    config = module.config
    assert isinstance(config, ModelConfig)
    check(not isinstance(module, EncoderDecoder), f"{config.family} is an encoder-decoder; trace a decoder-only model")
    check(config.is_moe, f"{model or 'this model'} has no MoE layer, so that no router chooses; trace an MoE model")
    if tokenizer is None:
        raise ConfigError("this model has no tokenizer, so texts cannot be read; put tokenizer.json into its folder")
    check(max_tokens >= 1, f"max_tokens ({max_tokens}) must be at least 1")
    limit = min(config.max_context, CONTEXT) if context is None else context
    check(1 <= limit <= config.max_context, f"context ({limit}) must lie between 1 and {config.max_context}")
    texts = list(_documents(tokenizer, data, field, limit, max_tokens))
    ids_D = [torch.tensor(ids) for _, ids in texts]
    highest = max((int(ids_T.max()) for ids_T in ids_D), default=0)
    check(bool(ids_D), "the data has no token; add text")
    check(
        highest < config.vocab_size, f"the tokenizer gives id {highest}, outside the vocabulary of {config.vocab_size}"
    )
    return record_ids(module, ids_D, sources=[name for name, _ in texts], model=model, progress=progress)


def _documents(
    tokenizer: Tokenizer, data: str | Path | Sequence[str | Path], field: str, limit: int, most: int
) -> Iterator[tuple[str, list[int]]]:
    """Names and token ids of pieces of at most `limit` tokens, `most` in all."""
    for document in read_documents(data, field=field, cut_characters=None):
        ids = tokenizer.encode(document.text[: 32 * most], add_special=True)[:most]
        for start in range(0, len(ids), limit):
            piece = ids[start : start + limit]
            yield document.name if len(ids) <= limit else f"{document.name}@{start}", piece
        most -= len(ids)
        if most <= 0:
            return


@torch.inference_mode()
def record_ids(
    module: nn.Module,
    documents: Sequence[Tensor],
    *,
    sources: Sequence[str] = (),
    model: str = "",
    progress: Progress = lambda done, total: None,
) -> Trace:
    """The routing of token ids (T,), document by document."""
    buffers = _Buffers(module, sum(len(ids_T) for ids_T in documents))
    account, held = account_of(module), nullcontext()
    chunk = getattr(module, "chunk_tokens", CHUNK_TOKENS)
    with held if account is None else account.lent(buffers.num_bytes, f"a trace of {buffers.num_tokens} tokens"):
        buffers.make()
        starts = [0]
        for ids_T in documents:
            cache: Any = module.new_cache()  # type: ignore[operator]
            for part_T in ids_T.long().split(chunk):
                module.hidden(part_T[None], cache, observe=buffers.observe)  # type: ignore[operator]
                buffers.end_step(part_T)
                progress(buffers.done, buffers.num_tokens)
            starts.append(buffers.done)
        return buffers.trace(starts, sources, model)


class _Buffers:
    """Room for the whole trace, filled step by step."""

    def __init__(self, module: nn.Module, num_tokens: int):
        config = module.config
        assert isinstance(config, ModelConfig)
        self.num_tokens, self.done = num_tokens, 0
        self.layers = [index for _, index, _ in config.moe_layers]
        self.routers = [moe.router for _, _, moe in config.moe_layers]
        self.width = max(router.top_k for router in self.routers)
        wide = max(router.num_experts for router in self.routers) > 2**15
        self.dtype = torch.int32 if wide else torch.int16
        self._numbers = {layer: number for number, layer in enumerate(self.layers)}

    @property
    def num_bytes(self) -> int:
        slots = self.num_tokens * len(self.layers) * self.width
        return slots * (self.dtype.itemsize + 2) + 4 * self.num_tokens

    def make(self) -> None:
        shape = (self.num_tokens, len(self.layers), self.width)
        self.ids_TLK = torch.full(shape, -1, dtype=self.dtype)
        self.weights_TLK = torch.zeros(shape, dtype=torch.float16)
        self.tokens_T = torch.empty(self.num_tokens, dtype=torch.int32)

    def observe(self, layer: int, routing: Routing) -> None:
        ids_TK, weights_TK = routing.ids_TK, routing.weights_TK
        if routing.kept_TK is not None:
            ids_TK = ids_TK.masked_fill(~routing.kept_TK, -1)
            weights_TK = weights_TK.masked_fill(~routing.kept_TK, 0.0)
        count, width = ids_TK.shape
        rows, number = slice(self.done, self.done + count), self._numbers[layer]
        self.ids_TLK[rows, number, :width] = ids_TK.to(self.dtype)
        self.weights_TLK[rows, number, :width] = weights_TK.half()

    def end_step(self, ids_T: Tensor) -> None:
        self.tokens_T[self.done : self.done + len(ids_T)] = ids_T
        self.done += len(ids_T)

    def trace(self, starts: Sequence[int], sources: Sequence[str], model: str) -> Trace:
        return Trace(
            self.ids_TLK,
            self.weights_TLK,
            tuple(starts),
            tuple(self.layers),
            tuple(router.num_experts for router in self.routers),
            tuple(router.top_k for router in self.routers),
            model,
            self.tokens_T,
            tuple(sources),
        )
