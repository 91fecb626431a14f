"""The file of expert records, opened for reading the way this disk is fastest: past the page cache, or through it."""

from __future__ import annotations

import fcntl
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fewfire.checkpoints.pack_layout import Layout
from fewfire.errors import ConfigError
from fewfire.kernels.isa import native
from fewfire.plan.memory import RECORD_ALIGNMENT
from fewfire.runtime.weights import huge_memory, open_file

_READERS = 4
_PIECE = 4 * 2**20  # of a record, at most
# Where a probe reads to. A disk fills memory that lies in a core's cache faster than slots, which do not.
PROBE_BYTES = 48 * 2**20
_ROUND_BYTES, _ROUND_S = 24 * 2**20, 0.1  # of one measurement, whichever is over first
_MOST_BYTES = 8 * 2**30  # of one probe: no disk reads more in its seconds
_PROBES = 3  # of either way, in turns
_CLEARLY = 1.2  # O_DIRECT needs no copy and no page cache: the other way has to be faster by this


@dataclass(frozen=True)
class Access:
    """How records are read, and how fast either way was: bytes/s, None where it was not tried."""

    is_direct: bool
    direct_bytes_per_s: float | None = None
    buffered_bytes_per_s: float | None = None

    @property
    def bytes_per_s(self) -> float | None:
        return self.direct_bytes_per_s if self.is_direct else self.buffered_bytes_per_s

    def __str__(self) -> str:
        way = "O_DIRECT" if self.is_direct else "buffered"
        return way if self.bytes_per_s is None else f"{way}, {self.bytes_per_s / 1e9:.2f} GB/s"


def open_records(path: Path, layout: Layout, slots: Tensor, direct: bool | None = None) -> tuple[int, Access, int]:
    """(file descriptor, how it was opened, bytes at the beginning of `slots` that were written to). `direct` None: a
    probe of some 150 MB decides, which reads into `slots` where they are enough.

    Raises: ConfigError where the file cannot be read, or not past the page cache where that was asked for.
    """
    buffered = _open_buffered(path)
    if direct is False or not hasattr(os, "O_DIRECT"):
        return buffered, Access(False), 0
    try:
        past = os.open(path, os.O_RDONLY | os.O_DIRECT)
        os.preadv(past, [huge_memory(RECORD_ALIGNMENT).numpy().data], 0)
    except OSError as error:
        if direct:
            raise ConfigError(
                f"{path} cannot be read past the page cache ({error.strerror}); leave --direct"
            ) from error
        return buffered, Access(False), 0
    if direct:
        os.close(buffered)
        return past, Access(True), 0
    if hasattr(os, "posix_fadvise"):  # what is left of writing it lies in large pieces, of which parts are not dropped
        os.posix_fadvise(buffered, 0, 0, os.POSIX_FADV_DONTNEED)
    memory, touched = _room(_piece(layout), slots)
    rates = [(_rate(past, layout, memory), _rate(buffered, layout, memory)) for _ in range(_PROBES)]
    of_direct, of_buffered = (max(each) for each in zip(*rates, strict=True))
    is_direct = of_buffered < _CLEARLY * of_direct
    os.close(buffered if is_direct else past)
    return past if is_direct else buffered, Access(is_direct, of_direct, of_buffered), touched


def _open_buffered(path: Path) -> int:
    """Through the page cache, which is not to read on beyond a record: that would be the disk's time for nothing, or
    make the next records seem faster than the disk. Raises: ConfigError naming the file."""
    file = open_file(path)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    return file


def _room(num_bytes: int, slots: Tensor) -> tuple[Tensor, int]:
    """(where the readers read to, pieces of `num_bytes` in turns, how much of `slots` that is): memory of its own where
    they have not a piece for each. Its pages are there before reading is timed."""
    pieces = min(PROBE_BYTES, slots.numel()) // (_READERS * num_bytes)
    needed = _READERS * max(1, pieces) * num_bytes
    memory = slots[:needed] if pieces else huge_memory(needed)
    return memory.fill_(1), needed if pieces else 0


def _piece(layout: Layout) -> int:
    """Bytes that a probe reads at a time: a record, if none is larger than the limit."""
    return min(_PIECE, *(layer.record_bytes for layer in layout.experts))


def random_read_bytes_per_s(
    file: int, places: Callable[[], int], num_bytes: int, *, seconds: float, most: int, memory: Tensor | None = None
) -> float:
    """Bytes/s of reads of `num_bytes` from `places()`, by some readers at once, none of it from the page cache: for
    `seconds` or until `most` bytes are read. `memory`: where to, made by `_room` (default: some of its own)."""
    module, drops = native(), hasattr(os, "posix_fadvise") and not _is_direct(file)
    assert module is not None
    if memory is None:
        memory, _ = _room(num_bytes, huge_memory(PROBE_BYTES))
    room = memory.numel() // (_READERS * num_bytes)
    first, share, stop = memory.data_ptr(), most // _READERS, time.perf_counter() + seconds

    def read(reader: int) -> int:
        total, turn = 0, 0
        while total < share and time.perf_counter() < stop:
            offset, to = places(), first + (reader * room + turn % room) * num_bytes
            if drops:
                os.posix_fadvise(file, offset, num_bytes, os.POSIX_FADV_DONTNEED)
            total += module.read_plain(file, offset, num_bytes, to)[0]
            turn += 1
        return total

    with ThreadPoolExecutor(_READERS) as pool:
        start = time.perf_counter()
        total = sum(pool.map(read, range(_READERS)))
        return total / (time.perf_counter() - start)


def _is_direct(file: int) -> bool:
    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


def _rate(
    file: int, layout: Layout, memory: Tensor | None = None, *, seconds: float = _ROUND_S, most: int = _ROUND_BYTES
) -> float:
    """Bytes/s of pieces of records from random places, none of them from the page cache."""
    piece = _piece(layout)
    return random_read_bytes_per_s(file, _places(layout, piece), piece, seconds=seconds, most=most, memory=memory)


def _places(layout: Layout, piece: int) -> Callable[[], int]:
    """Where random pieces of random records begin.

    Other places at every call: a host that caches below this machine serves what it has seen faster than the rest.
    """
    layers, draw = layout.experts, random.Random()

    def place() -> int:
        layer = layers[draw.randrange(len(layers))]
        return (
            layer.record_offset(draw.randrange(layer.num_experts)) + draw.randrange(layer.record_bytes // piece) * piece
        )

    return place


def records_bytes_per_s(path: Path, layout: Layout, direct: bool, *, seconds: float = 0.5) -> float:
    """The disk's yardstick beside a streamed run: bytes/s of records from random places, as `Access` reads them.

    Takes PROBE_BYTES of memory meanwhile. Raises: ConfigError where the file cannot be read.
    """
    file = os.open(path, os.O_RDONLY | os.O_DIRECT) if direct else _open_buffered(path)
    try:
        return _rate(file, layout, seconds=seconds, most=_MOST_BYTES)
    finally:
        os.close(file)
