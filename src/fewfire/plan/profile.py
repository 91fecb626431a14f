"""Routing profiles on disk: how often each expert was picked, per layer, on somebody's text.

A profile as JSON (`num_experts, top_k, num_tokens, counts`, `cache_curve`); a trace, whose header holds one; and counts
per model and domain, as the OLMoE authors' numbers are kept.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from fewfire.config import RoutingProfile, check
from fewfire.errors import ConfigError, FormatError
from fewfire.files import open_regular
from fewfire.headers import read_metadata
from fewfire.plan.hub import read_json


def read_profile(path: str | Path, *, model: str | None = None, domain: str | None = None) -> RoutingProfile:
    """A RoutingProfile from a file. `model` and `domain` choose where the file holds several; all domains are summed.

    Raises: ConfigError for a model or domain that is not in it, FormatError for a malformed file.
    """
    document = _trace_profile(Path(path)) if _is_trace(Path(path)) else read_json(Path(path))
    if "models" in document:
        return _from_domains(document["models"], str(path), model, domain)
    if domain is not None:
        raise ConfigError(f"{path} holds one profile without domains; leave --domain out")
    return _profile(document, str(path))


def _is_trace(path: Path) -> bool:
    """Whether a safetensors header begins there: the four high bytes of its length are zero, as no text's are."""
    try:
        with open_regular(path) as file:
            return file.read(9)[4:] == b"\0\0\0\0{"
    except OSError:
        return False  # read_json says why


def _trace_profile(path: Path) -> dict[str, Any]:
    """The profile in the header of a trace (docs/trace.md); its tensors are not read."""
    text = read_metadata(path).get("profile")
    if text is None:
        raise ConfigError(f"{path} holds no routing profile; `fewfire trace` writes one, if MoE layers are all alike")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError("is no JSON; record the trace again", path=str(path), record="profile") from error
    if not isinstance(document, dict):
        raise FormatError("expected an object; record the trace again", path=str(path), record="profile")
    return document


def _from_domains(models: Any, path: str, model: str | None, domain: str | None) -> RoutingProfile:
    if not isinstance(models, dict) or not models:
        raise FormatError("is empty; expected models by name", path=path, record="models")
    if model is None and len(models) > 1:
        raise ConfigError(f"{path} holds several models ({', '.join(models)}); plan one of them by that name")
    name = model if model in models else next(iter(models)) if model is None else None
    if name is None:
        raise ConfigError(f"{path} has no counts of {model}; it holds {', '.join(models)}")
    entry = models[name]
    domains = entry.get("domains") if isinstance(entry, dict) else None
    if not isinstance(domains, dict) or not domains:
        raise FormatError("has no domains", path=path, record=str(name))
    if domain is not None and domain not in domains:
        raise ConfigError(f"{path} has no domain {domain} of {name}; it holds {', '.join(domains)}")
    chosen = [domains[domain]] if domain is not None else list(domains.values())
    layers = entry.get("layers")
    if not isinstance(layers, list) or any(not isinstance(rows, list) or len(rows) != len(layers) for rows in chosen):
        raise FormatError("layers and counts differ in number", path=path, record=str(name))
    summed = {
        str(layer): [sum(column) for column in zip(*(rows[index] for rows in chosen))]
        for index, layer in enumerate(layers)
    }
    top_k = entry.get("top_k")
    tokens = sum(next(iter(summed.values()))) // top_k if isinstance(top_k, int) and top_k else 0
    return _profile({**entry, "counts": summed, "num_tokens": tokens}, path)


def _profile(entry: dict[str, Any], path: str) -> RoutingProfile:
    numbers = {}
    for key in ("num_experts", "top_k", "num_tokens"):
        value = entry.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FormatError(f"is {value!r}, expected a whole number above zero", path=path, record=key)
        numbers[key] = value
    counts = entry.get("counts")
    if not isinstance(counts, dict) or not counts:
        raise FormatError("is not there; expected counts per layer", path=path, record="counts")
    rows: dict[int, tuple[int, ...]] = {}
    for layer, row in counts.items():
        good = isinstance(row, list) and all(type(value) is int and value >= 0 for value in row)
        if not good or len(row) != numbers["num_experts"] or not str(layer).isdigit():
            raise FormatError(
                f"expected {numbers['num_experts']} counts, each 0 or more", path=path, record=f"counts.{layer}"
            )
        check(sum(row) > 0, f"{path}: layer {layer} has no counts at all; record it on some text first")
        rows[int(layer)] = tuple(row)
    curve = _curve(entry.get("cache_curve", []), path)
    return RoutingProfile(numbers["num_experts"], numbers["top_k"], numbers["num_tokens"], rows, curve)


def _curve(points: Any, path: str) -> tuple[tuple[float, float], ...]:
    """Pairs of numbers in 0..1, the first of them rising."""
    good = isinstance(points, list) and all(
        isinstance(point, list)
        and len(point) == 2
        and all(type(each) in (int, float) and 0 <= each <= 1 for each in point)
        for point in points
    )
    if not good or any(high[0] <= low[0] for low, high in pairwise([[0.0, 0.0], *points])):
        raise FormatError("expected (share, hit rate) pairs, shares rising to 1", path=path, record="cache_curve")
    return tuple((float(share), float(rate)) for share, rate in points)


def profile_json(profile: RoutingProfile) -> dict[str, Any]:
    """The profile as `read_profile` takes it."""
    return {
        "num_experts": profile.num_experts,
        "top_k": profile.top_k,
        "num_tokens": profile.num_tokens,
        "counts": {str(layer): list(row) for layer, row in profile.counts.items()},
        "cache_curve": [list(point) for point in profile.cache_curve],
    }
