"""Safetensors bytes to and from tensors, one tensor at a time, without ever mapping a file into memory.

Pages of a mapped file count as resident memory of the process; plain reads into the destination do not.
"""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fewfire.errors import ConfigError, FormatError
from fewfire.headers import DTYPE_BYTES, INDEX_FILE, SINGLE_FILE, TensorHeader

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
FILE_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
SHARD_BYTES = 5_000_000_000  # what the hub's own tools write


class Shards:
    """Reads tensors that `headers` found. Threads: `read` and `read_into` may be called from several."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def read(self, header: TensorHeader) -> Tensor:
        """A new tensor with the values of `header`. Raises as `read_into`."""
        values = torch.empty(header.shape, dtype=TORCH_DTYPES[header.dtype])
        self.read_into(header, values)
        return values

    def read_into(self, header: TensorHeader, values: Tensor) -> None:
        """Fill `values` (contiguous, of the header's dtype and size) from the file.

        Raises: FormatError where the file ends early, ConfigError where it cannot be read.
        """
        assert values.is_contiguous() and values.dtype == TORCH_DTYPES[header.dtype]
        assert values.numel() * values.element_size() == header.num_bytes
        if not header.num_bytes:
            return
        _touch(values.data_ptr(), header.num_bytes)
        view = values.reshape(-1).view(torch.uint8).numpy().data
        done = 0
        try:
            handle = self._handle(header.path)
            while done < header.num_bytes:
                count = os.preadv(handle, [view[done : done + 2**30]], header.offset + done)
                if count == 0:
                    where = header.offset + done
                    raise FormatError(
                        "the file ends inside this tensor; download it again",
                        path=str(header.path),
                        record=header.name,
                        offset=where,
                    )
                done += count
        except OSError as error:
            raise ConfigError(f"{header.path} cannot be read ({error.strerror}); check the disk") from error

    def _handle(self, path: Path) -> int:
        with self._lock:
            if path not in self._handles:
                self._handles[path] = os.open(path, os.O_RDONLY)
            return self._handles[path]


_POPULATE_WRITE = 23  # Linux 5.14's madvise: make pages as if they had been written
_WORTH_IT_BYTES = 2**20


def _touch(address: int, num_bytes: int) -> None:
    """Have the kernel make the pages of fresh memory in one call: a fault for every 4 KiB costs more than the reading
    (4 GB: 2.6 s of processor time become 1.8 s). A hint: where it is not understood, nothing happens."""
    if num_bytes < _WORTH_IT_BYTES or sys.platform != "linux":
        return
    start = address - address % mmap.PAGESIZE
    _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + num_bytes - start), _POPULATE_WRITE)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class Outgoing(NamedTuple):
    """A tensor to be written: `values` makes it (any strides) when its turn comes, so that one is held at a time."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * DTYPE_BYTES[FILE_DTYPES[self.dtype]]


def write_shards(folder: Path, tensors: Sequence[Outgoing], shard_bytes: int = SHARD_BYTES) -> None:
    """`tensors` as model.safetensors in `folder`, or as shards of at most about `shard_bytes` with their index.

    Raises: OSError as the system gives it; the caller makes the whole folder atomic.
    """
    shards: list[list[Outgoing]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    if len(shards) == 1:
        write_safetensors(folder / SINGLE_FILE, shards[0])
        return
    placed = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard)
        placed.update({tensor.name: name for tensor in shard})
    total = sum(tensor.num_bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: Iterable[Outgoing], metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file."""
    with open(path, "wb") as file:
        write_safetensors_into(file, tensors, metadata)


def write_safetensors_into(
    file: BinaryIO, tensors: Iterable[Outgoing], metadata: Mapping[str, str] | None = None
) -> None:
    """`write_safetensors` into an open file that is empty."""
    head, ordered = safetensors_layout(tensors, metadata or {"format": "pt"})
    file.write(head)
    for tensor in ordered:
        values = tensor.values().to(tensor.dtype).contiguous()
        assert tuple(values.shape) == tuple(tensor.shape), tensor.name
        if values.numel():
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)


def safetensors_layout(tensors: Iterable[Outgoing], metadata: Mapping[str, str]) -> tuple[bytes, list[Outgoing]]:
    """The bytes before the first tensor, and the tensors in the order in which they follow without gaps.

    Larger alignments come first, as with the format's own writer, so that all are aligned.
    """
    ordered = sorted(tensors, key=lambda tensor: (-DTYPE_BYTES[FILE_DTYPES[tensor.dtype]], tensor.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in ordered:
        offsets = [end, end + tensor.num_bytes]
        header[tensor.name] = {
            "dtype": FILE_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, ordered
