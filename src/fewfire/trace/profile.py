"""A trace in short: what `plan` receives instead of assuming uniform routing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fewfire.config import RoutingProfile, check
from fewfire.plan.profile import profile_json
from fewfire.trace.file import Trace, write_trace
from fewfire.trace.simulate import DEFAULT_POLICY, decode_steps, simulate

SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
CURVE_TOKENS = 1024  # of which the curve is made: more change it little, and cost time


def profile_of(trace: Trace, *, policy: str = DEFAULT_POLICY, shares: Sequence[float] = SHARES) -> RoutingProfile:
    """Expert counts by layer, and the hit rate of decode, token by token, against the share of experts in memory.

    Rates are of a cache that is full already: what the first half of the tokens did is not counted.
    Raises: ConfigError where MoE layers differ in experts or top_k: a profile has one of each.
    """
    kinds = set(zip(trace.num_experts, trace.top_k))
    check(len(kinds) == 1, "a routing profile needs MoE layers of one kind; this model's differ in experts or top_k")
    counts = {layer: tuple(row.tolist()) for layer, row in zip(trace.layers, trace.counts(), strict=True)}
    num_experts, top_k = kinds.pop()
    return RoutingProfile(num_experts, top_k, trace.num_tokens, counts, cache_curve(trace, policy, shares))


def save_trace(path: str | Path, trace: Trace) -> None:
    """`write_trace`, with the profile in the header, so that `fewfire plan --routing` needs to read no more. Without it
    where MoE layers differ."""
    alike = len(set(zip(trace.num_experts, trace.top_k))) == 1
    write_trace(path, trace, {"profile": json.dumps(profile_json(profile_of(trace)))} if alike else None)


def cache_curve(trace: Trace, policy: str, shares: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """(share of experts in memory, hit rate), rising; shares below two layers' worth of one token are left out."""
    steps = decode_steps(trace, end=min(trace.num_tokens, CURVE_TOKENS))
    warm = steps[: len(steps) // 2]
    curve = []
    for share in sorted(shares):
        slots = round(share * trace.num_records)
        if slots < 2 * max(trace.top_k):
            continue
        every, before = (
            simulate(trace.num_experts, steps, slots, policy),
            simulate(trace.num_experts, warm, slots, policy),
        )
        hits, misses = every.hits - before.hits, every.misses - before.misses
        curve.append((share, hits / (hits + misses) if hits + misses else 1.0))
    return tuple(curve)
