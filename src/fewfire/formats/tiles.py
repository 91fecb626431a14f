"""fewfire's own formats: q8, q4, mxfp4, in tiles of 16 rows x 128 columns, as the kernels read them.

The order of bytes within a tile is what a vector of 64 bytes wants: 16 rows of 4 neighbouring columns each. B row
blocks, G groups of 128 columns, r = 16 rows of a block. Every value is a small integer times one float32 a group
(mxfp4: a quarter group) and row: so sums over a group are exact in int32. Byte by byte: docs/formats.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS, GROUP = 16, 128
SUB = 16  # columns of q4 that share a sub-scale
MX_GROUP = 32  # columns of mxfp4 that share an exponent
CODE_BYTES = {"q8": ROWS * GROUP, "q4": ROWS * GROUP // 2, "mxfp4": ROWS * GROUP // 2}
Q8_LIMIT, Q8_OFFSET = 127, 128
# q4's sixteen values suit weights between a normal and a Laplace distribution. Times a sub-scale of up to 7 they fit a
# signed byte. Found by search over spacings; with equal steps there is 0 to 6 % more error (docs/formats.md).
Q4_BOOK = (-18, -15, -12, -10, -8, -6, -4, -2, 0, 2, 4, 6, 8, 11, 13, 16)
Q4_ZERO = Q4_BOOK.index(0)
Q4_LIMIT = 7
# e2m1 times two: an integer each. The sign is the highest bit of the code.
MX_BOOK = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_TINY = 2.0**-100  # a group whose largest value is below is stored as zero


class Encoded(NamedTuple):
    """One matrix in some format: two runs of uint8."""

    codes: Tensor
    scales: Tensor


def _tiles(values: Tensor) -> Tensor:
    """(N, K) -> (B, G, r, 128), padded with zeros."""
    rows, columns = values.shape
    padded = F.pad(values, (0, -columns % GROUP, 0, -rows % ROWS))
    return padded.reshape(-1, ROWS, padded.shape[1] // GROUP, GROUP).transpose(1, 2)


def _untile(tiles_BGrk: Tensor, shape: tuple[int, int]) -> Tensor:
    blocks, groups = tiles_BGrk.shape[:2]
    return tiles_BGrk.transpose(1, 2).reshape(blocks * ROWS, groups * GROUP)[: shape[0], : shape[1]]


def _grid(shape: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // ROWS), -(-shape[1] // GROUP)


def _round_bf16(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).float()


def _bf16_bytes(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).contiguous().view(torch.uint8)


def _normalised(tiles_BGrk: Tensor) -> tuple[Tensor, Tensor]:
    """Each group divided by its largest magnitude, so that squares neither overflow nor vanish; and that magnitude."""
    largest = tiles_BGrk.abs().amax(dim=-1, keepdim=True)
    largest = torch.where(largest < _TINY, torch.zeros(()), largest)
    return tiles_BGrk * torch.where(largest > 0, 1 / largest, torch.zeros(())), largest


# --------------------------------------------------------------------------------------------------------------- q8


def encode_q8(values: Tensor) -> Encoded:
    """q8 of float32 (N, K): clipping the largest value a little is tried, and the better of both kept."""
    unit, largest = _normalised(_tiles(values))
    best_error, best_scale = None, None
    for factor in (1.0, 0.97, 0.94):
        scale = _round_bf16(largest * (factor / Q8_LIMIT))
        relative = torch.where(largest > 0, scale / largest, torch.ones(()))
        codes = (unit / relative).round().clamp(-Q8_LIMIT, Q8_LIMIT)
        error = (codes * relative - unit).square().sum(dim=-1, keepdim=True)
        better = torch.ones_like(error, dtype=torch.bool) if best_error is None else error < best_error
        best_error = error if best_error is None else torch.where(better, error, best_error)
        best_scale = scale if best_scale is None else torch.where(better, scale, best_scale)
    assert best_scale is not None
    relative = torch.where(largest > 0, best_scale / largest, torch.ones(()))
    codes = (unit / relative).round().clamp(-Q8_LIMIT, Q8_LIMIT) + Q8_OFFSET
    return Encoded(_quads(codes.to(torch.uint8)).reshape(-1), _bf16_bytes(best_scale).reshape(-1))


def decode_q8(encoded: Encoded, shape: tuple[int, int]) -> Tensor:
    """float32 (N, K)."""
    integers, scales = split_q8(encoded, shape)
    return _untile(integers.float() * scales, shape)


def split_q8(encoded: Encoded, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The integers int32 (B, G, r, 128) and their float32 scales (B, G, r, 1)."""
    blocks, groups = _grid(shape)
    codes = _unquads(encoded.codes.reshape(blocks, groups, -1)).int() - Q8_OFFSET
    return codes, encoded.scales.clone().view(torch.bfloat16).float().reshape(blocks, groups, ROWS, 1)


