"""Experts that do not fit: tiers of memory, how often each answers, and the speed that leaves.

A tier holds the hottest experts that the tiers above it do not. Uniform routing: its share of the experts; a
profile: its share of the reads. Streaming never changes a token, only how long it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fewfire.plan.hardware import Part
from fewfire.plan.memory import PROCESS_BYTES
from fewfire.plan.speed import bandwidth, expert_bytes
from fewfire.plan.workload import Assumptions, Workload

DISK_BYTES_PER_S = 2e9  # where a part names no disk: a middling NVMe drive, reads of expert size


@dataclass(frozen=True)
class Tier:
    """Memory that experts are kept in: what is free for them, and how fast they come from it."""

    name: str
    free_bytes: float
    bytes_per_s: float


@dataclass(frozen=True)
class Streaming:
    """A decode step with experts over tiers: `shares` of expert reads by tier, in order; `seconds` one after another,
    `overlapped_s` if all reads ran at once."""

    batch: int
    tiers: tuple[Tier, ...]
    shares: tuple[float, ...]
    uniform_shares: tuple[float, ...]
    expert_bytes: float
    seconds: float
    overlapped_s: float

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
    fixed = work.weights.trunk + work.cache.sequence * batch + work.scratch_bytes_per_token * 512
    if part.kind != "gpu" or budget is not None:
        fixed += PROCESS_BYTES
    tiers = [Tier("memory", memory - fixed, bandwidth(part, assume))]
    if part.host_ram_gb and part.host_gbs and budget is None:
        tiers.append(Tier("host RAM", part.host_ram_gb * 1e9 - 8e9, part.host_gbs * 1e9))
    disk = part.disk_gbs * 1e9 if part.disk_gbs else DISK_BYTES_PER_S
    return [*tiers, Tier("disk", float("inf"), disk)]


def stream(work: Workload, part: Part, tiers: Sequence[Tier], batch: int, assume: Assumptions) -> Streaming | None:
    """A decode step with experts over `tiers`, hottest first. None if even two layers' experts do not fit the first.

    seconds = trunk, cache and every tier's expert reads, one after another, plus launches.
    """
    if not work.routed or not work.weights.per_expert:
        return None
    most = max(routed.top_k for routed, _ in work.routed)
    if tiers[0].free_bytes < 2 * most * work.weights.per_expert:
        return None
    shares = _shares(work, tiers, measured=True)
    awake = expert_bytes(work, batch)
    parts = [awake * share / tier.bytes_per_s for share, tier in zip(shares, tiers)]
    always = (work.trunk_bytes + work.cache_read * batch) / bandwidth(part, assume)
    launch = (part.launch_s or assume.launch_s[part.kind]) * work.num_layers
    return Streaming(
        batch=batch,
        tiers=tuple(tiers),
        shares=tuple(shares),
        uniform_shares=tuple(_shares(work, tiers, measured=False)),
        expert_bytes=awake,
        seconds=sum(parts) + always + launch,
        overlapped_s=max([*parts, always]) + launch,
    )


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
            cached = int(fraction * routed.num_experts)
            rate = routed.hit_rate(cached) if measured else cached / routed.num_experts
            answered += rate * routed.top_k * layers / weight
        reached.append(answered - before)
        before = answered
    return reached
