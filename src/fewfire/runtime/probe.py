"""This machine measured in some seconds, by native probes where the extension is built, else by numpy's.

Owns the profile that `fewfire doctor` stores, and the short probe of a loaded pack that predictions beside it rest on.
"""

from __future__ import annotations

import datetime
import os
import platform
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fewfire.checkpoints.pack import EXPERTS
from fewfire.errors import BudgetError
from fewfire.kernels.isa import current_isa, native
from fewfire.kernels.probe import int8_ops_per_s, kernel_rates, read_bytes_per_s
from fewfire.plan.hardware import Part
from fewfire.plan.here import MachineProfile
from fewfire.plan.limits import memory_limit, ram_bytes, usable_threads
from fewfire.plan.probe import (
    DISK_FILE_BYTES,
    DISK_READ_BYTES,
    probe_disk,
    probe_float,
    probe_ram,
    read_cpuinfo,
    scratch_file,
)
from fewfire.runtime.banks import StreamedExperts
from fewfire.runtime.disk import PROBE_BYTES, random_read_bytes_per_s, records_bytes_per_s
from fewfire.runtime.engine import NativeDecoder
from fewfire.runtime.weights import open_file

RECORD_SIZES = (2**20, DISK_READ_BYTES, 4 * 2**20, 8 * 2**20)  # experts' records are of these sizes
_SHORT_S = 0.1  # of reading memory beside a loaded model: some passes over what it holds
_SHORT_BYTES = 2**30  # more than last-level caches hold
_ROUNDS = 8  # of kernels, over some tenths of a second


def probe_machine(disk_folder: Path, *, say: Callable[[str], None] = lambda message: None) -> MachineProfile:
    """Measure everything, in well under 30 s. `say` hears what is being measured."""
    try:
        name, isa, cores = read_cpuinfo(Path("/proc/cpuinfo").read_text())
    except OSError:
        name, isa, cores = platform.processor() or platform.machine(), (), 0
    threads, memory, limit = usable_threads(), ram_bytes(), memory_limit()
    is_native = native() is not None
    say("memory bandwidth")
    by_threads = _ram_by_threads(threads, min(memory, limit or memory), is_native)
    say("arithmetic")
    kernels = kernel_rates(threads) if is_native else None
    say("disk")
    by_size, direct = _disk_by_size(disk_folder) if is_native else _disk_plainly(disk_folder)
    return MachineProfile(
        host=platform.node(),
        date=datetime.date.today().isoformat(),
        cpu=name,
        isa=isa,
        cores=min(cores or threads, threads),
        threads=threads,
        ram_bytes=memory,
        memory_limit_bytes=limit,
        ram_read_bytes_per_s=max(by_threads.values()),
        disk_read_bytes_per_s=by_size.get(DISK_READ_BYTES),
        disk_path=str(disk_folder),
        disk_direct=direct,
        float_ops_per_s=probe_float(threads) if kernels is None else kernels.float_ops_per_s,
        int8_ops_per_s=int8_ops_per_s(threads) if is_native else None,
        ram_read_bytes_per_s_by_threads={str(count): rate for count, rate in by_threads.items()},
        disk_record_bytes=DISK_READ_BYTES,
        disk_read_bytes_per_s_by_size={str(size): rate for size, rate in by_size.items()},
        kernel_isa=current_isa() if is_native else None,
        kernels=kernels,
    )


