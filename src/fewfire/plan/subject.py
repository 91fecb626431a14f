"""What is planned: a published name, a bare size, a configuration, or a folder's config.json. Owns the resolution.

The only file of the planner that knows where models come from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fewfire.config import ModelConfig
from fewfire.errors import ConfigError, FormatError
from fewfire.families import published, read_config
from fewfire.families.published import NotPublished
from fewfire.plan.bare import ASSUMED, bare_model, is_bare_size
from fewfire.plan.count import Counts, count


@dataclass(frozen=True)
class Subject:
    """A model to plan. `active_counts`: what its publisher's active figure holds (see `families.published`).

    `explained` says why a sum differs from what is published, or that a shape is assumed.
    """

    name: str
    config: ModelConfig
    counts: Counts
    title: str = ""
    active_counts: str | None = None
    published_total: str | None = None
    published_active: str | None = None
    exact_total: int | None = None
    hub_id: str | None = None
    licence: str | None = None
    explained: tuple[str, ...] = ()


def not_published(model: object) -> NotPublished | None:
    """The entry of a model whose maker publishes no shape (GPT-4, Gemini 1.5, Claude), whatever its version."""
    text = str(model).strip().lower().rpartition("/")[2]
    entries = sorted(published.not_published(), key=lambda entry: -len(entry.name))
    for entry in entries:
        if text == entry.name or text.startswith((f"{entry.name}-", f"{entry.name}o", f"{entry.name}.")):
            return entry
    families = {entry.name.split("-")[0]: entry for entry in entries}
    family = text.split("-")[0]
    return families.get(family) if family in ("gemini", "claude") else None


def resolve(model: str | Path | ModelConfig) -> Subject:
    """A Subject from what users write. Raises ConfigError with the nearest names, or the status of a closed model."""
    if isinstance(model, ModelConfig):
        return Subject(model.family, model, count(model))
    text = str(model)
    closed = not_published(text)
    if closed is not None:
        raise ConfigError(f"{closed.title} is not published ({closed.status}): {closed.words}")
    if is_bare_size(text):
        config, counts = bare_model(text)
        return Subject(text.strip().lower(), config, counts, explained=(ASSUMED,))
    folder = Path(text)
    if folder.is_dir() or folder.name == "config.json":
        return _from_folder(folder)
    return published_subject(text)


def published_subject(name: str) -> Subject:
    """The Subject of a published name. Raises ConfigError with the nearest names."""
    entry = published.find(name)
    config = published.load(name)
    assert not isinstance(entry, NotPublished)
    return Subject(
        name=entry.name,
        config=config,
        counts=count(config),
        title=entry.title,
        active_counts=entry.active_counts,
        published_total=entry.total,
        published_active=entry.active,
        exact_total=entry.exact_total,
        hub_id=entry.hub_id,
        licence=entry.licence,
        explained=entry.notes,
    )


def _from_folder(folder: Path) -> Subject:
    path = folder if folder.name == "config.json" else folder / "config.json"
    try:
        hub = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a folder with a config.json") from error
    except ValueError as error:
        raise FormatError(f"not JSON ({error}); fix or download it again", path=str(path)) from error
    config = read_config(hub)
    return Subject(path.parent.resolve().name, config, count(config))
