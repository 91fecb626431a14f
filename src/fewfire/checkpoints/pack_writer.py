"""Packs written: tensor by tensor, each expert's record when its turn comes, wholly or not at all.

An interrupted write is gone on with by the next. What the bytes of a parameter are comes from a `Source`: quantized
weights, or random ones. Memory: one trunk tensor, and a few expert records.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import fewfire
from fewfire import families
from fewfire.checkpoints.hub import COMPANIONS
from fewfire.checkpoints.pack import (
    CONFIG,
    EXPERTS,
    MANIFEST,
    TRUNK,
    VERSION,
    bytes_checksum,
    formats_to_json,
    manifest_checksum,
    record_name,
    stored_parts,
)
from fewfire.checkpoints.pack_layout import ExpertLayer, Layout, Placed, lay_out
from fewfire.checkpoints.shards import TORCH_DTYPES, Outgoing, safetensors_layout
from fewfire.checkpoints.unfinished import Made, Parts, Say, Unfinished, unfinished_folder
from fewfire.config import ModelConfig, check
from fewfire.errors import BudgetError, FormatError
from fewfire.formats import Encoded
from fewfire.plan.memory import Formats
from fewfire.sizes import format_bytes


class Source(Protocol):
    """Where a pack's bytes come from. `encoded` may be called from several threads."""

    config: ModelConfig

    def encoded(self, name: str, expert: int | None, format_name: str, shape: tuple[int, ...]) -> Encoded:
        """Parameter `name` (row `expert` of a bank) in `format_name`."""
        ...


class Ledger(Protocol):
    """What a source learned while it made parameters (how exact they are) and a resumed write must not forget."""

    def take(self, name: str, expert: int | None) -> Any:
        """What was learned of a parameter, as JSON, now that it is made; asked once."""
        ...

    def put_back(self, remarks: Any) -> None:
        """What `take` gave in an earlier run."""
        ...


Report = Callable[[int, int], None]  # bytes written, bytes in all


def write_pack(
    folder: str | Path,
    source: Source,
    formats: Formats,
    *,
    companions: str | Path | None = None,
    tokenizer_files: Mapping[str, bytes] | None = None,
    origin: str = "",
    report: Report | None = None,
    overwrite: bool = False,
    identity: Mapping[str, Any] | None = None,
    ledger: Ledger | None = None,
    say: Say = lambda line: None,
) -> int:
    """Write `folder` as a pack of `source` in `formats`. `companions`: a folder whose text-side files are copied.

    `identity`: JSON that is the same only where `source` gives the same bytes, under names in the plural; the next call
    then goes on with an interrupted write. Returns the bytes that were there; `say` hears a line about it.
    Raises: ConfigError where the folder is taken, being written, or the config has no hub form; FormatError from the
    source; BudgetError on a full disk: before anything is written where the disk is seen to be too small.
    """
    folder = Path(folder)
    check(
        formats.packed,
        "a pack cannot hold native, fp16 or fp8 weights; choose q4, q8, mxfp4, bf16, f32 or a GGUF format",
    )
    config = dataclasses.replace(source.config, native_format="bf16", ignored=())
    layout = lay_out(config, formats)
    hub = families.write_config(config)
    writer = _Writer(source, layout, report or (lambda done, total: None), ledger)
    chosen = {"formats": formats_to_json(formats), "overrides": dict(formats.overrides)}
    if identity is not None:
        identity = {**identity, **chosen, "model settings": hub, "versions": code_version()}
    with unfinished_folder(folder, writer.files, identity, overwrite=overwrite, say=say) as unfinished:
        writer.resume(unfinished)
        small = _small_files(unfinished.folder, hub, companions, tokenizer_files or {})
        manifest: dict[str, Any] = {
            "pack_version": VERSION,
            "made_by": f"fewfire {fewfire.__version__}",
            "source": origin,
            **chosen,
            "files": small,
            "trunk": {"file": TRUNK, "bytes": layout.trunk_bytes, "checksums": writer.write_trunk(unfinished)},
            "experts": {"file": EXPERTS, "bytes": layout.expert_bytes, "layers": writer.write_experts(unfinished)},
        }
        manifest["checksum"] = manifest_checksum(manifest)
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (unfinished.folder / MANIFEST).write_text(text, encoding="utf-8")
    return unfinished.resumed_bytes


def code_version() -> str:
    """What decides the bytes that are made of given weights: a resumed pack has one version's from end to end."""
    package = Path(fewfire.__file__).parent
    checksum = 0
    for part in ("checkpoints", "formats", "quantize"):
        for path in sorted((package / part).rglob("*.py")):
            checksum = zlib.crc32(path.read_bytes(), checksum)
    return f"fewfire {fewfire.__version__} {checksum:08x}, torch {torch.__version__}"


