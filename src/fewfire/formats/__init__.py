"""Weight formats: encode, decode, exact sizes. The plain definition of every bit that packs hold (docs/formats.md).

A matrix (N rows, K columns) becomes two runs of bytes: `codes`, and `scales` (empty where codes hold all). Knows no
file and no model; sizes come from `plan.memory`, so that what is planned is what is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fewfire.config import check
from fewfire.errors import FormatError
from fewfire.formats import ggml, ggml_tiles, tiles
from fewfire.formats.tiles import Encoded
from fewfire.plan.memory import FORMATS, NATIVE_BLOCKS, PLAN_ONLY, matrix_bytes

__all__ = ["GGML_FORMATS", "PACK_FORMATS", "Encoded", "Sizes", "decode", "decode_rows", "encode", "sizes", "transcode"]

PACK_FORMATS = tuple(name for name in FORMATS if name not in PLAN_ONLY)
_PLAIN = {"f32": torch.float32, "bf16": torch.bfloat16}
_TILED: dict[str, tuple[Callable[[Tensor], Encoded], Callable[[Encoded, tuple[int, int]], Tensor]]] = {
    "q8": (tiles.encode_q8, tiles.decode_q8),
    "q4": (tiles.encode_q4, tiles.decode_q4),
    "mxfp4": (tiles.encode_mxfp4, tiles.decode_mxfp4),
}
GGML_FORMATS = ggml.NAMES
_CODE_BYTES = tiles.CODE_BYTES | ggml_tiles.CODE_BYTES  # of a block
_CHUNK_VALUES = 1 << 18  # values encoded at a time: what the processor's cache holds
_NO_BYTES = torch.empty(0, dtype=torch.uint8)


class Sizes(NamedTuple):
    """Bytes of one encoded matrix."""

    codes: int
    scales: int

    @property
    def total(self) -> int:
        return self.codes + self.scales


def sizes(name: str, shape: tuple[int, ...]) -> Sizes:
    """Bytes of codes and scales of a matrix (N, K), or a vector (K,), in format `name`."""
    total = matrix_bytes(name, shape)
    if name not in _CODE_BYTES:
        return Sizes(total, 0)
    codes = total // FORMATS[name].num_bytes * _CODE_BYTES[name]
    return Sizes(codes, total - codes)


def encode(values: Tensor, name: str, *, record: str | None = None) -> Encoded:
    """Codes and scales (uint8) of a floating matrix (N, K) or vector (K,) in format `name`; `record` is for errors.

    Scales are chosen by search for the least squared error. Deterministic, whatever the number of threads.
    Raises: FormatError for NaN or infinity, ConfigError for a format of which no pack is made.
    """
    check_format(name)
    rows = values.detach().reshape(-1, values.shape[-1]) if values.dim() else values.detach().reshape(1, 1)
    _check_numbers(rows, 1, record)
    if name in _PLAIN:
        return Encoded(rows.to(_PLAIN[name]).contiguous().reshape(-1).view(torch.uint8), _NO_BYTES)
    one = _TILED[name][0] if name in _TILED else lambda part: ggml_tiles.to_tiles(ggml.encode(part, name), name)
    return _in_chunks(lambda part: one(part.float()), rows, rows.shape[1])


def transcode(rows: Tensor, name: str, *, record: str | None = None) -> Encoded:
    """What packs hold of rows (uint8 (N, bytes)) of whole ggml blocks of format `name`: the same bits, or, of ggml's
    mxfp4, the same values. `record` is for errors.

    Raises: FormatError for blocks whose values are no numbers.
    """
    block = NATIVE_BLOCKS[name]
    columns = rows.shape[1] // block.num_bytes * block.columns
    made = _in_chunks(lambda part: ggml_tiles.to_tiles(part, name), rows, columns)
    if name == "mxfp4":  # a large exponent overflows with a large code only
        _check_numbers(decode(made, name, (rows.shape[0], columns)), 1, record)
    else:
        for numbers in ggml.scales(rows, name):
            _check_numbers(numbers, ggml.FORMS[name].run, record)
    return made


def _check_numbers(values: Tensor | None, columns: int, record: str | None) -> None:
    """Raise FormatError for the first of `values` (N, n) that is none; each belongs to as many `columns`."""
    finite = None if values is None else torch.isfinite(values)
    if values is None or finite is None or bool(finite.all()):
        return
    row = int((~finite.all(dim=1)).nonzero()[0])
    at = int((~finite[row]).nonzero()[0])
    raise FormatError(
        f"holds {float(values[row, at])} in row {row}, column {at * columns}; a weight must be a number: "
        "repair the checkpoint",
        record=record,
    )


def _in_chunks(one: Callable[[Tensor], Encoded], rows: Tensor, columns: int) -> Encoded:
    """`one` of a few blocks of 16 rows at a time, so that its scratch stays in the processor's cache."""
    step = max(1, _CHUNK_VALUES // max(columns, 1) // tiles.ROWS) * tiles.ROWS
    parts = [one(part) for part in rows.split(step)]
    return Encoded(torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]))


def decode(encoded: Encoded, name: str, shape: tuple[int, ...]) -> Tensor:
    """The float32 values, of `shape` (N, K) or (K,), that `encoded` stands for. Exact.

    Raises: FormatError where the bytes are not as many as `sizes` says.
    """
    check_format(name)
    expected = sizes(name, shape)
    if (encoded.codes.numel(), encoded.scales.numel()) != expected:
        raise FormatError(
            f"has {encoded.codes.numel()} bytes of codes and {encoded.scales.numel()} of scales, expected "
            f"{expected.codes} and {expected.scales} for {name} of shape {list(shape)}"
        )
    matrix = (shape[-2] if len(shape) > 1 else 1, shape[-1])
    if name in _PLAIN:
        values = encoded.codes.clone().view(_PLAIN[name]).float()
    elif name in _TILED:
        values = _TILED[name][1](encoded, matrix)
    else:
        values = ggml.decode(ggml_tiles.from_tiles(encoded, name, matrix), name)[:, : matrix[1]]
    return values.reshape(shape)


def decode_rows(encoded: Encoded, name: str, shape: tuple[int, int], first: int, last: int) -> Tensor:
    """Rows `first` to `last` of a matrix, float32: `first` a multiple of 16, `last` one or the end."""
    assert first % tiles.ROWS == 0 and (last % tiles.ROWS == 0 or last == shape[0])
    head, part = sizes(name, (first, shape[1])), sizes(name, (last - first, shape[1]))
    cut = Encoded(
        encoded.codes[head.codes : head.codes + part.codes], encoded.scales[head.scales : head.scales + part.scales]
    )
    return decode(cut, name, (last - first, shape[1]))


def check_format(name: str) -> None:
    """Raise ConfigError unless packs can hold format `name`."""
    check(name in PACK_FORMATS, f"format {name!r} is none that packs hold; choose one of {', '.join(PACK_FORMATS)}")
