"""What can be measured of this machine without native code: instruction sets, read bandwidths, a float rate.

Numpy is fast enough for a probe: it reads at memory speed and releases the interpreter while it does. Where the
extension is built, its own probes are taken instead (runtime/probe.py).
"""

from __future__ import annotations

import mmap
import os
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_FLAGS = {  # /proc/cpuinfo flag -> our name
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx512f": "avx512",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx_vnni": "avx_vnni",
    "amx_tile": "amx",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "asimd": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "sve": "sve",
}
DISK_READ_BYTES = 2 * 2**20  # about one expert's record
DISK_FILE_BYTES = 256 * 2**20


def read_cpuinfo(text: str) -> tuple[str, tuple[str, ...], int]:
    """(model name, instruction sets by our names, physical cores) of /proc/cpuinfo's text."""
    name, flags, cores = "unknown", "", set()
    package = "0"
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key in ("model name", "Model") and name == "unknown":
            name = value
        elif key in ("flags", "Features") and not flags:
            flags = value
        elif key == "physical id":
            package = value
        elif key == "core id":
            cores.add((package, value))
    known = set(flags.split())
    return name, tuple(ours for theirs, ours in _FLAGS.items() if theirs in known), len(cores)


def probe_ram(threads: int, budget_bytes: int, *, seconds: float = 2.0) -> float:
    """Bytes/s that `threads` threads read together, best of several passes over arrays far larger than the caches."""
    import numpy as np

    size = max(8 * 2**20, min(512 * 2**20, budget_bytes // 4)) // threads // 8
    arrays = [np.ones(size, np.int64) for _ in range(threads)]
    total = sum(array.nbytes for array in arrays)
    best, stop = 0.0, time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() < stop:
            start = time.perf_counter()
            list(pool.map(lambda array: int(array.max()), arrays))
            best = max(best, total / (time.perf_counter() - start))
    return best


def probe_float(threads: int, *, seconds: float = 1.5) -> float:
    """Float32 FLOP/s of a matrix product as numpy does it: a floor of what kernels reach."""
    import numpy as np

    size = 768
    left, right = np.ones((size, size), np.float32), np.ones((size, size), np.float32)
    best, stop = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        left @ right
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


@contextmanager
def scratch_file(folder: Path) -> Iterator[Path | None]:
    """A file of random bytes in `folder`, on its disk and not in the page cache; None where there is no room."""
    try:
        file = tempfile.NamedTemporaryFile(dir=folder, prefix="fewfire-probe-")  # noqa: SIM115
    except OSError:
        yield None  # a full or unwritable folder is no reason to fail the whole doctor: it says 'not measured'
        return
    with file:
        yield Path(file.name) if _fill(file.file) else None


def _fill(file: IO[bytes]) -> bool:
    block = os.urandom(2**20)
    try:
        for _ in range(DISK_FILE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    except OSError:
        return False
    return True


def probe_disk(folder: Path, *, seconds: float = 4.0) -> tuple[float, bool] | None:
    """(bytes/s, past the page cache) of random reads of expert size from a file in `folder`; None if it is full.

    One reader. Reads go past the page cache where the file system allows it; otherwise the pages are dropped first.
    """
    with scratch_file(folder) as path:
        try:
            return None if path is None else _read_randomly(path, seconds)
        except OSError:
            return None


def _read_randomly(path: Path, seconds: float) -> tuple[float, bool]:
    flags, direct = os.O_RDONLY, hasattr(os, "O_DIRECT")
    try:
        descriptor = os.open(path, flags | os.O_DIRECT if direct else flags)
    except OSError:
        descriptor, direct = os.open(path, flags), False
    draw = random.Random(0)
    places = [draw.randrange(DISK_FILE_BYTES // DISK_READ_BYTES) * DISK_READ_BYTES for _ in range(100_000)]
    with mmap.mmap(-1, DISK_READ_BYTES) as buffer:
        try:
            if not direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            count, start = 0, time.perf_counter()
            stop = start + seconds
            limit = len(places) if direct else DISK_FILE_BYTES // DISK_READ_BYTES
            while time.perf_counter() < stop and count < limit:
                os.preadv(descriptor, [buffer], places[count] if direct else count * DISK_READ_BYTES)
                count += 1
            return count * DISK_READ_BYTES / (time.perf_counter() - start), direct
        finally:
            os.close(descriptor)
