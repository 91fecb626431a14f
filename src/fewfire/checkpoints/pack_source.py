"""The values of one parameter at a time, from a hub-layout checkpoint of any family: what quantizing reads.

Owns the inverse of a family's tensor table: which hub tensor holds a parameter, or an expert's row of a bank.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from torch import Tensor

from fewfire.checkpoints.encodings import check_weights, read_values
from fewfire.checkpoints.hub import HubCheckpoint
from fewfire.checkpoints.shards import Shards
from fewfire.errors import FormatError
from fewfire.families import HubTensor, Piece, part

_KEPT = 4  # hub tensors held: neighbours read a fused one in turns


class HubValues:
    """Reads parameters of an opened checkpoint under our names. Threads: `read` may be called from several."""

    def __init__(self, checkpoint: HubCheckpoint):
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self._shards, self._lock = Shards(), threading.Lock()
        self._held: OrderedDict[tuple[str, int | None], Tensor] = OrderedDict()
        self._places: dict[tuple[str, int | None], tuple[HubTensor, Piece]] = {}
        for tensor in checkpoint.table:
            check_weights(checkpoint.stored[tensor.name])
            for piece in tensor.pieces:
                self._places[piece.ours, piece.row] = (tensor, piece)

    def close(self) -> None:
        self._shards.__exit__()

    def read(self, name: str, row: int | None = None) -> Tensor:
        """Parameter `name`, or row `row` of a bank, in the dtype in which it is stored (float32 for FP8)."""
        place = self._places.get((name, row))
        if place is not None:
            tensor, piece = place
            return part(self._load(tensor, None), _viewed(tensor), piece)
        stacked = self._places.get((name, None)) if row is not None else None
        if stacked is None or row is None:
            raise FormatError("is in no tensor of the checkpoint", path=str(self.checkpoint.folder), record=name)
        tensor, piece = stacked
        if self._splits(tensor, piece):
            values = self._load(tensor, row)
            return part(values, HubTensor(tensor.name, tuple(values.shape), (piece,)), piece)[0]
        return part(self._load(tensor, None), _viewed(tensor), piece)[row]

    def _splits(self, tensor: HubTensor, piece: Piece) -> bool:
        """Whether one row of the leading axis can be read apart."""
        shape = tensor.view or tensor.shape
        stored = self.checkpoint.stored[tensor.name]
        apart = stored.encoding == "plain" or (tensor.view is None and stored.step == 1)
        return apart and (piece.span is None or piece.axis > 0) and (not piece.transpose or len(shape) > 2)

    def _load(self, tensor: HubTensor, row: int | None) -> Tensor:
        """A hub tensor in its view, or one row of its leading axis with that axis kept; the last few are held."""
        key = (tensor.name, row)
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        stored = self.checkpoint.stored[tensor.name]
        if stored.encoding == "plain":
            stored = stored._replace(parts=(stored.parts[0]._replace(shape=tensor.view or tensor.shape),))
        values = read_values(self._shards, stored, None if row is None else (row, row + 1))
        if len(tensor.pieces) > 1 or (row is None and tensor.view is not None) or not self._small(tensor, row):
            with self._lock:
                self._held[key] = values
                while len(self._held) > _KEPT:
                    self._held.popitem(last=False)
        return values

    def _small(self, tensor: HubTensor, row: int | None) -> bool:
        """Whether it is read once only: one parameter of its own, or one row."""
        only = tensor.pieces[0]
        return row is not None or only.row is not None or not _is_bank(only.ours)


def _is_bank(name: str) -> bool:
    return ".experts." in name


def _viewed(tensor: HubTensor) -> HubTensor:
    """`part` reshapes to the view, which the values that were read already have."""
    return tensor._replace(shape=tensor.view or tensor.shape)
