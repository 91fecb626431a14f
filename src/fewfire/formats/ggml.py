"""ggml's blocks as GGUF files hold them, row by row: q4_0, q4_1, q8_0, q4_k, q6_k, and its mxfp4.

Owns the bytes of a block and the search for scales. Values are exactly those of ggml's own definition in float32. How
packs lay the same bits out: ggml_tiles. Rows are padded with zeros to whole blocks.
Source: the block structures of the ggml repository. N rows, K columns, Q quads of columns, n blocks, P runs of columns
with a scale each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fewfire.plan.memory import NATIVE_BLOCKS


class Blocks(NamedTuple):
    """Rows of blocks taken apart. `codes` int32 (N, Q): four columns a word, a byte each, the first in the lowest;
    codes count from 0. `scales` uint8 (N, blocks, bytes): what else each block holds, in its order."""

    codes: Tensor
    scales: Tensor

    @property
    def bytes(self) -> Tensor:
        """The codes as uint8 (N, K)."""
        return self.codes.view(torch.uint8)


class Runs(NamedTuple):
    """Runs of columns that share a scale: value = integer * scale + minimum. `integers` int32 (N, P, run), `scales` and
    `minima` (or None) float32 (N, P)."""

    integers: Tensor
    scales: Tensor
    minima: Tensor | None


class Form(NamedTuple):
    """What is special to a format: the code of the integer 0, columns of a run, and the sizes of its fields."""

    zero: int
    run: int
    before: int  # bytes of a block before its codes
    after: int = 0  # and after them
    half: int = 0  # columns whose nibbles lie in the low halves of as many bytes, the next as many in the high ones


FORMS = {
    "q4_0": Form(zero=8, run=32, before=2, half=16),
    "q4_1": Form(zero=0, run=32, before=4, half=16),
    "q8_0": Form(zero=128, run=32, before=2),
    "q4_k": Form(zero=0, run=32, before=16, half=32),
    "q6_k": Form(zero=32, run=16, before=0, after=18),
    "mxfp4": Form(zero=0, run=32, before=1, half=16),
}


def row_bytes(name: str, columns: int) -> int:
    """Bytes of a row of `columns`, the last block padded."""
    block = NATIVE_BLOCKS[name]
    return -(-columns // block.columns) * block.num_bytes


# ----------------------------------------------------------------------------------------------------------- apart

# Masks of four bytes. Words of four columns are permuted and masked about four times as fast as bytes.
NIBBLES, PAIRS, SIGNS = 0x0F0F0F0F, 0x03030303, 0x80808080 - 2**32


def split(rows: Tensor, name: str) -> Blocks:
    """Take rows (uint8 (N, bytes)) of whole blocks apart. No bit is lost: see `join`."""
    form, block = FORMS[name], NATIVE_BLOCKS[name]
    blocks = rows.reshape(rows.shape[0], -1, block.num_bytes)
    before, packed, after = blocks.split((form.before, block.num_bytes - form.before - form.after, form.after), dim=-1)
    words = packed.clone(memory_format=torch.contiguous_format).view(torch.int32)
    codes = _unpack_six(words) if name == "q6_k" else _unpack_halves(words, form.half) if form.half else words ^ SIGNS
    return Blocks(codes.flatten(1), after if form.after else before)


def join(blocks: Blocks, name: str) -> Tensor:
    """The rows (uint8 (N, bytes)) that `split` took apart."""
    form, columns = FORMS[name], NATIVE_BLOCKS[name].columns
    codes = blocks.codes.unflatten(1, (-1, columns // 4))
    words = _pack_six(codes) if name == "q6_k" else _pack_halves(codes, form.half) if form.half else codes ^ SIGNS
    packed = words.contiguous().view(torch.uint8)
    return torch.cat((packed, blocks.scales) if form.after else (blocks.scales, packed), dim=-1).flatten(1)


def _unpack_halves(words: Tensor, half: int) -> Tensor:
    apart = words.unflatten(-1, (-1, half // 4))
    return torch.stack((apart & NIBBLES, apart >> 4 & NIBBLES), dim=-2).flatten(-3)


def _pack_halves(codes: Tensor, half: int) -> Tensor:
    apart = codes.unflatten(-1, (-1, 2, half // 4))
    return (apart[..., 0, :] | apart[..., 1, :] << 4).flatten(-2)


def _unpack_six(words: Tensor) -> Tensor:
    """128 bytes of low nibbles, 64 of high pairs of bits; in halves of 128 columns, each in quarters of 32."""
    low = words[..., :32].unflatten(-1, (2, 2, 8))
    nibbles = torch.cat((low & NIBBLES, low >> 4 & NIBBLES), dim=-2)
    top = words[..., 32:].unflatten(-1, (2, 8))
    return (nibbles | torch.stack([top >> shift & PAIRS for shift in (0, 2, 4, 6)], dim=-2) << 4).flatten(-3)


def _pack_six(codes: Tensor) -> Tensor:
    quarters = codes.unflatten(-1, (2, 4, 8))
    low, high = quarters & NIBBLES, quarters >> 4 & PAIRS
    nibbles = low[..., :2, :] | low[..., 2:, :] << 4
    top = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    return torch.cat((nibbles.flatten(-3), top.flatten(-2)), dim=-1)


# ---------------------------------------------------------------------------------------------------------- values


def scales(rows: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
    """Scales and minima (or None), float32 (N, P), of rows of whole blocks."""
    form = FORMS[name]
    blocks = rows.reshape(rows.shape[0], -1, NATIVE_BLOCKS[name].num_bytes)
    made, minima = _SCALES[name](blocks[..., -form.after :] if form.after else blocks[..., : form.before])
    return made.flatten(1), None if minima is None else minima.flatten(1)


def runs(blocks: Blocks, name: str) -> Runs:
    """What rows that were taken apart stand for."""
    form = FORMS[name]
    integers = (blocks.bytes.int() - form.zero).unflatten(1, (-1, form.run))
    scales, minima = _SCALES[name](blocks.scales)
    return Runs(integers, scales.flatten(1), None if minima is None else minima.flatten(1))


def decode(rows: Tensor, name: str) -> Tensor:
    """float32 (N, K) of rows (uint8 (N, bytes)) of whole blocks."""
    integers, scales, minima = runs(split(rows, name), name)
    values = integers.float() * scales[..., None]
    return (values if minima is None else values + minima[..., None]).flatten(1)


def _halves(bytes_: Tensor) -> Tensor:
    """(..., 2 c) bytes -> (..., c) float32 of c numbers of 16 bits."""
    return bytes_.contiguous().view(torch.float16).float()


def _q4_k_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """d, dmin, and twelve bytes: 8 scales and 8 minima of 6 bits."""
    d, dmin = _halves(scales[..., :2]), _halves(scales[..., 2:4])
    first, second, third = scales[..., 4:8], scales[..., 8:12], scales[..., 12:]
    scale = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=-1)
    low = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=-1)
    return d * scale.float(), -dmin * low.float()


def _q6_k_scales(scales: Tensor) -> tuple[Tensor, None]:
    return _halves(scales[..., 16:]) * scales[..., :16].contiguous().view(torch.int8).float(), None


_SCALES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor | None]]] = {
    "q4_0": lambda scales: (_halves(scales), None),
    "q4_1": lambda scales: (_halves(scales[..., :2]), _halves(scales[..., 2:])),
    "q8_0": lambda scales: (_halves(scales), None),
    "q4_k": _q4_k_scales,
    "q6_k": _q6_k_scales,
}


# --------------------------------------------------------------------------------------------------------- encoding


def encode(values: Tensor, name: str) -> Tensor:
    """Rows (uint8 (N, bytes)) of float32 (N, K): scales by search for the least squared error."""
    columns = NATIVE_BLOCKS[name].columns
    padded = F.pad(values, (0, -values.shape[1] % columns))
    codes, scales = _ENCODERS[name](padded.reshape(-1, columns))
    words = codes.to(torch.uint8).reshape(padded.shape).view(torch.int32)
    return join(Blocks(words, scales.reshape(values.shape[0], padded.shape[1] // columns, -1)), name)


def _half(values: Tensor) -> Tensor:
    """float32 rounded to what 16 bits hold, and kept finite."""
    return values.clamp(-65504, 65504).half().float()


def _half_bytes(values: Tensor) -> Tensor:
    return values.half().reshape(-1, 1).view(torch.uint8).reshape(-1, 2)


def _safe(values: Tensor) -> Tensor:
    return torch.where(values != 0, values, torch.ones(()))


def _best(sub: Tensor, steps: list[tuple[Tensor, Tensor]], low: int, high: int) -> tuple[Tensor, Tensor]:
    """Of the (step, offset) pairs, the one with the least squared error for each row of `sub`; codes in low..high."""
    best_error, best = None, steps[0]
    for step, offset in steps:
        codes = ((sub - offset) / _safe(step)).round().clamp(low, high)
        error = (codes * step + offset - sub).square().sum(dim=-1, keepdim=True)
        if best_error is None:
            best_error, best = error, (step, offset)
        else:
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = torch.where(better, step, best[0]), torch.where(better, offset, best[1])
    return best


def _peak(values: Tensor) -> Tensor:
    """The value of largest magnitude of each row, with its sign."""
    return values.gather(-1, values.abs().argmax(dim=-1, keepdim=True))


def _encode_q4_0(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and bytes of scales of blocks (n, 32); so the others."""
    zero = torch.zeros_like(x[:, :1])
    steps = [(_half(_peak(x) / -8 * factor), zero) for factor in torch.linspace(0.85, 1.1, 11).tolist()]
    step, _ = _best(x, steps, -8, 7)
    return (x / _safe(step)).round().clamp(-8, 7) + 8, _half_bytes(step)


