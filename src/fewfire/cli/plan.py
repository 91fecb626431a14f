"""`fewfire plan MODEL`: total and active, memory, fit, speed, cost. Parses, calls `fewfire.plan`, prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from fewfire.plan import Plan
    from fewfire.plan.machine import Machine


def plan(
    model: Annotated[str, typer.Argument(help="A published name, a size such as 400b-a30b, or a checkpoint's folder.")],
    quant: Annotated[str, typer.Option(help="Weight format: native, fp16, bf16, fp8, q8, q4, mxfp4, ...")] = "native",
    experts: Annotated[str | None, typer.Option(help="Format of the routed experts alone.")] = None,
    trunk: Annotated[str | None, typer.Option(help="Format of all that is not a routed expert.")] = None,
    down: Annotated[str | None, typer.Option(help="Format of the experts' down projections.")] = None,
    head: Annotated[str | None, typer.Option(help="Format of the output head.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens a sequence (default 4096).")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences at once (default 1).")] = None,
    hardware: Annotated[str | None, typer.Option(help="8xH200, 'RTX 4090', laptop-32; several with commas.")] = None,
    memory: Annotated[str | None, typer.Option(help="A budget such as 8GiB: is the floor below it?")] = None,
    versus: Annotated[str | None, typer.Option(help="Another model beside this one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """What a model needs, how fast it runs and what it costs, before anything is bought or downloaded."""
    from fewfire.cli.output import console, print_json
    from fewfire.plan import plan as make_plan
    from fewfire.plan.subject import not_published

    closed = not_published(model)
    if closed is not None:
        words = f"{closed.title} is not published ({closed.status} as a mixture of experts): {closed.words}."
        if as_json:
            print_json({"model": closed.name, "published": False, "status": closed.status, "words": closed.words})
        else:
            console().print(words)
        return
    made = make_plan(
        model, quant=quant, experts=experts, trunk=trunk, down=down, head=head, context=context, batch=batch,
        hardware=hardware, memory=memory, versus=versus,
    )  # fmt: skip
    if as_json:
        print_json(made.to_json())
        return
    print_plan(made, console())


def print_plan(made: Plan, out: Console) -> None:
    """The plan as tables that fit a terminal, ending in its sentence."""
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
    _print_api(made, out)
    if made.memory_budget is not None:
        _print_budget(made, out)
    for line in made.subject.explained:
        out.print(f"Note: {line}.", soft_wrap=True)
    if made.versus is not None:
        out.print(_versus_sentence(made, made.versus), soft_wrap=True)
    out.print(made.sentence, soft_wrap=True)


def _headline(made: Plan) -> str:
    from fewfire.sizes import format_count

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
    from fewfire.plan.memory import choose_formats, weight_bytes
    from fewfire.sizes import format_bytes

    def both(size: int) -> str:
        return f"{size / 1e9:,.1f} GB = {size / 2**30:,.1f} GiB"

    config, cache = made.subject.config, made.cache
    own = f"as published, {config.native_format}" if made.quant == "native" else made.quant
    rows = [("weights", f"{both(made.weights.total)}"), ("  stored as", own)]
    for name in ("bf16", "fp8", "q4"):
        rows.append((f"  in {name}", both(weight_bytes(config, choose_formats(config, name)).total)))
    growth = cache.per_token + cache.index_per_token
    rows.append(("KV cache a token, bf16", f"{growth:,} bytes"))
    fixed = cache.state + cache.conv
    if fixed:
        rows.append(("recurrent state a sequence", format_bytes(fixed)))
    rows.append((f"KV cache, {made.batch} x {made.work.context} tokens", format_bytes(cache.sequence * made.batch)))
    rows.append(("memory floor (experts on disk)", format_bytes(made.floor.total)))
    return rows


def _numbers_table(plans: list[Plan]) -> Any:
    from fewfire.cli.output import table

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


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _money(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _hardware_row(machine: Machine) -> list[str]:
    step, fill = machine.decode, machine.prefill
    if machine.fits and step is not None and machine.decode_range is not None:
        low, high = machine.decode_range
        first = fill.seconds if fill else None
        return [
            machine.system.label,
            "yes",
            machine.layout.name if machine.layout else "-",
            _rate(step.tokens_per_s),
            f"{_rate(low)}-{_rate(high)}",
            _rate(fill.tokens_per_s if fill else None),
            "-" if first is None else f"{first:.2f}" if first < 100 else f"{first:.0f}",
            f"{machine.fit.max_batch:,}",
            _money(machine.usd_per_million_output),
        ]
    needs = "no" if machine.needed is None else f"no, takes {machine.needed.count}"
    return [machine.system.label, needs, "", "", "", "", "", "", ""]


def _hardware_table(made: Plan, *, titled: bool) -> Any:
    from fewfire.cli.output import table

    sequences = "1 sequence" if made.batch == 1 else f"{made.batch} sequences"
    title = f"{sequences} of {made.work.context} tokens; dollars per million generated tokens at full load"
    if titled:
        title = f"{made.subject.name}: {title}"
    names = (
        "machine",
        "fits",
        "layout",
        "decode\ntok/s",
        "range",
        "prefill\ntok/s",
        "first\ntoken s",
        "most\nseqs",
        "$/M\nout",
    )
    rows = table(*names, title=title)
    for machine in made.machines:
        rows.add_row(*_hardware_row(machine))
    return rows


def _print_reasons(made: Plan, out: Console) -> None:
    for machine in made.machines:
        if not machine.fits and len(made.machines) <= 2:
            out.print(f"{machine.system.label}: {machine.fit.reason}.")


def _print_api(made: Plan, out: Console) -> None:
    if made.api is not None:
        api = made.api
        out.print(
            f"API: ${api.input:.2f} in, ${api.output:.2f} out per million tokens, median of {api.offers} offers "
            f"({api.date}; {api.source.split(' (')[0]})."
        )


def _print_budget(made: Plan, out: Console) -> None:
    from fewfire.sizes import format_bytes

    assert made.memory_budget is not None
    enough = made.memory_budget >= made.floor.total
    words = "is enough" if enough else "is below the floor"
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in made.floor.table.items() if size)
    out.print(f"Budget {format_bytes(made.memory_budget)} {words}: {parts}.")


def _versus_sentence(made: Plan, other: Plan) -> str:
    from fewfire.plan.plan import ratios

    shares = ratios(made, other)
    return (
        f"{made.subject.name} against {other.subject.name}: {shares['flops']:.2f}x the FLOPs a token, "
        f"{shares['bytes_read']:.2f}x the bytes read, {shares['weights_bytes']:.2f}x the memory."
    )
