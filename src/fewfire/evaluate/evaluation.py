"""One evaluation from data to figures: reads texts or questions, scores them, adds up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fewfire.config import ModelConfig, check
from fewfire.data import Document, read_documents
from fewfire.errors import ConfigError
from fewfire.evaluate.choices import answer_questions
from fewfire.evaluate.perplexity import Progress, Tally, score_windows
from fewfire.evaluate.questions import holds_questions, read_questions
from fewfire.evaluate.windows import Cut, Window, Windowing, check_vocabulary, token_bytes
from fewfire.model.encoder_decoder import EncoderDecoder
from fewfire.tokenizer import Tokenizer


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on one set of data, over `tokens` targets that stand for `num_bytes` bytes of text.

    With questions, perplexity and bits per byte are those of the right answers after their questions; `accuracy`
    picks the choice of the highest probability, `accuracy_normalised` of the highest per character. Else both are
    None. `perplexity_error`: standard error. `texts`: documents or questions that were scored.
    """

    perplexity: float
    bits_per_byte: float
    tokens: int
    accuracy: float | None
    accuracy_normalised: float | None
    perplexity_error: float | None
    num_bytes: int
    texts: int
    context: int
    stride: int
    like: str

    def to_json(self) -> dict[str, Any]:
        """The contract's object."""
        return {
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "accuracy": self.accuracy,
            "accuracy_normalised": self.accuracy_normalised,
            "perplexity_error": self.perplexity_error,
            "bytes": self.num_bytes,
            "texts": self.texts,
            "context": self.context,
            "stride": self.stride,
            "like": self.like,
        }


def evaluate(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    data: str | Path | Sequence[str | Path],
    *,
    field: str = "text",
    windowing: Windowing | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity and bits per byte of a decoder on texts, and accuracy where `data` holds questions with choices.

    `data`: files and folders. A text, code or markdown file is one text; so are a JSONL line and a Parquet row,
    under `field`. JSONL whose lines have `choices` holds questions (`read_questions`).
    Raises: ConfigError for data without text, or a model that cannot be asked; FormatError for a malformed line.
    """
    windowing = windowing or Windowing()
    if not holds_questions(data):
        documents = read_documents(data, field=field, cut_characters=None)
        return evaluate_documents(model, tokenizer, documents, windowing=windowing, progress=progress)
    check(windowing.like == "lm-eval", "questions have no windows; llama.cpp's are for texts - leave `like` out")
    check(windowing.stride is None, "stride has no effect on questions, which are read whole; leave it out")
    known, cut = _ask_for(model, tokenizer, windowing)
    questions, most = read_questions(data), windowing.max_tokens
    chosen = answer_questions(model, known, questions, cut, max_tokens=most, progress=progress)
    accuracy = (chosen.right / chosen.questions, chosen.right_normalised / chosen.questions)
    return _figures(chosen.answers, chosen.questions, windowing, cut, accuracy)


def evaluate_documents(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    documents: Iterable[Document],
    *,
    windowing: Windowing | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """`evaluate` on texts that are at hand."""
    windowing = windowing or Windowing()
    known, cut = _ask_for(model, tokenizer, windowing)
    config = model.config
    assert isinstance(config, ModelConfig)
    reader, tally = _Reader(known, config.vocab_size, windowing, cut), Tally()
    if progress is not None:
        progress(0, 0.0)
    for window, nats in score_windows(model, reader.windows(documents)):
        tally.add(nats, window.num_bytes)
        if progress is not None:
            progress(tally.tokens, tally.nats)
    _check_enough(tally, windowing, cut)
    return _figures(tally, reader.texts, windowing, cut)


def _ask_for(model: nn.Module, tokenizer: Tokenizer | None, windowing: Windowing) -> tuple[Tokenizer, Cut]:
    """Tokenizer and cut; ConfigError for a model that cannot be evaluated."""
    config = model.config
    assert isinstance(config, ModelConfig)
    check(
        not isinstance(model, EncoderDecoder),
        f"{config.family} is an encoder-decoder, which predicts no plain text; evaluate a decoder-only model",
    )
    if tokenizer is None:
        raise ConfigError(
            "this model has no tokenizer, so texts cannot be read; put its tokenizer.json into its folder"
        )
    return tokenizer, Cut.of(tokenizer, windowing.context_for(config))


class _Reader:
    """Texts to windows, up to `max_tokens` targets. `texts`: how many gave one so far."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, windowing: Windowing, cut: Cut):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.windowing, self.cut = windowing, cut
        self.texts, self._left = 0, windowing.max_tokens

    def windows(self, documents: Iterable[Document]) -> Iterator[Window]:
        for document in documents:
            first = True
            for window in self._windows_of(document.text):
                if self._left is not None:
                    if window.scored > self._left:
                        return
                    self._left -= window.scored
                self.texts, first = self.texts + first, False
                yield window
            if self._left == 0:
                return

    def _windows_of(self, text: str) -> Iterator[Window]:
        ids = self.tokenizer.encode(text)
        check_vocabulary(ids, self.vocab_size)
        num_bytes = token_bytes(self.tokenizer, text, ids)
        if self._left is not None and self.windowing.like == "lm-eval":
            keep = self._left + (self.cut.prefix is None)
            ids, num_bytes = ids[:keep], num_bytes[:keep]
        return self.windowing.windows(ids, num_bytes, self.cut)


def _check_enough(tally: Tally, windowing: Windowing, cut: Cut) -> None:
    """Raise ConfigError where fewer than two tokens were scored, and not because fewer were asked for."""
    if windowing.like == "llama.cpp":
        most = "" if windowing.max_tokens is None else f" within max_tokens ({windowing.max_tokens})"
        check(
            tally.tokens > 0,
            f"no text fills a window of {cut.context} tokens{most}; use a smaller context, more text or more tokens",
        )
    check(
        tally.tokens >= 2 or windowing.max_tokens == 1,
        f"the data has {tally.tokens} token{'s' * (tally.tokens != 1)} to predict, expected 2 or more; add text",
    )


def _figures(
    tally: Tally, texts: int, windowing: Windowing, cut: Cut, accuracy: tuple[float, float] | None = None
) -> Evaluation:
    raw, normalised = accuracy or (None, None)
    return Evaluation(
        perplexity=tally.perplexity,
        bits_per_byte=tally.bits_per_byte,
        tokens=tally.tokens,
        accuracy=raw,
        accuracy_normalised=normalised,
        perplexity_error=tally.perplexity_error,
        num_bytes=round(tally.num_bytes),
        texts=texts,
        context=cut.context,
        stride=windowing.stride or cut.context,
        like=windowing.like,
    )
