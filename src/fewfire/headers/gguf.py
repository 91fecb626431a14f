"""Headers of GGUF files: metadata, tensor names, shapes, block types, places. Hostile bytes give FormatError only.

Owns the table of ggml's block types. Source: the format's specification in the ggml repository, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fewfire.errors import ConfigError, FormatError
from fewfire.files import open_regular

# ggml type id -> (name, elements a block, bytes a block)
GGML_BLOCKS: dict[int, tuple[str, int, int]] = {
    0: ("f32", 1, 4),
    1: ("f16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    24: ("i8", 1, 1),
    25: ("i16", 1, 2),
    26: ("i32", 1, 4),
    27: ("i64", 1, 8),
    28: ("f64", 1, 8),
    29: ("iq1_m", 256, 56),
    30: ("bf16", 1, 2),
    34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17),
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONG_ARRAY = 4096  # items; longer ones (vocabularies) are kept only when asked for
_MAX_DIMS = 4


class GgufTensor(NamedTuple):
    """One tensor: `shape` outermost first (GGUF stores it reversed), `offset` from the start of the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself. Arrays of more than 4096 items are left out unless they were asked for."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the family, such as `qwen3moe`."""
        return str(self.metadata.get("general.architecture", ""))


class _Cursor:
    """Reads little-endian values and refuses to leave the file."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at = data, path, 0

    def fail(self, message: str, record: str | None = None) -> FormatError:
        return FormatError(f"{message}; download it again", path=str(self.path), record=record, offset=self.at)

    def take(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        if self.at + size > len(self.data):
            raise self.fail("ends inside its header")
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return value

    def string(self) -> str:
        length = self.take("Q")
        if length > len(self.data) - self.at:
            raise self.fail(f"a string of {length} bytes leaves the file")
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", errors="replace")

    def skip_strings(self, count: int) -> None:
        """Step over `count` strings without keeping them."""
        for _ in range(count):
            length = self.take("Q")
            if length > len(self.data) - self.at:
                raise self.fail(f"a string of {length} bytes leaves the file")
            self.at += length

    def count(self, what: str, least_bytes: int) -> int:
        """A count whose items need at least `least_bytes` each: more than fit the rest of the file are refused."""
        number: int = self.take("Q")
        if number * least_bytes > len(self.data) - self.at:
            raise self.fail(f"promises {number} {what}, more than the file holds")
        return number


def read_gguf(path: str | Path, *, long_arrays: bool = False) -> GgufHeader:
    """The header of one GGUF file, checked against its size. `long_arrays` keeps vocabularies and merges too.

    Raises: ConfigError where the file cannot be read, FormatError naming record and offset where it is malformed.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size < 24:
                raise FormatError("is too short for a GGUF file; download it again", path=str(path), offset=0)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(_Cursor(data, path), long_arrays)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check the path") from error


def _read(cursor: _Cursor, long_arrays: bool) -> GgufHeader:
    if cursor.data[:4] != b"GGUF":
        raise cursor.fail("does not begin with GGUF; it is another kind of file")
    cursor.at = 4
    version = cursor.take("I")
    if version not in (2, 3):
        raise cursor.fail(f"has version {version}, expected 2 or 3")
    num_tensors = cursor.count("tensors", 24)
    num_keys = cursor.count("metadata keys", 13)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in metadata:
            raise cursor.fail("a key appears twice", key)
        value = _value(cursor, cursor.take("I"), key, long_arrays)
        metadata[key] = value
    entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
    tensors = _place(cursor, entries, metadata)
    return GgufHeader(cursor.path, version, {k: v for k, v in metadata.items() if v is not None}, tensors)


def _value(cursor: _Cursor, kind: int, key: str, long_arrays: bool) -> Any:
    if kind in _SCALARS:
        return cursor.take(_SCALARS[kind])
    if kind == _STRING:
        return cursor.string()
    if kind != _ARRAY:
        raise cursor.fail(f"has the unknown value type {kind}", key)
    inner = cursor.take("I")
    if inner == _STRING:
        count = cursor.count("strings", 8)
        if count > _LONG_ARRAY and not long_arrays:
            cursor.skip_strings(count)
            return None
        return [cursor.string() for _ in range(count)]
    if inner not in _SCALARS:
        raise cursor.fail(f"is an array of the unknown type {inner}", key)
    code = _SCALARS[inner]
    size = struct.calcsize("<" + code)
    count = cursor.count("items", size)
    start = cursor.at
    cursor.at += count * size
    if count > _LONG_ARRAY and not long_arrays:
        return None
    return list(struct.unpack_from(f"<{count}{code}", cursor.data, start))


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape outermost first, type, offset in the data section)."""
    name = cursor.string()
    num_dims = cursor.take("I")
    if not 0 < num_dims <= _MAX_DIMS:
        raise cursor.fail(f"has {num_dims} dimensions, expected 1 to {_MAX_DIMS}", name)
    shape = tuple(cursor.take("Q") for _ in range(num_dims))
    kind, offset = cursor.take("I"), cursor.take("Q")
    if kind not in GGML_BLOCKS:
        raise cursor.fail(f"has the unknown block type {kind}", name)
    if math.prod(shape) >= 2**62:
        raise cursor.fail(f"has the shape {shape}, larger than any file", name)
    return name, shape[::-1], kind, offset


def _place(
    cursor: _Cursor, entries: list[tuple[str, tuple[int, ...], int, int]], metadata: dict[str, Any]
) -> dict[str, GgufTensor]:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        raise cursor.fail(f"is {alignment!r}, expected a power of two", "general.alignment")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in entries:
        type_name, block, block_bytes = GGML_BLOCKS[kind]
        if shape[-1] % block:
            raise cursor.fail(f"has rows of {shape[-1]}, no multiple of {type_name}'s {block}", name)
        size = math.prod(shape) // block * block_bytes
        if offset % alignment or start + offset + size > len(cursor.data):
            raise cursor.fail(f"its {size} bytes at {offset} leave the file or its alignment", name)
        if name in tensors:
            raise cursor.fail("is described twice", name)
        tensors[name] = GgufTensor(name, type_name, shape, cursor.path, start + offset, size)
    end = start
    for tensor in sorted(tensors.values(), key=lambda each: each.offset):
        if tensor.offset < end and tensor.num_bytes:
            raise cursor.fail("shares bytes with another tensor", tensor.name)
        end = tensor.offset + tensor.num_bytes
    return tensors
