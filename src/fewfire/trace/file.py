"""The trace file: which experts every token was sent to, in one safetensors file (docs/trace.md).

Bytes from outside are hostile: a file is believed only after everything in it was compared with everything else.
T tokens, L MoE layers, K experts of a token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewfire.checkpoints.atomic import replacing_file
from fewfire.checkpoints.shards import FILE_DTYPES, Outgoing, Shards, write_safetensors_into
from fewfire.config import check
from fewfire.errors import FormatError
from fewfire.headers import TensorHeader, read_metadata, read_safetensors

FORMAT, VERSION = "fewfire trace", 1
IDS, WEIGHTS, DOCUMENTS, TOKENS = "ids", "weights", "documents", "tokens"
_DTYPES = {IDS: ("I16", "I32"), WEIGHTS: ("F16", "BF16", "F32"), DOCUMENTS: ("I64",), TOKENS: ("I32",)}


@dataclass(frozen=True)
class Trace:
    """Routing of T tokens in the order in which they were read.

    `ids_TLK`: int16 or int32, distinct along K, -1 where nobody is (a rule that chose fewer, a dropped token).
    `weights_TLK`: float16, bfloat16 or float32. `documents`: offsets, D + 1 of them; each document began with an empty
    cache. `tokens`: the ids of the text (T,) int32, or None. `layers`: index in the model of each MoE layer,
    `num_experts` and `top_k` of each. `sources`: a name for each document, or nothing.

    Raises: ConfigError where these do not fit one another.
    """

    ids_TLK: Tensor
    weights_TLK: Tensor
    documents: tuple[int, ...]
    layers: tuple[int, ...]
    num_experts: tuple[int, ...]
    top_k: tuple[int, ...]
    model: str = ""
    tokens: Tensor | None = None
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        num_tokens, num_layers, width = self.ids_TLK.shape
        check(num_tokens > 0 and num_layers > 0 and width > 0, "a trace needs a token, a layer and an expert at least")
        check(
            self.ids_TLK.dtype in (torch.int16, torch.int32), f"ids are {self.ids_TLK.dtype}, expected int16 or int32"
        )
        check(self.weights_TLK.shape == self.ids_TLK.shape, "weights and ids differ in shape")
        check(bool(torch.isfinite(self.weights_TLK).all()), "a weight is not finite")
        for name in ("layers", "num_experts", "top_k"):
            values = getattr(self, name)
            check(len(values) == num_layers, f"{name} has {len(values)} entries for {num_layers} layers")
        check(all(low < high for low, high in pairwise((-1, *self.layers))), "layers must be rising indices")
        for experts, top_k in zip(self.num_experts, self.top_k):
            check(1 <= top_k <= min(experts, width), f"top_k ({top_k}) must lie between 1 and {min(experts, width)}")
        starts = self.documents
        whole = len(starts) >= 2 and starts[0] == 0 and starts[-1] == num_tokens
        check(whole and all(a < b for a, b in pairwise(starts)), f"documents must rise from 0 to {num_tokens}")
        check(len(self.sources) in (0, self.num_documents), "sources and documents differ in number")
        if self.tokens is not None:
            check(self.tokens.shape == (num_tokens,), "tokens and ids differ in number")
            check(self.tokens.dtype == torch.int32 and int(self.tokens.min()) >= 0, "tokens must be int32, 0 or more")
        self._check_ids()

    def _check_ids(self) -> None:
        limit_L1 = torch.tensor(self.num_experts)[:, None]
        good = (self.ids_TLK >= -1) & (self.ids_TLK < limit_L1)
        check(bool(good.all()), "an expert's id is outside its layer")
        sorted_TLK = self.ids_TLK.sort(dim=-1).values
        twice = (sorted_TLK[..., 1:] == sorted_TLK[..., :-1]) & (sorted_TLK[..., 1:] >= 0)
        check(not bool(twice.any()), "a token has an expert twice")

    @property
    def num_tokens(self) -> int:
        return self.ids_TLK.shape[0]

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    @property
    def num_records(self) -> int:
        """Experts of all layers: what a cache may hold."""
        return sum(self.num_experts)

    def counts(self) -> list[Tensor]:
        """For each layer how often each of its experts was chosen: int64 (num_experts,)."""
        return [
            torch.bincount(ids_TK[ids_TK >= 0].long(), minlength=experts)
            for ids_TK, experts in zip(self.ids_TLK.unbind(1), self.num_experts, strict=True)
        ]


def write_trace(path: str | Path, trace: Trace, metadata: dict[str, str] | None = None) -> None:
    """`trace` becomes the whole of `path`, or nothing changes. `metadata`: more keys for readers that look no further
    than the header. Raises: as `checkpoints.atomic.replacing_file`."""
    tensors = {
        IDS: trace.ids_TLK,
        WEIGHTS: trace.weights_TLK,
        DOCUMENTS: torch.tensor(trace.documents, dtype=torch.int64),
    }
    if trace.tokens is not None:
        tensors[TOKENS] = trace.tokens
    about = {
        "model": trace.model,
        "layers": trace.layers,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "sources": trace.sources,
    }
    head = {**(metadata or {}), "format": FORMAT, "version": str(VERSION), "trace": json.dumps(about)}
    outgoing = [Outgoing(name, each.dtype, tuple(each.shape), partial(_same, each)) for name, each in tensors.items()]
    assert all(FILE_DTYPES[each.dtype] in _DTYPES[each.name] for each in outgoing)
    with replacing_file(path) as file:
        write_safetensors_into(file, outgoing, head)


def _same(values: Tensor) -> Tensor:
    return values


def read_trace(path: str | Path) -> Trace:
    """The trace at `path`.

    Raises: ConfigError where the file cannot be read, FormatError where it is none, or its parts disagree.
    """
    path = Path(path)
    about = _about(path)
    headers = read_safetensors(path)
    _check_headers(path, headers)
    with Shards() as shards:
        tensors = {name: shards.read(header) for name, header in headers.items()}
    try:
        return Trace(
            tensors[IDS],
            tensors[WEIGHTS],
            tuple(tensors[DOCUMENTS].tolist()),
            tokens=tensors.get(TOKENS),
            **about,
        )
    except ValueError as error:  # ConfigError: what a Trace refuses
        raise FormatError(f"{error}; record the trace again", path=str(path)) from error


def _check_headers(path: Path, headers: dict[str, TensorHeader]) -> None:
    def wrong(name: str, message: str) -> FormatError:
        return FormatError(f"{message}; record the trace again", path=str(path), record=name)

    odd = sorted((headers.keys() - _DTYPES.keys()) | (_DTYPES.keys() - {TOKENS} - headers.keys()))
    if odd:
        raise wrong(odd[0], "is no part of a trace" if odd[0] in headers else "is missing")
    for name, header in headers.items():
        if header.dtype not in _DTYPES[name]:
            raise wrong(name, f"is {header.dtype}, expected {' or '.join(_DTYPES[name])}")
        ranks = 3 if name in (IDS, WEIGHTS) else 1
        if len(header.shape) != ranks:
            raise wrong(name, f"has shape {list(header.shape)}, expected {ranks} dimension{'s' * (ranks > 1)}")


def _about(path: Path) -> dict[str, Any]:
    """What the header says of the trace, checked in itself."""
    metadata = read_metadata(path)
    if metadata.get("format") != FORMAT:
        raise FormatError(
            f"is no trace; `fewfire trace` writes one (format {metadata.get('format')!r})", path=str(path)
        )
    if metadata.get("version") != str(VERSION):
        message = f"has version {metadata.get('version')!r}, expected {VERSION}; record the trace again"
        raise FormatError(message, path=str(path), record="version")
    try:
        about = json.loads(metadata.get("trace", ""))
    except (ValueError, RecursionError) as error:
        raise FormatError("is no JSON; record the trace again", path=str(path), record="trace") from error
    kinds = {"model": str, "layers": int, "num_experts": int, "top_k": int, "sources": str}
    if not isinstance(about, dict) or about.keys() != kinds.keys():
        raise FormatError(f"expected {', '.join(kinds)}", path=str(path), record="trace")
    for name, kind in kinds.items():
        values = [about[name]] if name == "model" else about[name]
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise FormatError(f"{name} is not what it should be", path=str(path), record="trace")
        if kind is int and not all(0 <= value < 2**31 for value in values):
            raise FormatError(f"{name} holds numbers out of range", path=str(path), record="trace")
    return {name: value if name == "model" else tuple(value) for name, value in about.items()}
