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
from fewfire.plan.limits import rss_bytes
from fewfire.plan.memory import LOGIT_BYTES, PROCESS_BYTES, activation_bytes, torch_cache_bytes
from fewfire.runtime.budget import planned_context, refuse
from fewfire.runtime.packed import load_packed_module


def load_module(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    exact: bool = False,
    ignore: Iterable[str] = (),
    memory: int | None = None,
) -> Decoder | EncoderDecoder | Recurrent:
    """The model of a pack, a hub-layout folder or a GGUF file, in evaluation mode.

    `dtype` and `exact` as `HubCheckpoint.fill`. `ignore`: config keys to leave aside. `memory` bounds the process.

    Raises: ConfigError for a config that is not understood, FormatError for files that do not fit it, BudgetError where
    `memory` does not hold all weights.
    """
    if is_pack(path):
        return load_packed_module(path, dtype=dtype)
    checkpoint = open_checkpoint(path, ignore=ignore)
    if memory is not None:
        _check_budget(checkpoint, memory, dtype)
    return fill_module(checkpoint, dtype=dtype, exact=exact)


def _check_budget(checkpoint: HubCheckpoint | GgufCheckpoint, memory: int, dtype: torch.dtype | None) -> None:
    config = checkpoint.config
    context = planned_context(config, None)
    needs = {
        "process": max(PROCESS_BYTES, rss_bytes()),
        "weights": checkpoint.run_bytes(dtype),
        "kv cache": torch_cache_bytes(config, context),
        "scratch": activation_bytes(config, 512) + LOGIT_BYTES * config.vocab_size,
    }
    if memory < sum(needs.values()):
        refuse(memory, needs, "`fewfire pack` the model: a pack keeps its experts on disk; or raise --memory")


def fill_module(
    checkpoint: HubCheckpoint | GgufCheckpoint, *, dtype: torch.dtype | None = None, exact: bool = False
) -> Decoder | EncoderDecoder | Recurrent:
    """The model of an opened checkpoint; see `load_module`."""
    with torch.device("meta"):
        module = build_model(checkpoint.config)
    checkpoint.fill(module, dtype=dtype, exact=exact)
    return module.eval()
