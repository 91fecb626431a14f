"""Rotary position embeddings: frequencies of every published scaling, and the rotation itself.

Knows no attention. Tensors: B batch, T tokens, H heads, R rotated dimensions (the first R of a head).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewfire.config import RopeConfig, RopeScaling
from fewfire.errors import ConfigError


def base_frequencies(rope: RopeConfig) -> Tensor:
    """theta^(-2i/R), i < R/2, float32."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    return 1.0 / (rope.theta**exponents)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention temperature: 0.1 m ln(s) + 1 (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(rope: RopeConfig, scaling: RopeScaling) -> tuple[Tensor, float]:
    frequencies, half = base_frequencies(rope), rope.dim // 2
    context = scaling.original_context
    assert context is not None

    def correction(rotations: float) -> float:
        return rope.dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = correction(scaling.beta_fast or 32), correction(scaling.beta_slow or 1)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = frequencies / scaling.factor * ramp + frequencies * (1 - ramp)
    if scaling.attention_factor is not None:
        return frequencies, scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        ratio = yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
        return frequencies, ratio
    return frequencies, yarn_mscale(scaling.factor)


def _llama3(rope: RopeConfig, scaling: RopeScaling) -> tuple[Tensor, float]:
    frequencies = base_frequencies(rope)
    assert scaling.original_context and scaling.low_freq_factor and scaling.high_freq_factor
    low_wavelength = scaling.original_context / scaling.low_freq_factor
    high_wavelength = scaling.original_context / scaling.high_freq_factor
    wavelength = 2 * math.pi / frequencies
    scaled = torch.where(wavelength > low_wavelength, frequencies / scaling.factor, frequencies)
    smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    is_medium = ~(wavelength < high_wavelength) & ~(wavelength > low_wavelength)
    return torch.where(is_medium, blended, scaled), 1.0


def _longrope(rope: RopeConfig, scaling: RopeScaling, length: int) -> tuple[Tensor, float]:
    context = scaling.original_context
    assert context is not None and scaling.short_factor is not None and scaling.long_factor is not None
    long = length > context
    factors = torch.tensor(scaling.long_factor if long else scaling.short_factor, dtype=torch.float32)
    frequencies = base_frequencies(rope) / factors
    mscale = scaling.long_mscale if long else scaling.short_mscale
    if mscale is not None:
        return frequencies, mscale
    if scaling.attention_factor is not None:
        return frequencies, scaling.attention_factor
    if scaling.factor <= 1.0:
        return frequencies, 1.0
    return frequencies, math.sqrt(1 + math.log(scaling.factor) / math.log(context))


def _dynamic(rope: RopeConfig, scaling: RopeScaling, length: int) -> tuple[Tensor, float]:
    context = scaling.original_context
    assert context is not None
    if length <= context:
        return base_frequencies(rope), 1.0
    grow = (scaling.factor * length / context - (scaling.factor - 1)) ** (rope.dim / (rope.dim - 2))
    return base_frequencies(RopeConfig(rope.theta * grow, rope.dim, rope.pairing)), 1.0


def frequencies(rope: RopeConfig, length: int) -> tuple[Tensor, float]:
    """(R/2 float32 frequencies, factor that multiplies cos and sin) when `length` positions are in use.

    Only `dynamic` and `longrope` depend on `length`. Sources: linear (kaiokendev), dynamic NTK (arXiv 2309.00071
    appendix), yarn (the same paper), llama3 (Llama 3.1 reference), longrope (arXiv 2402.13753).
    """
    scaling = rope.scaling
    if scaling is None:
        return base_frequencies(rope), 1.0
    if scaling.kind == "linear":
        return base_frequencies(rope) / scaling.factor, 1.0
    if scaling.kind == "dynamic":
        return _dynamic(rope, scaling, length)
    if scaling.kind == "yarn":
        return _yarn(rope, scaling)
    if scaling.kind == "llama3":
        return _llama3(rope, scaling)
    if scaling.kind == "longrope":
        return _longrope(rope, scaling, length)
    raise ConfigError(f"rope scaling ({scaling.kind}) is not known; use linear, dynamic, yarn, llama3 or longrope")


def cos_sin(rope: RopeConfig, positions_BT: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each (B, T, R/2) float32, of the angles at `positions_BT`."""
    inverse, factor = frequencies(rope, length)
    angles = positions_BT[..., None].float() * inverse.to(positions_BT.device)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x_BHTd: Tensor, cos_BTr: Tensor, sin_BTr: Tensor, pairing: str) -> Tensor:
    """Rotate the first R of the last dimension; the rest passes through. Same shape and dtype out.

    `interleaved` pairs stay interleaved in the output, so queries and keys must both come from here.
    """
    half = cos_BTr.shape[-1]
    cos, sin = cos_BTr[:, None].to(x_BHTd.dtype), sin_BTr[:, None].to(x_BHTd.dtype)
    turned, rest = x_BHTd[..., : 2 * half], x_BHTd[..., 2 * half :]
    if pairing == "half":
        a, b = turned[..., :half], turned[..., half:]
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    else:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out
