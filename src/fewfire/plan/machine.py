"""One model on one set of devices: the best layout, its speeds, its largest batch, its cost at full load.

Owns the choice of layout and of the batch called full load. Knows no catalogue and no printing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fewfire.plan.fit import Fit, fit, layouts
from fewfire.plan.hardware import Part, Payment, System
from fewfire.plan.speed import PrefillTime, StepTime, decode_step, prefill
from fewfire.plan.stream import Streaming, stream, tiers_of
from fewfire.plan.workload import Assumptions, Layout, Workload

FULL_LOAD_BATCH = 256  # sequences a data-parallel group: what serving engines run by default
USER_TOKENS_PER_S = 10.0  # full load stops where a user's stream falls below reading speed
RANGE = (0.7, 1.15)  # of the efficiency and the mfu: what published points scatter by


@dataclass(frozen=True)
class Machine:
    """`fits` is said of the devices asked for; `needed` is how many of the part it takes (equal where it fits)."""

    system: System
    fits: bool
    needed: System | None
    fit: Fit
    layout: Layout | None
    decode: StepTime | None
    decode_range: tuple[float, float] | None
    prefill: PrefillTime | None
    full_load: StepTime | None
    full_layout: Layout | None
    full_prefill: PrefillTime | None
    usd_per_hour: float | None
    output_share: float
    streaming: Streaming | None = None

    @property
    def usd_per_million_output(self) -> float | None:
        """Of tokens generated at full load: (price an hour / 3600) / (tokens/s) x 10^6."""
        if self.usd_per_hour is None or self.full_load is None:
            return None
        return self.usd_per_hour / 3600 / self.full_load.tokens_per_s * 1e6

    @property
    def usd_per_million_input(self) -> float | None:
        """Of prompt tokens, prefill alone."""
        if self.usd_per_hour is None or self.full_prefill is None or not self.full_prefill.tokens_per_s:
            return None
        return self.usd_per_hour / 3600 / self.full_prefill.tokens_per_s * 1e6

    @property
    def usd_per_million_blended(self) -> float | None:
        """Of all tokens, input and output in the workload's proportion: time adds up, so prices do."""
        if self.usd_per_million_input is None or self.usd_per_million_output is None:
            return None
        return (1 - self.output_share) * self.usd_per_million_input + self.output_share * self.usd_per_million_output

    def to_json(self) -> dict[str, Any]:
        """The object of the plan's `hardware` list."""
        step, fill = self.decode, self.prefill
        needed = self.needed or self.system
        return {
            "name": self.system.label,
            "part": self.system.part.name,
            "fits": self.fits,
            "reason": self.fit.reason or None,
            "devices": needed.count if self.needed else None,
            "nodes": needed.nodes if self.needed else None,
            "layout": self.layout.name if self.layout else None,
            "weights_bytes_per_device": round(self.fit.weights_per_device),
            "usable_bytes_per_device": round(self.fit.usable_per_device),
            "max_batch": self.fit.max_batch if self.fits else 0,
            "batch": step.batch if step else None,
            "decode_tokens_per_s": step.tokens_per_s if step else None,
            "decode_tokens_per_s_range": list(self.decode_range) if self.decode_range else None,
            "decode_bound": step.bound if step else None,
            "prefill_tokens_per_s": fill.tokens_per_s if fill else None,
            "prefill_bound": fill.bound if fill else None,
            "time_to_first_token_s": fill.seconds if fill else None,
            "usd_per_hour": self.usd_per_hour,
            "usd_per_million_tokens": self.usd_per_million_output,
            "usd_per_million_input_tokens": self.usd_per_million_input,
            "usd_per_million_blended_tokens": self.usd_per_million_blended,
            "full_load": self._full_load_json(),
            "streaming": self.streaming.to_json() if self.streaming else None,
        }

    def _full_load_json(self) -> dict[str, Any] | None:
        if self.full_load is None or self.full_layout is None:
            return None
        return {
            "batch": self.full_load.batch,
            "decode_tokens_per_s": self.full_load.tokens_per_s,
            "layout": self.full_layout.name,
            "prefill_tokens_per_s": self.full_prefill.tokens_per_s if self.full_prefill else None,
            "bound": self.full_load.bound,
        }


def _best(work: Workload, system: System, batch: int, assume: Assumptions) -> tuple[Layout, Fit] | None:
    """The fitting layout with the shortest decode step at `batch`."""
    fitting = [(layout, fit(work, system, layout, batch)) for layout in layouts(work, system)]
    fitting = [(layout, verdict) for layout, verdict in fitting if verdict.fits]
    if not fitting:
        return None
    return min(fitting, key=lambda pair: decode_step(work, system, pair[0], batch, assume).seconds)


