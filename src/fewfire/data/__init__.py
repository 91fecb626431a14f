"""Text in, token windows out: corpora, the held-out split, memory-mapped shards, the order of training."""

from __future__ import annotations

from fewfire.data.corpus import (
    Document,
    corpus_files,
    corpus_fingerprint,
    python_library_documents,
    read_documents,
)
from fewfire.data.prepare import write_shards, write_split
from fewfire.data.sampler import Batches, EvaluationBatch, EvaluationWindow, evaluation_batches, evaluation_windows
from fewfire.data.shards import TokenShards
from fewfire.data.split import select, side_of

__all__ = [
    "Batches",
    "Document",
    "EvaluationBatch",
    "EvaluationWindow",
    "TokenShards",
    "corpus_files",
    "corpus_fingerprint",
    "evaluation_batches",
    "evaluation_windows",
    "python_library_documents",
    "read_documents",
    "select",
    "side_of",
    "write_shards",
    "write_split",
]