def _small_files(
    folder: Path, hub: Mapping[str, Any], companions: str | Path | None, made: Mapping[str, bytes]
) -> dict[str, dict[str, int]]:
    """Write config.json and the text side; (bytes, checksum) of each."""
    (folder / CONFIG).write_text(json.dumps(hub, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    names = [CONFIG]
    for name in COMPANIONS:
        if companions is not None and (Path(companions) / name).is_file():
            shutil.copyfile(Path(companions) / name, folder / name)
            names.append(name)
    for name, content in made.items():
        if name not in names:
            (folder / name).write_bytes(content)
            names.append(name)
    found = {}
    for name in names:
        content = (folder / name).read_bytes()
        found[name] = {"bytes": len(content), "checksum": bytes_checksum(content)}
    return found


class _Writer:
    """The parts of both files, made one after the other. `files`: trunk.safetensors and experts.bin, if it has any."""

    def __init__(self, source: Source, layout: Layout, report: Report, ledger: Ledger | None):
        self.source, self.layout, self.report, self.ledger = source, layout, report, ledger
        self.total = layout.trunk_bytes + layout.expert_bytes
        self.done = 0
        self._last: tuple[str, Encoded] | None = None
        placed = {name: (each, name) for each in layout.trunk for name, _, _ in stored_parts(each)}
        described = [
            Outgoing(name, TORCH_DTYPES[dtype], shape, _never)
            for each in layout.trunk
            for name, dtype, shape in stored_parts(each)
        ]
        head, ordered = safetensors_layout(described, {"format": "fewfire"})
        self.trunk = Parts(TRUNK, head, tuple((each.name, each.num_bytes) for each in ordered))
        self._trunk_order = [placed[each.name] for each in ordered]
        self._records = [(layer, expert) for layer in layout.experts for expert in range(layer.num_experts)]
        records = tuple((record_name(layer, expert), layer.record_bytes) for layer, expert in self._records)
        self.experts = Parts(EXPERTS, b"", records)
        self.files = (self.trunk, self.experts) if records else (self.trunk,)

    def resume(self, unfinished: Unfinished) -> None:
        """Take over what is there. Raises BudgetError where the disk has no room for the rest."""
        self.done = unfinished.resumed_bytes
        if self.ledger is not None:
            for entry in unfinished.entries:
                for remarks in entry.remarks:
                    self.ledger.put_back(remarks)
        free, needed = shutil.disk_usage(unfinished.folder).free, self.total - self.done
        if needed > free:
            raise BudgetError(
                f"the pack needs {format_bytes(needed)} and the disk has {format_bytes(free)}; free some space, or "
                "name a folder on another disk"
            )

    def _told(self, names: Iterable[str], expert: int | None) -> list[Any]:
        """What the ledger keeps of some parameters."""
        found = [] if self.ledger is None else [self.ledger.take(name, expert) for name in names]
        return [each for each in found if each is not None]

    def _progress(self, num_bytes: int) -> None:
        self.done += num_bytes
        self.report(self.done, self.total)

    # ------------------------------------------------------------------------------------------------------ trunk

    def write_trunk(self, unfinished: Unfinished) -> dict[str, int]:
        """trunk.safetensors; the checksum of every tensor in it."""
        checksums = unfinished.write(self.trunk, self._make_trunk)
        self._last = None
        return {name: checksum for (name, _), checksum in zip(self.trunk.parts, checksums, strict=True)}

    def _make_trunk(self, first: int) -> Generator[Made, None, None]:
        for placed, name in self._trunk_order[first:]:
            encoded = self._trunk_tensor(placed)
            if name == f"{placed.name}.scales":
                made = Made(encoded.scales, [])
            else:
                made = Made(encoded.codes, self._told([placed.name], None))
            yield made
            self._progress(made.values.numel())

    def _trunk_tensor(self, placed: Placed) -> Encoded:
        """A trunk tensor; its codes and scales are asked for one after the other and made once."""
        if self._last is None or self._last[0] != placed.name:
            self._last = None
            self._last = (placed.name, self.source.encoded(placed.name, None, placed.format, placed.shape))
        return self._last[1]

    # ---------------------------------------------------------------------------------------------------- experts

    def write_experts(self, unfinished: Unfinished) -> list[dict[str, Any]]:
        """experts.bin, if there are experts; the manifest's entry of every layer."""
        if not self._records:
            return []
        checksums, entries, at = unfinished.write(self.experts, self._make_experts), [], 0
        for layer in self.layout.experts:
            entry = {"prefix": layer.prefix, "offset": layer.offset, "record_bytes": layer.record_bytes}
            entries.append(entry | {"checksums": checksums[at : at + layer.num_experts]})
            at += layer.num_experts
        return entries

    def _make_experts(self, first: int) -> Generator[Made, None, None]:
        """Records in order, a few made ahead."""
        workers = max(1, min(4, os.cpu_count() or 1))
        with ThreadPoolExecutor(workers) as pool:
            waiting: deque[Future[Made]] = deque()
            try:
                for layer, expert in self._records[first:]:
                    waiting.append(pool.submit(self._record, layer, expert))
                    if len(waiting) > workers:
                        yield self._finished(waiting.popleft().result())
                while waiting:
                    yield self._finished(waiting.popleft().result())
            finally:
                for each in waiting:
                    each.cancel()

    def _finished(self, made: Made) -> Made:
        self._progress(made.values.numel())
        return made

    def _record(self, layer: ExpertLayer, expert: int) -> Made:
        record = torch.zeros(layer.record_bytes, dtype=torch.uint8)
        made = {
            each.name: self.source.encoded(layer.prefix + each.name, expert, each.format, each.shape)
            for each in layer.matrices
        }
        for part in layer.parts:
            values = getattr(made[part.name], part.kind)
            if values.numel() != part.num_bytes:
                message = f"gave {values.numel()} bytes of {part.kind}, expected {part.num_bytes}"
                raise FormatError(message, record=layer.prefix + part.name)
            record[part.offset : part.offset + part.num_bytes] = values
        return Made(record, self._told((layer.prefix + name for name in made), expert))


def _never() -> Tensor:
    raise AssertionError("only described, never written as it is")
