"""Packs, fewfire's format for running: opened strictly, read part by part. Bytes: docs/pack.md; writing: pack_writer.

What a pack says of itself is compared with what its model and formats imply before any of it is believed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewfire import families
from fewfire.checkpoints.pack_layout import ExpertLayer, Layout, Placed, lay_out
from fewfire.checkpoints.shards import Shards
from fewfire.config import ModelConfig
from fewfire.errors import ConfigError, FormatError
from fewfire.files import read_regular
from fewfire.formats import PACK_FORMATS, Encoded, decode, sizes
from fewfire.headers import DTYPE_BYTES, TensorHeader, read_safetensors
from fewfire.kernels import crc32c
from fewfire.plan.memory import Formats, is_absorbed
from fewfire.plan.shapes import model_tensors

VERSION = 3  # 1 had CRC-32 checksums, 2 ggml's blocks row by row
MANIFEST, CONFIG, TRUNK, EXPERTS = "fewfire.json", "config.json", "trunk.safetensors", "experts.bin"
_MANIFEST_KEYS = {
    "pack_version", "made_by", "formats", "overrides", "files", "trunk", "experts", "source", "checksum",
}  # fmt: skip
PLAIN_DTYPES = {"f32": "F32", "bf16": "BF16"}


def is_pack(folder: str | Path) -> bool:
    """Whether `folder` is a pack (it has a manifest; nothing is checked)."""
    return (Path(folder) / MANIFEST).is_file()


def manifest_checksum(manifest: Mapping[str, Any]) -> int:
    """CRC-32C of the manifest without its own checksum, as compact JSON with sorted keys."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return bytes_checksum(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode("utf-8"))


def bytes_checksum(content: bytes) -> int:
    """CRC-32C of `content`."""
    return crc32c(torch.frombuffer(bytearray(content), dtype=torch.uint8)) if content else 0


def stored_parts(placed: Placed) -> list[tuple[str, str, tuple[int, ...]]]:
    """(tensor name, safetensors dtype, shape) under which trunk.safetensors holds one parameter."""
    size = sizes(placed.format, placed.shape)
    if placed.format in PLAIN_DTYPES:
        return [(placed.name, PLAIN_DTYPES[placed.format], placed.shape)]
    codes = (f"{placed.name}.codes", "U8", (size.codes,))
    return [codes, (f"{placed.name}.scales", "U8", (size.scales,))] if size.scales else [codes]


@dataclass(frozen=True)
class Pack:
    """An opened pack: everything checked but the weights' bytes, which are when they are read.

    Threads: reading may be done from several.
    """

    folder: Path
    config: ModelConfig
    formats: Formats
    layout: Layout
    manifest: Mapping[str, Any]
    trunk_headers: Mapping[str, TensorHeader]

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights: of experts.bin and of the trunk's tensors. `plan` says the same."""
        return self.layout.expert_bytes + self.layout.trunk_bytes

    def trunk_checksum(self, name: str) -> int:
        return int(self.manifest["trunk"]["checksums"][name])

    def expert_checksum(self, layer: int, expert: int) -> int:
        return int(self.manifest["experts"]["layers"][layer]["checksums"][expert])

    def read_trunk(self, placed: Placed, shards: Shards, *, verify: bool = True) -> Encoded:
        """A parameter of the trunk as it is stored. Raises FormatError where its bytes are not those written."""
        read = []
        for name, _, _ in stored_parts(placed):
            values = shards.read(self.trunk_headers[name]).reshape(-1).view(torch.uint8)
            if verify and crc32c(values) != self.trunk_checksum(name):
                header = self.trunk_headers[name]
                raise FormatError(DAMAGED, path=str(header.path), record=name, offset=header.offset)
            read.append(values)
        return Encoded(read[0], read[1] if len(read) > 1 else torch.empty(0, dtype=torch.uint8))

    def read_expert(self, layer: int, expert: int, *, verify: bool = True) -> Tensor:
        """The record (uint8) of expert `expert` of the `layer`-th MoE layer. Raises as `read_trunk`."""
        place = self.layout.experts[layer]
        name, path = record_name(place, expert), self.folder / EXPERTS
        header = TensorHeader(name, "U8", (place.record_bytes,), path, place.record_offset(expert), place.record_bytes)
        with Shards() as shards:
            record = shards.read(header)
        if verify and crc32c(record) != self.expert_checksum(layer, expert):
            raise FormatError(DAMAGED, path=str(path), record=name, offset=header.offset)
        return record

    def parameters(self, *, with_experts: bool = True) -> Iterator[tuple[str, int | None, Tensor]]:
        """(name, expert or None, float32 values) of every parameter, one at a time, checked against its checksum."""
        with Shards() as shards:
            for placed in self.layout.trunk:
                yield placed.name, None, decode(self.read_trunk(placed, shards), placed.format, placed.shape)
        for number, layer in enumerate(self.layout.experts if with_experts else ()):
            for expert in range(layer.num_experts):
                record = self.read_expert(number, expert)
                for placed in layer.matrices:
                    values = decode(cut_record(layer, record, placed.name), placed.format, placed.shape)
                    yield layer.prefix + placed.name, expert, values


