"""GGUF's blocks as they are: q4_0, q4_1, q8_0, q4_k, q6_k. A row is a run of blocks; bytes as ggml lays them out.

Values come back exactly as ggml's own definition gives them in float32. Rows are padded with zeros to whole blocks.
Source: the block structures of the ggml repository. n blocks, each along the first axis of what follows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_SMALLEST = 1e-30


def _blocks(values: Tensor, size: int) -> Tensor:
    return F.pad(values, (0, -values.shape[1] % size)).reshape(-1, size)


def _half(values: Tensor) -> Tensor:
    """float32 rounded to what 16 bits hold, and kept finite."""
    return values.clamp(-65504, 65504).half().float()


def _half_bytes(values: Tensor) -> Tensor:
    return values.half().reshape(-1, 1).view(torch.uint8).reshape(-1, 2)


def _read_half(bytes_: Tensor) -> Tensor:
    return bytes_.contiguous().view(torch.float16).float()


def _safe(values: Tensor) -> Tensor:
    return torch.where(values != 0, values, torch.ones(()))


def _nibble_pair(low: Tensor, high: Tensor) -> Tensor:
    return (low.to(torch.uint8) | high.to(torch.uint8) << 4).to(torch.uint8)


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


# --------------------------------------------------------------------------------------------------- blocks of 32


def encode_q4_0(values: Tensor) -> Tensor:
    x = _blocks(values, 32)
    zero = torch.zeros_like(x[:, :1])
    steps = [(_half(_peak(x) / -8 * factor), zero) for factor in torch.linspace(0.85, 1.1, 11).tolist()]
    step, _ = _best(x, steps, -8, 7)
    codes = (x / _safe(step)).round().clamp(-8, 7) + 8
    return torch.cat((_half_bytes(step), _nibble_pair(codes[:, :16], codes[:, 16:])), dim=1).reshape(-1)


def decode_q4_0(rows: Tensor) -> Tensor:
    block = rows.reshape(-1, 18)
    codes = torch.cat((block[:, 2:] & 15, block[:, 2:] >> 4), dim=1).float() - 8
    return (codes * _read_half(block[:, :2])).reshape(rows.shape[0], -1)


def encode_q4_1(values: Tensor) -> Tensor:
    x = _blocks(values, 32)
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    steps = []
    for factor in (1.0, 0.95, 0.9, 0.85):
        step = _half((high - low) / 15 * factor)
        for shift in (0.5, 0.3, 0.7):  # where the clipped range lies
            steps.append((step, _half(low + (high - low) * (1 - factor) * shift)))
    step, offset = _best(x, steps, 0, 15)
    codes = ((x - offset) / _safe(step)).round().clamp(0, 15)
    packed = _nibble_pair(codes[:, :16], codes[:, 16:])
    return torch.cat((_half_bytes(step), _half_bytes(offset), packed), dim=1).reshape(-1)


def decode_q4_1(rows: Tensor) -> Tensor:
    block = rows.reshape(-1, 20)
    codes = torch.cat((block[:, 4:] & 15, block[:, 4:] >> 4), dim=1).float()
    return (codes * _read_half(block[:, :2]) + _read_half(block[:, 2:4])).reshape(rows.shape[0], -1)


def encode_q8_0(values: Tensor) -> Tensor:
    x = _blocks(values, 32)
    step = _half(x.abs().amax(dim=-1, keepdim=True) / 127)
    codes = (x / _safe(step)).round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
    return torch.cat((_half_bytes(step), codes), dim=1).reshape(-1)


def decode_q8_0(rows: Tensor) -> Tensor:
    block = rows.reshape(-1, 34)
    codes = block[:, 2:].contiguous().view(torch.int8).float()
    return (codes * _read_half(block[:, :2])).reshape(rows.shape[0], -1)


# -------------------------------------------------------------------------------------------------- blocks of 256


def encode_q4_k(values: Tensor) -> Tensor:
    """8 sub-blocks of 32: value = d * scale * code - dmin * min, scales and mins of 6 bits."""
    x = _blocks(values, 256).reshape(-1, 8, 32)
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
    pairs_of_32 = codes.reshape(-1, 4, 2, 32)
    packed = _nibble_pair(pairs_of_32[:, :, 0], pairs_of_32[:, :, 1]).reshape(-1, 128)
    bits = _pack_k_scales(scale[..., 0].to(torch.uint8), low[..., 0].to(torch.uint8))
    return torch.cat((_half_bytes(d), _half_bytes(dmin), bits, packed), dim=1).reshape(-1)


def _pack_k_scales(scale: Tensor, low: Tensor) -> Tensor:
    """(n, 8) scales and mins of 6 bits -> (n, 12)."""
    first = scale[:, :4] | scale[:, 4:] >> 4 << 6
    second = low[:, :4] | low[:, 4:] >> 4 << 6
    return torch.cat((first, second, scale[:, 4:] & 15 | (low[:, 4:] & 15) << 4), dim=1)


def decode_q4_k(rows: Tensor) -> Tensor:
    block = rows.reshape(-1, 144)
    d, dmin = _read_half(block[:, :2]), _read_half(block[:, 2:4])
    first, second, third = block[:, 4:8], block[:, 8:12], block[:, 12:16]
    scale = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=1).float()
    low = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=1).float()
    packed = block[:, 16:].reshape(-1, 4, 32)
    codes = torch.stack((packed & 15, packed >> 4), dim=2).reshape(-1, 8, 32).float()
    values = (d * scale)[..., None] * codes - (dmin * low)[..., None]
    return values.reshape(rows.shape[0], -1)


def encode_q6_k(values: Tensor) -> Tensor:
    """16 sub-blocks of 16: value = d * scale * (code - 32), scales of 8 bits with sign."""
    x = _blocks(values, 256).reshape(-1, 16, 16)
    zero = torch.zeros_like(x[..., :1])
    step, _ = _best(x, [(_peak(x) / -32 * factor, zero) for factor in (1.0, 0.97, 0.94, 1.03)], -32, 31)
    d = _half(_peak(step[..., 0])[..., None] / -128)
    scale = (step / _safe(d)).round().clamp(-128, 127)
    codes = ((x / _safe(d * scale)).round().clamp(-32, 31) + 32).to(torch.uint8).reshape(-1, 2, 4, 32)
    low = _nibble_pair(codes[:, :, :2] & 15, codes[:, :, 2:] & 15).reshape(-1, 128)
    high = codes >> 4
    top = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    scales = scale[..., 0].to(torch.int8).view(torch.uint8)
    return torch.cat((low, top.reshape(-1, 64), scales, _half_bytes(d)), dim=1).reshape(-1)


def decode_q6_k(rows: Tensor) -> Tensor:
    block = rows.reshape(-1, 210)
    low, top = block[:, :128].reshape(-1, 2, 2, 32), block[:, 128:192].reshape(-1, 2, 32)
    nibbles = torch.cat((low & 15, low >> 4), dim=2)  # (n, 2, 4, 32)
    high = torch.stack([top >> shift & 3 for shift in (0, 2, 4, 6)], dim=2)
    codes = (nibbles | high << 4).reshape(-1, 16, 16).float() - 32
    scale = block[:, 192:208].contiguous().view(torch.int8).float()
    return ((_read_half(block[:, 208:]) * scale)[..., None] * codes).reshape(rows.shape[0], -1)


ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "q4_0": encode_q4_0,
    "q4_1": encode_q4_1,
    "q8_0": encode_q8_0,
    "q4_k": encode_q4_k,
    "q6_k": encode_q6_k,
}
DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "q4_0": decode_q4_0,
    "q4_1": decode_q4_1,
    "q8_0": decode_q8_0,
    "q4_k": decode_q4_k,
    "q6_k": decode_q6_k,
}
