"""The published models known by name: their configurations (one hub-form JSON each) and what their makers say of them.

Owns names and quotes. Figures quoted here are the publishers'; what fewfire computes is in `plan/`.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal

from fewfire.config import ModelConfig
from fewfire.errors import ConfigError
from fewfire.families import read_config

__all__ = ["NotPublished", "Published", "find", "hub_config", "load", "names", "not_published"]

_FOLDER = Path(__file__).parent

ActiveCounts = Literal["all", "without_embedding", "without_embedding_and_head"]


@dataclass(frozen=True)
class Published:
    """One published model. `total` and `active` are quoted ('46.7B'); None: not stated.

    `active_counts`: which parameters the publisher's active figure holds. `exact_total`: parameters of the main model,
    known to the integer (selection biases in; multi-token prediction, scales and buffers out). `context` in tokens.
    """

    name: str
    title: str
    vendor: str
    hub_id: str | None = None
    licence: str | None = None
    total: str | None = None
    active: str | None = None
    active_counts: ActiveCounts | None = None
    exact_total: int | None = None
    context: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class NotPublished:
    """A model that people ask about and whose maker publishes no configuration: words, no numbers.

    `status`: whether it is a mixture of experts is confirmed, reported or not characterised.
    """

    name: str
    title: str
    vendor: str
    status: Literal["confirmed", "reported", "not characterised"]
    words: str


def names() -> tuple[str, ...]:
    """Every name that `load` takes, in the order in which they are listed."""
    return tuple(_tables()[0])


def not_published() -> tuple[NotPublished, ...]:
    """GPT-4, Gemini 1.5, Claude."""
    return tuple(_tables()[1].values())


def find(name: str) -> Published | NotPublished:
    """What is known of `name` (upper or lower case).

    Raises: ConfigError with the nearest names if there is no such model.
    """
    key = name.strip().lower()
    published, others = _tables()
    if key in published:
        return published[key]
    if key in others:
        return others[key]
    raise ConfigError(f"no published model is called {name!r}; {_suggestion(key, (*published, *others))}")


def load(name: str) -> ModelConfig:
    """The configuration of a published model.

    Raises: ConfigError for an unknown name (with the nearest ones), and for a model whose maker publishes none.
    """
    return _load(_key(name))


def hub_config(name: str) -> dict[str, Any]:
    """The hub-form config.json of a published model, as we wrote it down. Raises: as `load`."""
    hub: dict[str, Any] = json.loads((_FOLDER / f"{_key(name)}.json").read_text(encoding="utf-8"))
    return hub


@cache
def _load(key: str) -> ModelConfig:
    return read_config(hub_config(key))


@cache
def _tables() -> tuple[dict[str, Published], dict[str, NotPublished]]:
    data = tomllib.loads((_FOLDER / "models.toml").read_text(encoding="utf-8"))
    published = {
        name: Published(name=name, **{**entry, "notes": tuple(entry.get("notes", ()))})
        for name, entry in data["models"].items()
    }
    return published, {name: NotPublished(name=name, **entry) for name, entry in data["not_published"].items()}


def _key(name: str) -> str:
    entry = find(name)
    if isinstance(entry, NotPublished):
        raise ConfigError(f"{entry.title} has no published configuration ({entry.status}): {entry.words}")
    return entry.name


def _suggestion(key: str, known: tuple[str, ...]) -> str:
    near = get_close_matches(key, known, n=3, cutoff=0.5)
    near += [each for each in known if len(key) > 2 and (key in each or each in key) and each not in near]
    return f"did you mean {', '.join(near[:4])}?" if near else "fewfire models lists what is known"
