"""How many threads compute."""

from __future__ import annotations

import torch

from fewfire.config import check

MOST_THREADS = 1024  # far more than cores help; systems refuse tens of thousands in ways of their own


def use_threads(count: int) -> None:
    """`count` threads for torch and the native engine, in the whole process. Raises: ConfigError."""
    fits = 1 <= count <= MOST_THREADS
    check(fits, f"threads ({count}) must be from 1 to {MOST_THREADS}; leave it out to use all cores")
    torch.set_num_threads(count)
