"""Every figure of a plan can be asked for its formula, its own numbers in it, and where the formula comes from."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from fewfire.errors import ConfigError
from fewfire.plan.memory import bits_per_weight
from fewfire.plan.rates import OVERLAP
from fewfire.sizes import format_bytes, format_count

if TYPE_CHECKING:
    from fewfire.plan.plan import Plan

_SHAPES = "exact arithmetic over the shapes of config.json (docs/plan.md, Parameters)"
_ROOF = "roofline; constants in docs/plan.md, Assumptions"


@dataclass(frozen=True)
class Explanation:
    """One figure: its name in `--json`, its formula in words, this plan's numbers put in, and the source."""

    name: str
    formula: str
    numbers: str
    source: str


def explain(plan: Plan, name: str | None = None) -> list[Explanation]:
    """All explanations, or those whose name ends in or holds `name`. Raises ConfigError with the nearest names."""
    everything = [*_parameters(plan), *_memory(plan), *_tokens(plan), *_machines(plan), *_money(plan)]
    if name is None or name == "all":
        return everything
    wanted = name.lower()
    exact = [each for each in everything if each.name.split(".")[-1] == wanted or each.name == wanted]
    found = exact or [each for each in everything if wanted in each.name]
    if not found:
        names = [each.name for each in everything]
        near = get_close_matches(wanted, [*names, *(each.split(".")[-1] for each in names)], n=3, cutoff=0.4)
        raise ConfigError(f"--explain ({name}) is no figure of a plan; nearest: {', '.join(near or names[:3])}")
    return found


def _parameters(plan: Plan) -> list[Explanation]:
    counts = plan.counts
    rows = [
        Explanation(
            "parameters.total",
            "experts + trunk; multi-token prediction, scales and buffers are counted apart",
            f"{counts.experts:,} + {counts.trunk:,} = {counts.total:,}",
            _SHAPES,
        ),
        Explanation(
            "parameters.trunk",
            "embedding, head, attention, norms, routers, shared experts, dense feed-forward",
            " + ".join(f"{kind} {size:,}" for kind, size in counts.by_class.items() if kind != "experts"),
            _SHAPES,
        ),
    ]
    if plan.subject.config.is_moe:
        routed = plan.work.routed[0][0] if plan.work.routed else None
        which = f"top {routed.top_k} of {routed.num_experts}" if routed else "top k"
        rows += [
            Explanation(
                "parameters.active",
                "trunk + the experts one token meets (k/E of them), input embedding included",
                f"{counts.trunk:,} + {counts.active_experts:,} ({which}) = {counts.active:,}",
                _SHAPES,
            ),
            Explanation(
                "parameters.active_excluding_embedding",
                "active - input embedding, which is a gather and no arithmetic (a tied table is the head: it stays)",
                f"{counts.active:,} - {counts.active - counts.active_excluding_embedding:,}",
                _SHAPES,
            ),
        ]
    return rows


def _memory(plan: Plan) -> list[Explanation]:
    formats, cache, work = plan.formats, plan.cache, plan.work
    own = plan.subject.stored_in(formats) is not None
    parts = {"experts": formats.experts, "down": formats.down, "trunk": formats.trunk, "head": formats.head}
    parts["router"] = formats.router
    bits = ", ".join(f"{part} {name} ({bits_per_weight(name):g} bits)" for part, name in parts.items())
    return [
        Explanation(
            "memory.weights_bytes",
            "the checkpoint's own bytes" if own else "sum over tensors of elements x bits / 8, rows padded to blocks",
            f"{bits}: {plan.weights.total:,} bytes = {plan.weights.total / 1e9:,.1f} GB",
            plan.subject.stored.source if own and plan.subject.stored else "block sizes of each format (docs/plan.md)",
        ),
        Explanation(
            "memory.kv_cache_bytes",
            "sequences x (context x per token + windowed + state): GQA 2 x kv heads x head_dim a layer and token, MLA "
            "its latent rank + rope dim, windows and chunks bounded, linear layers a constant; bf16",
            f"{plan.batch} x ({work.context} x {cache.per_token + cache.index_per_token:,} + {cache.windowed:,} + "
            f"{cache.state + cache.conv + cache.cross:,}) = {cache.sequence * plan.batch:,}",
            "each family's cache layout; DeepSeek-V2 report section 2.1 for MLA",
        ),
        Explanation(
            "memory.floor_bytes",
            "process + trunk + cache + two layers' chosen experts + activations: less cannot run, more caches experts",
            " + ".join(f"{part} {format_bytes(size)}" for part, size in plan.floor.table.items()),
            "what the runtime keeps resident whatever the budget",
        ),
    ]


