"""Experts that do not fit: tiers of memory, how often each answers, and the speed that leaves.

A tier holds the hottest experts that the tiers above it do not. Uniform routing: its share of the experts; a
profile: its share of the reads. Streaming never changes a token, only how long it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

from fewfire.plan.hardware import Part
from fewfire.plan.memory import embedding_on_disk_bytes, floor_bytes
from fewfire.plan.phases import expert_layers
from fewfire.plan.resident import DENSE_SLOTS, WINDOW_SLOTS
from fewfire.plan.speed import PrefillTime, bandwidth, chunk_phases, decode_phases, expert_bytes, launches
from fewfire.plan.unique import Routed
from fewfire.plan.workload import Assumptions, Workload

DOWN_SHARE = 1 / 3  # of an expert's work: gate and up are the rest
READ_COST = 0.25  # of the shorter of reading experts and computing them in a prompt: checksums, the ends of layers
DISK_BYTES_PER_S = 2e9  # where a part names no disk: a middling NVMe drive, reads of expert size


@dataclass(frozen=True)
class Tier:
    """Memory that experts are kept in: what is free for them, and how fast they come from it."""

    name: str
    free_bytes: float
    bytes_per_s: float


@dataclass(frozen=True)
class Streaming:
    """A decode step with experts over tiers: `shares` of expert reads by tier, in order. `seconds`: a layer's reads
    from disk run while its experts that are here are computed, all else one after another; `overlapped_s` if all reads
    ran at once."""

    batch: int
    tiers: tuple[Tier, ...]
    shares: tuple[float, ...]
    uniform_shares: tuple[float, ...]
    expert_bytes: float
    seconds: float
    overlapped_s: float
    bound: str

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.seconds

    @property
    def hit_rate(self) -> float:
        """Expert reads that never reach the last tier."""
        return 1.0 - self.shares[-1]

    def to_json(self) -> dict[str, Any]:
        """Tiers with their shares, and the speeds."""
        rows = [
            {
                "name": tier.name,
                "free_bytes": None if tier.free_bytes == float("inf") else round(tier.free_bytes),
                "bytes_per_s": tier.bytes_per_s,
                "share": share,
                "uniform_share": uniform,
                "bytes_per_token": share * self.expert_bytes / self.batch,
            }
            for tier, share, uniform in zip(self.tiers, self.shares, self.uniform_shares)
        ]
        return {
            "decode_tokens_per_s": self.tokens_per_s,
            "decode_tokens_per_s_overlapped": self.batch / self.overlapped_s,
            "hit_rate": self.hit_rate,
            "tiers": rows,
        }


def tiers_of(work: Workload, part: Part, batch: int, assume: Assumptions, *, budget: int | None = None) -> list[Tier]:
    """The tiers of one device: its memory less trunk, cache and activations, the host's RAM, the disk.

    `budget` bounds the first tier (`--memory`). A device whose first tier is negative cannot stream.
    """
    memory = part.usable_bytes if budget is None else min(budget, part.usable_bytes)
    if part.kind != "gpu" or budget is not None:
        floor = floor_bytes(work.config, work.formats, work.context, batch, weights=work.weights)
        fixed = floor.total - floor.table["experts in flight"] - embedding_on_disk_bytes(work.config, work.formats)
    else:
        fixed = round(work.weights.trunk + work.cache.sequence * batch + work.scratch_bytes_per_token * 512)
    tiers = [Tier("memory", memory - fixed, bandwidth(part, assume))]
    if part.host_ram_gb and part.host_gbs and budget is None:
        tiers.append(Tier("host RAM", part.host_ram_gb * 1e9 - 8e9, part.host_gbs * 1e9))
    disk = part.disk_gbs * 1e9 if part.disk_gbs else DISK_BYTES_PER_S
    return [*tiers, Tier("disk", float("inf"), disk)]


def stream(
    work: Workload,
    part: Part,
    tiers: Sequence[Tier],
    batch: int,
    assume: Assumptions,
    *,
    hit_rate: float | None = None,
) -> Streaming | None:
    """A decode step with experts over `tiers`, hottest first. None if even two layers' experts do not fit the first.

    seconds = trunk and cache + for each layer the longer of its reads from disk and its work on experts in memory +
    launches. `hit_rate` of the first tier, where it is known (a trace, a simulation); two tiers only.
    """
    if not work.routed or not work.weights.per_expert:
        return None
    most = max(routed.top_k for routed, _ in work.routed)
    if tiers[0].free_bytes < 2 * most * work.weights.per_expert:
        return None
    uniform = _shares(work, tiers, measured=False)
    shares = _shares(work, tiers, measured=True)
    if hit_rate is not None:
        assert len(tiers) == 2
        shares = [hit_rate, 1 - hit_rate]
    awake = expert_bytes(work, batch)
    parts = [awake * share / tier.bytes_per_s for share, tier in zip(shares, tiers)]
    launch, others = launches(work, part, assume), parts[1:-1]
    if part.kernels is not None:
        attention, trunk, experts = decode_phases(work, part, batch, assume)
        always, here = attention.seconds + trunk.seconds, experts.seconds
    else:
        always, here = (work.trunk_bytes + work.cache_read * batch) / bandwidth(part, assume), parts[0]
    bounds = {tier.name: seconds for tier, seconds in zip(tiers, parts)}
    bounds["memory"] = always + here
    return Streaming(
        batch=batch,
        tiers=tuple(tiers),
        shares=tuple(shares),
        uniform_shares=tuple(uniform),
        expert_bytes=awake,
        seconds=sum(others) + always + _layers_s(work, batch, shares[-1], tiers[-1].bytes_per_s, here) + launch,
        overlapped_s=max([*parts, always, here]) + launch,
        bound=max(bounds, key=lambda name: bounds[name]),
    )


def _layers_s(work: Workload, batch: int, miss_rate: float, bytes_per_s: float, work_s: float) -> float:
    """Seconds in which experts are read and computed, all layers: `work_s` of computing is spread evenly over them."""
    if miss_rate < 1e-9:
        return work_s
    total, layers = 0.0, sum(count for _, count in work.routed)
    for kind in expert_layers(work):
        awake = kind.routed.unique(batch)
        read_s = kind.num_bytes / bytes_per_s
        total += kind.layers * expected_layer_s(round(awake), miss_rate, read_s, work_s / layers)
    return total


def expected_layer_s(num_awake: int, miss_rate: float, read_s: float, work_s: float) -> float:
    """E[the longer of a layer's reads and its work], each of `num_awake` experts missing on its own. Of the expert that
    comes last, `down` is computed after it has come."""
    expected = 0.0
    for misses in range(num_awake + 1):
        chance = comb(num_awake, misses) * miss_rate**misses * (1 - miss_rate) ** (num_awake - misses)
        last = DOWN_SHARE * work_s / num_awake if misses else 0.0
        expected += chance * max(misses * read_s + last, work_s)
    return expected


def stream_prefill(
    work: Workload,
    part: Part,
    tiers: Sequence[Tier],
    num_tokens: int,
    assume: Assumptions,
    *,
    hit_rate: float | None = None,
) -> PrefillTime:
    """A prompt with experts in memory and on disk, on a part whose kernels were measured: each chunk reads every awake
    expert that is not in memory once, while others are computed, and from the second layer on while attention and trunk
    are. `hit_rate` None: the share that memory holds."""
    shares = _shares(work, tiers, measured=True)
    missing = shares[-1] if hit_rate is None else 1 - hit_rate
    layers = sum(count for _, count in work.routed)
    seconds, parts = 0.0, {"memory": 0.0, "compute": 0.0, "launches": 0.0, "disk": 0.0}
    for tokens, attention, trunk, experts in chunk_phases(work, part, num_tokens, assume):
        disk_s, launch_s = experts.num_bytes * missing / tiers[-1].bytes_per_s, launches(work, part, assume)
        others_s = attention.seconds + trunk.seconds
        ahead_s = (layers - 1) * _ahead_s(work, tokens, others_s / layers, tiers[-1].bytes_per_s)
        shown_s = max(experts.seconds, disk_s - ahead_s) + READ_COST * min(experts.seconds, disk_s)
        seconds += others_s + shown_s + launch_s
        for name, value in (("disk", disk_s), ("launches", launch_s)):
            parts[name] += value
        parts["memory"] += attention.reading_s + trunk.reading_s + experts.reading_s
        parts["compute"] += attention.arithmetic_s + trunk.arithmetic_s + experts.arithmetic_s
    return PrefillTime(num_tokens, seconds, max(parts, key=lambda name: parts[name]))


def _ahead_s(work: Workload, num_tokens: int, others_s: float, bytes_per_s: float) -> float:
    """Seconds of a layer's reads that run before its router has chosen, while attention and trunk take `others_s`: as
    many as the window holds, where each expert gets so many tokens (native/experts.cpp, native/residency.cpp)."""
    if any(num_tokens * routed.top_k < DENSE_SLOTS * routed.num_experts for routed, _ in work.routed):
        return 0.0
    return min(others_s, WINDOW_SLOTS * work.weights.per_expert / bytes_per_s)


def _shares(work: Workload, tiers: Sequence[Tier], *, measured: bool) -> list[float]:
    """Share of expert reads that each tier answers, experts spread evenly over the layers of a kind."""
    weight = sum(routed.top_k * layers for routed, layers in work.routed)
    num_experts = sum(routed.num_experts * layers for routed, layers in work.routed)
    reached, before, held = [], 0.0, 0.0
    for tier in tiers:
        held += tier.free_bytes / work.weights.per_expert
        fraction = min(1.0, held / num_experts)
        answered = 0.0
        for routed, layers in work.routed:
            rate = _rate_of(routed, fraction) if measured else fraction
            answered += rate * routed.top_k * layers / weight
        reached.append(answered - before)
        before = answered
    return reached


def _rate_of(routed: Routed, fraction: float) -> float:
    """Hit rate with a fraction of the experts in memory: slots are one pool for all layers, so that a layer may have
    one expert more than another of its kind."""
    whole, part = divmod(fraction * routed.num_experts, 1)
    low = routed.hit_rate(int(whole))
    return low + part * (routed.hit_rate(min(int(whole) + 1, routed.num_experts)) - low)