def _quads(codes_BGrk: Tensor) -> Tensor:
    """(B, G, r, 128) -> (B, G, 2048): 4 columns of row 0, 4 of row 1, ... 4 of row 15, then the next 4 columns."""
    blocks, groups = codes_BGrk.shape[:2]
    return codes_BGrk.reshape(blocks, groups, ROWS, GROUP // 4, 4).transpose(2, 3).reshape(blocks, groups, -1)


def _unquads(codes: Tensor) -> Tensor:
    blocks, groups = codes.shape[:2]
    return codes.reshape(blocks, groups, GROUP // 4, ROWS, 4).transpose(2, 3).reshape(blocks, groups, ROWS, GROUP)


def _nibbles(codes_BGrk: Tensor) -> Tensor:
    """(B, G, r, 128) of 0..15 -> (B, G, 1024): a byte holds a column (low) and the one 4 further (high)."""
    blocks, groups = codes_BGrk.shape[:2]
    split = codes_BGrk.reshape(blocks, groups, ROWS, GROUP // 8, 2, 4)
    packed = split[..., 0, :] | split[..., 1, :] << 4
    return packed.transpose(2, 3).reshape(blocks, groups, -1)


def _unnibbles(codes: Tensor) -> Tensor:
    blocks, groups = codes.shape[:2]
    packed = codes.reshape(blocks, groups, GROUP // 8, ROWS, 4).transpose(2, 3)
    return torch.stack((packed & 15, packed >> 4), dim=-2).reshape(blocks, groups, ROWS, GROUP)


# --------------------------------------------------------------------------------------------------------------- q4


def _book_codes() -> list[int]:
    """The code whose value is nearest, for each half step of a ratio from -18.5 up: all midpoints lie between two."""
    middles = [(index - 37) / 2 + 0.25 for index in range(76)]
    return [min(range(16), key=lambda code: abs(Q4_BOOK[code] - middle)) for middle in middles]


_NEAREST_CODE = torch.tensor(_book_codes(), dtype=torch.uint8)
_NEAREST_VALUE = torch.tensor([Q4_BOOK[code] for code in _book_codes()], dtype=torch.float32)


def _nearest(ratio: Tensor, table: Tensor) -> Tensor:
    """The entry of `table` for the value of Q4_BOOK nearest to each ratio; a search would take 15 times as long."""
    index = (ratio * 2 + 37).clamp_(0, 75).int()
    return table.index_select(0, index.reshape(-1)).reshape(ratio.shape)


def _fit(sub: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """(integer values of the book, squared error) of sub-blocks (..., 16) at `step` (..., 1); a step of 0 gives 0."""
    ratio = torch.where(step != 0, sub / step, torch.zeros(()))
    values = _nearest(ratio, _NEAREST_VALUE)
    return values, (values * step - sub).square().sum(dim=-1, keepdim=True)


def encode_q4(values: Tensor) -> Encoded:
    """q4 of float32 (N, K). Sub-scales and scale are fitted in turns: neighbours of each sub-scale, either sign, are
    tried; then the group's scale is the least-squares one for what was chosen."""
    unit, largest = _normalised(_tiles(values))
    sub = unit.unflatten(-1, (-1, SUB))  # (B, G, r, 8, 16)
    high, low = sub.amax(dim=-1, keepdim=True), sub.amin(dim=-1, keepdim=True)
    span = torch.maximum(high, -low)
    sign = torch.where(-low >= high, 1.0, -1.0)  # the longer side of the book takes the larger value
    scale = span.amax(dim=-2, keepdim=True) * (0.96 / (-Q4_BOOK[0] * Q4_LIMIT))
    for _ in range(2):
        steps = _choose_steps(sub, span, sign, scale)
        fitted = _fit(sub, steps * scale)[0] * steps
        power = fitted.square().sum(dim=(-1, -2), keepdim=True)
        optimal = (fitted * sub).sum(dim=(-1, -2), keepdim=True) / power.clamp_min(_TINY)
        scale = torch.where(power > 0, optimal, scale)
    stored = _round_bf16(scale[..., 0, 0].abs() * largest[..., 0])  # (B, G, r)
    relative = torch.where(largest[..., 0] > 0, stored / largest[..., 0].clamp_min(_TINY), torch.zeros(()))
    steps = torch.where(relative[..., None, None] > 0, steps, torch.zeros(()))
    ratio_step = steps * relative[..., None, None]
    ratio = torch.where(ratio_step != 0, sub / torch.where(ratio_step != 0, ratio_step, 1.0), torch.zeros(()))
    codes = _nearest(ratio, _NEAREST_CODE)
    packed_steps = (steps[..., 0].to(torch.int64) & 15) << (4 * torch.arange(GROUP // SUB))
    words = packed_steps.sum(dim=-1).to(torch.int64)  # (B, G, r)
    word_bytes = torch.stack([(words >> shift & 255).to(torch.uint8) for shift in (0, 8, 16, 24)], dim=-1)
    scales = torch.cat((_bf16_bytes(stored), word_bytes.flatten(2)), dim=-1)
    return Encoded(_nibbles(codes.flatten(3)).reshape(-1), scales.reshape(-1))


def _choose_steps(sub: Tensor, span: Tensor, sign: Tensor, scale: Tensor) -> Tensor:
    """Integer sub-scales (B, G, r, 8, 1): the best of some around the one that just reaches the span."""
    safe = torch.where(scale != 0, scale, 1.0)
    exact = sign * span / (-Q4_BOOK[0] * safe)
    best_error = torch.full_like(exact, float("inf"))
    best = torch.zeros_like(exact)
    for flip in (1.0, -1.0):
        for change in (-1.0, 0.0, 1.0) if flip > 0 else (0.0,):
            steps = (exact.abs() + change).round().clamp(0, Q4_LIMIT) * exact.sign() * flip
            error = _fit(sub, steps * scale)[1]
            better = error < best_error
            best_error, best = torch.where(better, error, best_error), torch.where(better, steps, best)
    return best


def decode_q4(encoded: Encoded, shape: tuple[int, int]) -> Tensor:
    """float32 (N, K)."""
    integers, scales = split_q4(encoded, shape)
    return _untile(integers.float() * scales, shape)


def split_q4(encoded: Encoded, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The integers int32 (B, G, r, 128), book times sub-scale, and their float32 scales (B, G, r, 1)."""
    blocks, groups = _grid(shape)
    codes = _unnibbles(encoded.codes.reshape(blocks, groups, -1))
    book = torch.tensor(Q4_BOOK, dtype=torch.int32)
    stored = encoded.scales.reshape(blocks, groups, 6 * ROWS)
    scales = stored[..., : 2 * ROWS].contiguous().view(torch.bfloat16).float()  # (B, G, r)
    nibbles = stored[..., 2 * ROWS :].reshape(blocks, groups, ROWS, 4)
    steps = torch.stack((nibbles & 15, nibbles >> 4), dim=-1).flatten(3).to(torch.int8)  # (B, G, r, 8)
    steps = torch.where(steps > 7, steps - 16, steps).int()
    integers = book[codes.long()].unflatten(-1, (-1, SUB)) * steps[..., None]
    return integers.flatten(3), scales[..., None]


# ------------------------------------------------------------------------------------------------------------ mxfp4


def encode_mxfp4(values: Tensor) -> Encoded:
    """mxfp4 of float32 (N, K): of the exponents around the one that reaches the largest value, the best is taken.

    What is representable comes back exactly.
    """
    sub = _tiles(values).unflatten(-1, (-1, MX_GROUP))  # (B, G, r, 4, 32)
    largest = sub.abs().amax(dim=-1, keepdim=True)
    exponent = torch.frexp(largest.clamp_min(2.0**-120)).exponent - 3  # largest in [4, 8) * 2^exponent
    best_error = torch.full_like(largest, float("inf"))
    best, codes = exponent, torch.zeros_like(sub, dtype=torch.uint8)
    for change in (0, 1, -1):
        tried = (exponent + change).clamp(-127, 125)  # 6 * 2^126 is no float32
        ratio = torch.ldexp(sub, -tried)
        index = (ratio.abs() * 4).clamp_(max=31).int().reshape(-1)  # bounds between values are quarters
        found = _MX_CODE.index_select(0, index).reshape(ratio.shape)
        magnitude = _MX_VALUE.index_select(0, index).reshape(ratio.shape)
        # Errors are compared in units of the first exponent, so that squares neither overflow nor vanish.
        error = torch.ldexp(magnitude - ratio.abs(), tried - exponent).square().sum(dim=-1, keepdim=True)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, tried, best)
        codes = torch.where(better, found | (torch.signbit(sub).to(torch.uint8) << 3), codes)
    stored = torch.where(largest > 0, best + 127, 127).to(torch.uint8)[..., 0]  # (B, G, r, 4)
    return Encoded(_nibbles(codes.flatten(3)).reshape(-1), stored.transpose(2, 3).reshape(-1))


def _mx_codes() -> list[int]:
    """The magnitude code that is nearest, for each quarter from 0 up."""
    return [min(range(8), key=lambda code: abs(MX_BOOK[code] / 2 - (index / 4 + 0.125))) for index in range(32)]


_MX_CODE = torch.tensor(_mx_codes(), dtype=torch.uint8)
_MX_VALUE = torch.tensor([MX_BOOK[code] / 2 for code in _mx_codes()], dtype=torch.float32)


def decode_mxfp4(encoded: Encoded, shape: tuple[int, int]) -> Tensor:
    """float32 (N, K). An exponent of 255 means NaN."""
    integers, scales = split_mxfp4(encoded, shape)
    return _untile((integers.float() * scales).flatten(3), shape)


def split_mxfp4(encoded: Encoded, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The integers int32 (B, G, r, 4, 32), twice the e2m1, and their float32 scales (B, G, r, 4, 1)."""
    blocks, groups = _grid(shape)
    codes = _unnibbles(encoded.codes.reshape(blocks, groups, -1)).unflatten(-1, (-1, MX_GROUP))
    exponents = encoded.scales.reshape(blocks, groups, GROUP // MX_GROUP, ROWS).transpose(2, 3).int()
    scales = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents - 128)
    scales = torch.where(exponents == 255, float("nan"), scales)
    return torch.tensor(MX_BOOK, dtype=torch.int32)[codes.long()], scales[..., None]
