"""A pack's bytes in memory, as they are stored: read in large pieces by several threads, checked while they are hot.

Owns where weights lie: one region for the trunk, one for the experts, in huge pages where the system gives them.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fewfire.checkpoints.pack import DAMAGED, EXPERTS, PLAIN_DTYPES, TRUNK, Pack, stored_parts
from fewfire.checkpoints.pack_layout import Placed
from fewfire.errors import ConfigError, FormatError
from fewfire.formats import Encoded, decode, tiles
from fewfire.kernels import crc32c, read_checked
from fewfire.kernels.isa import extension
from fewfire.kernels.linear import NATIVE_FORMATS

EMBEDDING = "embed.weight"
ALIGNMENT = 64  # of every tensor: a cache line, and the widest vector
_READERS = 4
_PIECE_BYTES = 16 * 2**20  # of experts.bin at a time
_NORESERVE = 0x4000 if sys.platform == "linux" else 0
Report = Callable[[int], None]  # bytes that are there now, besides those before


class Piece(NamedTuple):
    """A run of a file and where it goes. `checksum` is that of all of it; `record` names it in errors."""

    offset: int
    values: Tensor
    checksum: int
    record: str


def _untouched_pages(num_bytes: int) -> mmap.mmap:
    """Memory of its own, page-aligned, without cost until written. Raises: OSError where no addresses are left."""
    # Private: pages of shared memory, mmap's default, are small. Not reserved: what is not touched is not promised.
    return mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)


def huge_pages(num_bytes: int) -> mmap.mmap:
    """The same, in huge pages where the system has them."""
    memory = _untouched_pages(num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def huge_memory(num_bytes: int) -> Tensor:
    """The same as uint8."""
    return torch.frombuffer(huge_pages(num_bytes), dtype=torch.uint8)[:num_bytes]


def untouched_floats(*shape: int) -> Tensor:
    """float32 that takes memory only where it is written, in small pages. Raises as above."""
    return torch.frombuffer(_untouched_pages(4 * prod(shape)), dtype=torch.float32)[: prod(shape)].view(shape)


def open_file(path: Path) -> int:
    """A descriptor for reading. Raises: ConfigError naming the file."""
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); complete the pack") from error


def read_pieces(path: Path, pieces: Iterable[Piece], report: Report = lambda num_bytes: None) -> None:
    """Fill all pieces from the file `path`. `report` hears the bytes of each when it is there.

    Raises: FormatError naming file, record and byte where the file ends early or a checksum differs; ConfigError where
    it cannot be read.
    """
    file = open_file(path)
    try:
        with ThreadPoolExecutor(_READERS) as pool:
            for num_bytes in pool.map(lambda piece: _read_piece(file, path, piece), pieces):
                report(num_bytes)
    finally:
        os.close(file)


def _read_piece(file: int, path: Path, piece: Piece) -> int:
    try:
        done, checksum = read_checked(file, piece.offset, piece.values)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check the disk") from error
    where = piece.offset + done
    if done < piece.values.numel():
        raise FormatError(
            "the file ends here; copy or make the pack again", path=str(path), record=piece.record, offset=where
        )
    if checksum != piece.checksum:
        raise FormatError(DAMAGED, path=str(path), record=piece.record, offset=piece.offset)
    return done


class Trunk:
    """All that is not a routed expert, as stored. Raises as `read_pieces`."""

    def __init__(self, pack: Pack, report: Report = lambda num_bytes: None):
        self.placed: dict[str, Placed] = {each.name: each for each in pack.layout.trunk}
        sizes = {name: header.num_bytes for name, header in pack.trunk_headers.items()}
        offsets, end = {}, 0
        for name in sorted(sizes, key=lambda name: pack.trunk_headers[name].offset):
            offsets[name], end = end, end + -(-sizes[name] // ALIGNMENT) * ALIGNMENT
        self._pages = huge_pages(end)
        self.memory = torch.frombuffer(self._pages, dtype=torch.uint8)[:end]
        self.on_disk: RowFile | None = None
        self._stored = {name: self.memory[start : start + sizes[name]] for name, start in offsets.items()}
        self._offsets, self._headers, self.path = offsets, pack.trunk_headers, pack.folder / TRUNK
        pieces = [
            Piece(self._headers[name].offset, values, pack.trunk_checksum(name), name)
            for name, values in self._stored.items()
        ]
        read_pieces(self.path, pieces, report)

    def __contains__(self, name: str) -> bool:
        return name in self.placed

    @property
    def in_memory(self) -> Tensor:
        """Stored bytes that are in memory, as many as lie together."""
        if self.on_disk is None:
            return self.memory
        return max(self.memory[: self.on_disk.start], self.memory[self.on_disk.stop :], key=len)

    def leave_on_disk(self, name: str) -> int:
        """Rows of a matrix are read from the file from now on (`on_disk`); returns how many bytes of memory that frees.

        One matrix at most. Its bytes have been compared with their checksum, and each block is again when it is read.
        """
        parts = [part for part, _, _ in stored_parts(self.placed[name])]
        if self.on_disk is not None or not hasattr(mmap, "MADV_DONTNEED"):
            return 0
        start = min(self._offsets[part] for part in parts)
        stop = max(self._offsets[part] + self._stored[part].numel() for part in parts)
        inner = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        lies_together = stop - start < sum(self._stored[part].numel() + ALIGNMENT for part in parts)
        if not lies_together or inner[0] >= inner[1]:
            return 0
        self.on_disk = RowFile(
            self.path, self.placed[name], self.encoded(name), [self._headers[part].offset for part in parts], inner
        )
        self._pages.madvise(mmap.MADV_DONTNEED, inner[0], inner[1] - inner[0])
        return inner[1] - inner[0]

    def encoded(self, name: str) -> Encoded:
        """A parameter as it is stored; no copy."""
        parts = [self._stored[part] for part, _, _ in stored_parts(self.placed[name])]
        return Encoded(parts[0], parts[1] if len(parts) > 1 else torch.empty(0, dtype=torch.uint8))

    def values(self, name: str) -> Tensor:
        """A parameter as float32."""
        placed = self.placed[name]
        return decode(self.encoded(name), placed.format, placed.shape)

    def matrix(self, name: str) -> tuple[int, int, int, int, int]:
        """(format, address of codes, of scales, rows, columns) for the engine; a vector is one row."""
        placed, encoded = self.placed[name], self.encoded(name)
        rows = placed.shape[0] if len(placed.shape) > 1 else 1
        scales = encoded.scales.data_ptr() if encoded.scales.numel() else 0
        return NATIVE_FORMATS[placed.format], encoded.codes.data_ptr(), scales, rows, placed.shape[-1]


class RowFile:
    """A matrix of the trunk that stays in its file. `start`, `stop`: the bytes of the trunk's memory that it frees.

    `spec` is what the engine is given: file, places and checksums of blocks of 16 rows (plain formats: of rows).
    """

    def __init__(self, path: Path, placed: Placed, encoded: Encoded, offsets: Sequence[int], freed: tuple[int, int]):
        self.start, self.stop = freed
        block_rows = 1 if placed.format in PLAIN_DTYPES else tiles.ROWS
        blocks = -(-placed.shape[0] // block_rows)
        sizes = [stored.numel() // blocks for stored in encoded]
        sums = [
            [crc32c(stored[at * size : (at + 1) * size]) for stored, size in zip(encoded, sizes)]
            for at in range(blocks)
        ]
        self._checksums = torch.tensor(sums).to(torch.uint32)
        self._file = open_file(path)
        self.spec = {
            "file": self._file,
            "codes": offsets[0],
            "code_bytes": sizes[0],
            "scales": offsets[-1],  # of plain formats none are read
            "scale_bytes": sizes[1],
            "block_rows": block_rows,
            "checksums": self._checksums.data_ptr(),
        }

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)


def read_experts(pack: Pack, report: Report = lambda num_bytes: None) -> Tensor:
    """experts.bin in memory, byte for byte; nothing is compared with a checksum yet. Raises as `read_pieces`."""
    memory, path = huge_memory(pack.layout.expert_bytes), pack.folder / EXPERTS
    if not memory.numel():
        return memory
    file = open_file(path)
    try:
        with ThreadPoolExecutor(_READERS) as pool:
            starts = range(0, memory.numel(), _PIECE_BYTES)
            for num_bytes in pool.map(lambda start: _read_run(file, path, memory, start), starts):
                report(num_bytes)
    finally:
        os.close(file)
    return memory


def _read_run(file: int, path: Path, memory: Tensor, start: int) -> int:
    module = extension()
    assert module is not None
    wanted = min(_PIECE_BYTES, memory.numel() - start)
    done, error = module.read_plain(file, start, wanted, memory.data_ptr() + start)
    if error:
        raise FormatError(f"cannot be read ({os.strerror(error)}); check the disk", path=str(path), offset=start + done)
    if done < wanted:
        raise FormatError("the file ends here; copy or make the pack again", path=str(path), offset=start + done)
    return done
