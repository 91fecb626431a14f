"""A pack becomes what runs: the native engine where every step of it is native, else a torch module, dequantized.

The torch module is the reference, and runs whatever can be packed.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from fewfire.checkpoints.pack import Pack, open_pack
from fewfire.kernels.isa import native
from fewfire.model.build import build_model
from fewfire.model.decoder import Decoder
from fewfire.model.encoder_decoder import EncoderDecoder
from fewfire.model.recurrent import Recurrent
from fewfire.runtime.engine import NativeDecoder
from fewfire.runtime.lower import why_not_native

FLOAT32_BYTES = 4 * 2**30  # a model of more than this in float32 is made in bfloat16


def load_pack(
    folder: str | Path, *, dtype: torch.dtype | None = None
) -> NativeDecoder | Decoder | EncoderDecoder | Recurrent:
    """The native engine for a pack; torch where `dtype` asks for it, or something has no native step (a warning says).

    Raises: as `open_pack`, and FormatError where bytes are not those written.
    """
    if dtype is not None:
        return load_packed_module(folder, dtype=dtype)
    pack = open_pack(folder)
    why = why_not_native(pack) if native() is not None else "the extension fewfire._native is missing"
    if why is None:
        return NativeDecoder(pack)
    warnings.warn(f"{folder} runs on torch, dequantized, instead of the native engine: {why}", stacklevel=2)
    return load_packed_module(folder)


def load_packed_module(folder: str | Path, *, dtype: torch.dtype | None = None) -> Decoder | EncoderDecoder | Recurrent:
    """The module of a pack, in evaluation mode, in `dtype`; None: float32 up to 4 GiB of it, else bfloat16.

    Selection biases stay float32. Raises: as `open_pack`, and FormatError where bytes are not those written.
    """
    pack = open_pack(folder)
    with torch.device("meta"):
        module = build_model(pack.config)
    state = module.state_dict()
    if dtype is None:
        size = 4 * sum(values.numel() for values in state.values())
        dtype = torch.float32 if size <= FLOAT32_BYTES else torch.bfloat16
    module.load_state_dict(_dequantize(pack, state, dtype), strict=True, assign=True)
    return module.eval()


def _dequantize(pack: Pack, state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name, expert, values in pack.parameters():
        if name not in made:
            kept = torch.float32 if name.endswith("select_bias") else dtype
            made[name] = torch.empty(state[name].shape, dtype=kept)
        target = made[name] if expert is None else made[name][expert]
        target.copy_(values)
    return made
