"""`plan(model)`: what is known before anything is bought or downloaded. Composes the rest of this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fewfire.config import ModelConfig, RoutingProfile, check
from fewfire.plan.api_prices import ApiPrice, load_api_prices
from fewfire.plan.count import Counts, Flops, decode_flops
from fewfire.plan.hardware import System, load_catalogue, parse_hardware
from fewfire.plan.machine import Machine, plan_machine
from fewfire.plan.memory import CacheBytes, Floor, Formats, WeightBytes, choose_formats, floor_bytes
from fewfire.plan.speed import bytes_per_step
from fewfire.plan.subject import Subject, resolve
from fewfire.plan.workload import Assumptions, Workload
from fewfire.sizes import format_count, parse_bytes

DEFAULT_CONTEXT = 4096
DEFAULT_HARDWARE = ("laptop-16", "laptop-32", "laptop-64", "RTX 4090", "H100", "8xH200")


@dataclass(frozen=True)
class Plan:
    """A finished plan. Sizes in bytes, rates per second; `to_json` has the contract's field names."""

    subject: Subject
    work: Workload
    quant: str
    batch: int
    flops: Flops
    floor: Floor
    machines: tuple[Machine, ...]
    api: ApiPrice | None
    memory_budget: int | None
    versus: Plan | None
    output_share: float

    @property
    def counts(self) -> Counts:
        return self.subject.counts

    @property
    def weights(self) -> WeightBytes:
        return self.work.weights

    @property
    def cache(self) -> CacheBytes:
        return self.work.cache

    @property
    def formats(self) -> Formats:
        return self.work.formats

    @cached_property
    def bytes_read(self) -> int:
        """Bytes a generated token reads: a decode step's, shared by the batch."""
        return round(bytes_per_step(self.work, self.batch) / self.batch)

    @property
    def quoted_active(self) -> int:
        """Active parameters by the publisher's convention; the input embedding included where there is none."""
        counts = self.counts
        match self.subject.active_counts:
            case "without_embedding":
                return counts.active_excluding_embedding
            case "without_embedding_and_head":
                return counts.active_excluding_embedding - (0 if self.subject.config.tied_head else counts.head)
            case _:
                return counts.active

    @property
    def sentence(self) -> str:
        """The plan in a sentence."""
        active, total = format_count(self.quoted_active), format_count(self.counts.total)
        quality = "Quality on your text: not measured (fewfire eval)."
        if not self.subject.config.is_moe:
            return f"Dense: computes like what it is housed as, {total}. {quality}"
        return f"Computes like a {active} dense model; housed like a {total} one. {quality}"

    def to_json(self) -> dict[str, Any]:
        """One JSON object; counts are integers, bytes are integers, rates are floats, unknown is null."""
        counts, config = self.counts, self.subject.config
        document: dict[str, Any] = {
            "model": self.subject.name,
            "parameters": {
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
            },
            "published": {
                "total": self.subject.published_total,
                "active": self.subject.published_active,
                "active_counts": self.subject.active_counts,
                "exact_total": self.subject.exact_total,
                "quoted_active": self.quoted_active,
            },
            "memory": self._memory_json(),
            "per_token": {
                "flops": self.flops.total,
                "matmul_flops": self.flops.matmul,
                "attention_flops": self.flops.attention,
                "router_flops": self.flops.router,
                "router_flops_frac": self.flops.router / self.flops.total,
                "bytes_read": self.bytes_read,
            },
            "context": self.work.context,
            "batch": self.batch,
            "hardware": [machine.to_json() for machine in self.machines],
            "api": self._api_json(),
            "notes": list(self.subject.explained),
            "sentence": self.sentence,
        }
        if self.versus is not None:
            document["versus"] = self.versus.to_json()
            document["ratios"] = ratios(self, self.versus)
        return document

    def _memory_json(self) -> dict[str, Any]:
        weights, cache, subject = self.weights, self.cache, self.subject
        memory: dict[str, Any] = {
            "quant": self.quant,
            "weights_bytes": weights.total,
            "weights_gb": weights.total / 1e9,
            "weights_gib": weights.total / 2**30,
            "experts_bytes": weights.experts,
            "trunk_bytes": weights.trunk,
            "by_class": weights.by_class,
            "on_disk_bytes": subject.stored.total_bytes if subject.stored else subject.disk_bytes,
            "stored_types": subject.stored.types if subject.stored else None,
            "kv_cache_bytes": cache.sequence * self.batch,
            "kv_cache_bytes_per_token": cache.per_token,
            "kv_cache_bytes_per_sequence": cache.sequence,
            "index_bytes_per_token": cache.index_per_token,
            "windowed_bytes_per_sequence": cache.windowed,
            "state_bytes_per_sequence": cache.state,
            "conv_bytes_per_sequence": cache.conv,
            "floor_bytes": self.floor.total,
            "floor": dict(self.floor.table),
        }
        if self.memory_budget is not None:
            memory["budget_bytes"] = self.memory_budget
            memory["budget_suffices"] = self.memory_budget >= self.floor.total
        return memory

    def _api_json(self) -> dict[str, Any]:
        if self.api is None:
            return {}
        return {
            "usd_per_million_input_tokens": self.api.input,
            "usd_per_million_output_tokens": self.api.output,
            "usd_per_million_blended_tokens": self.api.blended(self.output_share),
            "output_share": self.output_share,
            "input_range": list(self.api.input_range),
            "output_range": list(self.api.output_range),
            "offers": self.api.offers,
            "providers": list(self.api.providers),
            "date": self.api.date,
            "source": self.api.source,
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


def _check_context(subject: Subject, context: int | None) -> int:
    most = subject.config.max_context
    if context is None:
        return min(DEFAULT_CONTEXT, most)
    check(context >= 1, f"context ({context}) must be at least 1 token; the model takes up to {most}")
    check(context <= most, f"context ({context}) exceeds what {subject.name} was made for; use {most} or less")
    return context


def _systems(hardware: str | Sequence[str] | None) -> list[System]:
    catalogue = load_catalogue()
    if hardware is None:
        names: Sequence[str] = DEFAULT_HARDWARE
    else:
        names = hardware.split(",") if isinstance(hardware, str) else hardware
    return [parse_hardware(name, catalogue) for name in names]


def plan(
    model: str | Path | ModelConfig,
    *,
    quant: str = "native",
    experts: str | None = None,
    trunk: str | None = None,
    down: str | None = None,
    head: str | None = None,
    context: int | None = None,
    batch: int | None = None,
    hardware: str | Sequence[str] | None = None,
    memory: str | int | None = None,
    versus: str | Path | ModelConfig | None = None,
    routing: RoutingProfile | None = None,
    output_share: float = 0.25,
    assume: Assumptions | None = None,
) -> Plan:
    """Plan a model: a published name, a bare size ('400b-a30b'), a folder with a config.json, or a ModelConfig.

    `quant` and the four formats as `choose_formats`; `context` tokens a sequence (default 4096 or the model's most),
    `batch` sequences at once (default 1; the cost then searches for the cheapest batch). `hardware` is '8xH200' or a
    list. `output_share` is the generated part of all tokens. Loads no torch and reads no weights.

    Raises: ConfigError on unknown names, formats, hardware and sizes out of range.
    """
    subject = resolve(model)
    context = _check_context(subject, context)
    check(batch is None or 1 <= batch <= 10**7, f"batch ({batch}) must be between 1 and 10000000 sequences")
    check(0.0 <= output_share <= 1.0, f"output share ({output_share}) must be between 0 and 1")
    formats = choose_formats(subject.config, quant, experts=experts, trunk=trunk, down=down, head=head)
    work = Workload.of(subject.config, formats, context, routing, stored=subject.stored)
    size = batch or 1
    machines = [
        plan_machine(work, system, batch=size, full_batch=batch, assume=assume, output_share=output_share)
        for system in _systems(hardware)
    ]
    other = None
    if versus is not None:
        other = plan(
            versus, quant=quant, context=context, batch=batch, hardware=hardware, output_share=output_share,
            assume=assume,
        )  # fmt: skip
    return Plan(
        subject=subject,
        work=work,
        quant=quant.lower(),
        batch=size,
        flops=decode_flops(subject.config, context),
        floor=floor_bytes(subject.config, formats, context, size),
        machines=tuple(machines),
        api=load_api_prices().models.get(subject.name),
        memory_budget=None if memory is None else parse_bytes(memory, name="--memory"),
        versus=other,
        output_share=output_share,
    )