def _tokens(plan: Plan) -> list[Explanation]:
    flops, work = plan.flops, plan.work
    rows = [
        Explanation(
            "per_token.flops",
            "2 x active matmul parameters (embedding gather left out) + attention over the context",
            f"{flops.matmul:,} + {flops.attention:,}; the router's part {flops.router / flops.total * 100:.3f} %",
            "one multiply-add is two operations",
        )
    ]
    numbers = f"trunk {work.trunk_bytes / 1e9:.2f} GB + cache {work.cache_read / 1e9:.3f} GB x {plan.batch}"
    for routed, layers in work.routed:
        unique = routed.unique(plan.batch)
        numbers += f" + {layers} layers x {unique:.1f} of {routed.num_experts} experts awake"
    how = "measured marginals: sum of 1 - (1 - p_e)^B" if work.profile else "uniform routing: E (1 - (1 - k/E)^B)"
    rows.append(
        Explanation(
            "per_token.bytes_read",
            f"(trunk + awake experts + cache of the batch) / batch; awake by {how}",
            f"({numbers}) / {plan.batch} = {plan.bytes_read / 1e9:.2f} GB",
            "decode reads the experts a batch wakes, not the active parameters once",
        )
    )
    return rows


def _machines(plan: Plan) -> list[Explanation]:
    rows = []
    for machine in plan.machines:
        part, verdict = machine.system.part, machine.fit
        usable, held = verdict.usable_per_device / 1e9, verdict.weights_per_device / 1e9
        name = f"hardware.{machine.system.label}"
        rows.append(
            Explanation(
                f"{name}.fits",
                "memory x utilisation - reserve >= weights a device + activations + one sequence's cache",
                f"a device: usable {usable:.1f} GB, weights {held:.1f} GB",
                "GPUs: 0.9 of the memory less 3.5 GB (1 GB below 40 GB); docs/plan.md, Fit",
            )
        )
        step, fill = machine.decode, machine.prefill
        if step is None or fill is None:
            continue
        how = "batch / (sum over attention, trunk, experts of max(bytes / rate, FLOPs / rate) + launches + links)"
        if part.kernels is not None:
            how = (
                "batch / (sum over attention, trunk, experts of max(reading, arithmetic) "
                f"+ {1 - OVERLAP:.2f} min of them + launches)"
            )
        rows.append(
            Explanation(
                f"{name}.decode_tokens_per_s",
                how,
                f"{step.batch} / ({step.memory_s * 1e3:.2f} ms reading {step.bytes_read / 1e9:.1f} GB a device at "
                f"{part.bandwidth_gbs:g} GB/s x {part.efficiency:g}, {step.compute_s * 1e3:.2f} ms arithmetic, "
                f"{step.launch_s * 1e3:.2f} ms launches, {step.communication_s * 1e3:.2f} ms links)",
                f"{_ROOF}; {', '.join(part.sources)}",
            )
        )
        if fill.seconds is not None:
            rows.append(
                Explanation(
                    f"{name}.time_to_first_token_s",
                    "chunks x max(weights / bandwidth, FLOPs / (mfu x rate)) + launches + links",
                    f"{fill.num_tokens} tokens in {fill.seconds:.2f} s, bound by {fill.bound}",
                    _ROOF,
                )
            )
        if machine.full_load is not None and machine.usd_per_hour is not None:
            full = machine.full_load
            rows.append(
                Explanation(
                    f"{name}.usd_per_million_tokens",
                    "dollars an hour / 3600 / generated tokens a second at full load x 10^6",
                    f"${machine.usd_per_hour:.2f} / 3600 / {full.tokens_per_s:,.0f} ({full.batch} sequences) x 10^6",
                    part.price_source or "bought, written off over three years, power at 0.15 a kWh",
                )
            )
    return rows


def _money(plan: Plan) -> list[Explanation]:
    costs = plan.costs
    if costs is None or costs.host is None:
        return []
    host = costs.host
    rows = [
        Explanation(
            "cost.capacity_tokens_per_month",
            "730 hours x 3600 / ((1 - share) / prefill rate + share / decode rate), share = generated part of tokens",
            f"{format_count(host.capacity)} tokens a month on {host.machine.system.label}",
            "time of prompts and answers adds up on one system",
        )
    ]
    if costs.api_per_million:
        point = costs.break_even
        rows.append(
            Explanation(
                "cost.break_even_tokens_per_month",
                "(730 x dollars an hour + ops) / API price a token, valid up to the capacity",
                f"${host.floor_usd_per_month:,.0f} / ${costs.api_per_million:.4f} a million = "
                + ("never within capacity" if point is None else f"{format_count(point)} tokens a month"),
                f"API: {plan.api.source if plan.api else 'none'}",
            )
        )
    return rows
