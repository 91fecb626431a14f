"""How `fewfire plan` looks in a terminal: tables of at most 100 columns, ending in the sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fewfire.cli.output import table
from fewfire.plan.document import ratios
from fewfire.plan.memory import choose_formats, weight_bytes
from fewfire.sizes import format_bytes, format_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from fewfire.plan import Plan
    from fewfire.plan.explain import Explanation
    from fewfire.plan.machine import Machine

RANKED_ROWS = 8  # of the catalogue that a terminal shows; --json has all


def print_plan(made: Plan, out: Console) -> None:
    """Headline, numbers, machines, cost, and what was asked for besides; the sentence last."""
    plans = [made] if made.versus is None else [made, made.versus]
    for each in plans:
        out.print(_headline(each), soft_wrap=True)
    out.print()
    out.print(_numbers_table(plans))
    out.print()
    for each in plans:
        out.print(_hardware_table(each, titled=len(plans) > 1))
        _print_reasons(each, out)
        out.print()
    lines = [
        *_budget_lines(made),
        *_routing_lines(made),
        *_measured_lines(made),
        *_day_lines(made),
        *_training_lines(made),
    ]
    for line in lines:
        out.print(line, soft_wrap=True)
    _print_costs(made, out)
    for line in made.subject.explained:
        out.print(f"Note: {line}.", soft_wrap=True)
    if made.versus is not None:
        out.print(_versus_sentence(made, made.versus), soft_wrap=True)
    out.print(f"Verdict: {made.verdict}.", soft_wrap=True)
    out.print(made.sentence, soft_wrap=True)


def print_explanations(rows: Sequence[Explanation], out: Console) -> None:
    """Each figure with its formula, its numbers and its source."""
    for row in rows:
        out.print(row.name, style="bold", soft_wrap=True)
        out.print(f"  formula  {row.formula}")
        out.print(f"  here     {row.numbers}")
        out.print(f"  source   {row.source}")


def print_launch(made: Plan, out: Console) -> None:
    """Commands that can be pasted, one a node."""
    from fewfire.plan.handover import SGLANG_VERSION, VLLM_VERSION

    handed = made.hand_over()
    if handed is None:
        out.print("No GPU machine of the list holds the model: name one with --hardware.")
        return
    for name, commands in ((f"vLLM {VLLM_VERSION}", handed.vllm), (f"SGLang {SGLANG_VERSION}", handed.sglang)):
        out.print(f"# {name}")
        for command in commands:
            out.print(command, soft_wrap=True, markup=False)
    for line in handed.notes:
        out.print(f"# {line}", soft_wrap=True)


def _headline(made: Plan) -> str:
    counts, subject = made.counts, made.subject
    words = f"{subject.name}: {format_count(counts.total)} parameters"
    if subject.config.is_moe:
        words += f", {format_count(made.quoted_active)} active for each token"
    if subject.published_total:
        published = f"{subject.published_total} total"
        published += f", {subject.published_active} active" if subject.published_active else ""
        words += f"  (published: {published})"
    return words


def _star(quoted: bool) -> str:
    """Marks the count that the publisher quotes."""
    return " *" if quoted else "  "


def _parameter_rows(made: Plan) -> list[tuple[str, str]]:
    counts, config = made.counts, made.subject.config
    rows = [("total", f"{counts.total:,}")]
    if config.is_moe:
        convention = made.subject.active_counts
        rows.append(("active, input embedding included", f"{counts.active:,}{_star(convention == 'all')}"))
        quoted = _star(convention == "without_embedding")
        rows.append(("active, input embedding excluded", f"{counts.active_excluding_embedding:,}{quoted}"))
        if convention == "without_embedding_and_head":
            rows.append(("active, embedding and head excluded", f"{made.quoted_active:,}{_star(True)}"))
    rows += [
        ("routed experts", f"{counts.experts:,}" if config.is_moe else "none: dense"),
        ("trunk (all else)", f"{counts.trunk:,}"),
    ]
    if config.is_moe:
        share = made.flops.router / made.flops.total
        rows.append(("  router", f"{counts.router:,}"))
        rows.append(("  router's share of a token's FLOPs", f"{share * 100:.3f} %"))
    rows.append(("  input embedding", f"{counts.embedding:,}"))
    return rows


def _memory_rows(made: Plan) -> list[tuple[str, str]]:
    def both(size: int) -> str:
        return f"{size / 1e9:,.1f} GB = {size / 2**30:,.1f} GiB"

    config, cache = made.subject.config, made.cache
    own = f"as published, {config.native_format}" if made.quant == "native" else made.quant
    if made.quant == "native" and made.subject.stored is not None:
        types = sorted(made.subject.stored.types.items(), key=lambda item: -item[1])[:3]
        own = "as it is, " + " ".join(name for name, _ in types)
    rows = [("weights", f"{both(made.weights.total)}"), ("  stored as", own)]
    for name in ("bf16", "fp8", "q4"):
        rows.append((f"  in {name}", both(weight_bytes(config, choose_formats(config, name)).total)))
    growth = cache.per_token + cache.index_per_token
    rows.append(("KV cache a token, bf16", f"{growth:,} bytes"))
    fixed = cache.state + cache.conv
    if fixed:
        rows.append(("recurrent state a sequence", format_bytes(fixed)))
    if cache.windowed:
        rows.append(("windowed layers a sequence", format_bytes(cache.windowed)))
    rows.append((f"KV cache, {made.batch} x {made.work.context} tokens", format_bytes(cache.sequence * made.batch)))
    rows.append(("memory floor (experts on disk)", format_bytes(made.floor.total)))
    return rows


def _numbers_table(plans: list[Plan]) -> Any:
    made = table("", *(each.subject.name for each in plans))
    sections = [
        [_parameter_rows(each) for each in plans],
        [_memory_rows(each) for each in plans],
        [
            [
                ("FLOPs a token", f"{each.flops.total / 1e9:,.1f} G"),
                ("bytes read a token", f"{each.bytes_read / 1e9:,.2f} GB"),
            ]
            for each in plans
        ],
    ]
    for section in sections:
        labels = list(dict.fromkeys(label for rows in section for label, _ in rows))
        for label in labels:
            made.add_row(label, *(dict(rows).get(label, "") for rows in section), end_section=label == labels[-1])
    return made


def rate(value: float | None) -> str:
    """Tokens a second in three figures or so."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def money(made: Plan, usd: float | None, *, digits: int = 2) -> str:
    """Dollars, or the currency asked for."""
    if usd is None:
        return "-"
    code, per_usd = made.currency
    sign = "$" if code == "USD" else f"{code} "
    return f"{sign}{usd * per_usd:,.{digits}f}"


