"""A plan as one JSON object, under the names that checks and scripts rely on. Knows no formula."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewfire.plan.plan import Plan

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def to_json(plan: Plan) -> dict[str, Any]:
    """Counts and bytes are integers, rates are floats, unknown is null."""
    document: dict[str, Any] = {
        "model": plan.subject.name,
        "parameters": _parameters(plan),
        "published": {
            "total": plan.subject.published_total,
            "active": plan.subject.published_active,
            "active_counts": plan.subject.active_counts,
            "exact_total": plan.subject.exact_total,
            "quoted_active": plan.quoted_active,
        },
        "memory": _memory(plan),
        "per_token": {
            "flops": plan.flops.total,
            "matmul_flops": plan.flops.matmul,
            "attention_flops": plan.flops.attention,
            "router_flops": plan.flops.router,
            "router_flops_frac": plan.flops.router / plan.flops.total,
            "bytes_read": plan.bytes_read,
        },
        "context": plan.work.context,
        "batch": plan.batch,
        "unique_experts": _unique(plan),
        "hardware": [machine.to_json() for machine in plan.machines],
        "api": _api(plan),
        "cost": plan.costs.to_json() if plan.costs else None,
        "verdict": plan.verdict,
        "warnings": list(plan.warnings),
        "notes": list(plan.subject.explained),
        "sentence": plan.sentence,
    }
    if plan.currency[0] != "USD":
        document["currency"] = {"code": plan.currency[0], "per_usd": plan.currency[1]}
    if plan.placement is not None:
        document["placement"] = asdict(plan.placement)
    if plan.training is not None:
        document["training"] = plan.training.to_json()
    if plan.day is not None:
        document["day"] = plan.day.to_json()
    if plan.points:
        document["measured"] = [
            {**asdict(point), "above_roof": point.above_roof, "error": point.error} for point in plan.points
        ]
    if plan.versus is not None:
        document["versus"] = to_json(plan.versus)
        document["ratios"] = ratios(plan, plan.versus)
    return document


def _parameters(plan: Plan) -> dict[str, Any]:
    counts, config = plan.counts, plan.subject.config
    return {
        "total": counts.total,
        "active": counts.active,
        "active_excluding_embedding": counts.active_excluding_embedding,
        "experts": counts.experts,
        "trunk": counts.trunk,
        "router": counts.router,
        "embedding": counts.embedding,
        "head": counts.head,
        "by_class": counts.by_class,
        "mtp": config.mtp.parameters if config.mtp else 0,
    }


def _memory(plan: Plan) -> dict[str, Any]:
    weights, cache, subject = plan.weights, plan.cache, plan.subject
    memory: dict[str, Any] = {
        "quant": plan.quant,
        "weights_bytes": weights.total,
        "weights_gb": weights.total / 1e9,
        "weights_gib": weights.total / 2**30,
        "experts_bytes": weights.experts,
        "trunk_bytes": weights.trunk,
        "by_class": weights.by_class,
        "on_disk_bytes": subject.stored.total_bytes if subject.stored else subject.disk_bytes,
        "stored_types": subject.stored.types if subject.stored else None,
        "kv_cache_bytes": cache.sequence * plan.batch,
        "kv_cache_bytes_per_token": cache.per_token,
        "kv_cache_bytes_per_sequence": cache.sequence,
        "index_bytes_per_token": cache.index_per_token,
        "windowed_bytes_per_sequence": cache.windowed,
        "state_bytes_per_sequence": cache.state,
        "conv_bytes_per_sequence": cache.conv,
        "floor_bytes": plan.floor.total,
        "floor": dict(plan.floor.table),
    }
    if plan.memory_budget is not None:
        memory["budget_bytes"] = plan.memory_budget
        memory["budget_suffices"] = plan.memory_budget >= plan.floor.total
        memory["streaming"] = plan.budget_streaming.to_json() if plan.budget_streaming else None
    return memory


def _unique(plan: Plan) -> list[dict[str, float]] | None:
    """Experts a batch wakes in a layer: uniform, and from the profile where there is one."""
    if not plan.work.routed:
        return None
    routed, uniform = plan.work.routed[0][0], (plan.uniform or plan.work).routed[0][0]
    rows = []
    for batch in BATCHES:
        row = {"batch": batch, "uniform": uniform.unique(batch)}
        if plan.uniform is not None:
            row["measured"] = routed.unique(batch)
        rows.append(row)
    return rows


def _api(plan: Plan) -> dict[str, Any]:
    if plan.api is None:
        return {}
    return {
        "usd_per_million_input_tokens": plan.api.input,
        "usd_per_million_output_tokens": plan.api.output,
        "usd_per_million_blended_tokens": plan.api.blended(plan.output_share),
        "output_share": plan.output_share,
        "input_range": list(plan.api.input_range),
        "output_range": list(plan.api.output_range),
        "offers": plan.api.offers,
        "providers": list(plan.api.providers),
        "date": plan.api.date,
        "source": plan.api.source,
    }


def ratios(plan: Plan, other: Plan) -> dict[str, float]:
    """`plan` divided by `other`: what a token costs and what must be housed."""
    return {
        "total": plan.counts.total / other.counts.total,
        "active": plan.counts.active / other.counts.active,
        "flops": plan.flops.total / other.flops.total,
        "bytes_read": plan.bytes_read / other.bytes_read,
        "weights_bytes": plan.weights.total / other.weights.total,
        "kv_cache_bytes": plan.cache.sequence / other.cache.sequence if other.cache.sequence else float("inf"),
    }


def node_verdict(plan: Plan) -> str:
    """One node, or several and why, of the first machine asked about (ranked: of the cheapest)."""
    if not plan.machines:
        return "no machine was asked about"
    machine = plan.machines[0]
    needed, part = machine.needed, machine.system.part
    if needed is None:
        return f"no number of {part.name} holds it: they have no link between them that would"
    node = part.usable_bytes * part.per_node
    weights = plan.weights.total
    if needed.nodes == 1:
        return (
            f"single node: {needed.label} ({plan.weights.total / 1e9:,.0f} GB of weights, "
            f"{needed.usable_bytes / 1e9:,.0f} GB usable)"
        )
    return (
        f"multi-node: {needed.nodes} nodes of {part.per_node} x {part.name}; {weights / 1e9:,.0f} GB of weights and "
        f"the cache do not fit the {node / 1e9:,.0f} GB that one node leaves"
    )
