"""Every tensor of a model with its class: what all other arithmetic of the planner sums over.

Names and shapes come from `families.parameters`, the one place that knows them. Owns the classes of the breakdowns and
what of a tensor one token meets. Knows no format. Identical layers are listed once, so 61 layers cost two layers' work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isqrt, prod
from typing import NamedTuple

from fewfire.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LayerConfig,
    LstmConfig,
    Mixer,
    ModelConfig,
    MoEConfig,
)
from fewfire.families.parameters import layer_parameters, parameters


@dataclass(frozen=True)
class TensorSpec:
    """One tensor. `kind` is its class in every breakdown; `active`: elements one token meets (top_k of the experts).

    `matmul`: elements multiplied with a token, 0 for gathers, vectors and convolutions.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    active: int
    matmul: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


_MATRICES = ("weight", "gate", "up", "down")  # last words of names that hold a matrix


def _mixer_kind(mixer: Mixer | None) -> str:
    if isinstance(mixer, AttentionConfig | LatentAttentionConfig):
        return "attention"
    return "lstm" if isinstance(mixer, LstmConfig) else "linear_attention"


def _kind(name: str, layer: LayerConfig) -> str:
    parts = name.split(".")
    if len(parts) > 1 and parts[-2].endswith("norm"):
        return "norm"
    if parts[0] == "attention":
        return "indexer" if "indexer" in parts else _mixer_kind(layer.mixer)
    if parts[0] == "cross":
        return "cross_attention"
    if parts[0] == "ffn" and isinstance(layer.ffn, MoEConfig):
        part = parts[1]
        if part == "router":
            return "select_bias" if parts[-1] == "select_bias" else "router"
        return "experts" if part == "experts" else "shared_expert"
    return "dense_ffn"


def _active(size: int, kind: str, layer: LayerConfig) -> int:
    if kind == "experts" and isinstance(layer.ffn, MoEConfig):
        return size // layer.ffn.router.num_experts * layer.ffn.router.top_k
    return size


def _matmul(spec_size: int, active: int, name: str, shape: tuple[int, ...], kind: str, layer: LayerConfig) -> int:
    """Noise is for training only; a hierarchical router runs the chosen branches' second level."""
    if len(shape) < 2 or name.rpartition(".")[2] not in _MATRICES:
        return 0
    if kind == "norm" or ".conv." in name or "noise" in name or "relative_bias" in name:
        return 0
    if ".router.branch." in name and isinstance(layer.ffn, MoEConfig) and layer.ffn.router.branches:
        return spec_size // layer.ffn.router.branches * isqrt(layer.ffn.router.top_k)
    return active


class Block(NamedTuple):
    """One kind of layer: how many blocks of the stack are exactly like it, and its tensors, named from inside it."""

    layer: LayerConfig
    copies: int
    specs: tuple[TensorSpec, ...]


class _Same:
    """A configuration as a cache key by identity: hashing 61 layers by value costs more than all the arithmetic."""

    def __init__(self, config: ModelConfig):
        self.config = config

    def __hash__(self) -> int:
        return id(self.config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.config is other.config


def _layer_specs(layer: LayerConfig, config: ModelConfig) -> tuple[TensorSpec, ...]:
    specs = []
    for name, shape in layer_parameters(layer, config).items():
        kind = _kind(name, layer)
        active = _active(prod(shape), kind, layer)
        specs.append(TensorSpec(name, shape, kind, active, _matmul(prod(shape), active, name, shape, kind, layer)))
    return tuple(specs)


@lru_cache(maxsize=64)
def _stacks(same: _Same) -> dict[str, tuple[Block, ...]]:
    config, made = same.config, {}
    for stack, layers in (("encoder", config.encoder), ("decoder", config.layers)):
        counts: dict[LayerConfig, int] = {}
        for layer in layers:
            counts[layer] = counts.get(layer, 0) + 1
        made[stack] = tuple(Block(layer, copies, _layer_specs(layer, config)) for layer, copies in counts.items())
    return made


def decoder_blocks(config: ModelConfig) -> tuple[Block, ...]:
    """The decoder's different layers, each once."""
    return _stacks(_Same(config))["decoder"]


def encoder_blocks(config: ModelConfig) -> tuple[Block, ...]:
    """The encoder's different layers, each once; empty without an encoder."""
    return _stacks(_Same(config))["encoder"]


def blocks(config: ModelConfig) -> tuple[Block, ...]:
    """Every different layer of both stacks."""
    return encoder_blocks(config) + decoder_blocks(config)


def outer_tensors(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """What lies outside the blocks. A tied table is listed once, as the embedding: it is the head too, so `matmul`."""
    return _outer(_Same(config))


@lru_cache(maxsize=64)
def _outer(same: _Same) -> tuple[TensorSpec, ...]:
    config, specs = same.config, []
    shapes = parameters(replace(config, layers=config.layers[:1], encoder=config.encoder[:1]))
    for name, shape in shapes.items():
        if name.startswith(("layers.", "encoder.layers.")):
            continue
        size, first = prod(shape), name.split(".")[0]
        kind = {"embed": "embedding", "positions": "positions", "head": "head"}.get(first, "norm")
        multiplied = name == "head.weight" or (name == "embed.weight" and config.tied_head)
        specs.append(TensorSpec(name, shape, kind, size, size if multiplied else 0))
    return tuple(specs)


def named_blocks(config: ModelConfig, *, encoder: bool = True) -> tuple[Block, ...]:
    """Every layer of both stacks, or of the decoder alone, apart, its tensors under their full names."""
    stacks = (("encoder.layers", config.encoder if encoder else ()), ("layers", config.layers))
    found = []
    for stack, layers in stacks:
        for index, layer in enumerate(layers):
            specs = (replace(spec, name=f"{stack}.{index}.{spec.name}") for spec in _layer_specs(layer, config))
            found.append(Block(layer, 1, tuple(specs)))
    return tuple(found)


def model_tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor under its full name: encoder, decoder, then what lies outside the blocks."""
    for block in named_blocks(config):
        yield from block.specs
    yield from outer_tensors(config)
