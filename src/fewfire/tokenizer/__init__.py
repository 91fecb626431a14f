"""Text in, token ids out, and back. Wraps the `tokenizers` library; knows no model and no torch."""

from __future__ import annotations

from fewfire.tokenizer.bpe import train_bpe
from fewfire.tokenizer.stream import StreamDecoder
from fewfire.tokenizer.tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "train_bpe"]
