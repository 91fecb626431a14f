"""Routed experts of a pack: all in memory, or in slots under a byte budget and on disk. One interface, the same values.

`ResidentExperts` and `StreamedExperts` hold every layer's experts for the native engine (`source`) and give one layer
as an `ExpertBank` for whoever runs the rest (`bank`). T tokens, K chosen experts, D model width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from operator import sub
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewfire.checkpoints.pack import DAMAGED, EXPERTS, TRUNK, Pack, record_name
from fewfire.config import FeedForwardConfig, check
from fewfire.errors import FormatError
from fewfire.kernels.isa import native
from fewfire.routing import Routing
from fewfire.runtime.disk import open_records
from fewfire.runtime.lower import expert_layout
from fewfire.runtime.weights import EMBEDDING, Report, huge_memory, read_experts

Policy = Literal["lru", "lfru", "s3fifo"]
POLICIES: dict[str, int] = {"lru": 0, "lfru": 1, "s3fifo": 2, "belady": 3}  # native/include/residency.hpp


@dataclass(frozen=True)
class Streaming:
    """How experts come from disk. None of it changes a value.

    `policy`: which record leaves for another (docs/trace.md says what each hits). `lookahead`: ask the next layer's
    router beforehand; switches itself off where tokens do not come faster by it. `verify_always`: compare checksums at
    every read, not only at a record's first. `direct`: past the page cache, or not; None takes what a probe finds
    faster. `hot`: (MoE layer, expert) pairs to begin with, the most wanted first.
    """

    policy: Policy = "lfru"
    num_readers: int = 8
    lookahead: bool = False
    verify_always: bool = False
    direct: bool | None = None
    hot: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        check(self.policy in ("lru", "lfru", "s3fifo"), f"policy ({self.policy}) is not one of lru, lfru, s3fifo")
        check(1 <= self.num_readers <= 64, f"num_readers ({self.num_readers}) must be between 1 and 64")

    @property
    def changed(self) -> list[str]:
        """What is not as it is by default."""
        return [each.name for each in fields(self) if getattr(self, each.name) != each.default]


@dataclass(frozen=True)
class LayerCounts:
    """One MoE layer: experts wanted that were in memory, or not; experts read beforehand that were wanted, or not."""

    hits: int = 0
    misses: int = 0
    prefetch_useful: int = 0
    prefetch_wasted: int = 0


@dataclass(frozen=True)
class ExpertCounts:
    """What happened since the experts were opened.

    `prefetch_late`: read beforehand, but not soon enough to be there when wanted. `stall_s`: seconds in which nothing
    was computed because no expert was there.
    """

    layers: tuple[LayerCounts, ...] = field(default=())
    bytes_read: int = 0
    evictions: int = 0
    prefetch_late: int = 0
    stall_s: float = 0.0
    substituted: int = 0  # experts that ran from their low-precision copies

    @property
    def total(self) -> LayerCounts:
        columns = zip(*(_numbers(layer) for layer in self.layers))
        return LayerCounts(*(sum(column) for column in columns))

    def since(self, before: ExpertCounts) -> ExpertCounts:
        """What came after `before`."""
        layers = [
            LayerCounts(*map(sub, _numbers(now), _numbers(then))) for now, then in zip(self.layers, before.layers)
        ]
        return ExpertCounts(
            tuple(layers),
            self.bytes_read - before.bytes_read,
            self.evictions - before.evictions,
            self.prefetch_late - before.prefetch_late,
            self.stall_s - before.stall_s,
            self.substituted - before.substituted,
        )


def _numbers(layer: LayerCounts) -> tuple[int, int, int, int]:
    return layer.hits, layer.misses, layer.prefetch_useful, layer.prefetch_wasted


class _Experts:
    """What both have in common."""

    source: Any
    pack: Pack
    account: Any = None  # the budget that they are part of, where torch runs the rest

    def counts(self) -> ExpertCounts:
        """Between steps only."""
        layers, bytes_read, evictions, late, stall_s, _, substituted, _ = self.source.counts()
        counted = tuple(LayerCounts(*layer) for layer in layers)
        return ExpertCounts(counted, bytes_read, evictions, late, stall_s, substituted)

    def bank(self, number: int, config: FeedForwardConfig, *, weight_on_input: bool) -> LayerBank:
        """The experts of the `number`-th MoE layer."""
        assert isinstance(self, ResidentExperts | StreamedExperts)
        return LayerBank(self, number, config, weight_on_input)

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """A record or a row that cannot be had becomes a FormatError that names it."""
        module = native()
        assert module is not None
        try:
            yield
        except module.ReadError as error:
            kind, layer, expert, offset, number = error.args
            message = (
                f"cannot be read ({os.strerror(number)}); check the disk",
                "the file ends here; copy or make the pack again",
                DAMAGED,
            )[kind]
            if layer < 0:  # a row of the embedding
                file, record = TRUNK, f"{EMBEDDING}, row {expert}"
            else:
                file, record = EXPERTS, record_name(self.pack.layout.experts[layer], expert)
            raise FormatError(message, path=str(self.pack.folder / file), record=record, offset=offset) from None


class ResidentExperts(_Experts):
    """experts.bin in memory, whole. Checksums are compared when an expert is first used, or by `verify`."""

    access = None

    def __init__(self, pack: Pack, report: Report = lambda num_bytes: None):
        module = native()
        assert module is not None
        self.pack, self.num_bytes = pack, pack.layout.expert_bytes
        self.memory = read_experts(pack, report)
        self.source = module.ResidentExperts(
            _record_layers(pack), _checksums(pack), self.memory.data_ptr(), self.memory
        )

    @property
    def least_bytes(self) -> int:
        """What it cannot give back."""
        return self.num_bytes

    @property
    def untouched_bytes(self) -> int:
        return 0

    @property
    def touched_memory(self) -> Tensor:
        """Bytes that have their pages."""
        return self.memory

    def fit(self, num_bytes: int) -> None:
        """All stay."""

    def verify(self) -> None:
        """Compare all checksums that were not compared yet. Raises: FormatError."""
        with self.named_errors():
            self.source.verify()


class StreamedExperts(_Experts):
    """Experts in slots of one budget for all layers; what is in none is read when a token wants it.

    `num_bytes`: of all slots. Raises: ConfigError where experts.bin cannot be read, or the hot set is another model's.
    """

    def __init__(self, pack: Pack, num_bytes: int, settings: Streaming | None = None):
        module = native()
        assert module is not None
        self.pack, self.settings = pack, settings or Streaming()
        held = [layer.num_experts for layer in pack.layout.experts]
        for layer, expert in self.settings.hot:
            fits = 0 <= layer < len(held) and 0 <= expert < held[layer]
            check(
                fits,
                f"the hot set names expert {expert} of layer {layer}, which this model has not; record a trace on it",
            )
        self.slot_bytes = max(layer.record_bytes for layer in pack.layout.experts)
        self.num_records = sum(layer.num_experts for layer in pack.layout.experts)
        self.slots = self._slots_of(num_bytes)
        self._memory = huge_memory(self.num_records * self.slot_bytes)  # of which so much is used as there are slots
        slots = self._memory[: self.num_bytes]
        file, self.access, touched = open_records(pack.folder / EXPERTS, pack.layout, slots, self.settings.direct)
        self.source = module.ExpertStore(
            _record_layers(pack),
            _checksums(pack),
            {
                "file": file,
                "drops_cache": not self.access.is_direct,
                "always_verifies": self.settings.verify_always,
                "num_readers": self.settings.num_readers,
                "capacity": self.slots,
                "memory": self._memory.data_ptr(),
                "touched_bytes": touched,
                "slot_bytes": self.slot_bytes,
                "policy": POLICIES[self.settings.policy],
                "looks_ahead": self.settings.lookahead,
            },
            self._memory,
        )
        if self.settings.hot:
            # the most wanted last, so that it does not count as the oldest
            self.source.seed(list(self.settings.hot)[: self.slots][::-1])

    @staticmethod
    def least_bytes_of(pack: Pack) -> int:
        """Two layers' worth of the experts that one token wants."""
        most = max(moe.router.top_k for _, _, moe in pack.config.moe_layers)
        return 2 * most * max(layer.record_bytes for layer in pack.layout.experts)

    @property
    def least_bytes(self) -> int:
        return self.least_bytes_of(self.pack)

    @property
    def num_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def untouched_bytes(self) -> int:
        """Of the slots, what takes no memory yet."""
        return self.source.untouched_bytes()

    @property
    def touched_memory(self) -> Tensor:
        """Bytes of slots that have their pages."""
        return self._memory[: self.num_bytes - self.untouched_bytes]

    @property
    def has_empty_slots(self) -> bool:
        """Whether some hold nothing yet."""
        return self.source.counts()[-1] < self.slots

    def fit(self, num_bytes: int) -> None:
        """Use so much memory from now on. A little more than before is left alone: what is cached stays."""
        slots = self._slots_of(num_bytes)
        if slots < self.slots or slots > self.slots + self.slots // 64:
            self.slots = slots
            self.source.set_capacity(slots)

    def _slots_of(self, num_bytes: int) -> int:
        return min(num_bytes // self.slot_bytes, self.num_records)

    @property
    def looks_ahead(self) -> bool:
        """Whether it still does."""
        return self.source.counts()[5]


class LayerBank(nn.Module):
    """One layer's experts for a module that torch runs. An `ExpertBank`: (x_TD, Routing) -> (T, D) float32's values."""

    def __init__(
        self, experts: ResidentExperts | StreamedExperts, number: int, config: FeedForwardConfig, weight_on_input: bool
    ):
        super().__init__()
        module = native()
        assert module is not None
        self.experts, self.weight_on_input = experts, weight_on_input
        layout = expert_layout(experts.pack.layout.experts[number], config)
        self.native_bank = module.ExpertBank(layout, number, experts.source)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        rows = x_TD.float().contiguous()
        ids = routing.ids_TK if routing.kept_TK is None else routing.ids_TK.masked_fill(~routing.kept_TK, -1)
        chosen, weights = ids.to(torch.int32).contiguous(), routing.weights_TK.float().contiguous()
        out = torch.empty_like(rows)
        with self.experts.named_errors():
            self.native_bank.run(
                rows.data_ptr(),
                chosen.data_ptr(),
                weights.data_ptr(),
                rows.shape[0],
                chosen.shape[1],
                self.weight_on_input,
                out.data_ptr(),
                torch.get_num_threads(),
            )
        return out.to(x_TD.dtype)


def _record_layers(pack: Pack) -> list[tuple[int, int, int, int, int]]:
    """(offset, bytes of a record, experts, offset and bytes of what a record is needed for last) of each layer."""
    made = []
    for layer in pack.layout.experts:
        down = next(part for part in layer.parts if (part.name, part.kind) == ("down", "codes"))
        made.append((layer.offset, layer.record_bytes, layer.num_experts, down.offset, down.num_bytes))
    return made


def _checksums(pack: Pack) -> list[int]:
    return [
        pack.expert_checksum(number, expert)
        for number, layer in enumerate(pack.layout.experts)
        for expert in range(layer.num_experts)
    ]
