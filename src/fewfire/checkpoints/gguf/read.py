"""Open a GGUF file and give its values to a module: checked first, decoded tensor by tensor, in one copy.

Decoding is the gguf library's, in float32, exactly as ggml defines each block.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewfire import families
from fewfire.checkpoints.fill import SCRATCH_BYTES, Placed, give_values, run_dtypes
from fewfire.checkpoints.gguf.architectures import hub_config
from fewfire.checkpoints.gguf.layout import Slot, as_stored, slots
from fewfire.checkpoints.gguf.metadata import Metadata
from fewfire.checkpoints.shards import Shards
from fewfire.config import ModelConfig
from fewfire.errors import FormatError
from fewfire.headers import GgufHeader, GgufTensor, TensorHeader, read_gguf

PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_FORMATS = {"f32": "f32", "f16": "fp16", "bf16": "bf16"}
# Types whose values are weights; the other ones are integers.
DECODED = frozenset(
    "f32 f16 bf16 q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k q4_k q5_k q6_k iq1_s iq1_m iq2_xxs iq2_xs iq2_s iq3_xxs iq3_s "
    "iq4_nl iq4_xs tq1_0 tq2_0 mxfp4".split()
)
_SMALL_VALUES = 4096


@dataclass(frozen=True)
class GgufCheckpoint:
    """An opened GGUF file: everything checked but the values. `ignored`: tensors of the file that nothing needs."""

    header: GgufHeader
    config: ModelConfig
    table: tuple[Slot, ...]
    ignored: tuple[str, ...]

    @property
    def files(self) -> list[Path]:
        """The files that decide what it is."""
        return [self.header.path]

    def fill(self, module: nn.Module, *, dtype: torch.dtype | None = None, exact: bool = False) -> None:
        """Give every parameter and buffer of `module`, built on the meta device, its values: each is made once.

        `dtype` None: f16 and bf16 files as they are, quantized ones in float32; norms and routers as stored.
        `exact`: every tensor keeps its dtype. Raises: FormatError where the file is damaged.
        """
        tensors, found = self.header.tensors, dict[str, torch.dtype]()
        sizes: Counter[torch.dtype] = Counter()
        for slot in self.table:
            own = PLAIN.get(tensors[slot.name].type, torch.float32)
            sizes[own] += math.prod(slot.shape)
            for part in slot.parts:
                found[part.ours] = torch.promote_types(found.get(part.ours, own), own)
        jobs = [job for slot in self.table for job in _jobs(slot, tensors[slot.name])]
        jobs.sort(key=lambda job: job.tensor.offset)
        with Shards() as shards:
            dtypes = found if exact else run_dtypes(found, sizes, dtype)
            give_values(module, dtypes, jobs, lambda job, into: _place(job, into, shards))

    def run_bytes(self, dtype: torch.dtype | None = None) -> int:
        """What `fill` makes of it in memory, but for the small tensors that keep a wider precision of their own."""
        values = Counter[torch.dtype]()
        for slot in self.table:
            values[PLAIN.get(self.header.tensors[slot.name].type, torch.float32)] += math.prod(slot.shape)
        return values.total() * (dtype or values.most_common(1)[0][0]).itemsize if values else 0


def open_gguf(path: str | Path, *, ignore: Iterable[str] = ()) -> GgufCheckpoint:
    """Read a GGUF file's metadata and tensor headers. `ignore`: metadata keys to leave aside, in full.

    Raises: ConfigError for an architecture that is not known; FormatError naming the first key or tensor that is
    missing, of another shape, unknown, or of a type that holds no weights.
    """
    header = read_gguf(path)
    if header.metadata.get("split.count", 0) not in (0, 1):
        raise FormatError("is one part of several; join them with llama.cpp's gguf-split --merge", path=str(path))
    metadata = Metadata(header, lambda name: _small_values(header, name))
    hub = hub_config(metadata, frozenset(ignore))
    config = families.read_config(hub)
    sizes: Counter[str] = Counter()
    for tensor in header.tensors.values():
        sizes[tensor.type] += tensor.num_bytes
    most = sizes.most_common(1)[0][0]
    config = dataclasses.replace(config, native_format=_FORMATS.get(most, most))
    table = slots(config, frozenset(header.tensors))
    return GgufCheckpoint(header, config, tuple(table), _compare(header, config, table))


def _compare(header: GgufHeader, config: ModelConfig, table: list[Slot]) -> tuple[str, ...]:
    """The tensors to ignore; FormatError at the first that does not fit."""
    path, expected = str(header.path), {slot.name for slot in table}
    for slot in table:
        tensor = header.tensors.get(slot.name)
        if tensor is None:
            raise FormatError("is missing, and the metadata describes a model that has it", path=path, record=slot.name)
        if tensor.shape != slot.shape:
            message = f"has shape {list(tensor.shape)}, the metadata implies {list(slot.shape)}; one of them is wrong"
            raise FormatError(message, path=path, record=slot.name)
        if tensor.type not in DECODED:
            raise FormatError(f"is {tensor.type}, which holds no weights", path=path, record=slot.name)
    surplus = [name for name in header.tensors if name not in expected]
    last = len(config.layers)
    for name in surplus:
        layer = re.match(r"blk\.(\d+)\.", name)
        predicts = layer is not None and int(layer.group(1)) >= last  # multi-token prediction
        if not predicts and name != "rope_freqs.weight" and not (name == "output.weight" and config.tied_head):
            raise FormatError("is no part of the model that the metadata describes", path=path, record=name)
    return tuple(surplus)


class _Job(NamedTuple):
    slot: Slot
    tensor: GgufTensor
    rows: tuple[int, int] | None


def _jobs(slot: Slot, tensor: GgufTensor) -> Iterator[_Job]:
    """A plain tensor in runs of its first axis, so that the float32 of a run fits the scratch; others whole."""
    if not slot.plain or len(slot.shape) < 2:
        yield _Job(slot, tensor, None)
        return
    step = max(1, SCRATCH_BYTES // max(4 * math.prod(slot.shape[1:]), 1))
    for start in range(0, slot.shape[0], step):
        yield _Job(slot, tensor, (start, min(start + step, slot.shape[0])))


def _place(job: _Job, targets: Mapping[str, Tensor], shards: Shards) -> Placed:
    slot, tensor, rows = job
    if slot.plain:
        target = targets[slot.parts[0].ours]
        into = target if rows is None else target[slice(*rows)]
        if into.dtype == PLAIN.get(tensor.type):
            shards.read_into(_bytes_header(tensor, rows), into.view(-1).view(torch.uint8))
        else:
            into.copy_(decode_rows(shards, tensor, rows).reshape(into.shape))
        return [(slot.parts[0].ours, into.numel())]
    values, placed, start = decode_rows(shards, tensor, None), [], 0
    for part in slot.parts:
        into = as_stored(targets[part.ours], part)
        given = values.reshape(-1)[start : start + into.numel()]
        into.copy_(given.reshape(into.shape))
        placed.append((part.ours, into.numel()))
        start += into.numel()
    return placed


def _bytes_header(tensor: GgufTensor, rows: tuple[int, int] | None) -> TensorHeader:
    """The bytes of some rows of the first axis."""
    start, stop = rows or (0, tensor.shape[0])
    num_bytes, offset = tensor.num_bytes, tensor.offset
    if (start, stop) != (0, tensor.shape[0]):
        row_bytes = tensor.num_bytes // tensor.shape[0]
        num_bytes, offset = (stop - start) * row_bytes, offset + start * row_bytes
    return TensorHeader(tensor.name, "U8", (num_bytes,), tensor.path, offset, num_bytes)


def read_rows(shards: Shards, tensor: GgufTensor, rows: tuple[int, int] | None) -> Tensor:
    """The bytes (uint8 (N, bytes)) of some rows of the first axis; N are all axes but the last."""
    found = shards.read(_bytes_header(tensor, rows))
    return found.reshape(-1, tensor.num_bytes // max(math.prod(tensor.shape[:-1]), 1))


def decode_rows(shards: Shards, tensor: GgufTensor, rows: tuple[int, int] | None) -> Tensor:
    """Values of some rows of the first axis, flat: as stored for plain types, float32 for blocks."""
    if tensor.type in PLAIN:
        return shards.read(_bytes_header(tensor, rows)).view(PLAIN[tensor.type])
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    blocks = read_rows(shards, tensor, rows).numpy()
    with np.errstate(all="ignore"):  # damaged scales may be NaN or infinite; sampling says so
        return torch.from_numpy(dequantize(blocks, GGMLQuantizationType[tensor.type.upper()])).reshape(-1)


def _small_values(header: GgufHeader, name: str) -> list[float]:
    """A small float tensor whose values are part of the config."""
    tensor = header.tensors[name]
    if tensor.type != "f32" or math.prod(tensor.shape) > _SMALL_VALUES:
        raise FormatError("is no short float32 table; download the file again", path=str(header.path), record=name)
    with Shards() as shards:
        return [float(f"{value:.7g}") for value in decode_rows(shards, tensor, None).tolist()]