def _plain_money(made: Plan, usd: float | None) -> str:
    """As `money`, the unit left to the column's head."""
    if usd is None:
        return "-"
    value = usd * made.currency[1]
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def _hardware_row(made: Plan, machine: Machine) -> list[str]:
    step, fill = machine.decode, machine.prefill
    name = machine.system.label
    if machine.fits and step is not None and machine.decode_range is not None:
        low, high = machine.decode_range
        first = fill.seconds if fill else None
        return [
            name,
            "yes",
            machine.layout.name if machine.layout and machine.layout.devices > 1 else "",
            rate(step.tokens_per_s),
            f"{rate(low)}-{rate(high)}",
            rate(fill.tokens_per_s if fill else None),
            "-" if first is None else f"{first:.2f}" if first < 100 else f"{first:,.0f}",
            f"{machine.fit.max_batch:,}",
            _plain_money(made, machine.usd_per_million_output),
        ]
    if machine.streaming is not None:
        speed, best = machine.streaming.tokens_per_s, machine.streaming.batch / machine.streaming.overlapped_s
        return [
            name,
            "streams",
            machine.streaming.tiers[-1].name,
            rate(speed),
            f"{rate(speed)}-{rate(best)}",
            *[""] * 4,
        ]
    needs = "no" if machine.needed is None or machine.needed.count == 1 else f"needs {machine.needed.count}"
    return [name, needs, *[""] * 7]


def _shown(made: Plan) -> list[Machine]:
    """Of a ranked catalogue the cheapest and the laptops, whatever else it holds."""
    if not made.ranked:
        return list(made.machines)
    laptops = [machine for machine in made.machines if machine.system.part.kind == "laptop"]
    others = [machine for machine in made.machines if machine.system.part.kind != "laptop"]
    return [*laptops, *others[:RANKED_ROWS]]


def _hardware_table(made: Plan, *, titled: bool) -> Any:
    sequences = "1 sequence" if made.batch == 1 else f"{made.batch} sequences"
    title = f"{sequences} of {made.work.context} tokens; money per million generated tokens at full load"
    if made.ranked:
        title += "; cheapest first"
    if titled:
        title = f"{made.subject.name}: {title}"
    names = ("machine", "fits", "layout", "decode\ntok/s", "range", "prefill\ntok/s", "first\ntoken s", "most\nseqs")
    unit = "$" if made.currency[0] == "USD" else made.currency[0]
    rows = table(*names, f"{unit}/M\nout", title=title)
    for machine in _shown(made):
        rows.add_row(*_hardware_row(made, machine))
    return rows


def _print_reasons(made: Plan, out: Console) -> None:
    hidden = len(made.machines) - len(_shown(made))
    if hidden > 0:
        out.print(f"{hidden} more in --json; `fewfire models --hardware` lists the catalogue.")
    for machine in made.machines:
        if not machine.fits and not made.ranked:
            words = f"{machine.system.label}: {machine.fit.reason}"
            if machine.needed is not None and machine.needed.count > 1:
                words += f"; {machine.needed.label} on {machine.needed.nodes} node(s) would hold it"
            out.print(f"{words}.", soft_wrap=True)