def smallest_fit(work: Workload, system: System, batch: int, *, limit: int = 4096) -> System | None:
    """The fewest devices of the same part that hold the model: powers of two in a node, then whole nodes."""
    part, count = system.part, 1
    if part.domain == 1 and part.per_node == 1 and part.node_link_gbs is None:
        candidate = replace(system, count=1)
        return candidate if _fits(work, candidate, batch) else None
    while count <= limit:
        candidate = replace(system, count=count)
        if _fits(work, candidate, batch):
            return candidate
        count = count * 2 if count < part.per_node else (count // part.per_node + 1) * part.per_node
        if count > 64 * part.per_node:
            count = count * 2
    return None


def _fits(work: Workload, system: System, batch: int) -> bool:
    return any(fit(work, system, layout, batch).fits for layout in layouts(work, system))


def _full_load(
    work: Workload, system: System, batch: int | None, assume: Assumptions
) -> tuple[Layout, StepTime] | None:
    """The cheapest way to run: the largest batch of any layout within memory, 256 a group, and a readable stream."""
    best: tuple[Layout, StepTime] | None = None
    for layout in layouts(work, system):
        verdict = fit(work, system, layout, batch or 1)
        if not verdict.fits:
            continue
        if batch:
            step = decode_step(work, system, layout, batch, assume)
        else:
            step = _largest(work, system, layout, verdict, assume)
        if best is None or step.tokens_per_s > best[1].tokens_per_s:
            best = layout, step
    return best


def _largest(work: Workload, system: System, layout: Layout, verdict: Fit, assume: Assumptions) -> StepTime:
    limit = min(verdict.max_batch, FULL_LOAD_BATCH * layout.data)
    step = decode_step(work, system, layout, 1, assume)
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        trial = decode_step(work, system, layout, middle, assume)
        if 1 / trial.seconds >= USER_TOKENS_PER_S:
            low, step = middle, trial
        else:
            high = middle - 1
    return step if low == step.batch else decode_step(work, system, layout, low, assume)


def plan_machine(
    work: Workload,
    system: System,
    *,
    batch: int = 1,
    full_batch: int | None = None,
    prompt_tokens: int | None = None,
    assume: Assumptions | None = None,
    output_share: float = 0.25,
    paid: Payment | None = None,
) -> Machine:
    """Everything about `work` on `system`. `full_batch` fixes the batch of the cost; None searches for full load.

    `prompt_tokens` is the prompt that prefill times (default: the context). `paid` says how device-hours
    are paid (default: the catalogue's price).
    """
    assume = assume or Assumptions()
    best = _best(work, system, batch, assume)
    hourly = (paid or Payment()).of(system.part)
    price = None if hourly is None else hourly * system.count
    if best is None:
        verdict = min(
            (fit(work, system, layout, batch) for layout in layouts(work, system)),
            key=lambda each: each.weights_per_device,
        )
        needed = smallest_fit(work, system, batch)
        streaming = None
        if system.count == 1:
            streaming = stream(work, system.part, tiers_of(work, system.part, batch, assume), batch, assume)
        return Machine(
            system, False, needed, verdict, None, None, None, None, None, None, None, price, output_share, streaming
        )  # fmt: skip
    layout, verdict = best
    most = max(fit(work, system, each, batch).max_batch for each in layouts(work, system))
    step = decode_step(work, system, layout, batch, assume)
    prompt = prompt_tokens or work.context
    full = _full_load(work, system, full_batch, assume)
    full_prefills = [prefill(work, system, each, prompt, assume) for each in layouts(work, system)]
    full_prefill = max(full_prefills, key=lambda each: each.tokens_per_s or 0.0)
    return Machine(
        system=system,
        fits=True,
        needed=system,
        fit=replace(verdict, max_batch=most),
        layout=layout,
        decode=step,
        decode_range=_range(work, system, layout, batch, assume),
        prefill=prefill(work, system, layout, prompt, assume),
        full_load=full[1] if full else None,
        full_layout=full[0] if full else None,
        full_prefill=full_prefill,
        usd_per_hour=price,
        output_share=output_share,
    )


def _range(work: Workload, system: System, layout: Layout, batch: int, assume: Assumptions) -> tuple[float, float]:
    """Decode speed with every share of a peak taken at 0.7 and at 1.15 of its value (never above 0.95 of the peak,
    or above the value: what was measured is whole)."""
    speeds = []
    own = assume.efficiency or system.part.efficiency
    for factor in RANGE:
        share = min(max(0.95, own), own * factor)
        varied = replace(assume, efficiency=share, decode_mfu=assume.decode_mfu * factor)
        speeds.append(decode_step(work, system, layout, batch, varied).tokens_per_s)
    return speeds[0], speeds[1]


def rank(work: Workload, parts: Sequence[Part], *, batch: int = 1) -> list[System]:
    """The fewest devices of each part that hold the model, cheapest an hour first; parts without a price after those.

    Parts that cannot hold it are left out: one machine where parts have no link between them, two nodes where nodes
    are joined by less than 50 GB/s a device, else 64 devices.
    """
    systems = []
    for part in parts:
        fast = (part.node_link_gbs or 0) >= 50
        limit = 64 if fast else max(part.domain, 2 * part.per_node if part.per_node > 1 else 1)
        found = smallest_fit(work, System(part, 1), batch, limit=max(limit, part.per_node))
        if found is not None:
            systems.append(found)
    return sorted(systems, key=lambda each: (each.usd_per_hour is None, each.usd_per_hour or 0.0, each.label))
