"""The experts that a trace used most: what a cache may begin with."""

from __future__ import annotations

from fewfire.config import check
from fewfire.trace.file import Trace


def hot_set(trace: Trace, slots: int) -> list[tuple[int, int]]:
    """The `slots` most used records as (number of the MoE layer, expert), the most used first; unused ones never.

    What `Streaming(hot=...)` takes. Ties go to the earlier layer, then to the lower expert.
    """
    check(slots >= 0, f"slots ({slots}) must not be negative")
    used = [
        (-count, layer, expert)
        for layer, counts in enumerate(trace.counts())
        for expert, count in enumerate(counts.tolist())
        if count
    ]
    return [(layer, expert) for _, layer, expert in sorted(used)[:slots]]
