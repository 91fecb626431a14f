"""Where every byte of a pack lies, computed from the model and its formats alone: no file is asked.

Owns the order of expert records and of the parts within one (docs/pack.md). Sizes are `plan.memory`'s, so that the
planned bytes are the written ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from fewfire.config import ModelConfig
from fewfire.formats import sizes
from fewfire.plan.memory import RECORD_ALIGNMENT, Formats
from fewfire.plan.shapes import TensorSpec, model_tensors

_MATRICES = ("gate", "up", "down")


@dataclass(frozen=True)
class Placed:
    """One parameter: its format and shape; for an expert's, of one expert."""

    name: str
    format: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A run of bytes within an expert's record: `kind` is `codes` or `scales` of the parameter `name`."""

    name: str
    kind: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class ExpertLayer:
    """All experts of one MoE layer: `num_experts` records of `record_bytes` from `offset` of experts.bin on.

    `prefix` is that of the parameters (`layers.3.ffn.experts.`); `matrices` maps what follows it to its format and
    shape; `parts` lie one after the other, and zeros fill the record.
    """

    prefix: str
    num_experts: int
    offset: int
    record_bytes: int
    matrices: tuple[Placed, ...]
    parts: tuple[Part, ...]

    def record_offset(self, expert: int) -> int:
        """Where expert `expert` begins in experts.bin."""
        return self.offset + expert * self.record_bytes


@dataclass(frozen=True)
class Layout:
    """Every parameter of a pack: `trunk` in trunk.safetensors, `experts` in experts.bin."""

    trunk: tuple[Placed, ...]
    experts: tuple[ExpertLayer, ...]

    @property
    def expert_bytes(self) -> int:
        """The size of experts.bin."""
        return sum(layer.num_experts * layer.record_bytes for layer in self.experts)

    @property
    def trunk_bytes(self) -> int:
        """Bytes of the tensors in trunk.safetensors, its header not counted."""
        return sum(sizes(each.format, each.shape).total for each in self.trunk)


def lay_out(config: ModelConfig, formats: Formats) -> Layout:
    """The layout of a pack of `config` in `formats`; layers in the order of the model, an encoder's first."""
    trunk, banks = [], dict[str, list[Placed]]()
    for spec in model_tensors(config):
        if spec.kind == "experts":
            prefix, _, name = spec.name.rpartition(".")
            banks.setdefault(f"{prefix}.", []).append(Placed(name, formats.of(spec), spec.shape[1:]))
        else:
            trunk.append(Placed(spec.name, formats.of(spec), _stored_shape(spec)))
    counts = [moe.router.num_experts for _, _, moe in config.moe_layers]
    experts, offset = [], 0
    for (prefix, placed), num_experts in zip(banks.items(), counts, strict=True):
        layer = _expert_layer(prefix, num_experts, offset, placed)
        offset += num_experts * layer.record_bytes
        experts.append(layer)
    return Layout(tuple(trunk), tuple(experts))


def _stored_shape(spec: TensorSpec) -> tuple[int, ...]:
    return spec.shape or (1,)


def _expert_layer(prefix: str, num_experts: int, offset: int, placed: list[Placed]) -> ExpertLayer:
    matrices = [each for name in _MATRICES for each in placed if each.name == name]
    biases = [each for name in _MATRICES for each in placed if each.name == f"{name}_bias"]
    assert len(matrices) + len(biases) == len(placed), placed
    parts, end = [], 0
    for name, kind, size in _runs(matrices, biases):
        parts.append(Part(name, kind, end, size))
        end += size
    record = ceil(end / RECORD_ALIGNMENT) * RECORD_ALIGNMENT
    return ExpertLayer(prefix, num_experts, offset, record, tuple(matrices + biases), tuple(parts))


def _runs(matrices: list[Placed], biases: list[Placed]) -> Iterator[tuple[str, str, int]]:
    """(name, kind, bytes) in the order of the record: all codes, all scales, biases."""
    for each in matrices:
        yield each.name, "codes", sizes(each.format, each.shape).codes
    for each in matrices:
        scales = sizes(each.format, each.shape).scales
        if scales:
            yield each.name, "scales", scales
    for each in biases:
        yield each.name, "codes", sizes(each.format, each.shape).codes
