"""`fewfire plan MODEL`: total and active, memory, fit, speed, cost. Parses, calls `fewfire.plan`, prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fewfire.plan import Plan
    from fewfire.plan.cost import Demand
    from fewfire.plan.hardware import Payment


def plan(
    model: Annotated[
        str, typer.Argument(help="A published name, a size such as 400b-a30b, a folder, a .gguf file or a hub id.")
    ],
    quant: Annotated[str, typer.Option(help="Weight format: native, fp16, bf16, fp8, q8, q4, mxfp4, ...")] = "native",
    experts: Annotated[str | None, typer.Option(help="Format of the routed experts alone.")] = None,
    trunk: Annotated[str | None, typer.Option(help="Format of all that is not a routed expert.")] = None,
    down: Annotated[str | None, typer.Option(help="Format of the experts' down projections.")] = None,
    head: Annotated[str | None, typer.Option(help="Format of the output head.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens a sequence (default 4096).")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences at once (default 1).")] = None,
    hardware: Annotated[
        str | None, typer.Option(help="8xH200, 'RTX 4090', laptop-32, here; several with commas (default: ranked).")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="A budget such as 8GiB: what streams, and how fast.")] = None,
    versus: Annotated[str | None, typer.Option(help="Another model beside this one.")] = None,
    routing: Annotated[Path | None, typer.Option(help="Expert counts recorded on your text (JSON).")] = None,
    domain: Annotated[str | None, typer.Option(help="The domain of --routing to use (default: all).")] = None,
    measured: Annotated[
        str | None, typer.Option(help="Decode speeds of the first machine, as 1=17.0,4=36.4: calibrates the rest.")
    ] = None,
    prompt: Annotated[int | None, typer.Option(help="Prompt tokens that prefill is timed for.")] = None,
    tokens_per_month: Annotated[str | None, typer.Option(help="Tokens in and out a month, as 2b or 500m.")] = None,
    output_share: Annotated[float, typer.Option(help="Part of the tokens that is generated.")] = 0.25,
    burstiness: Annotated[float, typer.Option(help="Busiest hour over the mean.")] = 1.0,
    ops_usd_per_month: Annotated[float, typer.Option(help="People and extras of self-hosting.")] = 0.0,
    price: Annotated[float | None, typer.Option(help="Dollars a device-hour, instead of the catalogue's.")] = None,
    buy_usd: Annotated[float | None, typer.Option(help="Bought instead of rented: price of one device.")] = None,
    years: Annotated[float | None, typer.Option(help="Years over which it is written off (default 3).")] = None,
    power_kw: Annotated[float | None, typer.Option(help="Power of one bought device, all in.")] = None,
    usd_per_kwh: Annotated[float | None, typer.Option(help="Price of power (default 0.15).")] = None,
    pricing: Annotated[
        str, typer.Option(help="on-demand, own-hyperscaler, own-smaller-cloud or rent-3-years.")
    ] = "on-demand",
    currency: Annotated[str | None, typer.Option(help="Show money in another currency, as KES=129.")] = None,
    api_prices: Annotated[
        bool, typer.Option("--api-prices", help="Read prices from the installed genai-prices package.")
    ] = False,
    train_tokens: Annotated[str | None, typer.Option(help="Cost of training on so many tokens, as 1t.")] = None,
    simulate: Annotated[int | None, typer.Option(help="Simulate a day of so many requests.")] = None,
    answer: Annotated[int | None, typer.Option(help="Answer tokens of a simulated request (default 300).")] = None,
    explain: Annotated[
        str | None, typer.Option(help="Formula, numbers and source of one figure, or of all of them (all).")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report to this file.")] = None,
    launch: Annotated[bool, typer.Option("--launch", help="Commands for vLLM and SGLang.")] = False,
    placement: Annotated[Path | None, typer.Option(help="Write the expert placement from --routing here.")] = None,
    ignore_key: Annotated[list[str] | None, typer.Option(help="A key of config.json to leave aside.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """What a model needs, how fast it runs and what it costs, before anything is bought or downloaded."""
    from fewfire.cli.output import console, note, print_json
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
        model,
        quant=quant,
        experts=experts,
        trunk=trunk,
        down=down,
        head=head,
        context=context,
        batch=batch,
        hardware=hardware,
        memory=memory,
        versus=versus,
        routing=routing,
        domain=domain,
        measured=measured,
        price=_payment(price, buy_usd, years, power_kw, usd_per_kwh, pricing),
        demand=_demand(tokens_per_month, output_share, burstiness, ops_usd_per_month),
        api_price=_api_price(model, api_prices),
        train_tokens=_count(train_tokens, "--train-tokens"),
        traffic=_traffic(simulate, prompt, answer),
        prompt_tokens=prompt,
        currency=_currency(currency),
        ignore_keys=ignore_key or (),
    )
    for warning in made.warnings:
        note(f"warning: {warning}")
    _write_files(made, html, placement)
    if as_json:
        _print_json(made, explain, launch)
        return
    from fewfire.cli import plan_tables

    out = console()
    if explain is not None:
        plan_tables.print_explanations(made.explain(explain), out)
    elif launch:
        plan_tables.print_launch(made, out)
    else:
        plan_tables.print_plan(made, out)


def _print_json(made: Plan, explain: str | None, launch: bool) -> None:
    from fewfire.cli.output import print_json

    document: dict[str, Any] = made.to_json()
    if explain is not None:
        document["explanations"] = [each.__dict__ for each in made.explain(explain)]
    if launch:
        handed = made.hand_over()
        document["launch"] = handed.to_json() if handed else None
    print_json(document)


def _payment(
    price: float | None,
    buy_usd: float | None,
    years: float | None,
    power_kw: float | None,
    usd_per_kwh: float | None,
    pricing: str,
) -> Payment:
    from fewfire.config import check
    from fewfire.plan.hardware import OWN_YEARS, USD_PER_KWH, Payment

    given = years is not None or power_kw is not None or usd_per_kwh is not None
    check(
        buy_usd is not None or not given,
        "--years, --power-kw and --usd-per-kwh are of bought parts; give --buy-usd",
    )
    return Payment(
        usd_per_hour=price,
        buy_usd=buy_usd,
        years=OWN_YEARS if years is None else years,
        kilowatts=power_kw,
        usd_per_kwh=USD_PER_KWH if usd_per_kwh is None else usd_per_kwh,
        pricing=pricing,
    )


def _count(text: str | None, name: str) -> float | None:
    from fewfire.config import check
    from fewfire.sizes import parse_count

    if text is None:
        return None
    number = parse_count(text, name=name)
    check(number > 0, f"{name} ({text}) must be above 0; write it as 2b or 500m")
    return float(number)


def _demand(tokens: str | None, output_share: float, burstiness: float, ops: float) -> Demand:
    from fewfire.plan.cost import Demand

    return Demand(_count(tokens, "--tokens-per-month"), output_share, burstiness, ops)


def _traffic(requests: int | None, prompt: int | None, answer: int | None) -> Any:
    from fewfire.config import check

    if requests is None:
        check(answer is None, "--answer is of a simulated request; give --simulate too")
        return None
    from fewfire.plan.simulate import Traffic

    return Traffic(requests, prompt_tokens=prompt or 2000, answer_tokens=300 if answer is None else answer)


def _api_price(model: str, installed: bool) -> Any:
    if not installed:
        return None
    from fewfire.plan.api_prices import installed_price

    return installed_price(model)


def _currency(text: str | None) -> tuple[str, float]:
    from fewfire.config import check

    if text is None:
        return "USD", 1.0
    code, _, rate = text.partition("=")
    number = float(rate) if rate.replace(".", "", 1).isdigit() else 0.0
    check(
        code.isalpha() and number > 0,
        f"--currency ({text}) is not CODE=units a dollar, above 0; write it as KES=129",
    )
    return code.upper(), number


def _write_files(made: Plan, html: Path | None, placement: Path | None) -> None:
    import json

    from fewfire.cli.output import note, write_whole
    from fewfire.config import check

    if html is not None:
        write_whole(html, made.to_html())
        note(f"wrote {html}")
    if placement is not None:
        handed = made.hand_over()
        check(
            handed is not None and handed.placement is not None,
            "no placement: it takes --routing and a --hardware of several GPUs over which experts are spread",
        )
        assert handed is not None
        write_whole(placement, json.dumps(handed.placement))
        note(f"wrote {placement}")
