"""What may stand in a checkpoint in place of a plain tensor: DeepSeek's block-scaled FP8, gpt-oss's MXFP4.

Owns names, shapes and where decoded values lie. Decoding itself is in `formats`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from fewfire.config import ModelConfig
from fewfire.families.tensors import HubTensor, Piece

FP8_BLOCK = 128
MXFP4_BLOCK = 32


class StoredPart(NamedTuple):
    """One stored tensor. `dtype` as safetensors spells it (F8_E4M3, F32, U8)."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Stored(NamedTuple):
    """A quantized form of one hub tensor: read all `parts`, decode them, and the values lie as `decoded` says.

    fp8: parts are (values, scale_inv): value * scale of its 128 x 128 block; `decoded` is the plain tensor.
    mxfp4: parts are (blocks, scales): 32 numbers a block along the last axis, two a byte, the low nibble first, times
    2 ** (scale - 127); `decoded` has the axes (expert, out, in), where the plain tensor has (expert, in, out).
    Source: transformers `integrations/finegrained_fp8.py`, `integrations/mxfp4.py`.
    """

    format: Literal["fp8", "mxfp4"]
    parts: tuple[StoredPart, ...]
    decoded: HubTensor


def stored_forms(config: ModelConfig, tensor: HubTensor) -> tuple[Stored, ...]:
    """The quantized forms in which a checkpoint of `config` may hold `tensor`; () where there is none.

    A form is there if all of its parts are; the plain tensor is always possible too.
    """
    if config.family == "gpt_oss" and ".mlp.experts." in tensor.name and not tensor.name.endswith("_bias"):
        return _mxfp4(tensor)
    if len(tensor.shape) == 2 and tensor.name.endswith(".weight"):
        return (_fp8(tensor),)
    return ()


def _fp8(tensor: HubTensor) -> Stored:
    blocks = tuple(-(-extent // FP8_BLOCK) for extent in tensor.shape)
    values = StoredPart(tensor.name, tensor.shape, "F8_E4M3")
    return Stored("fp8", (values, StoredPart(f"{tensor.name}_scale_inv", blocks, "F32")), tensor)


def _mxfp4(tensor: HubTensor) -> tuple[Stored, ...]:
    experts, into, out = tensor.shape
    if into % MXFP4_BLOCK:
        return ()
    groups = into // MXFP4_BLOCK
    blocks = StoredPart(f"{tensor.name}_blocks", (experts, out, groups, MXFP4_BLOCK // 2), "U8")
    scales = StoredPart(f"{tensor.name}_scales", (experts, out, groups), "U8")
    pieces = tuple(_turned(piece) for piece in tensor.pieces)
    return (Stored("mxfp4", (blocks, scales), HubTensor(tensor.name, (experts, out, into), pieces)),)


def _turned(piece: Piece) -> Piece:
    """The same region after the last two axes of the hub tensor were swapped."""
    axis = {1: 2, 2: 1}.get(piece.axis, piece.axis)
    return piece._replace(axis=axis, transpose=not piece.transpose)
