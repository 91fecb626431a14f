"""`plan(model)`: what is known before anything is bought or downloaded. Composes the rest of this package."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewfire.config import ModelConfig, RoutingProfile, check
from fewfire.plan import document
from fewfire.plan.api_prices import ApiPrice, load_api_prices
from fewfire.plan.cost import Costs, Demand, choose_host, self_host
from fewfire.plan.count import Counts, Flops
from fewfire.plan.fit import layouts
from fewfire.plan.hardware import Catalogue, Payment, System, load_catalogue, parse_hardware
from fewfire.plan.machine import Machine, plan_machine, rank
from fewfire.plan.memory import CacheBytes, Floor, Formats, WeightBytes, choose_formats, floor_bytes
from fewfire.plan.placement import PlacementGain
from fewfire.plan.speed import bytes_per_step
from fewfire.plan.stream import Streaming, stream, tiers_of
from fewfire.plan.subject import Subject, resolve
from fewfire.plan.unique import placement_gain
from fewfire.plan.workload import Assumptions, Workload
from fewfire.sizes import format_count, parse_bytes

# Modules that only some questions need are imported where they are asked: `fewfire plan NAME` answers in under 0.5 s.
if TYPE_CHECKING:
    from fewfire.plan.calibrate import Point
    from fewfire.plan.explain import Explanation
    from fewfire.plan.handover import HandOver
    from fewfire.plan.simulate import Day, Traffic
    from fewfire.plan.training import Training

DEFAULT_CONTEXT = 4096
LAPTOPS = ("laptop-16", "laptop-32", "laptop-64")


@dataclass(frozen=True)
class Plan:
    """A finished plan. Sizes in bytes, rates per second; `to_json` has the contract's field names."""

    subject: Subject
    work: Workload
    quant: str
    batch: int
    floor: Floor
    machines: tuple[Machine, ...]
    api: ApiPrice | None
    assume: Assumptions
    ranked: bool = False
    memory_budget: int | None = None
    budget_streaming: Streaming | None = None
    versus: Plan | None = None
    costs: Costs | None = None
    training: Training | None = None
    day: Day | None = None
    points: tuple[Point, ...] = ()
    placement: PlacementGain | None = None
    warnings: tuple[str, ...] = ()
    output_share: float = 0.25
    currency: tuple[str, float] = ("USD", 1.0)
    uniform: Workload | None = field(default=None, repr=False)  # the same without the profile, to show the difference

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

    @property
    def flops(self) -> Flops:
        return self.work.flops

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

    @property
    def verdict(self) -> str:
        """Single node or several, of the first machine asked about."""
        return document.node_verdict(self)

    def explain(self, name: str | None = None) -> list[Explanation]:
        """Formula, numbers and source of every figure, or of those called `name`."""
        from fewfire.plan.explain import explain

        return explain(self, name)

    def hand_over(self) -> HandOver | None:
        """Launch commands for the first machine that fits; None if none does."""
        from fewfire.plan.handover import hand_over

        machine = next((each for each in self.machines if each.fits and each.system.part.kind == "gpu"), None)
        if machine is None or machine.full_layout is None or machine.full_load is None:
            return None
        return hand_over(
            self.subject.hub_id or self.subject.name,
            self.subject.config,
            machine.system,
            machine.full_layout,
            quant=self.quant,
            context=self.work.context,
            max_sequences=machine.full_load.batch,
            profile=self.work.profile,
        )

    def to_json(self) -> dict[str, Any]:
        """One JSON object; counts are integers, bytes are integers, rates are floats, unknown is null."""
        return document.to_json(self)

    def to_html(self) -> str:
        """The report to hand over: one self-contained page with charts."""
        from fewfire.plan.report import to_html

        return to_html(self)


def _check_context(subject: Subject, context: int | None) -> int:
    most = subject.config.max_context
    if context is None:
        return min(DEFAULT_CONTEXT, most)
    check(context >= 1, f"context ({context}) must be at least 1 token; the model takes up to {most}")
    check(context <= most, f"context ({context}) exceeds what {subject.name} was made for; use {most} or less")
    return context


def _systems(
    hardware: str | Sequence[str] | None, catalogue: Catalogue, work: Workload, batch: int
) -> tuple[list[System], bool]:
    """(systems to plan, whether ranked here): those named, or the catalogue, cheapest fit first, and laptops."""
    if hardware is not None:
        names = hardware.split(",") if isinstance(hardware, str) else list(hardware)
        check(bool(names), "hardware is empty; name a part such as H100 or a set such as 8xH200")
        return [_system(name, catalogue) for name in names], False
    ranked = rank(work, catalogue.parts, batch=batch)
    held = {system.part.name for system in ranked}
    laptops = [parse_hardware(name, catalogue) for name in LAPTOPS]
    return [*ranked, *(system for system in laptops if system.part.name not in held)], True


