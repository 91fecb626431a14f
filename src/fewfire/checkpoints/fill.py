"""Hub tensors into the parameters of a module on the meta device: each parameter made once, never a second copy.

What lies in the file as it lies in the parameter is read straight into it; the rest passes through a scratch of at
most about `SCRATCH_BYTES` a thread.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fewfire.checkpoints.encodings import Stored, check_weights, read_values, rows_header
from fewfire.checkpoints.shards import Shards
from fewfire.errors import FewfireError, FormatError
from fewfire.families import HubTensor, Piece, part

SCRATCH_BYTES = 32 * 2**20  # of float32, whatever the files hold
_THREADS = 4  # more than cores: one waits for the disk while another makes pages
_SMALL = ("norm", "router", "sinks", "select_bias", "head_weights", "a_log", "dt_bias")


class Chunk(NamedTuple):
    """A hub tensor, or a run of its rows along the leading axis (of the view), read and placed at once."""

    tensor: HubTensor
    stored: Stored
    rows: tuple[int, int] | None


Placed = list[tuple[str, int]]  # (parameter, number of values that it was given)
Job = TypeVar("Job")


def give_values(
    module: nn.Module,
    dtypes: Mapping[str, torch.dtype],
    jobs: Iterable[Job],
    place: Callable[[Job, Mapping[str, Tensor]], Placed],
) -> None:
    """Make memory of `dtypes` for the whole state of `module`, let `place` do each of `jobs`, and hand it over.

    `place` runs on several threads and says what it filled. Raises: FormatError where a parameter was not filled
    exactly, or module and `dtypes` do not name the same ones.
    """
    targets, filled = _allocate(module, dtypes), Counter[str]()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for placed in pool.map(lambda job: place(job, targets), jobs):
                for name, count in placed:
                    filled[name] += count
        except FewfireError:
            pool.shutdown(cancel_futures=True)
            raise
    for name, values in targets.items():
        if filled[name] != values.numel():
            raise FormatError(f"{filled[name]} of {values.numel()} values were given", record=name)
    module.load_state_dict(targets, strict=True, assign=True)
    left = [name for name, values in _tensors(module) if values.is_meta]
    assert not left, f"{left} are not part of the state and were left without values"


class Filler:
    """One fill of one module from a hub checkpoint; see `HubCheckpoint.fill` for what the arguments mean."""

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
        self.dtypes = _parameter_dtypes(table, stored, dtype, exact)

    def run(self) -> None:
        chunks = sorted(self._chunks(), key=lambda chunk: (*chunk.stored.where, chunk.rows or (0, 0)))
        with Shards() as shards:
            give_values(self.module, self.dtypes, chunks, lambda chunk, targets: _place(chunk, targets, shards))

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


def _place(chunk: Chunk, targets: Mapping[str, Tensor], shards: Shards) -> Placed:
    """Read `chunk` into the parameters."""
    tensor, stored, rows = chunk
    destinations = [(piece, _destination(targets, piece, rows)) for piece in tensor.pieces]
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


def _destination(targets: Mapping[str, Tensor], piece: Piece, rows: tuple[int, int] | None) -> Tensor:
    target = targets[piece.ours] if piece.row is None else targets[piece.ours][piece.row]
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
    return found if exact else run_dtypes(found, sizes, dtype)


def run_dtypes(
    found: Mapping[str, torch.dtype], sizes: Counter[torch.dtype], asked: torch.dtype | None
) -> dict[str, torch.dtype]:
    """What parameters stored as `found` become to be run: `asked`, else the dtype that most values have (`sizes`).

    Where none is asked for, routers, norms and other small tensors keep theirs. Selection biases are float32.
    """
    main = asked or (sizes.most_common(1)[0][0] if sizes else torch.float32)

    def choose(name: str, own: torch.dtype) -> torch.dtype:
        if name.endswith("select_bias"):
            return torch.float32
        return own if asked is None and any(small in name for small in _SMALL) else main

    return {name: choose(name, own) for name, own in found.items()}


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
