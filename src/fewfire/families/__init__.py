"""Hub config.json <-> ModelConfig, and hub tensor names <-> ours: one file for each hub `model_type`.

Owns the registry and the checks that hold for every family. No torch; a family's module is imported when first used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import Any

from fewfire.config import ModelConfig
from fewfire.errors import ConfigError
from fewfire.families.reader import Reader
from fewfire.families.stored import Stored, StoredPart, stored_forms
from fewfire.families.tensors import HubTensor, Piece, part

__all__ = [
    "HubTensor",
    "StoredPart",
    "Piece",
    "Stored",
    "ignored_tensors",
    "known",
    "layouts",
    "match",
    "part",
    "read_config",
    "stored_forms",
    "tensors",
    "write_config",
]

# model_type -> module in this folder. A new family is one file and one line here.
_FAMILIES = {
    "dbrx": "dbrx",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "deepseek_v32": "deepseek_v32",
    "fewfire": "fewfire",
    "glm4_moe": "glm4_moe",
    "glm_moe_dsa": "glm_moe_dsa",
    "gpt2": "gpt2",
    "gpt_oss": "gpt_oss",
    "granitemoe": "granitemoe",
    "grok-1": "grok",
    "jamba": "jamba",
    "kimi_k2": "kimi_k2",
    "llama": "llama",
    "llama4": "llama4",
    "llama4_text": "llama4",
    "minimax": "minimax",
    "minimax_m2": "minimax_m2",
    "mixtral": "mixtral",
    "olmoe": "olmoe",
    "phimoe": "phimoe",
    "qwen2_moe": "qwen2_moe",
    "qwen3_moe": "qwen3_moe",
    "qwen3_next": "qwen3_next",
    "qwen3_vl_moe": "qwen3_vl_moe",
    "switch_transformers": "switch_transformers",
}

# Tensors of any family that hold nothing to load: rotary tables that older files saved.
_BUFFERS = (r".*rotary_emb\.(inv_freq|original_inv_freq)", r".*rotary_emb\.(cos|sin)_cached")


def known() -> tuple[str, ...]:
    """The hub model types that fewfire reads and writes, sorted."""
    return tuple(sorted(_FAMILIES))


def read_config(hub: Mapping[str, Any], *, ignore: tuple[str, ...] | list[str] = ()) -> ModelConfig:
    """A ModelConfig from a hub config.json as a dict. `ignore`: keys to leave aside (dots reach into objects).

    Raises: ConfigError for an unknown model_type (the message lists what is known), a missing key, a wrong type or
    value, and any key that the family neither uses nor lists as ignored.
    """
    if not isinstance(hub, Mapping):
        raise ConfigError(f"config.json holds a {type(hub).__name__}; expected a JSON object")
    model_type = hub.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(f"config.json has no model_type ({model_type!r}); expected one of {', '.join(known())}")
    family = _family(model_type)
    reader = Reader(hub, ignore=tuple(ignore))
    reader.skip("model_type")
    config = family.read(reader)
    reader.close()
    return replace(config, ignored=reader.ignored) if reader.ignored else config


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The hub config.json of `config`, which reads back to the same ModelConfig.

    `native_format` decides dtype and quantization_config: who writes other weights replaces that field first.
    Raises: ConfigError naming the first field that the family cannot express.
    """
    hub = _family(config.family).write(config)
    back, meant = read_config(hub), replace(config, ignored=())
    if back != meant:
        path, ours, theirs = _difference(meant, back, "")
        raise ConfigError(
            f"family {config.family} cannot express {path} = {ours!r} (it would read back as {theirs!r}); "
            "change it, choose another family, or keep the model as a pack"
        )
    return hub


def tensors(config: ModelConfig, layout: str | None = None) -> list[HubTensor]:
    """Every hub tensor of `config`, where its values lie in our parameters included. `layout`: one of `layouts`."""
    family = _family(config.family)
    names = layouts(config)
    if layout is not None and layout not in names:
        raise ConfigError(f"family {config.family} has no layout {layout!r}; expected one of {', '.join(names)}")
    return family.tensors(config) if len(names) == 1 else family.tensors(config, layout or names[0])


def layouts(config: ModelConfig) -> tuple[str, ...]:
    """The ways in which checkpoints of this family lay out tensors; the first is the one we write."""
    return getattr(_family(config.family), "LAYOUTS", ("hub",))


def match(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[HubTensor]:
    """The table, of all layouts, that fits a checkpoint's `shapes` (name -> shape) best.

    The caller compares names and shapes and reports what does not fit: this only chooses.
    """
    tables = [tensors(config, layout) for layout in layouts(config)]
    if len(tables) == 1:
        return tables[0]
    return max(tables, key=lambda table: sum(tuple(shapes.get(each.name, ())) == each.shape for each in table))


def ignored_tensors(config: ModelConfig) -> tuple[re.Pattern[str], ...]:
    """Patterns (full match) of hub tensors that a checkpoint may hold and that nothing here needs."""
    patterns = _BUFFERS + tuple(getattr(_family(config.family), "ignored_tensors", lambda config: ())(config))
    return tuple(re.compile(pattern) for pattern in patterns)


def _family(model_type: str) -> ModuleType:
    if model_type not in _FAMILIES:
        near = get_close_matches(model_type, _FAMILIES, n=1)
        hint = f" - did you mean {near[0]}?" if near else ""
        raise ConfigError(f"model_type {model_type!r} is not known; expected one of {', '.join(known())}{hint}")
    return import_module(f"fewfire.families.{_FAMILIES[model_type]}")


def _difference(ours: Any, theirs: Any, path: str) -> tuple[str, Any, Any]:
    """The first place where two config trees differ: (path, our value, theirs)."""
    if is_dataclass(ours) and type(ours) is type(theirs):
        for field in fields(ours):
            a, b = getattr(ours, field.name), getattr(theirs, field.name)
            if a != b:
                return _difference(a, b, f"{path}.{field.name}" if path else field.name)
    if isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a != b:
                return _difference(a, b, f"{path}[{index}]")
    return path, ours, theirs
