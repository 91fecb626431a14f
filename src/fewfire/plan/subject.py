"""What is planned: a published name, a bare size, a configuration, or a folder's config.json. Owns the resolution.

The only file of the planner that knows where models come from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fewfire.config import ModelConfig, check
from fewfire.errors import ConfigError
from fewfire.families import published, read_config
from fewfire.families.published import NotPublished
from fewfire.plan.bare import ASSUMED, bare_model, is_bare_size
from fewfire.plan.count import Counts, count

if TYPE_CHECKING:
    from fewfire.plan.checkpoint import Stored
    from fewfire.plan.memory import Formats

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner/name


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
    stored: Stored | None = None
    formats: Formats | None = None  # of a pack, which says them
    disk_bytes: int | None = None
    explained: tuple[str, ...] = ()

    def stored_in(self, formats: Formats) -> Stored | None:
        """The checkpoint's own bytes, where `formats` are its own."""
        return self.stored if formats.native or formats == self.formats else None


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


def resolve(model: str | Path | ModelConfig, *, ignore: tuple[str, ...] = ()) -> Subject:
    """A Subject from what users write: a published name, a bare size, a folder, a .gguf file, a hub id, a ModelConfig.

    `ignore`: keys of a config.json to leave aside. Raises ConfigError with the nearest names, or the status of a
    closed model; FormatError on damaged headers.
    """
    if isinstance(model, ModelConfig):
        return Subject(model.family, model, count(model))
    text = str(model)
    check(bool(text.strip()), "model is empty; name one, `fewfire models` lists them")
    closed = not_published(text)
    if closed is not None:
        raise ConfigError(f"{closed.title} is not published ({closed.status}): {closed.words}")
    if is_bare_size(text):
        config, counts = bare_model(text)
        return Subject(text.strip().lower(), config, counts, explained=(ASSUMED,))
    path = Path(text)
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if path.is_dir() or path.name == "config.json":
        return _from_folder(path, ignore)
    if _HUB_ID.fullmatch(text) and not path.exists():
        return _from_hub(text, ignore)
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


def _from_folder(folder: Path, ignore: tuple[str, ...]) -> Subject:
    from fewfire.plan.checkpoint import explain_gap, is_pack, read_pack_formats, read_stored, read_stored_pack
    from fewfire.plan.hub import read_json

    if folder.name == "config.json":
        folder = folder.parent
    if not (folder / "config.json").exists() and (folder / "model" / "config.json").exists():
        folder = folder / "model"  # where `fewfire train` leaves what it made
    config = read_config(read_json(folder / "config.json"), ignore=ignore)
    name = folder.resolve().name
    counts = count(config)
    if is_pack(folder):
        return Subject(name, config, counts, stored=read_stored_pack(folder, config), formats=read_pack_formats(folder))
    if not any(folder.glob("*.safetensors*")):
        return Subject(name, config, counts, explained=("no weights beside config.json: bytes are the formula's",))
    stored = read_stored(folder, config)
    return Subject(name, config, counts, stored=stored, explained=explain_gap(stored, counts))


def _from_gguf(path: Path) -> Subject:
    from fewfire.headers import read_gguf
    from fewfire.plan.checkpoint import explain_gap, read_stored_gguf
    from fewfire.plan.gguf import config_of_gguf

    header = read_gguf(path)
    config = config_of_gguf(header)
    counts = count(config)
    stored = read_stored_gguf(header, config)
    return Subject(path.name, config, counts, stored=stored, explained=explain_gap(stored, counts))


def _from_hub(hub_id: str, ignore: tuple[str, ...]) -> Subject:
    for name in published.names():
        entry = published.find(name)
        if not isinstance(entry, NotPublished) and (entry.hub_id or "").lower() == hub_id.lower():
            return published_subject(name)
    from fewfire.plan.hub import fetch_config

    hub, disk_bytes = fetch_config(hub_id)
    config = read_config(hub, ignore=ignore)
    said = () if disk_bytes is None else (f"the hub's index says {disk_bytes / 1e9:,.1f} GB on disk",)
    return Subject(hub_id, config, count(config), hub_id=hub_id, disk_bytes=disk_bytes, explained=said)
