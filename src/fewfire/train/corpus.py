"""From `[data]` to token shards and a tokenizer inside the run's folder; done once, reused when nothing changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fewfire.data import (
    Document,
    TokenShards,
    corpus_fingerprint,
    evaluation_windows,
    python_library_documents,
    read_documents,
    select,
    write_split,
)
from fewfire.errors import ConfigError
from fewfire.tokenizer import Tokenizer, train_bpe
from fewfire.train.settings import DataSettings


@dataclass(frozen=True)
class Corpus:
    """Training and held-out tokens and the tokenizer they were made with."""

    train: TokenShards
    held_out: TokenShards
    tokenizer: Tokenizer


def prepare_corpus(settings: DataSettings, folder: Path, tokenizer: Tokenizer | None = None) -> Corpus:
    """Tokenizer (given, loaded or trained on the training side) and shards, in `folder`.

    Raises: ConfigError for missing files, an empty corpus or a vocabulary that is too small.
    """
    if tokenizer is None:
        tokenizer = _tokenizer(settings, folder)
    fingerprint = (
        ""
        if settings.source == "python"
        else corpus_fingerprint(settings.paths, suffixes=settings.suffixes or None, field=settings.field)
    )
    train, held_out = write_split(
        _documents(settings),
        tokenizer,
        folder / "tokens",
        held_out=settings.held_out_frac,
        seed=settings.split_seed,
        fingerprint=fingerprint or _python_fingerprint(),
    )
    return Corpus(train, held_out, tokenizer)


def _documents(settings: DataSettings) -> Iterator[Document]:
    if settings.source == "python":
        return python_library_documents()
    return read_documents(settings.paths, suffixes=settings.suffixes or None, field=settings.field)


def _python_fingerprint() -> str:
    import sys

    return f"python {sys.version}"


def _tokenizer(settings: DataSettings, folder: Path) -> Tokenizer:
    if settings.tokenizer:
        return Tokenizer.load(settings.tokenizer)
    saved = folder / "tokenizer.json"
    if saved.exists():
        found = Tokenizer.load(folder)
        if found.vocab_size <= settings.vocab_size:
            return found
        raise ConfigError(
            f"{saved} has {found.vocab_size} tokens, data.vocab_size is {settings.vocab_size}; "
            "use another folder for another vocabulary"
        )
    side = select(_documents(settings), "train", fraction=settings.held_out_frac, seed=settings.split_seed)
    trained = train_bpe((document.text for document in side), settings.vocab_size)
    trained.save(folder)
    return trained


def held_out_batches(
    shards: TokenShards, *, seq_len: int, batch_size: int, max_tokens: int
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], int]:
    """Batches of (tokens (B, L+1), mask (B, L)) and the bytes of text they stand for.

    With `max_tokens` > 0, windows spread evenly over the whole held-out text, the same ones every time.
    """
    windows = list(evaluation_windows(shards, seq_len))
    if 0 < max_tokens < shards.num_tokens:
        wanted = max(1, max_tokens // seq_len)
        windows = [windows[i * len(windows) // wanted] for i in range(wanted)]
    batches = []
    for start in range(0, len(windows), batch_size):
        part = windows[start : start + batch_size]
        tokens = torch.full((len(part), seq_len + 1), shards.eos_token_id, dtype=torch.int64)
        mask = torch.zeros((len(part), seq_len), dtype=torch.bool)
        for row, window in enumerate(part):
            length = len(window.tokens_L1)
            tokens[row, :length] = torch.from_numpy(window.tokens_L1)
            mask[row, : length - 1] = True
        batches.append((tokens, mask))
    return batches, sum(window.num_bytes for window in windows)
