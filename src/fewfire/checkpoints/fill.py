"""Hub tensors into the parameters of a module on the meta device: each parameter made once, never a second copy.

What lies in the file as it lies in the parameter is read straight into it; the rest passes through a scratch of at
most about `SCRATCH_BYTES` a thread. E experts.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewfire.checkpoints.shards import TORCH_DTYPES, Shards
from fewfire.errors import FewfireError, FormatError
from fewfire.families import HubTensor, Piece, part
from fewfire.headers import DTYPE_BYTES, TensorHeader

SCRATCH_BYTES = 64 * 2**20
WEIGHT_DTYPES = ("F32", "BF16", "F16", "F64")
_SMALL = ("norm", "router", "sinks", "select_bias", "head_weights", "a_log", "dt_bias")


class Chunk(NamedTuple):
    """A run of a hub tensor along its leading axis (of the view), read and placed at once."""

    tensor: HubTensor
    header: TensorHeader
    start: int
    stop: int


class Filler:
    """One fill of one module. `run` does it; see `HubCheckpoint.fill` for what the arguments mean."""

    def __init__(
        self,
        table: Sequence[HubTensor],
        headers: Mapping[str, TensorHeader],
        module: nn.Module,
        *,
        dtype: torch.dtype | None,
        exact: bool,
    ):
        self.table, self.headers, self.module = table, headers, module
        dtypes = _parameter_dtypes(table, headers, dtype, exact)
        self.targets = _allocate(module, dtypes)
        self._filled: Counter[str] = Counter()

    def run(self) -> None:
        chunks = sorted(self._chunks(), key=lambda chunk: (str(chunk.header.path), chunk.header.offset))
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
            header = self.headers[tensor.name]
            extent = _leading(tensor)
            if not _splits(tensor):
                yield Chunk(tensor, header, 0, extent)
                continue
            rows = max(1, SCRATCH_BYTES * extent // max(header.num_bytes, 1))
            for start in range(0, extent, rows):
                yield _chunk(tensor, header, start, min(start + rows, extent))

    def _place(self, chunk: Chunk, shards: Shards) -> list[tuple[str, int]]:
        """Read `chunk` into the parameters; (name, number of values) of each that was given some."""
        tensor, header = chunk.tensor, chunk.header
        destinations = [(piece, self._destination(chunk, piece)) for piece in tensor.pieces]
        first = destinations[0][1]
        plain = len(destinations) == 1 and not tensor.pieces[0].transpose and tensor.pieces[0].span is None
        if plain and first.is_contiguous() and first.dtype == TORCH_DTYPES[header.dtype]:
            shards.read_into(header, first)
        else:
            values = shards.read(header)
            shape = (chunk.stop - chunk.start, *(tensor.view or tensor.shape)[1:]) if tensor.shape else ()
            whole = HubTensor(tensor.name, shape, tensor.pieces)
            for piece, destination in destinations:
                given = part(values.reshape(shape), whole, piece)
                assert given.shape == destination.shape, f"{tensor.name} -> {piece}: {given.shape}, {destination.shape}"
                destination.copy_(given)
        return [(piece.ours, destination.numel()) for piece, destination in destinations]

    def _destination(self, chunk: Chunk, piece: Piece) -> Tensor:
        target = self.targets[piece.ours]
        if piece.row is not None:
            target = target[piece.row]
        return target[chunk.start : chunk.stop] if _splits(chunk.tensor) else target


def _leading(tensor: HubTensor) -> int:
    shape = tensor.view or tensor.shape
    return shape[0] if shape else 1


def _splits(tensor: HubTensor) -> bool:
    """Whether rows of the leading axis are rows of every piece: then the tensor can be read in runs of them."""
    shape = tensor.view or tensor.shape
    return len(shape) > 0 and all(
        (piece.span is None or piece.axis > 0) and (not piece.transpose or len(shape) > 2) for piece in tensor.pieces
    )


def _chunk(tensor: HubTensor, header: TensorHeader, start: int, stop: int) -> Chunk:
    row_bytes = header.num_bytes // max(_leading(tensor), 1)
    rows = (stop - start, *(tensor.view or tensor.shape)[1:])
    piece = header._replace(shape=rows, offset=header.offset + start * row_bytes, num_bytes=(stop - start) * row_bytes)
    return Chunk(tensor, piece, start, stop)


def _parameter_dtypes(
    table: Sequence[HubTensor], headers: Mapping[str, TensorHeader], dtype: torch.dtype | None, exact: bool
) -> dict[str, torch.dtype]:
    """The dtype of each parameter that `table` fills. Raises FormatError for values that are no weights."""
    stored: dict[str, torch.dtype] = {}
    sizes: Counter[torch.dtype] = Counter()
    for tensor in table:
        header = headers[tensor.name]
        if header.dtype not in WEIGHT_DTYPES:
            raise FormatError(
                f"is {header.dtype}, expected {', '.join(WEIGHT_DTYPES)}; use the unquantized checkpoint",
                path=str(header.path),
                record=header.name,
            )
        own = torch.float32 if header.dtype == "F64" and not exact else TORCH_DTYPES[header.dtype]
        sizes[own] += header.num_bytes // DTYPE_BYTES[header.dtype]
        for piece in tensor.pieces:
            stored[piece.ours] = torch.promote_types(stored.get(piece.ours, own), own)
    main = dtype or (sizes.most_common(1)[0][0] if sizes else torch.float32)
    return {name: _run_dtype(name, own, main, dtype) if not exact else own for name, own in stored.items()}


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
