"""Measures this machine in a few seconds: instruction sets, cores, memory and its limit, read bandwidths, float rate.

Numpy is fast enough for a probe: it reads at memory speed and releases the interpreter while it does.
"""

from __future__ import annotations

import datetime
import mmap
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fewfire.plan.here import MachineProfile
from fewfire.plan.limits import memory_limit, ram_bytes, usable_threads

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
_DISK_READ_BYTES = 2 * 2**20  # about one expert's record
_DISK_FILE_BYTES = 256 * 2**20


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


def probe_disk(folder: Path, *, seconds: float = 4.0) -> tuple[float, bool] | None:
    """(bytes/s, past the page cache) of random reads of expert size from a file in `folder`; None if it is full.

    Reads go past the page cache where the file system allows it; otherwise the pages are dropped first.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="fewfire-probe-") as file:
            block = os.urandom(2**20)
            for _ in range(_DISK_FILE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return _read_randomly(Path(file.name), seconds)
    except OSError:
        return None  # a full or unwritable folder is no reason to fail the whole doctor: it says 'not measured'


def _read_randomly(path: Path, seconds: float) -> tuple[float, bool]:
    flags, direct = os.O_RDONLY, hasattr(os, "O_DIRECT")
    try:
        descriptor = os.open(path, flags | os.O_DIRECT if direct else flags)
    except OSError:
        descriptor, direct = os.open(path, flags), False
    draw = random.Random(0)
    places = [draw.randrange(_DISK_FILE_BYTES // _DISK_READ_BYTES) * _DISK_READ_BYTES for _ in range(100_000)]
    with mmap.mmap(-1, _DISK_READ_BYTES) as buffer:
        try:
            if not direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            count, start = 0, time.perf_counter()
            stop = start + seconds
            limit = len(places) if direct else _DISK_FILE_BYTES // _DISK_READ_BYTES
            while time.perf_counter() < stop and count < limit:
                os.preadv(descriptor, [buffer], places[count] if direct else count * _DISK_READ_BYTES)
                count += 1
            return count * _DISK_READ_BYTES / (time.perf_counter() - start), direct
        finally:
            os.close(descriptor)


def probe_machine(
    disk_folder: Path,
    *,
    int8_ops_per_s: float | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> MachineProfile:
    """Measure everything, in well under 30 s. `say` hears what is being measured."""
    try:
        name, isa, cores = read_cpuinfo(Path("/proc/cpuinfo").read_text())
    except OSError:
        name, isa, cores = platform.processor() or platform.machine(), (), 0
    threads, memory, limit = usable_threads(), ram_bytes(), memory_limit()
    say("memory bandwidth")
    bandwidth = probe_ram(threads, min(memory, limit or memory))
    say("arithmetic")
    float_rate = probe_float(threads)
    say("disk")
    disk = probe_disk(disk_folder)
    return MachineProfile(
        host=platform.node(),
        date=datetime.date.today().isoformat(),
        cpu=name,
        isa=isa,
        cores=min(cores or threads, threads),
        threads=threads,
        ram_bytes=memory,
        memory_limit_bytes=limit,
        ram_read_bytes_per_s=bandwidth,
        disk_read_bytes_per_s=None if disk is None else disk[0],
        disk_path=str(disk_folder),
        disk_direct=disk is not None and disk[1],
        float_ops_per_s=float_rate,
        int8_ops_per_s=int8_ops_per_s,
    )