def _ram_by_threads(threads: int, budget_bytes: int, is_native: bool) -> dict[int, float]:
    """Bytes/s of 1, 2, 4 ... and all threads."""
    counts = sorted({threads, *(1 << power for power in range(threads.bit_length()) if 1 << power <= threads)})
    if not is_native:
        return {count: probe_ram(count, budget_bytes) for count in counts}
    memory = torch.ones(max(8 * 2**20, min(512 * 2**20, budget_bytes // 4)), dtype=torch.uint8)
    return {count: read_bytes_per_s(count, memory=memory) for count in counts}


def _disk_plainly(folder: Path) -> tuple[dict[int, float], bool]:
    found = probe_disk(folder)
    return ({}, False) if found is None else ({DISK_READ_BYTES: found[0]}, found[1])


def _disk_by_size(folder: Path, *, seconds: float = 0.6) -> tuple[dict[int, float], bool]:
    """(bytes/s of random reads by their size, past the page cache): the faster way at the size of most records."""
    with scratch_file(folder) as path:
        if path is None:
            return {}, False
        files = [(open_file(path), False)]
        try:
            if hasattr(os, "O_DIRECT"):
                files.append((os.open(path, os.O_RDONLY | os.O_DIRECT), True))
        except OSError:
            pass  # a file system without it: the buffered way remains
        try:
            rates = {
                is_direct: {size: _read_rate(file, size, seconds) for size in RECORD_SIZES} for file, is_direct in files
            }
        except OSError:
            return {}, False
        finally:
            for file, _ in files:
                os.close(file)
    direct = max(rates, key=lambda way: rates[way][DISK_READ_BYTES])
    return rates[direct], direct


def _read_rate(file: int, size: int, seconds: float) -> float:
    draw = random.Random(size)

    def place() -> int:
        return draw.randrange(DISK_FILE_BYTES // size) * size

    return random_read_bytes_per_s(file, place, size, seconds=seconds, most=16 * DISK_FILE_BYTES)


# ------------------------------------------------------------------------------------------------ a loaded pack


def read_own_bytes_per_s(module: NativeDecoder, *, seconds: float = _SHORT_S) -> float:
    """Memory bandwidth of the threads that `module` runs on, over weights that it holds: takes no memory."""
    weights = module.resident_weights
    return read_bytes_per_s(torch.get_num_threads(), seconds=seconds, num_bytes=_SHORT_BYTES, memory=weights)


def probe_part(module: NativeDecoder, *, seconds: float = _SHORT_S, bandwidth: float | None = None) -> Part:
    """This machine as the planner's part, measured for what `module` needs, in about 0.3 s and some MB of memory.

    `bandwidth`: bytes/s of memory where they were measured already. The disk, where experts stream: as fast as was
    found when the file was opened (`DiskSamples` measures it beside a run).
    """
    pack, threads = module.pack, torch.get_num_threads()
    formats = {each.format for each in pack.layout.trunk}
    formats |= {matrix.format for layer in pack.layout.experts for matrix in layer.matrices}
    kernels = kernel_rates(threads, formats, seconds=seconds / 30, rounds=_ROUNDS)
    disk = _records_rate(module)
    return MachineProfile(
        host=platform.node(),
        date=datetime.date.today().isoformat(),
        cpu=platform.machine(),
        isa=(),
        cores=threads,
        threads=threads,
        ram_bytes=ram_bytes(),
        memory_limit_bytes=memory_limit(),
        ram_read_bytes_per_s=bandwidth or read_own_bytes_per_s(module, seconds=seconds),
        disk_read_bytes_per_s=disk,
        disk_path=str(pack.folder),
        disk_direct=disk is not None,
        float_ops_per_s=kernels.float_ops_per_s,
        int8_ops_per_s=None,
        kernels=kernels,
    ).part()


class DiskSamples:
    """The disk's rate beside a streamed run: the mean of samples between its pieces, as disks change within seconds.

    Samples are of random pieces of records, read as the run reads them, and take their memory out of its budget.
    Without streamed experts there are none.
    """

    def __init__(self, module: NativeDecoder, *, seconds: float = 0.3):
        self.module, self.seconds = module, seconds
        self._rates: list[float] = []

    def take(self) -> None:
        rate = _records_rate(self.module, self.seconds)
        self._rates.extend([] if rate is None else [rate])

    def on(self, part: Part) -> Part:
        """`part` with the disk as it was found."""
        return replace(part, disk_gbs=sum(self._rates) / len(self._rates) / 1e9) if self._rates else part


def pieces_of(count: int, *, most: int = 8) -> list[tuple[int, int]]:
    """(start, stop) of up to `most` pieces of `count` steps, as even as they come."""
    number = max(1, min(most, count))
    return [(count * piece // number, count * (piece + 1) // number) for piece in range(number)]


def _records_rate(module: NativeDecoder, seconds: float = 0.0) -> float | None:
    """Bytes/s of records from random places in so many `seconds`, out of the memory budget; None where experts do not
    stream. 0, or where there is no room: as fast as was found when the file was opened."""
    if not isinstance(module.experts, StreamedExperts):
        return None
    access = module.experts.access
    known = access.bytes_per_s
    if known is not None and not seconds:
        return known
    path, layout = module.pack.folder / EXPERTS, module.pack.layout
    try:
        with module.account.lent(PROBE_BYTES, "a probe of the disk"):
            return records_bytes_per_s(path, layout, access.is_direct, seconds=seconds or _SHORT_S)
    except BudgetError:
        return known
