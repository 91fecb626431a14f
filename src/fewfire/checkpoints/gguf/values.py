"""The values of one parameter at a time from a GGUF file, or the blocks that hold them: what packing reads.

Owns which GGUF tensor holds a parameter, or an expert's matrix of a bank, and whether its blocks survive the way there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewfire.checkpoints.gguf.layout import Part, as_stored
from fewfire.checkpoints.gguf.read import PLAIN, GgufCheckpoint, decode_rows, read_rows
from fewfire.checkpoints.shards import Shards
from fewfire.errors import FormatError
from fewfire.families.parameters import parameters
from fewfire.headers import GgufTensor

# ggml types -> the format in which a pack holds exactly their values.
HOMES = {
    "f32": "f32", "f16": "f32", "bf16": "bf16", "mxfp4": "mxfp4",
    "q4_0": "q4_0", "q4_1": "q4_1", "q8_0": "q8_0", "q4_k": "q4_k", "q6_k": "q6_k",
}  # fmt: skip


class _Place(NamedTuple):
    """Where a parameter, or a part of it, lies: from row `start` of the tensor's first axis up to `stop`."""

    tensor: GgufTensor
    part: Part
    start: int
    stop: int


class GgufValues:
    """Reads parameters of an opened GGUF file under our names. Threads: reading may be done from several."""

    def __init__(self, checkpoint: GgufCheckpoint):
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self._shapes = parameters(checkpoint.config)
        self._shards = Shards()
        self._places: dict[str, list[_Place]] = {}
        for slot in checkpoint.table:
            start = 0
            for part in slot.parts:
                count = slot.shape[0] if len(slot.parts) == 1 else self._shapes[part.ours][0]
                place = _Place(checkpoint.header.tensors[slot.name], part, start, start + count)
                self._places.setdefault(part.ours, []).append(place)
                start += count

    def close(self) -> None:
        self._shards.__exit__()

    def types(self, name: str) -> tuple[str, ...]:
        """The ggml types of the tensors that hold parameter `name`."""
        return tuple(sorted({place.tensor.type for place in self._at(name)}))

    def home(self, name: str) -> str | None:
        """The format in which a pack can hold exactly what the file does; None where there is none."""
        places = self._at(name)
        return HOMES.get(places[0].tensor.type) if len(places) == 1 and places[0].part.latent is None else None

    def read(self, name: str, row: int | None = None) -> Tensor:
        """Parameter `name`, or row `row` of a bank: as stored where that is a plain type, else float32."""
        shape, places = self._shapes[name], self._at(name)
        if row is not None:
            return decode_rows(self._shards, places[0].tensor, (row, row + 1)).reshape(shape[1:])
        dtypes = {PLAIN.get(place.tensor.type, torch.float32) for place in places}
        values = torch.empty(shape, dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32)
        for tensor, part, start, stop in places:
            target = as_stored(values, part)
            target.copy_(decode_rows(self._shards, tensor, (start, stop)).reshape(target.shape))
        return values

    def read_blocks(self, name: str, row: int | None = None) -> Tensor:
        """The rows (uint8 (N, bytes)) of blocks of parameter `name`, or of row `row` of a bank, in our order."""
        (place,) = self._at(name)
        first = (place.start, place.stop) if row is None else (row, row + 1)
        stored = read_rows(self._shards, place.tensor, first)
        if place.part.paired is None:
            return stored
        rows = torch.empty_like(stored)
        target = as_stored(rows, place.part)
        target.copy_(stored.reshape(target.shape))
        return rows

    def _at(self, name: str) -> list[_Place]:
        if name not in self._places:
            path = str(self.checkpoint.header.path)
            raise FormatError("is in no tensor of the file", path=path, record=name)
        return self._places[name]
