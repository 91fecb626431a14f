"""What a checkpoint on disk really holds: bytes and parameters by class, from headers alone.

Owns the sorting of stored tensors into what runs (experts, trunk) and what does not (multi-token prediction, a vision
tower, scales, buffers), so that each gap to the model's own count has a name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from fewfire.config import ModelConfig
from fewfire.errors import FormatError
from fewfire.headers import GgufHeader, TensorHeader, read_checkpoint, read_safetensors
from fewfire.plan.count import Counts, count
from fewfire.plan.hub import read_json
from fewfire.plan.memory import FORMAT_NAMES, Formats, WeightBytes
from fewfire.sizes import format_count

_EXPERT = re.compile(r"(^|[._])experts?[._]|_exps\b|block_sparse_moe\.(input|output)_linear")
_SHARED = re.compile(r"shared_expert|shared_mlp|_shexp")
_SCALE = re.compile(r"(_scale_inv|_scale|_scales|\.absmax|weight_scale_2|input_scale)$")
_VISION = re.compile(r"(^|\.)(vision_tower|vision_model|visual|multi_modal_projector|v\.|mm\.)")
_BUFFER = re.compile(r"inv_freq$|rotary_emb\.|\.(slope_rate|query_decay|key_decay|diagonal_decay)$|rope_freqs")
_LAYER = re.compile(r"(?:^|\.)(?:layers|blk|h|block)\.(\d+)\.")


@dataclass(frozen=True)
class Stored:
    """A checkpoint's tensors by class: `bytes_of` and `parameters_of` share the keys experts, trunk, embedding (the
    part of the trunk that is only gathered from), mtp, vision, scales, buffers."""

    bytes_of: dict[str, int]
    parameters_of: dict[str, int]
    types: dict[str, int]  # stored type -> bytes
    source: str

    @property
    def total_bytes(self) -> int:
        """All that lies on disk."""
        return sum(size for key, size in self.bytes_of.items() if key != "embedding")

    @property
    def running_bytes(self) -> int:
        """What a decoder loads: without multi-token prediction, vision and buffers; scales belong to their weights."""
        return self.bytes_of["experts"] + self.bytes_of["trunk"]


class _Sorter:
    def __init__(self, config: ModelConfig):
        self.num_layers, self.tied = len(config.layers), config.tied_head
        self.bytes_of = dict.fromkeys(("experts", "trunk", "embedding", "mtp", "vision", "buffers"), 0)
        self.parameters_of = dict.fromkeys((*self.bytes_of, "scales"), 0)
        self.types: dict[str, int] = {}

    def add(self, name: str, type_name: str, num_elements: int, num_bytes: int) -> None:
        self.types[type_name] = self.types.get(type_name, 0) + num_bytes
        key = self._class(name)
        self.bytes_of[key] += num_bytes
        if _SCALE.search(name):
            self.parameters_of["scales"] += num_elements
        else:
            self.parameters_of[key] += num_elements * (2 if name.endswith("_blocks") else 1)
        if not self.tied and key == "trunk" and re.search(r"(embed_tokens|wte|token_embd|^embed|tok_embeddings)", name):
            self.bytes_of["embedding"] += num_bytes

    def _class(self, name: str) -> str:
        layer = _LAYER.search(name)
        if re.match(r"(model\.)?mtp\.", name) or (layer and int(layer.group(1)) >= self.num_layers):
            return "mtp"
        if _VISION.search(name):
            return "vision"
        if _BUFFER.search(name):
            return "buffers"
        return "experts" if _EXPERT.search(name) and not _SHARED.search(name) else "trunk"


def read_stored(folder: Path, config: ModelConfig) -> Stored:
    """Sort the tensors of a hub-layout folder. Raises as `headers.read_checkpoint`."""
    return sort_tensors(read_checkpoint(folder), config, "the checkpoint's own headers")


def sort_tensors(tensors: dict[str, TensorHeader], config: ModelConfig, source: str) -> Stored:
    """Sort safetensors headers, wherever they came from."""
    sorter = _Sorter(config)
    for name, tensor in tensors.items():
        sorter.add(name, tensor.dtype.lower(), prod(tensor.shape), tensor.num_bytes)
    return Stored(sorter.bytes_of, sorter.parameters_of, sorter.types, source)


def is_pack(folder: Path) -> bool:
    """Whether `folder` is fewfire's own runtime format."""
    return (folder / "fewfire.json").is_file() and (folder / "trunk.safetensors").is_file()


