"""How many experts a batch wakes: what decode reads. Uniform routing exactly, or a measured `RoutingProfile`.

E experts, k routed a token, B tokens in a step. Both forms take tokens as independent; tokens of one sequence
repeat experts, so a per-token trace gives fewer still.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb, log, sqrt

from fewfire.config import RoutingProfile, check
from fewfire.plan.placement import Placement, PlacementGain, place


def unique_experts(num_experts: int, top_k: int, num_tokens: float) -> float:
    """U(B) = E (1 - (1 - k/E)^B): expected distinct experts of a layer under uniform routing; exactly k at B = 1."""
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** num_tokens)


def marginals(counts: Sequence[int], top_k: int) -> tuple[float, ...]:
    """p_e, how likely a token picks expert e; they sum to `top_k` (a share above 1 is not possible and is clipped)."""
    total = sum(counts)
    check(total > 0, "a routing profile has a layer without counts; record it on some text first")
    return tuple(min(1.0, top_k * value / total) for value in counts)


def unique_from_marginals(shares: Sequence[float], num_tokens: float) -> float:
    """U(B) = sum over e of 1 - (1 - p_e)^B. Never above the uniform value (concavity)."""
    return sum(1.0 - (1.0 - share) ** num_tokens for share in shares)


@dataclass(frozen=True)
class Routed:
    """The routing of one kind of MoE layer: uniform, or the marginals of the profile's layers (`layers`)."""

    num_experts: int
    top_k: int
    layers: tuple[tuple[float, ...], ...] = ()

    @staticmethod
    def of(num_experts: int, top_k: int, profile: RoutingProfile | None) -> Routed:
        """Raises ConfigError if the profile is of a model with other experts."""
        if profile is None:
            return Routed(num_experts, top_k)
        check(
            (profile.num_experts, profile.top_k) == (num_experts, top_k),
            f"the routing profile is of {profile.num_experts} experts, top {profile.top_k}, the model has "
            f"{num_experts}, top {top_k}; record one on this model",
        )
        rows = profile.counts.values()
        check(all(len(row) == num_experts for row in rows), f"a profile's layer needs {num_experts} counts")
        return Routed(num_experts, top_k, tuple(marginals(row, top_k) for row in rows))

    def unique(self, num_tokens: float) -> float:
        """U(B), mean over the profile's layers."""
        return _unique(self, num_tokens)

    def busiest(self, num_tokens: float, num_devices: int) -> float:
        """E[most experts awake on one of `num_devices`], experts in their order, a contiguous share each."""
        if num_devices == 1:
            return self.unique(num_tokens)
        if not self.layers:
            return uniform_max_active(self.num_experts, self.top_k, num_tokens, num_devices)
        return _busiest(self, num_tokens, num_devices)

    def imbalance(self, num_devices: int) -> float | None:
        """Tokens on the busiest device over the mean, mean over layers; None without a profile."""
        return _imbalance(self, num_devices) if self.layers else None

    def hit_rate(self, cached: int) -> float:
        """Share of expert reads that a cache of each layer's `cached` hottest experts answers; C / E if uniform."""
        cached = max(0, min(cached, self.num_experts))
        if not self.layers:
            return cached / self.num_experts
        rates = [sum(sorted(shares, reverse=True)[:cached]) / sum(shares) for shares in self.layers]
        return sum(rates) / len(rates)


@lru_cache(maxsize=8192)
def _unique(routed: Routed, num_tokens: float) -> float:
    if not routed.layers:
        return unique_experts(routed.num_experts, routed.top_k, num_tokens)
    return sum(unique_from_marginals(shares, num_tokens) for shares in routed.layers) / len(routed.layers)


@lru_cache(maxsize=2048)
def _busiest(routed: Routed, num_tokens: float, num_devices: int) -> float:
    most = [
        max_active_per_device(awake_by_device(shares, place(shares, num_devices, balance=False), num_tokens))
        for shares in routed.layers
    ]
    return sum(most) / len(most)


@lru_cache(maxsize=512)
def _imbalance(routed: Routed, num_devices: int) -> float:
    factors = [place(shares, num_devices, balance=False).imbalance(shares) for shares in routed.layers]
    return sum(factors) / len(factors)


def awake_by_device(shares: Sequence[float], placement: Placement, num_tokens: float) -> list[list[float]]:
    """For each device, how likely each expert it holds is awake in a step; a copied expert shares its tokens."""
    copies = placement.copies(len(shares))
    return [
        [1.0 - (1.0 - shares[expert] / copies[expert]) ** num_tokens for expert in device]
        for device in placement.devices
    ]


def max_active_per_device(awake: Sequence[Sequence[float]]) -> float:
    """E[max over devices of experts awake]: what a step of an expert-parallel layer waits for.

    Devices are taken as independent; the exact counts are negatively correlated, so this is slightly high.
    """
    if len(awake) == 1:
        return sum(awake[0])
    cumulative: list[list[float]] = []
    for probabilities in awake:
        dist = [1.0]
        for p in probabilities:
            dist = [a * (1.0 - p) + b * p for a, b in zip([*dist, 0.0], [0.0, *dist])]
        running, sums = 0.0, []
        for value in dist:
            running += value
            sums.append(min(1.0, running))
        cumulative.append(sums)
    expected = 0.0
    for value in range(max(map(len, cumulative))):
        below = 1.0
        for sums in cumulative:
            below *= sums[value] if value < len(sums) else 1.0
        expected += 1.0 - below
    return expected


@lru_cache(maxsize=8192)
def uniform_max_active(num_experts: int, top_k: int, num_tokens: float, num_devices: int) -> float:
    """`max_active_per_device` for uniform routing, experts spread evenly (ceil(E / devices) on the fullest)."""
    held = -(-num_experts // num_devices)
    awake = unique_experts(num_experts, top_k, num_tokens) / num_experts
    if num_devices == 1:
        return held * awake
    if held > 512:  # the tail of a wide binomial is a normal one's
        spread = sqrt(held * awake * (1.0 - awake))
        return min(float(held), held * awake + spread * sqrt(2.0 * log(num_devices)))
    below, total = 0.0, 0.0
    for value in range(held):
        below += comb(held, value) * awake**value * (1.0 - awake) ** (held - value)
        total += 1.0 - min(1.0, below) ** num_devices
    return total


def placement_gain(
    routed: Routed, devices: int, num_tokens: int, *, replicas: int | None = None
) -> PlacementGain | None:
    """In order against balanced for a measured profile; None without one, or where experts do not spread over devices.

    `replicas` None: as many as fill the devices evenly, at least one a device where there are four or more.
    """
    if not routed.layers or devices < 2 or devices > routed.num_experts:
        return None
    if replicas is None:
        replicas = -routed.num_experts % devices + (devices if devices >= 4 else 0)
    sums = [0.0, 0.0, 0.0, 0.0]
    for shares in routed.layers:
        plain = place(shares, devices, balance=False)
        even = place(shares, devices, replicas=replicas)
        found = (
            plain.imbalance(shares),
            even.imbalance(shares),
            max_active_per_device(awake_by_device(shares, plain, num_tokens)),
            max_active_per_device(awake_by_device(shares, even, num_tokens)),
        )
        sums = [total + value / len(routed.layers) for total, value in zip(sums, found)]
    return PlacementGain(devices, replicas, num_tokens, *sums)
