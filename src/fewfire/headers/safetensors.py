"""Headers of safetensors files and the index of a folder of them.

A header is believed only after it was checked against the size of its file.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fewfire.errors import ConfigError, FormatError
from fewfire.files import open_regular, read_regular

# Bytes of one value of each safetensors dtype. Types of less than a byte are in no checkpoint that fewfire reads.
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
_MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


class TensorHeader(NamedTuple):
    """One tensor of a file: `dtype` as the file spells it, `offset` counted from the start of the file at `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    num_bytes: int


def read_safetensors(path: str | Path) -> dict[str, TensorHeader]:
    """Every tensor of one safetensors file, in the order of their bytes.

    Raises: ConfigError where the file cannot be read, FormatError where header and file do not agree: a length that
    leaves the file, unknown dtypes, shapes that do not fit their bytes, bytes that overlap or belong to no tensor.
    Source: the format's description in the safetensors repository.
    """
    path = Path(path)
    entries, start, file_bytes = _read_header(path)
    entries.pop("__metadata__", None)
    tensors = [_tensor(path, name, entry, start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.num_bytes))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            problem = "shares bytes with another tensor" if tensor.offset < end else "leaves a gap before it"
            raise FormatError(f"{problem}; download it again", path=str(path), record=tensor.name, offset=tensor.offset)
        end += tensor.num_bytes
    if end != file_bytes:
        raise FormatError(
            f"is {file_bytes} bytes long, its header describes {end}; download it again", path=str(path), offset=end
        )
    return {tensor.name: tensor for tensor in tensors}


def read_metadata(path: str | Path) -> dict[str, str]:
    """What a safetensors file says of itself as a whole; empty where it says nothing. The tensors are not looked at.

    Raises: ConfigError where the file cannot be read, FormatError where its header is damaged.
    """
    path = Path(path)
    found = _read_header(path)[0].get("__metadata__", {})
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise FormatError("expected texts by name; download it again", path=str(path), record="__metadata__")
    return found


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header's object, where the tensors' bytes begin, and the size of the file."""
    try:
        with open_regular(path) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            header_bytes = _header_length(path, file.read(8), file_bytes)
            text = file.read(header_bytes)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check the path") from error
    if len(text) < header_bytes:
        raise FormatError("ends inside its header; download it again", path=str(path), offset=8 + len(text))
    return _parse_object(path, text, offset=8), 8 + header_bytes, file_bytes


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a hub-layout folder, by its index where there is one.

    Raises: ConfigError where there are none, FormatError for a broken index or a file that it lists and that is absent.
    """
    folder = Path(folder)
    index = folder / INDEX_FILE
    if index.is_file():
        return [folder / name for name in _present_files(index)]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others
    if others:
        raise ConfigError(f"{folder} holds {len(others)} safetensors files and no {INDEX_FILE}; add the index")
    found = "only PyTorch .bin files" if any(folder.glob("*.bin")) else "no weights"
    raise ConfigError(f"{folder} holds {found}; fewfire reads {SINGLE_FILE}, or shards with their {INDEX_FILE}")


def read_checkpoint(folder: str | Path) -> dict[str, TensorHeader]:
    """Every tensor of a hub-layout folder, all shards together. Raises as `checkpoint_files` and `read_safetensors`;
    FormatError also for a tensor in two shards, or one that the index places where it is not."""
    folder = Path(folder)
    tensors: dict[str, TensorHeader] = {}
    for path in checkpoint_files(folder):
        for name, tensor in read_safetensors(path).items():
            if name in tensors:
                raise FormatError(
                    f"is also in {tensors[name].path.name}; keep one of the two", path=str(path), record=name
                )
            tensors[name] = tensor
    index = folder / INDEX_FILE
    if index.is_file():
        _check_index(index, tensors)
    return tensors


def _header_length(path: Path, prefix: bytes, file_bytes: int) -> int:
    if len(prefix) < 8:
        raise FormatError(
            f"is {file_bytes} bytes long, too short for a safetensors file; download it again",
            path=str(path),
            offset=0,
        )
    (length,) = struct.unpack("<Q", prefix)
    if length > min(_MAX_HEADER_BYTES, file_bytes - 8):
        raise FormatError(
            f"promises a header of {length} bytes in a file of {file_bytes}; it is cut off or no safetensors file",
            path=str(path),
            offset=0,
        )
    return length


def _parse_object(path: Path, text: bytes, *, offset: int = 0) -> dict[str, Any]:
    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise FormatError("is described twice; download it again", path=str(path), record=key)
            found[key] = value
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, numbers of thousands of digits, deep nesting
        where = offset + error.pos if isinstance(error, json.JSONDecodeError) else offset
        raise FormatError("the header is no JSON; download it again", path=str(path), offset=where) from error
    if not isinstance(value, dict):
        raise FormatError(f"the header is a {type(value).__name__}, expected an object", path=str(path), offset=offset)
    return value


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorHeader:
    """A header entry, checked in itself: types, dtype, and that the shape fits the bytes."""

    def wrong(message: str) -> FormatError:
        return FormatError(f"{message}; download it again", path=str(path), record=name)

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise wrong("has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise wrong(f"has dtype {dtype!r}, expected one of {', '.join(DTYPE_BYTES)}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise wrong(f"has shape {shape!r} and data_offsets {offsets!r}, expected whole numbers")
    num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != num_bytes:
        raise wrong(f"is {dtype} {shape}, {num_bytes} bytes, but takes the bytes from {offsets[0]} to {offsets[1]}")
    return TensorHeader(name, dtype, tuple(shape), path, start + offsets[0], num_bytes)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _index_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name of an index file."""
    try:
        text = read_regular(index)
    except OSError as error:
        raise ConfigError(f"{index} cannot be read ({error.strerror}); check the path") from error
    placed = _parse_object(index, text).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise FormatError("has no weight_map from tensors to files; download it again", path=str(index))
    return placed


def index_files(index: str | Path) -> list[str]:
    """The files that an index file lists, whether they are there or not. Raises FormatError for a broken index."""
    names = sorted(set(_index_map(Path(index)).values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise FormatError(f"lists {name!r}, which is no plain file name", path=str(index))
    return names


def _present_files(index: Path) -> list[str]:
    names = index_files(index)
    for name in names:
        if not (index.parent / name).is_file():
            raise FormatError(f"lists {name}, which is not there; download it", path=str(index), record=name)
    return names


def _check_index(index: Path, tensors: dict[str, TensorHeader]) -> None:
    for name, file in _index_map(index).items():
        if name not in tensors:
            raise FormatError(f"is placed in {file}, which does not hold it", path=str(index), record=name)
        if tensors[name].path.name != file:
            message = f"is placed in {file}, but lies in {tensors[name].path.name}"
            raise FormatError(message, path=str(index), record=name)
