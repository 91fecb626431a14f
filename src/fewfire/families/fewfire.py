"""fewfire's own form, for what has no hub type (the 2017 LSTM MoE): the whole ModelConfig as JSON, names as they are.

Owns the generic dataclass <-> dict form: every field is written, every key is checked; where a field may hold one of
several dataclasses, the object's `kind_of` key names which.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fewfire.config import ModelConfig, check
from fewfire.errors import ConfigError
from fewfire.families.parameters import parameters
from fewfire.families.reader import Reader
from fewfire.families.tensors import HubTensor, Piece

_VERSION = 1
_KIND = "kind_of"


def read(hub: Reader) -> ModelConfig:
    hub.expect("fewfire_config_version", _VERSION, why="a later fewfire wrote this; update")
    value = hub.get("model", expected="an object with the fields of a ModelConfig")
    config = decode(ModelConfig, value, "model")
    assert isinstance(config, ModelConfig)
    check(config.family == "fewfire", f"model.family is {config.family!r} in config.json; expected 'fewfire'")
    return config


def write(config: ModelConfig) -> dict[str, Any]:
    return {"model_type": "fewfire", "fewfire_config_version": _VERSION, "model": encode(config)}


def tensors(config: ModelConfig) -> list[HubTensor]:
    """Our own names."""
    return [HubTensor(name, shape, (Piece(name),)) for name, shape in parameters(config).items()]


def encode(value: Any) -> Any:
    """A dataclass tree as JSON values: dataclasses as objects with `kind_of`, tuples as lists."""
    if is_dataclass(value):
        body = {field.name: encode(getattr(value, field.name)) for field in fields(value)}
        return {_KIND: type(value).__name__, **body}
    return [encode(item) for item in value] if isinstance(value, tuple) else value


def decode(annotation: Any, value: Any, path: str) -> Any:
    """The inverse of `encode`, checked against the fields' types. Raises: ConfigError naming the path."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _decode_union(get_args(annotation), value, path)
    if origin is Literal:
        return _accept(value in get_args(annotation), value, path, " or ".join(map(repr, get_args(annotation))))
    if origin is tuple:
        _accept(isinstance(value, (list, tuple)), value, path, "a list")
        inner = get_args(annotation)
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        _accept(len(kinds) == len(value), value, path, f"a list of {len(kinds)}")
        return tuple(decode(kind, item, f"{path}[{index}]") for index, (kind, item) in enumerate(zip(kinds, value)))
    if is_dataclass(annotation):
        return _decode_dataclass(annotation, value, path)
    if annotation is float:
        _accept(isinstance(value, (int, float)) and not isinstance(value, bool), value, path, "a number")
        return float(value)
    if annotation is int:
        return _accept(isinstance(value, int) and not isinstance(value, bool), value, path, "a whole number")
    expected = {bool: "true or false", str: "a string", type(None): "null"}[annotation]
    return _accept(isinstance(value, annotation), value, path, expected)


def _decode_union(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    classes = {kind.__name__: kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)}
    if not classes:
        return decode(next(kind for kind in kinds if kind is not type(None)), value, path)
    named = isinstance(value, Mapping) and value.get(_KIND) in classes
    _accept(named, value, path, f"an object whose {_KIND} is one of {', '.join(classes)}")
    return _decode_dataclass(classes[value[_KIND]], value, path)


def _decode_dataclass(kind: Any, value: Any, path: str) -> Any:
    named = isinstance(value, Mapping) and value.get(_KIND, kind.__name__) == kind.__name__
    _accept(named, value, path, f"a {kind.__name__} object")
    hints, known = _hints(kind), {field.name: field for field in fields(kind)}
    for name in value:
        if name not in known and name != _KIND:
            raise ConfigError(f"{path}.{name} is no field of {kind.__name__}; expected one of {', '.join(known)}")
    for name, field in known.items():
        if name not in value and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{path}.{name} is missing; {kind.__name__} needs it")
    return kind(**{name: decode(hints[name], value[name], f"{path}.{name}") for name in known if name in value})


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _accept(condition: bool, value: Any, path: str, expected: str) -> Any:
    if not condition:
        raise ConfigError(f"{path} is {str(value)[:60]!r} in config.json; expected {expected}")
    return value
