"""What this machine can do, by native loops that do nothing else: the yardsticks beside every speed."""

from __future__ import annotations

import time

import torch

from fewfire.errors import KernelUnavailable
from fewfire.kernels.isa import native

READ_BYTES = 512 * 2**20  # far more than any cache holds


def read_bytes_per_s(threads: int, *, seconds: float = 1.0, num_bytes: int = READ_BYTES) -> float:
    """Memory bandwidth of `threads` threads that only read, the median of passes over `num_bytes`.

    Raises: KernelUnavailable without the extension.
    """
    module = native()
    if module is None:
        raise KernelUnavailable(
            "the bandwidth probe needs the extension fewfire._native; build it with `pip install .`"
        )
    memory = torch.ones(num_bytes, dtype=torch.uint8)
    rates: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or not rates:
        start = time.perf_counter()
        module.probe_read(memory.data_ptr(), num_bytes, threads)
        rates.append(num_bytes / (time.perf_counter() - start))
    return sorted(rates)[len(rates) // 2]


def int8_ops_per_s(threads: int, *, seconds: float = 0.5) -> float:
    """int8 multiplications and additions per second from registers, the best of several runs. Raises as above."""
    module = native()
    if module is None:
        raise KernelUnavailable("the int8 probe needs the extension fewfire._native; build it with `pip install .`")
    best, stop, rounds = 0.0, time.perf_counter() + seconds, 200_000
    while time.perf_counter() < stop or not best:
        start = time.perf_counter()
        done = module.probe_int8(rounds, threads)
        best = max(best, done / (time.perf_counter() - start))
    return best
