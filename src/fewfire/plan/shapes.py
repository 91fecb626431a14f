"""Every tensor of a model with its class: what all other arithmetic of the planner sums over.

Names and shapes come from `families.parameters`, the one place that knows them. Owns the classes of the breakdowns and
what of a tensor one token meets. Knows no format. Identical layers are listed once, so 61 layers cost two layers' work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isqrt, prod

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


def _active(size: int, name: str, kind: str, layer: LayerConfig) -> int:
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


@lru_cache(maxsize=512)
def _layer_tensors(layer: LayerConfig, config: ModelConfig) -> tuple[TensorSpec, ...]:
    specs = []
    for name, shape in layer_parameters(layer, config).items():
        kind = _kind(name, layer)
        active = _active(prod(shape), name, kind, layer)
        specs.append(TensorSpec(name, shape, kind, active, _matmul(prod(shape), active, name, shape, kind, layer)))
    return tuple(specs)


def layer_tensors(layer: LayerConfig, config: ModelConfig) -> tuple[TensorSpec, ...]:
    """The tensors of one block, named from inside it (`attention.q.weight`)."""
    return _layer_tensors(layer, config)


def outer_tensors(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """What lies outside the blocks. A tied table is listed once, as the embedding: it is the head too, so `matmul`."""
    specs = []
    for name, shape in _outer(config).items():
        size, first = prod(shape), name.split(".")[0]
        kind = {"embed": "embedding", "positions": "positions", "head": "head"}.get(first, "norm")
        multiplied = name == "head.weight" or (name == "embed.weight" and config.tied_head)
        specs.append(TensorSpec(name, shape, kind, size, size if multiplied else 0))
    return tuple(specs)


@lru_cache(maxsize=64)
def _outer(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes = parameters(_without_layers(config))
    return {name: shape for name, shape in shapes.items() if not name.startswith(("layers.", "encoder.layers."))}


def _without_layers(config: ModelConfig) -> ModelConfig:
    """The same model with one layer a stack: its outer tensors are all that is asked for."""
    return replace(config, layers=config.layers[:1], encoder=config.encoder[:1])


def count_layers(layers: Iterable[LayerConfig]) -> dict[LayerConfig, int]:
    """Each different layer with how many blocks are exactly like it."""
    seen: dict[LayerConfig, int] = {}
    for layer in layers:
        seen[layer] = seen.get(layer, 0) + 1
    return seen


def distinct_layers(config: ModelConfig) -> list[tuple[LayerConfig, int]]:
    """(layer, how many blocks are exactly like it), encoder and decoder together."""
    return list(count_layers((*config.encoder, *config.layers)).items())


def model_tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor under its full name: encoder, decoder, then what lies outside the blocks."""
    for stack, layers in (("encoder.layers", config.encoder), ("layers", config.layers)):
        for index, layer in enumerate(layers):
            for spec in layer_tensors(layer, config):
                yield TensorSpec(f"{stack}.{index}.{spec.name}", spec.shape, spec.kind, spec.active, spec.matmul)
    yield from outer_tensors(config)
