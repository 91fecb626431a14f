"""Hub tensors into the parameters of a module on the meta device: each parameter made once, never a second copy.

What lies in the file as it lies in the parameter is read straight into it; the rest passes through a scratch of at
most about `SCRATCH_BYTES` a thread.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewfire.checkpoints.encodings import Stored, check_weights, read_values, rows_header
from fewfire.checkpoints.shards import Shards
from fewfire.errors import FewfireError, FormatError
from fewfire.families import HubTensor, Piece, part

SCRATCH_BYTES = 64 * 2**20  # of float32, whatever the files hold
_SMALL = ("norm", "router", "sinks", "select_bias", "head_weights", "a_log", "dt_bias")


class Chunk(NamedTuple):
    """A hub tensor, or a run of its rows along the leading axis (of the view), read and placed at once."""

    tensor: HubTensor
    stored: Stored
    rows: tuple[int, int] | None


class Filler:
    """One fill of one module. `run` does it; see `HubCheckpoint.fill` for what the arguments mean."""

    def __init__(
        self,
        table: Sequence[HubTensor],
        stored: Mapping[str, Stored],
        module: nn.Module,
        *,
        dtype: torch.dtype | None,
        exact: bool,
    ):
        self.table, self.stored, self.module = table, stored, module
        self.targets = _allocate(module, _parameter_dtypes(table, stored, dtype, exact))
        self._filled: Counter[str] = Counter()

    def run(self) -> None:
        chunks = sorted(self._chunks(), key=lambda chunk: (*chunk.stored.where, chunk.rows or (0, 0)))
        with Shards() as shards, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            try:
                for placed in pool.map(lambda chunk: self._place(chunk, shards), chunks):
                    for name, count in placed:
                        self._filled[name] += count
            except FewfireError:
                pool.shutdown(cancel_futures=True)
                raise
        for name, values in self.targets.items():
            if self._filled[name] != values.numel():
                raise FormatError(f"{self._filled[name]} of {values.numel()} values were given", record=name)
        self.module.load_state_dict(self.targets, strict=True, assign=True)
        left = [name for name, values in _tensors(self.module) if values.is_meta]
        assert not left, f"{left} are not part of the state and were left without values"

    def _chunks(self) -> Iterator[Chunk]:
        for tensor in self.table:
            stored, shape = self.stored[tensor.name], tensor.view or tensor.shape
            if not _splits(tensor, stored):
                yield Chunk(tensor, stored, None)
                continue
            rows = max(1, SCRATCH_BYTES // max(4 * math.prod(shape[1:]), 1))
            rows = max(stored.step, rows - rows % stored.step)
            for start in range(0, shape[0], rows):
                yield Chunk(tensor, stored, (start, min(start + rows, shape[0])))

    def _place(self, chunk: Chunk, shards: Shards) -> list[tuple[str, int]]:
        """Read `chunk` into the parameters; (name, number of values) of each that was given some."""
        tensor, stored, rows = chunk
        destinations = [(piece, self._destination(piece, rows)) for piece in tensor.pieces]
        first, only = destinations[0][1], tensor.pieces[0]
        as_it_lies = len(tensor.pieces) == 1 and not only.transpose and only.span is None and stored.encoding == "plain"
        if as_it_lies and first.is_contiguous() and first.dtype == stored.dtype:
            header = stored.parts[0]._replace(shape=tensor.view or tensor.shape)
            shards.read_into(header if rows is None else rows_header(header, *rows), first)
        else:
            if stored.encoding == "plain":
                stored = stored._replace(parts=(stored.parts[0]._replace(shape=tensor.view or tensor.shape),))
            values = read_values(shards, stored, rows)
            viewed = HubTensor(tensor.name, tuple(values.shape), tensor.pieces)
            for piece, destination in destinations:
                given = part(values, viewed, piece)
                assert given.shape == destination.shape, f"{tensor.name} -> {piece}: {given.shape}, {destination.shape}"
                destination.copy_(given)
        return [(piece.ours, destination.numel()) for piece, destination in destinations]

    def _destination(self, piece: Piece, rows: tuple[int, int] | None) -> Tensor:
        target = self.targets[piece.ours]
        if piece.row is not None:
            target = target[piece.row]
        return target if rows is None else target[slice(*rows)]


def _splits(tensor: HubTensor, stored: Stored) -> bool:
    """Whether rows of the leading axis are rows of every piece: then the tensor can be read in runs of them."""
    shape = tensor.view or tensor.shape
    if not shape or (stored.encoding != "plain" and tensor.view is not None):
        return False
    return all(
        (piece.span is None or piece.axis > 0) and (not piece.transpose or len(shape) > 2) for piece in tensor.pieces
    )


def _parameter_dtypes(
    table: Sequence[HubTensor], stored: Mapping[str, Stored], dtype: torch.dtype | None, exact: bool
) -> dict[str, torch.dtype]:
    """The dtype of each parameter that `table` fills. Raises FormatError for values that are no weights."""
    found: dict[str, torch.dtype] = {}
    sizes: Counter[torch.dtype] = Counter()
    for tensor in table:
        source = stored[tensor.name]
        check_weights(source)
        own = torch.float32 if source.dtype == torch.float64 and not exact else source.dtype
        sizes[own] += math.prod(source.shape)
        for piece in tensor.pieces:
            found[piece.ours] = torch.promote_types(found.get(piece.ours, own), own)
    main = dtype or (sizes.most_common(1)[0][0] if sizes else torch.float32)
    return {name: own if exact else _run_dtype(name, own, main, dtype) for name, own in found.items()}


def _run_dtype(name: str, own: torch.dtype, main: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    if name.endswith("select_bias"):
        return torch.float32
    return own if asked is None and any(small in name for small in _SMALL) else main


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _allocate(module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Unset memory for every parameter and persistent buffer. Raises FormatError where the table and they disagree."""
    state = module.state_dict()
    stray = sorted(state.keys() ^ dtypes.keys())
    if stray:
        side = "the checkpoint has no values for it" if stray[0] in state else "the model has no such parameter"
        raise FormatError(f"{side}; its family's tensor table is wrong", record=stray[0])
    return {name: torch.empty(values.shape, dtype=dtypes[name]) for name, values in state.items()}
