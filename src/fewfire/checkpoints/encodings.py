"""How a hub tensor's values lie in the files: plain, DeepSeek's block FP8, or gpt-oss's MXFP4; both directions.

Owns pairing values with their scales. Decoding is exact in float32 for FP8 and in bf16 for MXFP4; encoding a decoded
tensor with the same scales gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fewfire.checkpoints.shards import TORCH_DTYPES, Outgoing, Shards
from fewfire.errors import FormatError
from fewfire.headers import TensorHeader

FP8_BLOCK = 128  # rows and columns that share a scale
MXFP4_BLOCK = 32  # values that share a scale
PLAIN = ("F32", "BF16", "F16", "F64")
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Stored(NamedTuple):
    """A hub tensor as the files hold it. `shape` is that of its values; `parts` are its values and their scales."""

    name: str
    shape: tuple[int, ...]
    encoding: Literal["plain", "fp8", "mxfp4"]
    parts: tuple[TensorHeader, ...]

    @property
    def dtype(self) -> torch.dtype:
        """What its values are made into when nothing else is asked for: what its checkpoint's other tensors are."""
        return TORCH_DTYPES[self.parts[0].dtype] if self.encoding == "plain" else torch.bfloat16

    @property
    def where(self) -> tuple[str, int]:
        return str(self.parts[0].path), self.parts[0].offset

    @property
    def step(self) -> int:
        """Rows of the leading axis can be read apart where they begin at multiples of this."""
        return FP8_BLOCK if self.encoding == "fp8" and len(self.shape) == 2 else 1


def pair_parts(headers: Mapping[str, TensorHeader]) -> dict[str, Stored]:
    """Every hub tensor by name: values that are paired with scales are one tensor, under the name of the values.

    Raises: FormatError for encoded values without fitting scales, and dtypes that no weights have.
    """
    left, found = dict(headers), {}
    for name, header in headers.items():
        if header.dtype == "F8_E4M3":
            scales = _scales(left, header, f"{name}_scale_inv", _fp8_grid(header.shape))
            found[name] = Stored(name, header.shape, "fp8", (header, scales))
        elif header.dtype == "U8" and name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            if len(header.shape) < 3 or header.shape[-1] != MXFP4_BLOCK // 2:
                raise _wrong(header, f"has shape {list(header.shape)}, expected blocks of {MXFP4_BLOCK // 2} bytes")
            scales = _scales(left, header, f"{base}_scales", header.shape[:-1])
            *outer, rows, blocks, _ = header.shape
            found[base] = Stored(base, (*outer, blocks * MXFP4_BLOCK, rows), "mxfp4", (header, scales))
        else:
            continue
        del left[name]
    return found | {name: Stored(name, header.shape, "plain", (header,)) for name, header in left.items()}


def _fp8_grid(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], *(math.ceil(extent / FP8_BLOCK) for extent in shape[-2:]))


def _scales(left: dict[str, TensorHeader], header: TensorHeader, name: str, shape: tuple[int, ...]) -> TensorHeader:
    """Take the scales of `header` out of `left`."""
    scales = left.pop(name, None)
    if scales is None:
        raise _wrong(header, f"is {header.dtype} and has no {name}; complete the download")
    if scales.shape != shape:
        raise _wrong(scales, f"has shape {list(scales.shape)}, expected {list(shape)}")
    if (scales.dtype != "U8") if name.endswith("_scales") else (scales.dtype not in (*PLAIN, "F8_E8M0")):
        raise _wrong(scales, f"is {scales.dtype}, which no scales are")
    return scales


def _wrong(header: TensorHeader, message: str) -> FormatError:
    return FormatError(message, path=str(header.path), record=header.name)


def check_weights(stored: Stored) -> None:
    """Raise FormatError where the values are of a dtype that no weights have."""
    header = stored.parts[0]
    if stored.encoding == "plain" and header.dtype not in PLAIN:
        raise _wrong(header, f"is {header.dtype}, expected {', '.join(PLAIN)}, block FP8 or MXFP4 with their scales")


# ---------------------------------------------------------------------------------------------------------- decoding


def rows_header(header: TensorHeader, start: int, stop: int) -> TensorHeader:
    """The header of rows `start` to `stop` of a tensor's leading axis."""
    row_bytes = header.num_bytes // max(header.shape[0], 1)
    shape, offset = (stop - start, *header.shape[1:]), header.offset + start * row_bytes
    return header._replace(shape=shape, offset=offset, num_bytes=(stop - start) * row_bytes)


