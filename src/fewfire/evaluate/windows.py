"""A text's tokens cut into the windows that a model reads, by the conventions of lm-eval or of llama.cpp.

Owns which token is predicted from which others. Knows no model; ids in, ids out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple, get_args

from fewfire.config import ModelConfig, check
from fewfire.errors import ConfigError
from fewfire.tokenizer import Tokenizer

Convention = Literal["lm-eval", "llama.cpp"]
CONVENTIONS: tuple[str, ...] = get_args(Convention)
DEFAULT_CONTEXT = 2048


class Window(NamedTuple):
    """`ids`: the model reads [:-1], targets are [1:], of which the last `scored` count. `num_bytes`: their text."""

    ids: Sequence[int]
    scored: int
    num_bytes: float


@dataclass(frozen=True)
class Windowing:
    """How texts are cut. `context`: tokens that the model reads at most (None: 2048, or the model's own if less).

    `lm-eval`: each text stands alone; the beginning token (else the end token) goes before it, and every token of it
    is a target exactly once. The first window predicts `context` tokens, each further one the next `stride`
    (None: `context`, so that windows only share one token), from the `context` tokens before each window's end. Where
    the tokenizer has neither token, a text's first token is read and not predicted.
    `llama.cpp`: disjoint windows of `context` tokens; their first is replaced by the beginning token where the
    tokenizer puts one before texts, their second half is scored (context - context // 2 - 1 tokens), a text's rest
    that fills no window is left out. `max_tokens`: targets over all texts at most; llama.cpp's count by the window.
    Source: lm-eval's `loglikelihood_rolling`; llama.cpp's `perplexity` without a stride.
    """

    context: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    like: Convention = "lm-eval"

    def __post_init__(self) -> None:
        check(self.like in CONVENTIONS, f"like {self.like!r} is not known; expected {' or '.join(CONVENTIONS)}")
        least = 3 if self.like == "llama.cpp" else 1
        check(self.context is None or self.context >= least, f"context ({self.context}) must be at least {least}")
        check(
            self.stride is None or self.like == "lm-eval",
            "stride has no effect on llama.cpp's windows, which are disjoint; leave it out",
        )
        check(self.stride is None or self.stride >= 1, f"stride ({self.stride}) must be at least 1 token")
        check(self.max_tokens is None or self.max_tokens >= 1, f"max_tokens ({self.max_tokens}) must be at least 1")

    def context_for(self, config: ModelConfig) -> int:
        """Tokens in a window of a model. Raises ConfigError where context, stride and the model disagree."""
        context = min(config.max_context, DEFAULT_CONTEXT) if self.context is None else self.context
        check(
            context <= config.max_context,
            f"context ({context}) exceeds the {config.max_context} tokens that the model was made for; "
            f"use {config.max_context} or less",
        )
        check(
            self.stride is None or self.stride <= context,
            f"stride ({self.stride}) exceeds the context ({context}): tokens between would be lost; use {context} "
            "or less",
        )
        return context

    def windows(self, ids: Sequence[int], num_bytes: Sequence[float], cut: Cut) -> Iterator[Window]:
        """The windows of one text. `num_bytes`: of the text that each id stands for."""
        if self.like == "llama.cpp":
            return _halves([*cut.frame, *ids], [*[0.0] * len(cut.frame), *num_bytes], cut)
        return _rolling(ids, num_bytes, cut, self.stride or cut.context)


class Cut(NamedTuple):
    """What a model's tokenizer adds: `prefix` begins a text that stands alone, `frame` is put before texts anyhow."""

    context: int
    prefix: int | None
    frame: Sequence[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, context: int) -> Cut:
        """For `tokenizer`."""
        prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        bos = tokenizer.bos_token_id
        frame = [bos] if bos is not None and tokenizer.encode("a", add_special=True)[:1] == [bos] else []
        return cls(context, prefix, frame)


def _rolling(ids: Sequence[int], num_bytes: Sequence[float], cut: Cut, stride: int) -> Iterator[Window]:
    if cut.prefix is not None:
        ids, num_bytes = [cut.prefix, *ids], [0.0, *num_bytes]
    before = [0.0, *accumulate(num_bytes)]
    done, last = 0, len(ids) - 1  # targets are 1 .. last
    while done < last:
        end = min(done + (cut.context if done == 0 else stride), last)
        yield Window(ids[max(0, end - cut.context) : end + 1], end - done, before[end + 1] - before[done + 1])
        done = end


def _halves(ids: Sequence[int], num_bytes: Sequence[float], cut: Cut) -> Iterator[Window]:
    scored = cut.context - cut.context // 2 - 1
    for start in range(0, len(ids) - cut.context + 1, cut.context):
        end = start + cut.context
        window = [*cut.frame, *ids[start + len(cut.frame) : end]]
        yield Window(window, scored, sum(num_bytes[end - scored : end]))


def token_bytes(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> list[float]:
    """Bytes of `text` that each id stands for; they add up to its UTF-8 length.

    Where ids spell another text than was given (spaces put before, characters normalised), shares are in proportion.
    """
    lengths = [len(tokenizer.id_to_bytes(token)) for token in ids]
    total, spelled = len(text.encode("utf-8", "replace")), sum(lengths)
    if spelled == 0:
        return [total / len(ids)] * len(ids) if ids else []
    return [length * total / spelled for length in lengths]


def check_vocabulary(ids: Sequence[int], vocab_size: int) -> None:
    """Raise ConfigError where a tokenizer gives ids that the model does not have."""
    highest = max(ids, default=0)
    if highest >= vocab_size:
        raise ConfigError(
            f"the tokenizer gives id {highest}, outside the model's vocabulary of {vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
