"""Which documents are held out: decided by a document's content and the seed, by nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Literal

from fewfire.data.corpus import Document
from fewfire.errors import ConfigError

Side = Literal["train", "held_out"]


def side_of(document: Document, *, fraction: float, seed: int) -> Side:
    """`held_out` for about `fraction` of all documents. Equal contents (outer blanks aside) fall on one side,
    whatever their names, order or neighbours.
    """
    content = document.text.strip().encode("utf-8")
    digest = hashlib.blake2b(content, digest_size=8, key=f"split {seed}".encode()).digest()
    return "held_out" if int.from_bytes(digest, "little") < fraction * 2.0**64 else "train"


def check_fraction(fraction: float) -> None:
    """Raise ConfigError unless 0 < fraction < 1."""
    if not 0.0 < fraction < 1.0:
        raise ConfigError(f"held_out ({fraction}) is no fraction between 0 and 1; 0.05 holds out a twentieth")


def select(documents: Iterable[Document], side: Side, *, fraction: float, seed: int) -> Iterator[Document]:
    """The documents of one side, in their order."""
    check_fraction(fraction)
    return (document for document in documents if side_of(document, fraction=fraction, seed=seed) == side)