def read_values(shards: Shards, stored: Stored, rows: tuple[int, int] | None = None) -> Tensor:
    """The values of a hub tensor, or of some rows of its leading axis: float32 for FP8, bf16 for MXFP4, else as stored.

    `rows` must begin at a multiple of `stored.step`. Strides are any. Raises as `Shards.read_into`.
    """
    values, *scales = stored.parts
    if rows is not None:
        values = rows_header(values, *rows)
    if stored.encoding == "plain":
        return shards.read(values)
    scale = shards.read(scales[0])
    if rows is not None:
        grid = slice(rows[0] // stored.step, math.ceil(rows[1] / stored.step))
        scale = scale[grid]
    if stored.encoding == "fp8":
        return decode_fp8(shards.read(values), scale)
    return decode_mxfp4(shards.read(values), scale).swapaxes(-1, -2)


def decode_fp8(codes: Tensor, scales: Tensor) -> Tensor:
    """Float32 values of e4m3 `codes` (..., O, I) whose 128 x 128 blocks are multiplied by `scales`.

    Source: DeepSeek-V3 report, section 3.3; `weight_scale_inv` of its checkpoints.
    """
    return codes.float().mul_(_spread(scales.float(), codes.shape))


def _spread(scales: Tensor, shape: torch.Size) -> Tensor:
    spread = scales.repeat_interleave(FP8_BLOCK, -2).repeat_interleave(FP8_BLOCK, -1)
    return spread[..., : shape[-2], : shape[-1]]


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """bf16 values (..., 32 G) of `blocks` (..., G, 16) uint8, two e2m1 values a byte (the lower half first), times
    2^(scales - 127). Source: OCP Microscaling formats 1.0; gpt-oss checkpoints."""
    values = torch.tensor([*_FP4, *(-each for each in _FP4)], dtype=torch.bfloat16)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1).view(torch.int32).flatten()
    found = pairs.index_select(0, blocks.reshape(-1).int()).view(torch.bfloat16)
    found = found.reshape(*blocks.shape[:-1], MXFP4_BLOCK)
    return torch.ldexp(found, (scales.int() - 127)[..., None]).to(torch.bfloat16).flatten(-2)


# ---------------------------------------------------------------------------------------------------------- encoding


def encode_fp8(values: Tensor, scales: Tensor) -> Tensor:
    """e4m3 codes of `values` (..., O, I) for given block scales: what `decode_fp8` read, rounded to bf16 or not."""
    spread = _spread(scales.float(), values.shape)
    ratio = torch.where(spread == 0, torch.zeros((), dtype=torch.float32), values.float() / spread)
    return ratio.clamp_(-448, 448).to(torch.float8_e4m3fn)


def encode_mxfp4(values: Tensor, scales: Tensor) -> Tensor:
    """Blocks (..., G, 16) of `values` (..., 32 G) for given scales (..., G): what `decode_mxfp4` read."""
    grouped = values.unflatten(-1, (-1, MXFP4_BLOCK)).float()
    ratio = torch.ldexp(grouped, (127 - scales.int())[..., None])
    bounds = torch.tensor([(low + high) / 2 for low, high in zip(_FP4, _FP4[1:])])
    codes = torch.bucketize(ratio.abs().contiguous(), bounds).to(torch.uint8) | (
        torch.signbit(ratio).to(torch.uint8) << 3
    )
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def encoded_like(stored: Stored, plain: Outgoing) -> list[Outgoing]:
    """What to write for `plain` so that it lies in the file as `stored` does: same codes, and the scales copied."""
    if stored.encoding == "plain":
        return [plain._replace(dtype=TORCH_DTYPES[stored.parts[0].dtype])]
    codes, scales = stored.parts

    def read_scales() -> Tensor:
        with Shards() as shards:
            return shards.read(scales)

    def make_codes() -> Tensor:
        if stored.encoding == "fp8":
            return encode_fp8(plain.values(), read_scales())
        return encode_mxfp4(plain.values().swapaxes(-1, -2), read_scales())

    return [
        Outgoing(codes.name, TORCH_DTYPES[codes.dtype], codes.shape, make_codes),
        Outgoing(scales.name, TORCH_DTYPES[scales.dtype], scales.shape, read_scales),
    ]
