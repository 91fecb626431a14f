"""ggml's blocks in tiles of 16 rows, as kernels read them: the same bits in another order (docs/formats.md).

A tile holds 128 columns of codes; a piece of scales belongs to 128 columns, or to the 256 of a K format. B blocks of 16
rows, G groups of 128 columns, q the 32 quads of a group (words of four columns), S pieces, r the row of a block.
Padding is blocks of zero bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fewfire.formats import ggml
from fewfire.formats.ggml import Blocks
from fewfire.formats.tiles import GROUP, ROWS, Encoded
from fewfire.plan.memory import NATIVE_BLOCKS


class Field(NamedTuple):
    """`numbers` of `width` bytes from byte `start` of a block's scales on. A piece has field after field; of each,
    number after number; of each, row after row."""

    start: int
    numbers: int
    width: int


FIELDS: dict[str, tuple[Field, ...]] = {
    "q4_0": (Field(0, 1, 2),),
    "q4_1": (Field(0, 1, 2), Field(2, 1, 2)),
    "q8_0": (Field(0, 1, 2),),
    "q4_k": (Field(0, 1, 2), Field(2, 1, 2), Field(4, 3, 4)),
    "q6_k": (Field(16, 1, 2), Field(0, 16, 1)),
    "mxfp4": (Field(0, 1, 1),),
}
CODE_BYTES = {"q4_0": 1024, "q4_1": 1024, "q8_0": 2048, "q4_k": 2 * 1024, "q6_k": 2 * 1536}  # for a piece of scales

_QUADS = GROUP // 4


def _piece_columns(name: str) -> int:
    return max(GROUP, NATIVE_BLOCKS[name].columns)


def to_tiles(rows: Tensor, name: str) -> Encoded:
    """Rows (uint8 (N, bytes)) of whole blocks as a pack holds them; mxfp4 becomes fewfire's own."""
    block = NATIVE_BLOCKS[name]
    blocks = _pad(rows.reshape(rows.shape[0], -1, block.num_bytes), name)
    codes, scales = ggml.split(blocks.flatten(1), name)
    quads_BGqr = codes.reshape(-1, ROWS, codes.shape[1] // _QUADS, _QUADS).permute(0, 2, 3, 1)
    packed = _pack(quads_BGqr, name).contiguous().view(torch.uint8)
    return Encoded(packed.reshape(-1), tile_scales(scales, name))


def tile_scales(scales: Tensor, name: str) -> Tensor:
    """A pack's scales of what `ggml.split` gives as scales (N, blocks, bytes); padding is zeros."""
    padded, together = _pad(scales, name), _piece_columns(name) // NATIVE_BLOCKS[name].columns
    pieces = padded.reshape(-1, ROWS, padded.shape[1] // together, together, padded.shape[2])
    return torch.cat([_place(pieces, field) for field in FIELDS[name]], dim=-1).reshape(-1)


def _pad(blocks: Tensor, name: str) -> Tensor:
    """(N, blocks, bytes) with zeros up to whole tiles and pieces."""
    together = _piece_columns(name) // NATIVE_BLOCKS[name].columns
    return F.pad(blocks, (0, 0, 0, -blocks.shape[1] % together, 0, -blocks.shape[0] % ROWS))


def from_tiles(encoded: Encoded, name: str, shape: tuple[int, int]) -> Tensor:
    """The rows (uint8 (N, bytes)) of a matrix of `shape` (N, K): what `to_tiles` was given."""
    block = NATIVE_BLOCKS[name]
    height, pieces = -(-shape[0] // ROWS), -(-shape[1] // _piece_columns(name))
    together = _piece_columns(name) // block.columns
    groups = pieces * _piece_columns(name) // GROUP
    quads_BGqr = _unpack(encoded.codes.clone().view(torch.int32).reshape(height, groups, -1, ROWS), name)
    stored = encoded.scales.reshape(height, pieces, -1)
    scales = torch.empty((height, ROWS, pieces, together, _scale_bytes(name)), dtype=torch.uint8)
    at = 0
    for field in FIELDS[name]:
        size = together * field.numbers * ROWS * field.width
        part = stored[..., at : at + size].unflatten(-1, (together, field.numbers, ROWS, field.width))
        target = scales[..., field.start : field.start + field.numbers * field.width]
        target.copy_(part.permute(0, 4, 1, 2, 3, 5).flatten(-2))
        at += size
    codes = quads_BGqr.permute(0, 3, 1, 2).reshape(height * ROWS, -1)
    rows = ggml.join(Blocks(codes, scales.reshape(height * ROWS, -1, scales.shape[-1])), name)
    return rows[: shape[0], : ggml.row_bytes(name, shape[1])]


def _scale_bytes(name: str) -> int:
    return sum(field.numbers * field.width for field in FIELDS[name])


def _place(pieces: Tensor, field: Field) -> Tensor:
    """(B, r, S, blocks, bytes) -> (B, S, blocks * numbers * r * width) of one field."""
    part = pieces[..., field.start : field.start + field.numbers * field.width]
    return part.unflatten(-1, (field.numbers, field.width)).permute(0, 2, 3, 4, 1, 5).flatten(2)


def _pack(quads_BGqr: Tensor, name: str) -> Tensor:
    """(B, G, lines, r): a line of nibbles holds two quads, one of q6_k's high bits four."""
    if name == "q8_0":
        return quads_BGqr
    if name != "q6_k":
        return _fold(quads_BGqr, 2)
    high = quads_BGqr >> 4 & ggml.PAIRS
    return torch.cat((_fold(quads_BGqr & ggml.NIBBLES, 2), _fold(high, 4)), dim=2)


def _unpack(lines: Tensor, name: str) -> Tensor:
    if name == "q8_0":
        return lines
    if name != "q6_k":
        return _unfold(lines, 2, ggml.NIBBLES)
    low, high = lines.split((_QUADS // 2, _QUADS // 4), dim=2)
    return _unfold(low, 2, ggml.NIBBLES) | _unfold(high, 4, ggml.PAIRS) << 4


def _fold(quads_BGqr: Tensor, count: int) -> Tensor:
    """`count` neighbouring quads in a word, the first in its bytes' lowest bits."""
    apart = quads_BGqr.unflatten(2, (-1, count)).unbind(3)
    folded = apart[0]
    for index, each in enumerate(apart[1:], start=1):
        folded = folded | each << 8 // count * index
    return folded


def _unfold(lines: Tensor, count: int, mask: int) -> Tensor:
    return torch.stack([lines >> 8 // count * index & mask for index in range(count)], dim=3).flatten(2, 3)
