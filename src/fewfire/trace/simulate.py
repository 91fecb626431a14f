"""A trace through a cache of experts: the hits and misses that the store would have, without a model or a disk.

The decisions are the store's own code (native/residency.cpp); where the extension is not built, its reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fewfire.config import check
from fewfire.kernels.isa import extension
from fewfire.plan.resident import DENSE_SLOTS, LOOSE_SLOTS
from fewfire.runtime.banks import POLICIES, LayerCounts, Streaming
from fewfire.trace import reference
from fewfire.trace.file import Trace

DEFAULT_POLICY: str = Streaming().policy


class Step(NamedTuple):
    """One use of one MoE layer: its distinct experts, rising. `in_order`: they pass one after the other; `reads_ahead`:
    the next layer will want nearly all of its own."""

    layer: int
    experts: tuple[int, ...]
    in_order: bool = False
    reads_ahead: bool = False


@dataclass(frozen=True)
class Simulated:
    """What a cache did, in all and by layer."""

    layers: tuple[LayerCounts, ...]
    evictions: int

    @property
    def hits(self) -> int:
        return sum(layer.hits for layer in self.layers)

    @property
    def misses(self) -> int:
        return sum(layer.misses for layer in self.layers)

    @property
    def hit_rate(self) -> float:
        """1.0 where nothing was wanted."""
        wanted = self.hits + self.misses
        return self.hits / wanted if wanted else 1.0


def decode_steps(trace: Trace, start: int = 0, end: int | None = None) -> list[Step]:
    """Tokens [start, end) of a trace, one after the other."""
    last = trace.num_tokens if end is None else end
    return steps_of(trace, [1] * (last - start), start)


def steps_of(trace: Trace, sizes: Iterable[int], start: int = 0) -> list[Step]:
    """Tokens from `start` on in engine steps of `sizes` tokens each: prefill chunks and decoded tokens.

    Raises: ConfigError where the trace has fewer.
    """
    steps = []
    for size in sizes:
        check(0 < size <= trace.num_tokens - start, f"a step of {size} tokens at {start} leaves the trace")
        for layer, ids_TK in enumerate(trace.ids_TLK[start : start + size].unbind(1)):
            step = _step(layer, ids_TK, trace.num_experts[layer])
            if step.experts:
                steps.append(step)
        start += size
    return steps


def _step(layer: int, ids_TK: Tensor, num_experts: int) -> Step:
    chosen = [expert for expert in ids_TK.flatten().tolist() if expert >= 0]
    slots = len(chosen)
    return Step(layer, tuple(sorted(set(chosen))), slots > LOOSE_SLOTS, slots >= DENSE_SLOTS * num_experts)


def simulate(num_experts: Sequence[int], steps: Sequence[Step], slots: int, policy: str = DEFAULT_POLICY) -> Simulated:
    """`steps` through a cache of `slots` records for all layers, empty at first.

    `policy`: lru, lfru, s3fifo, or belady, which knows the future: no cache that keeps what it reads does better.
    Raises: ConfigError for another policy, no slot, or a layer or expert that is not there.
    """
    check(policy in POLICIES, f"policy ({policy}) is not one of {', '.join(POLICIES)}")
    check(slots >= 1, f"slots ({slots}) must be at least 1")
    for step in steps:
        check(0 <= step.layer < len(num_experts), f"layer {step.layer} is not one of {len(num_experts)}")
        experts = step.experts
        rising = bool(experts) and experts[0] >= 0 and experts[-1] < num_experts[step.layer]
        check(
            rising and sorted(set(experts)) == list(experts),
            f"experts {experts} of layer {step.layer} are not distinct and rising",
        )
    first_ids = [0]
    for count in num_experts:
        first_ids.append(first_ids[-1] + count)
    slots = min(slots, first_ids[-1])
    module = extension()
    if module is None:
        return Simulated(*reference.simulate(policy, first_ids, slots, steps))
    events, flat = list[tuple[int, int, int, bool, bool]](), list[int]()
    for step in steps:
        events.append((step.layer, len(flat), len(step.experts), step.in_order, step.reads_ahead))
        flat += step.experts
    layers, evictions = module.simulate(POLICIES[policy], first_ids, slots, events, flat)
    return Simulated(tuple(LayerCounts(*layer) for layer in layers), evictions)
