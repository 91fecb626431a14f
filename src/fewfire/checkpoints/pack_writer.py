"""Packs written: tensor by tensor, each expert's record when its turn comes, wholly or not at all.

What the bytes of a parameter are comes from a `Source`: quantized weights, or random ones. Memory: one trunk tensor,
and a few expert records.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import fewfire
from fewfire import families
from fewfire.checkpoints import atomic
from fewfire.checkpoints.hub import COMPANIONS
from fewfire.checkpoints.pack import (
    CONFIG,
    EXPERTS,
    MANIFEST,
    PLAIN_DTYPES,
    TRUNK,
    VERSION,
    bytes_checksum,
    formats_to_json,
    manifest_checksum,
)
from fewfire.checkpoints.pack_layout import ExpertLayer, Layout, Placed, lay_out
from fewfire.checkpoints.shards import TORCH_DTYPES, Outgoing, write_safetensors
from fewfire.config import ModelConfig, check
from fewfire.errors import FormatError
from fewfire.formats import Encoded, sizes
from fewfire.kernels import crc32c
from fewfire.plan.memory import Formats


class Source(Protocol):
    """Where a pack's bytes come from. `encoded` may be called from several threads."""

    config: ModelConfig

    def encoded(self, name: str, expert: int | None, format_name: str, shape: tuple[int, ...]) -> Encoded:
        """Parameter `name` (row `expert` of a bank) in `format_name`."""
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
) -> None:
    """Write `folder` as a pack of `source` in `formats`. `companions`: a folder whose text-side files are copied.

    Raises: ConfigError where the folder is taken or the config has no hub form, FormatError from the source,
    BudgetError on a full disk: said before anything is written where the disk is seen to be too small.
    """
    folder = Path(folder)
    check(
        formats.packed,
        "a pack cannot hold native, fp16 or fp8 weights; choose q4, q8, mxfp4, bf16, f32 or a GGUF format",
    )
    config = dataclasses.replace(source.config, native_format="bf16", ignored=())
    layout = lay_out(config, formats)
    hub = families.write_config(config)
    writer = _Writer(source, layout, report or (lambda done, total: None))
    with atomic.replacing_folder(folder, overwrite=overwrite) as temporary:
        atomic_files = _small_files(temporary, hub, companions, tokenizer_files or {})
        trunk = writer.write_trunk(temporary / TRUNK)
        experts = writer.write_experts(temporary / EXPERTS)
        manifest: dict[str, Any] = {
            "pack_version": VERSION,
            "made_by": f"fewfire {fewfire.__version__}",
            "source": origin,
            "formats": formats_to_json(formats),
            "overrides": dict(formats.overrides),
            "files": atomic_files,
            "trunk": {"file": TRUNK, "bytes": layout.trunk_bytes, "checksums": trunk},
            "experts": {"file": EXPERTS, "bytes": layout.expert_bytes, "layers": experts},
        }
        manifest["checksum"] = manifest_checksum(manifest)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
    def __init__(self, source: Source, layout: Layout, report: Report):
        self.source, self.layout, self.report = source, layout, report
        self.total = layout.trunk_bytes + layout.expert_bytes
        self.done = 0
        self._last: tuple[str, Encoded] | None = None

    def _progress(self, num_bytes: int) -> None:
        self.done += num_bytes
        self.report(self.done, self.total)

    def _trunk_part(self, placed: Placed, kind: str) -> Tensor:
        """Codes or scales of a trunk tensor; both are asked for one after the other and made once."""
        if self._last is None or self._last[0] != placed.name:
            self._last = None
            self._last = (placed.name, self.source.encoded(placed.name, None, placed.format, placed.shape))
        return getattr(self._last[1], kind)

    def write_trunk(self, path: Path) -> dict[str, int]:
        """trunk.safetensors; the checksum of every tensor in it."""
        checksums: dict[str, int] = {}

        def outgoing(placed: Placed, name: str, kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Outgoing:
            def make() -> Tensor:
                values = self._trunk_part(placed, kind)
                checksums[name] = crc32c(values)
                self._progress(values.numel())
                return values.view(dtype).reshape(shape)

            return Outgoing(name, dtype, shape, make)

        tensors = []
        for placed in self.layout.trunk:
            size = sizes(placed.format, placed.shape)
            if placed.format in PLAIN_DTYPES:
                dtype = TORCH_DTYPES[PLAIN_DTYPES[placed.format]]
                tensors.append(outgoing(placed, placed.name, "codes", dtype, placed.shape))
                continue
            for kind in ("codes", "scales"):
                if getattr(size, kind):
                    shape = (getattr(size, kind),)
                    tensors.append(outgoing(placed, f"{placed.name}.{kind}", kind, torch.uint8, shape))
        write_safetensors(path, tensors, {"format": "fewfire"})
        self._last = None
        return checksums

    def write_experts(self, path: Path) -> list[dict[str, Any]]:
        """experts.bin, if there are experts; the manifest's entry of every layer."""
        entries: list[dict[str, Any]] = []
        if not self.layout.experts:
            return entries
        with open(path, "wb") as file:
            for layer in self.layout.experts:
                checksums = []
                for record in self._records(layer):
                    file.write(record.numpy().data)
                    checksums.append(crc32c(record))
                    self._progress(layer.record_bytes)
                entry = {"prefix": layer.prefix, "offset": layer.offset, "record_bytes": layer.record_bytes}
                entries.append(entry | {"checksums": checksums})
        return entries

    def _records(self, layer: ExpertLayer) -> Iterator[Tensor]:
        """Every expert's record in order, a few made ahead."""
        workers = max(1, min(4, os.cpu_count() or 1))
        with ThreadPoolExecutor(workers) as pool:
            waiting: deque[Future[Tensor]] = deque()
            try:
                for expert in range(layer.num_experts):
                    waiting.append(pool.submit(self._record, layer, expert))
                    if len(waiting) > workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for each in waiting:
                    each.cancel()

    def _record(self, layer: ExpertLayer, expert: int) -> Tensor:
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
        return record
