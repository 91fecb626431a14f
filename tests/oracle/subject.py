"""The model under test: loaded by fewfire from the oracle's folder, and run the same three ways."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewfire.checkpoints.hub import open_hub
from fewfire.config import ModelConfig
from fewfire.model.build import build_model
from oracle.reference import PREFILL, Oracle


def load(folder: Path) -> Any:
    """The checkpoint in float32, every parameter from the file."""
    checkpoint = open_hub(folder)
    with torch.device("meta"):
        model = build_model(checkpoint.config)
    checkpoint.fill(model, dtype=torch.float32)
    return model.eval()


def alter(node: Any, kind: type, /, **changes: Any) -> Any:
    """A config with `changes` in every part of type `kind`."""
    if isinstance(node, tuple):
        return tuple(alter(item, kind, **changes) for item in node)
    if not dataclasses.is_dataclass(node):
        return node
    inner = {each.name: alter(getattr(node, each.name), kind, **changes) for each in dataclasses.fields(node)}
    return dataclasses.replace(node, **{**inner, **(changes if isinstance(node, kind) else {})})


def rebuild(model: nn.Module, config: ModelConfig) -> Any:
    """A model of another config with the same weights; what the other config has no place for is left out."""
    other = build_model(config)
    state = {name: values for name, values in model.state_dict().items() if name in other.state_dict()}
    other.load_state_dict(state, strict=False)
    return other.eval()


@torch.no_grad()
def prefill(model: Any, oracle: Oracle) -> Tensor:
    if "source" in oracle.extra:
        return model.teacher_forced(oracle.extra["source"], oracle.ids)
    return model(oracle.ids)


@torch.no_grad()
def decode(model: Any, oracle: Oracle) -> Tensor:
    cache, options, first = model.new_cache(), {}, PREFILL
    if "source" in oracle.extra:
        options, first = {"memory": model.encode(oracle.extra["source"])}, 1
    parts = oracle.ids.split([first] + [1] * (oracle.ids.shape[1] - first), dim=1)
    return torch.cat([model(part, cache, **options) for part in parts], dim=1)


@torch.no_grad()
def padded(model: Any, oracle: Oracle) -> Tensor:
    if "source" in oracle.extra:
        return model.teacher_forced(oracle.padded_ids, oracle.extra["pair"], mask_BS=oracle.mask)
    return model(oracle.padded_ids, mask_BT=oracle.mask)[oracle.mask]
