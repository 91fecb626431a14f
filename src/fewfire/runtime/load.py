"""A model on disk becomes a module that runs, in one copy."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from fewfire.checkpoints.gguf import GgufCheckpoint
from fewfire.checkpoints.hub import HubCheckpoint
from fewfire.checkpoints.pack import is_pack
from fewfire.checkpoints.source import open_checkpoint
from fewfire.model.build import build_model
from fewfire.model.decoder import Decoder
from fewfire.model.encoder_decoder import EncoderDecoder
from fewfire.model.recurrent import Recurrent
from fewfire.runtime.packed import load_packed_module


def load_module(
    path: str | Path, *, dtype: torch.dtype | None = None, exact: bool = False, ignore: Iterable[str] = ()
) -> Decoder | EncoderDecoder | Recurrent:
    """The model of a pack, a hub-layout folder or a GGUF file, in evaluation mode.

    `dtype` and `exact` as `HubCheckpoint.fill`. `ignore`: config keys to leave aside.

    Raises: ConfigError for a config that is not understood, FormatError for files that do not fit it.
    """
    if is_pack(path):
        return load_packed_module(path, dtype=dtype)
    return fill_module(open_checkpoint(path, ignore=ignore), dtype=dtype, exact=exact)


def fill_module(
    checkpoint: HubCheckpoint | GgufCheckpoint, *, dtype: torch.dtype | None = None, exact: bool = False
) -> Decoder | EncoderDecoder | Recurrent:
    """The model of an opened checkpoint; see `load_module`."""
    with torch.device("meta"):
        module = build_model(checkpoint.config)
    checkpoint.fill(module, dtype=dtype, exact=exact)
    return module.eval()
