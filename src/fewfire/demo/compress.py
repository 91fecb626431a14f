"""What general compressors make of the held-out text: the yardstick beside bits per byte."""

from __future__ import annotations

import gzip
import lzma

from fewfire.data import python_library_documents, select
from fewfire.train.settings import DataSettings


def compressed_bits_per_byte(settings: DataSettings) -> dict[str, float]:
    """`gzip -9` and `xz -9` over the held-out documents, each alone: bits per byte of text."""
    total = gzipped = xzed = 0
    side = select(python_library_documents(), "held_out", fraction=settings.held_out_frac, seed=settings.split_seed)
    for document in side:
        content = document.text.encode("utf-8", "replace")
        total += len(content)
        gzipped += len(gzip.compress(content, 9))
        xzed += len(lzma.compress(content, preset=9))
    return {"gzip -9": 8 * gzipped / max(1, total), "xz -9": 8 * xzed / max(1, total)}