def _system(name: str, catalogue: Catalogue) -> System:
    if name.strip().lower() == "here":
        from fewfire.plan.here import load_profile

        return System(load_profile().part(), 1, asked=True)
    return parse_hardware(name, catalogue)


def _warnings(catalogue: Catalogue, machines: Sequence[Machine], api: ApiPrice | None, paid: Payment) -> list[str]:
    today, found = datetime.date.today(), []
    age = catalogue.price_age_days(today)
    if paid == Payment() and machines and age is not None and age > catalogue.stale_after_days:
        found.append(f"machine prices are of {catalogue.prices_date}, {age} days old: check them, or give --price")
    prices = load_api_prices()
    if api is not None and prices.age_days(today) > prices.stale_after_days:
        found.append(f"API prices are of {prices.date}, {prices.age_days(today)} days old: check them")
    return found


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
    routing: RoutingProfile | str | Path | None = None,
    domain: str | None = None,
    measured: str | dict[int, float] | None = None,
    price: float | Payment | None = None,
    demand: Demand | None = None,
    api_price: ApiPrice | None = None,
    train_tokens: float | None = None,
    traffic: Traffic | None = None,
    prompt_tokens: int | None = None,
    currency: tuple[str, float] = ("USD", 1.0),
    assume: Assumptions | None = None,
    ignore_keys: Sequence[str] = (),
) -> Plan:
    """Plan a model: a published name, a bare size ('400b-a30b'), a folder, a .gguf file, a hub id, or a ModelConfig.

    `quant` and the four formats as `choose_formats`; `context` tokens a sequence (default 4096 or the model's most),
    `batch` sequences at once (default 1; the cost then searches for full load). `hardware` is '8xH200', 'here' or a
    list; without it the catalogue is ranked, cheapest fit first. `routing`: a profile or its file. `measured`: decode
    speeds ('1=17,4=36.4') of the first machine that calibrate the rest. `price`: dollars a device-hour, or how it
    is paid. `traffic`: simulate a day on the first machine. Loads no torch and reads no weights.

    Raises: ConfigError on unknown names, formats, hardware and sizes out of range; FormatError on damaged files.
    """
    subject = resolve(model, ignore=tuple(ignore_keys))
    context = _check_context(subject, context)
    check(batch is None or 1 <= batch <= 10**7, f"batch ({batch}) must be between 1 and 10000000 sequences")
    check(prompt_tokens is None or 1 <= prompt_tokens <= 10**8, f"prompt ({prompt_tokens}) must be 1 to 10^8 tokens")
    demand, size = demand or Demand(), batch or 1
    paid = price if isinstance(price, Payment) else Payment(price)
    formats = choose_formats(
        subject.config, quant, experts=experts, trunk=trunk, down=down, head=head, stored=subject.formats
    )
    profile = _profile(routing, subject, domain)
    stored = subject.stored_in(formats)
    work = Workload.of(subject.config, formats, context, profile, stored=stored)
    catalogue = load_catalogue()
    systems, ranked = _systems(hardware, catalogue, work, size)
    assume, points = _calibrate(work, systems[0], measured, assume or Assumptions())
    machines = [
        plan_machine(
            work,
            system,
            batch=size,
            full_batch=batch,
            prompt_tokens=prompt_tokens,
            assume=assume,
            output_share=demand.output_share,
            paid=paid,
        )  # fmt: skip
        for system in systems
    ]
    api = api_price or load_api_prices().models.get(subject.name)
    budget = None if memory is None else parse_bytes(memory, name="--memory")
    check(budget is None or budget > 0, f"--memory ({memory}) must be above 0; write it as 8GiB")
    return Plan(
        subject=subject,
        work=work,
        quant=quant.lower(),
        batch=size,
        floor=floor_bytes(subject.config, formats, context, size, weights=work.weights),
        machines=tuple(machines),
        api=api,
        assume=assume,
        ranked=ranked,
        memory_budget=budget,
        budget_streaming=_budget_streaming(work, systems, budget, size, assume),
        versus=None if versus is None else _versus(versus, quant, context, batch, hardware, demand, paid, assume),
        costs=_costs(subject, _serving(machines, ranked), demand, api, catalogue, context, currency),
        training=_training(work, subject, train_tokens, systems[0] if not ranked else _system("H100", catalogue)),
        day=_day(work, machines, traffic, assume),
        points=points,
        placement=_placement(work, machines, size),
        warnings=tuple(_warnings(catalogue, machines, api, paid)),
        output_share=demand.output_share,
        currency=currency,
        uniform=None if profile is None else Workload.of(subject.config, formats, context, stored=stored),
    )