def read_stored_pack(folder: Path, config: ModelConfig) -> Stored:
    """A pack's bytes: the trunk's by its header, the experts' by their file's size. Parameters are the config's."""
    counts = count(config)
    trunk = read_safetensors(folder / "trunk.safetensors")
    experts = folder / "experts.bin"
    size = experts.stat().st_size if experts.is_file() else 0
    held = sum(tensor.num_bytes for tensor in trunk.values())
    gathered = sum(tensor.num_bytes for name, tensor in trunk.items() if name.startswith("embed."))
    bytes_of = {"experts": size, "trunk": held, "embedding": 0 if config.tied_head else gathered}
    parameters_of = {"experts": counts.experts, "trunk": counts.trunk, "embedding": counts.embedding}
    extra = dict.fromkeys(("mtp", "vision", "buffers"), 0)
    return Stored(
        bytes_of | extra, parameters_of | extra | {"scales": 0}, {"pack": held + size}, "the pack's own files"
    )


def read_pack_formats(folder: Path) -> Formats:
    """The formats that a pack's manifest names. Raises: FormatError where it names none, or unknown ones."""
    path = folder / "fewfire.json"
    manifest = read_json(path)
    named, overrides = manifest.get("formats"), manifest.get("overrides") or {}
    parts = ("experts", "down", "trunk", "head", "router", "embedding", "small")
    if not isinstance(named, dict) or not isinstance(overrides, dict):
        raise FormatError(
            "formats and overrides are not objects; make the pack again", path=str(path), record="formats"
        )
    for name in (*(named.get(part) for part in parts), *overrides.values()):
        if name not in FORMAT_NAMES:
            raise FormatError(f"{name} is no format; make the pack again", path=str(path), record="formats")
    return Formats(**{part: named[part] for part in parts}, overrides=overrides)


def read_stored_gguf(header: GgufHeader, config: ModelConfig) -> Stored:
    """Sort the tensors of a GGUF file."""
    sorter = _Sorter(config)
    for name, tensor in header.tensors.items():
        sorter.add(name, tensor.type, prod(tensor.shape), tensor.num_bytes)
    return Stored(sorter.bytes_of, sorter.parameters_of, sorter.types, "the GGUF file's own header")


def stored_weights(stored: Stored, config: ModelConfig, formula: WeightBytes) -> WeightBytes:
    """The weights as they lie on disk, in the form the planner computes with; `formula` gives what headers cannot."""
    experts, trunk = stored.bytes_of["experts"], stored.bytes_of["trunk"]
    share = experts / formula.experts if formula.experts else 0.0
    return WeightBytes(
        total=experts + trunk,
        experts=experts,
        trunk=trunk,
        embedding=stored.bytes_of["embedding"],
        per_expert=round(formula.per_expert * share),
        active_experts=round(formula.active_experts * share),
        by_class={key: size for key, size in stored.bytes_of.items() if size and key != "embedding"},
    )


def explain_gap(stored: Stored, counts: Counts) -> tuple[str, ...]:
    """Why the checkpoint holds another number of parameters than the model: one line a reason, none if it does not."""
    names = {
        "mtp": "multi-token-prediction layers, stored and not used in plain decoding",
        "scales": "scales of quantized weights",
        "vision": "a vision tower",
        "buffers": "stored buffers (rotary frequencies)",
    }
    held = stored.parameters_of
    lines = [
        f"the checkpoint also holds {format_count(held[key])} in {words}" for key, words in names.items() if held[key]
    ]
    rest = held["experts"] + held["trunk"] - counts.total
    if rest:
        lines.append(f"the checkpoint holds {rest:+,} parameters against its configuration's shape, unexplained")
    return tuple(lines)