DAMAGED = "is not what was written (its checksum differs); copy or make the pack again"


def record_name(layer: ExpertLayer, expert: int) -> str:
    """How errors name an expert's record: `layers.3.ffn.experts[17]`."""
    return f"{layer.prefix[:-1]}[{expert}]"


def cut_record(layer: ExpertLayer, record: Tensor, name: str) -> Encoded:
    """The codes and scales of parameter `name` within an expert's record; no copy."""
    found = {part.kind: record[part.offset : part.offset + part.num_bytes] for part in layer.parts if part.name == name}
    return Encoded(found["codes"], found.get("scales", torch.empty(0, dtype=torch.uint8)))


# ----------------------------------------------------------------------------------------------------------- opening


def open_pack(folder: str | Path) -> Pack:
    """Read and check the manifest, the config and all sizes of a pack; no weight is read.

    Raises: ConfigError where a file cannot be read, FormatError naming file, record and offset where the pack is
    damaged, incomplete, or of a later version.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST)
    _check_files(folder, manifest)
    config = families.read_config(_read_object(folder / CONFIG))
    formats = _formats(folder / MANIFEST, manifest, config)
    layout = lay_out(config, formats)
    _check_experts(folder, manifest, layout)
    headers = _check_trunk(folder, manifest, layout)
    return Pack(folder, config, formats, layout, manifest, headers)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        raw = read_regular(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); name the folder of a pack") from error
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        where = error.pos if isinstance(error, json.JSONDecodeError) else None
        raise FormatError("is no JSON; copy or make the pack again", path=str(path), offset=where) from error
    if not isinstance(value, dict):
        raise FormatError(f"holds a {type(value).__name__}, expected a JSON object", path=str(path))
    return value


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = _read_object(path)
    version = manifest.get("pack_version")
    if type(version) is not int or version < VERSION:
        raise FormatError(
            f"is {version!r}, this fewfire reads {VERSION}; make the pack again", path=str(path), record="pack_version"
        )
    if version > VERSION:
        raise FormatError(
            f"is {version}, this fewfire reads {VERSION}; update fewfire, or make the pack again",
            path=str(path),
            record="pack_version",
        )
    missing = sorted(_MANIFEST_KEYS - manifest.keys())
    if missing:
        raise FormatError("is missing; copy or make the pack again", path=str(path), record=missing[0])
    if manifest["checksum"] != manifest_checksum(manifest):
        raise FormatError(DAMAGED, path=str(path))
    for key in ("formats", "overrides", "files", "trunk", "experts"):
        if not isinstance(manifest[key], dict):
            raise FormatError(f"is {str(manifest[key])[:60]!r}, expected an object", path=str(path), record=key)
    return manifest


def _formats(path: Path, manifest: Mapping[str, Any], config: ModelConfig) -> Formats:
    parts, named = [field.name for field in fields(Formats) if field.type in ("str", str)], manifest["formats"]
    if set(named) != set(parts):
        odd = sorted(set(named) ^ set(parts))[0]
        raise FormatError(f"formats are wanted for {', '.join(parts)}", path=str(path), record=f"formats.{odd}")
    for key in ("formats", "overrides"):
        for name, format_name in manifest[key].items():
            _check_format(path, f"{key}.{name}", format_name, PACK_FORMATS)
    _check_format(path, "formats.small", named["small"], PLAIN_DTYPES)
    chosen: dict[str, Any] = {part: str(named[part]) for part in parts}
    return _override(path, Formats(**chosen), manifest["overrides"], config)


def _check_format(path: Path, record: str, found: Any, allowed: Iterable[str]) -> None:
    if found not in tuple(allowed):
        message = f"is {str(found)[:40]!r}, expected one of {', '.join(allowed)}"
        raise FormatError(message, path=str(path), record=record)


def _override(path: Path, formats: Formats, overrides: Mapping[str, str], config: ModelConfig) -> Formats:
    """`formats` with the parameters that have one of their own: only the model's, and only what can be run."""
    if not overrides:
        return formats
    specs = {spec.name: spec for spec in model_tensors(config)}
    for name, format_name in overrides.items():
        record = f"overrides.{name}"
        if name not in specs or specs[name].kind == "select_bias":
            raise FormatError("is no parameter whose format can be chosen", path=str(path), record=record)
        if formats.part(specs[name]) in ("small", "router") or is_absorbed(specs[name]):
            _check_format(path, record, format_name, PLAIN_DTYPES)
    return replace(formats, overrides=dict(overrides))


def formats_to_json(formats: Formats) -> dict[str, str]:
    """What the manifest says of the formats of parts."""
    return {key: value for key, value in asdict(formats).items() if isinstance(value, str)}