def _profile(
    routing: RoutingProfile | str | Path | None, subject: Subject, domain: str | None
) -> RoutingProfile | None:
    check(domain is None or routing is not None, f"domain ({domain}) is one of a routing file; give --routing too")
    if routing is None or isinstance(routing, RoutingProfile):
        return routing
    from fewfire.plan.profile import read_profile

    return read_profile(routing, model=subject.name, domain=domain)


def _calibrate(
    work: Workload, system: System, measured: str | dict[int, float] | None, assume: Assumptions
) -> tuple[Assumptions, tuple[Point, ...]]:
    if measured is None:
        return assume, ()
    from fewfire.plan.calibrate import calibrate, compare, parse_measured

    points = parse_measured(measured) if isinstance(measured, str) else measured
    layout = layouts(work, system)[0]
    found = tuple(compare(work, system, layout, points, assume))
    return calibrate(work, system, layout, points, assume), found


def _budget_streaming(
    work: Workload, systems: Sequence[System], budget: int | None, batch: int, assume: Assumptions
) -> Streaming | None:
    """What `--memory` leaves on the first single machine, experts beyond it coming from its disk."""
    single = next((system.part for system in systems if system.count == 1), None)
    if budget is None or single is None:
        return None
    return stream(work, single, tiers_of(work, single, batch, assume, budget=budget), batch, assume)


def _versus(
    model: str | Path | ModelConfig, quant: str, context: int, batch: int | None,
    hardware: str | Sequence[str] | None, demand: Demand, paid: Payment, assume: Assumptions,
) -> Plan:  # fmt: skip
    """The other model under the same question; a context beyond its own is cut to it."""
    most = resolve(model).config.max_context
    return plan(
        model, quant=quant, context=min(context, most), batch=batch, hardware=hardware, demand=demand, price=paid,
        assume=assume,
    )  # fmt: skip


def _serving(machines: list[Machine], ranked: bool) -> list[Machine]:
    """Machines to reckon a service with: those named, or of the ranked ones those that are rented by the hour."""
    if not ranked:
        return machines
    return [machine for machine in machines if machine.system.part.price_usd_per_hour is not None]


def _costs(
    subject: Subject, machines: list[Machine], demand: Demand, api: ApiPrice | None, catalogue: Catalogue,
    context: int, currency: tuple[str, float],
) -> Costs:  # fmt: skip
    """Self-hosting, API, and, where a volume is named, a dense model of about the active size on a cheap machine."""
    host, dense, name = choose_host(machines, demand, api), None, ""
    if demand.tokens_per_month is not None and subject.config.is_moe and subject.counts.active >= 10**6:
        name = format_count(subject.counts.active).lower().replace("k", "m")
        small = resolve(name)
        work = Workload.of(small.config, choose_formats(small.config, "bf16"), min(context, 131_072))
        rented = [part for part in catalogue.parts if part.price_usd_per_hour is not None]
        hosts = [self_host(plan_machine(work, system), demand) for system in rank(work, rented)[:8]]
        usable = [each for each in hosts if each is not None and each.machine.full_load is not None]
        quick = [each for each in usable if each.machine.decode and each.machine.decode.tokens_per_s >= 10]
        dense = min(quick, key=lambda each: each.monthly(demand.tokens_per_month or 1.0), default=None)
    return Costs(demand, host, api, dense, name, currency)


def _training(work: Workload, subject: Subject, num_tokens: float | None, system: System) -> Training | None:
    if num_tokens is None:
        return None
    from fewfire.plan.training import plan_training

    return plan_training(work, subject.counts, num_tokens, system)


def _day(work: Workload, machines: list[Machine], traffic: Traffic | None, assume: Assumptions) -> Day | None:
    """A day on the first machine that holds the model, with as many copies of its smallest fit as there is room for."""
    if traffic is None:
        return None
    from fewfire.plan.simulate import simulate_day

    machine = next((each for each in machines if each.fits), None)
    check(machine is not None, "no machine of the list holds the model, so no day can be simulated; give --hardware")
    assert machine is not None
    single = rank(work, [machine.system.part]) or [machine.system]
    size = min(single[0].count, machine.system.count)
    copy = plan_machine(work, System(machine.system.part, size), assume=assume)
    layout = copy.full_layout or machine.layout
    assert layout is not None
    return simulate_day(work, machine.system, layout, max(1, machine.system.count // layout.devices), traffic, assume)


def _placement(work: Workload, machines: list[Machine], batch: int) -> PlacementGain | None:
    if work.profile is None or not work.routed:
        return None
    sizes = [machine.system.count for machine in machines if 1 < machine.system.count <= work.profile.num_experts]
    return placement_gain(work.routed[0][0], sizes[0] if sizes else 8, max(batch, 64))