def _budget_lines(made: Plan) -> list[str]:
    if made.memory_budget is None:
        return []
    enough = made.memory_budget >= made.floor.total
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in made.floor.table.items() if size)
    words = "is enough" if enough else "is below the floor"
    lines = [f"Budget {format_bytes(made.memory_budget)} {words} of {format_bytes(made.floor.total)}: {parts}."]
    stream = made.budget_streaming
    if enough and stream is not None:
        lines.append(
            f"In it {stream.hit_rate * 100:.0f} % of expert reads are answered from memory; the disk gives "
            f"{stream.shares[-1] * stream.expert_bytes / stream.batch / 1e9:.2f} GB a token: "
            f"{rate(stream.tokens_per_s)} tokens/s, at best {rate(stream.batch / stream.overlapped_s)}."
        )
    return lines


def _routing_lines(made: Plan) -> list[str]:
    if made.uniform is None or not made.work.routed:
        return []
    routed, uniform = made.work.routed[0][0], made.uniform.routed[0][0]
    pairs = [f"{batch}: {routed.unique(batch):.1f} ({uniform.unique(batch):.1f})" for batch in (1, 8, 32, 128)]
    lines = [f"Experts awake in a layer by batch, measured (uniform): {', '.join(pairs)} of {routed.num_experts}."]
    gain = made.placement
    if gain is not None:
        lines.append(
            f"Over {gain.devices} devices the busiest gets {gain.imbalance_in_order:.2f} times the mean in order, "
            f"{gain.imbalance_balanced:.2f} balanced with {gain.replicas} copies; experts awake on it at "
            f"{gain.num_tokens} tokens: {gain.awake_in_order:.1f}, {gain.awake_balanced:.1f}."
        )
    return lines


def _measured_lines(made: Plan) -> list[str]:
    return [
        f"Measured {point.measured:g} tokens/s at batch {point.batch}: predicted {point.predicted:.1f} "
        f"({point.error * 100:+.0f} %), roof {point.roof:.1f}; the table is calibrated on it."
        for point in made.points
    ]


def _day_lines(made: Plan) -> list[str]:
    day = made.day
    if day is None:
        return []
    first, token, total = day.first_token_s, day.token_s, day.total_s
    return [
        f"A day of {day.traffic.requests:,} requests on {day.devices} devices ({day.replicas} x {day.layout}): "
        f"first token {first['p50']:.2f} s, {first['p99']:.2f} s at the 99th percentile; "
        f"between tokens {token['p50'] * 1e3:.0f} ms, {token['p99'] * 1e3:.0f} ms; "
        f"whole answer {total['p50']:.1f} s, {total['p99']:.1f} s; {day.busy_frac * 100:.1f} % busy, "
        f"longest queue {day.longest_queue}."
    ]


def _training_lines(made: Plan) -> list[str]:
    training = made.training
    if training is None:
        return []
    words = f"Training on {format_count(training.num_tokens)} tokens: {training.flops:.2e} FLOPs"
    if training.device_hours is not None:
        part = training.system.part.name
        words += f", {training.device_hours:,.0f} hours of {part} at {training.mfu * 100:.0f} % of its rate"
    if training.usd is not None:
        words += f", {money(made, training.usd, digits=0)}"
    state = format_bytes(training.state_bytes)
    return [f"{words}; weights, gradients and optimizer take {state}, {training.devices_for_memory} devices or more."]


def _print_costs(made: Plan, out: Console) -> None:
    costs = made.costs
    if costs is None or (costs.host is None and costs.api is None):
        return
    if costs.demand.tokens_per_month is not None:
        rows = table("route", "a month", "per million tokens")
        for route in costs.routes():
            rows.add_row(route.name, money(made, route.usd_per_month, digits=0), money(made, route.usd_per_million))
        out.print(rows)
        for route in costs.routes():
            name = route.name.split(",")[0]
            out.print(
                f"{name}: the text goes {route.text_goes}; offered by {route.providers}; leaving: {route.leaving}.",
                soft_wrap=True,
            )
    if made.api is not None:
        out.print(
            f"API: {money(made, made.api.input)} in, {money(made, made.api.output)} out per million tokens, median of "
            f"{made.api.offers} offers ({made.api.date}; {made.api.source.split(' (')[0]}).",
            soft_wrap=True,
        )
    out.print(costs.sentence, soft_wrap=True)


def _versus_sentence(made: Plan, other: Plan) -> str:
    shares = ratios(made, other)
    return (
        f"{made.subject.name} against {other.subject.name}: {shares['flops']:.2f}x the FLOPs a token, "
        f"{shares['bytes_read']:.2f}x the bytes read, {shares['weights_bytes']:.2f}x the memory."
    )