def _check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """The small files, byte for byte: config.json and what came with the model."""
    files = manifest["files"]
    if CONFIG not in files:
        raise FormatError("is not listed; make the pack again", path=str(folder / MANIFEST), record=f"files.{CONFIG}")
    for name, entry in files.items():
        if Path(name).name != name or not isinstance(entry, dict) or set(entry) != {"bytes", "checksum"}:
            raise FormatError("is no entry of a file", path=str(folder / MANIFEST), record=f"files.{name}")
        if type(entry["bytes"]) is not int or entry["bytes"] < 0:
            raise FormatError("is no number of bytes", path=str(folder / MANIFEST), record=f"files.{name}.bytes")
        path = folder / name
        try:
            _check_size(path, entry["bytes"])
            content = read_regular(path)
        except OSError as error:
            raise FormatError(f"cannot be read ({error.strerror}); complete the pack", path=str(path)) from error
        if bytes_checksum(content) != entry["checksum"]:
            raise FormatError(DAMAGED, path=str(path))


def _check_experts(folder: Path, manifest: Mapping[str, Any], layout: Layout) -> None:
    path, listed = str(folder / MANIFEST), manifest["experts"].get("layers")
    _check_says(manifest["experts"], {"file": EXPERTS, "bytes": layout.expert_bytes}, path, "experts")
    if not isinstance(listed, list) or len(listed) != len(layout.experts):
        raise FormatError(f"expected {len(layout.experts)} layers of experts", path=path, record="experts.layers")
    for number, (entry, layer) in enumerate(zip(listed, layout.experts, strict=True)):
        expected = {"prefix": layer.prefix, "offset": layer.offset, "record_bytes": layer.record_bytes}
        record = f"experts.layers[{number}]"
        _check_says(entry, expected, path, record)
        _check_checksums(entry.get("checksums"), layer.num_experts, path, record)
    if not layout.experts:
        return
    _check_size(folder / EXPERTS, layout.expert_bytes)


def _check_checksums(values: Any, count: int, path: str, record: str) -> None:
    if not isinstance(values, list) or len(values) != count or not all(type(each) is int for each in values):
        raise FormatError(f"expected {count} checksums", path=path, record=record)


def _check_size(path: Path, expected: int) -> None:
    try:
        found = os.stat(path).st_size
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror}); complete the pack", path=str(path)) from error
    if found != expected:
        message = f"is {found} bytes long, expected {expected}; copy or make the pack again"
        raise FormatError(message, path=str(path), offset=min(found, expected))


def _check_says(entry: Any, expected: Mapping[str, Any], path: str, record: str) -> None:
    if not isinstance(entry, dict) or {key: entry.get(key) for key in expected} != expected:
        raise FormatError(f"does not say {expected}, which config and formats imply", path=path, record=record)


def _check_trunk(folder: Path, manifest: Mapping[str, Any], layout: Layout) -> dict[str, TensorHeader]:
    expected_file = {"file": TRUNK, "bytes": layout.trunk_bytes}
    _check_says(manifest["trunk"], expected_file, str(folder / MANIFEST), "trunk")
    path = folder / TRUNK
    headers = read_safetensors(path)
    expected = {name: (dtype, shape) for placed in layout.trunk for name, dtype, shape in stored_parts(placed)}
    odd = sorted(headers.keys() ^ expected.keys())
    if odd:
        what = "is no part of this model" if odd[0] in headers else "is missing"
        raise FormatError(f"{what}; make the pack again", path=str(path), record=odd[0])
    for name, (dtype, shape) in expected.items():
        header = headers[name]
        if (header.dtype, header.shape) != (dtype, shape):
            raise FormatError(
                f"is {header.dtype} {list(header.shape)}, expected {dtype} {list(shape)}", path=str(path), record=name
            )
        assert header.num_bytes == DTYPE_BYTES[dtype] * torch.Size(shape).numel()
    listed = manifest["trunk"].get("checksums")
    if not isinstance(listed, dict) or set(listed) != set(expected):
        raise FormatError("does not list the trunk's tensors", path=str(folder / MANIFEST), record="trunk.checksums")
    _check_checksums(list(listed.values()), len(expected), str(folder / MANIFEST), "trunk.checksums")
    return headers


# --------------------------------------------------------------------------------------------------------- verifying


@dataclass(frozen=True)
class Verified:
    """What `verify_pack` read: everything, and all of it as written."""

    tensors: int
    experts: int
    num_bytes: int


def verify_pack(folder: str | Path) -> Verified:
    """Read every byte of a pack and compare all checksums. Raises as `open_pack`, at the first that differs."""
    pack = open_pack(folder)
    with Shards() as shards:
        for placed in pack.layout.trunk:
            pack.read_trunk(placed, shards)
    for number, layer in enumerate(pack.layout.experts):
        for expert in range(layer.num_experts):
            pack.read_expert(number, expert)
    experts = sum(layer.num_experts for layer in pack.layout.experts)
    return Verified(len(pack.trunk_headers), experts, pack.num_bytes)