def _encode_q4_1(x: Tensor) -> tuple[Tensor, Tensor]:
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    steps = []
    for factor in (1.0, 0.95, 0.9, 0.85):
        step = _half((high - low) / 15 * factor)
        for shift in (0.5, 0.3, 0.7):  # where the clipped range lies
            steps.append((step, _half(low + (high - low) * (1 - factor) * shift)))
    step, offset = _best(x, steps, 0, 15)
    codes = ((x - offset) / _safe(step)).round().clamp(0, 15)
    return codes, torch.cat((_half_bytes(step), _half_bytes(offset)), dim=1)


def _encode_q8_0(x: Tensor) -> tuple[Tensor, Tensor]:
    step = _half(x.abs().amax(dim=-1, keepdim=True) / 127)
    return (x / _safe(step)).round().clamp(-127, 127) + 128, _half_bytes(step)


def _encode_q4_k(values: Tensor) -> tuple[Tensor, Tensor]:
    """8 sub-blocks of 32: value = d * scale * code - dmin * min, scales and mins of 6 bits."""
    x = values.reshape(-1, 8, 32)
    floor = x.amin(dim=-1, keepdim=True).clamp(max=0)
    top = x.amax(dim=-1, keepdim=True).clamp(min=0)
    pairs = []
    for factor in (1.0, 0.95, 0.9, 0.85, 0.8):
        step = (top - floor) / 15 * factor
        pairs += [(step, floor + (top - floor) * (1 - factor) * shift) for shift in (0.5, 0.25, 0.75)]
    step, offset = _best(x, [(step, offset.clamp(max=0)) for step, offset in pairs], 0, 15)
    d = _half(step.amax(dim=1, keepdim=True) / 63)
    dmin = _half((-offset).amax(dim=1, keepdim=True) / 63)
    scale, low = (step / _safe(d)).round().clamp(0, 63), (-offset / _safe(dmin)).round().clamp(0, 63)
    codes = ((x + dmin * low) / _safe(d * scale)).round().clamp(0, 15)
    bits = _pack_k_scales(scale[..., 0].to(torch.uint8), low[..., 0].to(torch.uint8))
    return codes, torch.cat((_half_bytes(d), _half_bytes(dmin), bits), dim=1)


