"""Rotary positions in hub configs, both spellings: `rope_theta` + `rope_scaling`, and `rope_parameters`.

Owns keys and defaults (those of transformers' rope functions); the mathematics is in `model/rope.py`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from fewfire.config import RopeConfig, RopeScaling
from fewfire.errors import ConfigError
from fewfire.families.reader import Reader

Pairing = Literal["half", "interleaved"]


def read_rope(
    hub: Reader,
    *,
    head_dim: int,
    max_context: int,
    theta: float,
    partial: float = 1.0,
    pairing: Pairing = "half",
    neutral: tuple[str, ...] = (),
) -> RopeConfig:
    """The rope of `hub`. `theta` and `partial` are what the family's class takes when the file does not say.

    `neutral`: keys inside the rope object that the family does not use (Qwen3-VL's sections).
    """
    rope = _section(hub)
    theta = _one(hub, rope, "rope_theta", theta)
    partial = _one(hub, rope, "partial_rotary_factor", partial)
    scaling = None
    if rope is not None:
        kind = rope.string("rope_type", "type", default="default")
        scaling = _scaling(hub, rope, kind, max_context)
        rope.skip(*neutral)
        rope.close()
    dim = int(head_dim * partial)
    if dim <= 0 or dim % 2:
        raise ConfigError(f"rope would turn {dim} of {head_dim} dimensions of a head; expected an even number above 0")
    return RopeConfig(theta=theta, dim=dim, pairing=pairing, scaling=scaling)


def write_rope(rope: RopeConfig, *, head_dim: int) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and, where the rope turns a part of a head only, `partial_rotary_factor`."""
    keys: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": write_scaling(rope.scaling)}
    if rope.dim != head_dim:
        keys["partial_rotary_factor"] = write_partial(rope.dim, head_dim)
    return keys


def write_partial(dim: int, head_dim: int) -> float:
    """The fraction f for which int(head_dim * f) is `dim`: rounding must not lose a pair."""
    fraction = dim / head_dim
    return fraction if int(head_dim * fraction) == dim else math.nextafter(fraction, 2.0)


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The `rope_scaling` object; None for a plain rope."""
    if scaling is None:
        return None
    named: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    named["original_max_position_embeddings"] = scaling.original_context
    for key in (
        "attention_factor mscale mscale_all_dim beta_fast beta_slow low_freq_factor high_freq_factor "
        "short_factor long_factor short_mscale long_mscale"
    ).split():
        value = getattr(scaling, key)
        named[key] = list(value) if isinstance(value, tuple) else value
    if scaling.kind == "yarn":
        named["truncate"] = scaling.truncate
    return {key: value for key, value in named.items() if value is not None}


def mscale(factor: float, scale: float) -> float:
    """YaRN's attention temperature: 1 up to factor 1, else 0.1 * scale * ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _section(hub: Reader) -> Reader | None:
    """rope_parameters (transformers 5) or rope_scaling (before); both present must agree."""
    both = [name for name in ("rope_scaling", "rope_parameters") if hub.has(name)]
    if len(both) == 2 and hub.hub["rope_scaling"] != hub.hub["rope_parameters"]:
        raise ConfigError("config.json has rope_scaling and rope_parameters, and they differ; --ignore-key one of them")
    hub.skip("rope_scaling", "rope_parameters")
    return hub.section(both[0]) if both else None


def _one(hub: Reader, rope: Reader | None, name: str, default: float) -> float:
    """`name` from the rope object or from the top level; both must agree."""
    top = hub.number(name, default=None)
    inner = rope.number(name, default=None) if rope is not None else None
    if top is not None and inner is not None and top != inner:
        raise ConfigError(f"{name} is {top} and, in the rope object, {inner}; --ignore-key {hub.prefix}{name}")
    return inner if inner is not None else top if top is not None else default


def _scaling(hub: Reader, rope: Reader, kind: str, max_context: int) -> RopeScaling | None:
    original = rope.integer("original_max_position_embeddings", default=None, minimum=1)
    if kind == "default":
        return None
    if original is None:
        original = hub.integer("original_max_position_embeddings", default=max_context, minimum=1)
    else:
        hub.skip("original_max_position_embeddings")
    if kind == "linear":
        return RopeScaling("linear", rope.number("factor"))
    if kind == "dynamic":
        return RopeScaling("dynamic", rope.number("factor"), original_context=max_context)
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            rope.number("factor"),
            original_context=original,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    if kind == "yarn":
        return RopeScaling(
            "yarn",
            rope.number("factor"),
            original_context=original,
            attention_factor=rope.number("attention_factor", default=None),
            mscale=rope.number("mscale", default=None),
            mscale_all_dim=rope.number("mscale_all_dim", default=None),
            beta_fast=rope.number("beta_fast", default=32.0),
            beta_slow=rope.number("beta_slow", default=1.0),
            truncate=rope.boolean("truncate", default=True),
        )
    if kind == "longrope":
        return RopeScaling(
            "longrope",
            rope.number("factor", default=max_context / original),
            original_context=original,
            attention_factor=rope.number("attention_factor", default=None),
            short_factor=rope.items("short_factor", kind=float),
            long_factor=rope.items("long_factor", kind=float),
            short_mscale=rope.number("short_mscale", default=None),
            long_mscale=rope.number("long_mscale", default=None),
        )
    raise ConfigError(
        f"rope_type is {kind!r} in config.json; expected one of default, linear, dynamic, yarn, llama3, longrope"
    )
