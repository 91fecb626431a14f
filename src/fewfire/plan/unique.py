"""How many experts a batch wakes: what decode reads. Uniform routing exactly, or a measured `RoutingProfile`.

E experts, k routed a token, B tokens in a step. Both forms take tokens as independent; tokens of one sequence
repeat experts, so a per-token trace gives fewer still.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import comb

from fewfire.config import RoutingProfile, check


def unique_experts(num_experts: int, top_k: int, num_tokens: float) -> float:
    """U(B) = E (1 - (1 - k/E)^B): expected distinct experts of a layer under uniform routing; exactly k at B = 1."""
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** num_tokens)


def marginals(counts: Sequence[int], top_k: int) -> list[float]:
    """p_e, how likely a token picks expert e; they sum to `top_k`. Counted shares above 1 are not possible: clipped."""
    total = sum(counts)
    check(total > 0, "a routing profile has a layer without counts; record it on some text first")
    return [min(1.0, top_k * value / total) for value in counts]


def unique_from_marginals(shares: Sequence[float], num_tokens: float) -> float:
    """U(B) = sum over e of 1 - (1 - p_e)^B. Never above the uniform value (concavity)."""
    return sum(1.0 - (1.0 - share) ** num_tokens for share in shares)


def profile_unique(profile: RoutingProfile, num_tokens: float) -> float:
    """U(B) of a profile, mean over its layers."""
    layers = [unique_from_marginals(marginals(row, profile.top_k), num_tokens) for row in profile.counts.values()]
    return sum(layers) / len(layers)


def cache_hit_rate(num_experts: int, top_k: int, cached: int, profile: RoutingProfile | None = None) -> float:
    """Share of expert reads that a cache of the `cached` hottest experts of each layer answers.

    Uniform: C / E. From a profile: the sum of the top C marginals over k, mean over its layers.
    """
    cached = max(0, min(cached, num_experts))
    if profile is None:
        return cached / num_experts
    rates = []
    for row in profile.counts.values():
        shares = sorted(marginals(row, top_k), reverse=True)
        rates.append(sum(shares[:cached]) / sum(shares))
    return sum(rates) / len(rates)


def max_active_per_device(wake: Sequence[Sequence[float]]) -> float:
    """E[max over devices of experts awake], `wake[device]` holding each of its experts' probability of being awake.

    The step of an expert-parallel layer waits for this device. Devices are taken as independent, which overstates
    slightly: the exact counts are negatively correlated.
    """
    if len(wake) == 1:
        return sum(wake[0])
    tails: list[list[float]] = []
    for probabilities in wake:
        dist = [1.0]
        for p in probabilities:
            dist = [a * (1.0 - p) + b * p for a, b in zip([*dist, 0.0], [0.0, *dist], strict=True)]
        tails.append(dist)
    most = max(len(dist) for dist in tails)
    below = [1.0] * most
    for dist in tails:
        running = 0.0
        for value in range(most):
            running += dist[value] if value < len(dist) else 0.0
            below[value] *= min(1.0, running)
    return sum(1.0 - chance for chance in below)


@lru_cache(maxsize=4096)
def uniform_max_active(num_experts: int, top_k: int, num_tokens: float, num_devices: int) -> float:
    """`max_active_per_device` for uniform routing with the experts spread evenly (ceil(E / devices) on the fullest)."""
    held = -(-num_experts // num_devices)
    awake = unique_experts(num_experts, top_k, num_tokens) / num_experts
    if num_devices == 1 or held * num_devices - num_experts >= held:
        return held * awake
    below, total = 0.0, 0.0
    for value in range(held):
        below += comb(held, value) * awake**value * (1.0 - awake) ** (held - value)
        total += 1.0 - min(1.0, below) ** num_devices
    return total