def _pack_k_scales(scale: Tensor, low: Tensor) -> Tensor:
    """(n, 8) scales and mins of 6 bits -> (n, 12)."""
    first = scale[:, :4] | scale[:, 4:] >> 4 << 6
    second = low[:, :4] | low[:, 4:] >> 4 << 6
    return torch.cat((first, second, scale[:, 4:] & 15 | (low[:, 4:] & 15) << 4), dim=1)


def _encode_q6_k(values: Tensor) -> tuple[Tensor, Tensor]:
    """16 sub-blocks of 16: value = d * scale * (code - 32), scales of 8 bits with sign."""
    x = values.reshape(-1, 16, 16)
    zero = torch.zeros_like(x[..., :1])
    step, _ = _best(x, [(_peak(x) / -32 * factor, zero) for factor in (1.0, 0.97, 0.94, 1.03)], -32, 31)
    d = _half(_peak(step[..., 0])[..., None] / -128)
    scale = (step / _safe(d)).round().clamp(-128, 127)
    codes = (x / _safe(d * scale)).round().clamp(-32, 31) + 32
    return codes, torch.cat((scale[..., 0].to(torch.int8).view(torch.uint8), _half_bytes(d)), dim=1)


_ENCODERS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "q4_0": _encode_q4_0,
    "q4_1": _encode_q4_1,
    "q8_0": _encode_q8_0,
    "q4_k": _encode_q4_k,
    "q6_k": _encode_q6_k,
}
NAMES = tuple(_ENCODERS)  # the formats of packs; mxfp4 is only read
