"""The plan as one self-contained HTML page with charts, to hand over. No scripts, nothing fetched, prints on paper."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from fewfire.families import published
from fewfire.families.published import NotPublished
from fewfire.plan.api_prices import load_api_prices
from fewfire.plan.count import count
from fewfire.plan.fit import layouts
from fewfire.plan.machine import Machine
from fewfire.plan.memory import cache_bytes
from fewfire.plan.speed import decode_step
from fewfire.plan.svg import Line, line_chart, scatter, stacked_bars
from fewfire.sizes import format_bytes, format_count

if TYPE_CHECKING:
    from fewfire.plan.plan import Plan

_STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:#1a1f24;background:#fff;margin:0}
main{max-width:860px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 4px}h2{font-size:1.2rem;margin:40px 0 8px}
.sub{color:#5b6770;margin:0 0 20px}.lead{font-size:1.15rem;border-left:4px solid #1b4f8f;padding:4px 0 4px 14px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:20px 0}
.card{border:1px solid #d5dbe0;border-radius:6px;padding:10px 14px}.card b{display:block;font-size:1.35rem}
.card span{color:#5b6770;font-size:.85rem}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.88rem;margin:8px 0 4px}
th,td{padding:6px 8px;border-bottom:1px solid #e3e8ec;text-align:right;vertical-align:top}
th:first-child,td:first-child{text-align:left}
td:nth-child(4){white-space:nowrap}.words td{white-space:normal}
.words td,.words th{text-align:left}th{color:#5b6770;font-weight:600}
svg{width:100%;height:auto;display:block;font:12px system-ui,sans-serif}svg text{fill:#3a444c}
svg .grid{stroke:#e3e8ec}svg .mark{font-weight:600;fill:#111}
.legend{font-size:.85rem;color:#3a444c;margin:2px 0 0;display:flex;flex-wrap:wrap;gap:4px 18px}
.legend i{display:inline-block;width:12px;height:12px;border-radius:2px;margin-right:6px;vertical-align:-1px}
.note{color:#5b6770;font-size:.88rem}
.warn{background:#fff6e5;border:1px solid #e8c984;padding:8px 12px;border-radius:6px}
@media print{main{padding:0}h2{break-after:avoid}svg,table{break-inside:avoid}}
"""


def to_html(plan: Plan) -> str:
    """The whole page. Every figure in it is one of `to_json`; its formula is in the last table."""
    sections = [
        _head(plan),
        _cards(plan),
        _machines(plan),
        _speed(plan),
        _memory(plan),
        _cost(plan),
        _prices(plan),
        _versus(plan),
        _day(plan),
        _launch(plan),
        _formulas(plan),
    ]
    title = escape(f"{plan.subject.name}: what it needs, how fast it runs, what it costs")
    body = "\n".join(section for section in sections if section)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="words"' if words else ""
    return f'<div class="wide"><table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _money(plan: Plan, usd: float | None, digits: int = 2) -> str:
    if usd is None:
        return "unknown"
    code, per_usd = plan.currency
    return f"{'$' if code == 'USD' else code + ' '}{usd * per_usd:,.{digits}f}"


def _rate(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _head(plan: Plan) -> str:
    warnings = "".join(f'<p class="warn">{escape(words)}.</p>' for words in plan.warnings)
    answer = escape(plan.costs.sentence) if plan.costs else ""
    today = datetime.date.today().isoformat()
    return (
        f"<h1>{escape(plan.subject.title or plan.subject.name)}</h1>"
        f'<p class="sub">What it needs, how fast it runs, what it costs. Worked out on {today} from published shapes '
        "and prices; nothing was bought or downloaded, and speeds are predictions, not measurements.</p>"
        f'<p class="lead">{escape(plan.sentence)}</p><p>{answer}</p><p>{escape(plan.verdict)}.</p>{warnings}'
    )


def _cards(plan: Plan) -> str:
    counts = plan.counts
    cards = [
        (format_count(counts.total), "parameters to house"),
        (format_count(plan.quoted_active), "active for each token"),
        (f"{plan.weights.total / 1e9:,.1f} GB", f"of weights ({plan.quant})"),
        (format_bytes(plan.cache.sequence), f"of cache for {plan.work.context:,} tokens"),
        (format_bytes(plan.floor.total), "at the very least"),
    ]
    inner = "".join(f'<div class="card"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in cards)
    return f'<div class="cards">{inner}</div>'


def _shown(plan: Plan) -> list[Machine]:
    return list(plan.machines) if not plan.ranked else list(plan.machines[:14])


def _machines(plan: Plan) -> str:
    rows = []
    for machine in _shown(plan):
        if machine.fits and machine.decode and machine.decode_range and machine.prefill:
            low, high = machine.decode_range
            seconds = machine.prefill.seconds
            rows.append(
                (
                    machine.system.label,
                    "yes",
                    _rate(machine.decode.tokens_per_s),
                    f"{_rate(low)} to {_rate(high)}",
                    _rate(machine.prefill.tokens_per_s),
                    "unknown" if seconds is None else f"{seconds:.2f} s",
                    f"{machine.fit.max_batch:,}",
                    _money(plan, machine.usd_per_million_output),
                )
            )
        else:
            speed = _rate(machine.streaming.tokens_per_s) if machine.streaming else ""
            reason = "streams experts from disk" if machine.streaming else machine.fit.reason
            rows.append((machine.system.label, reason, speed, "", "", "", "", ""))
    head = (
        "machine", "fits", "decode tokens/s", "range", "prefill tokens/s", "first token", "most sequences",
        "per million generated",
    )  # fmt: skip
    words = f"{plan.batch} at once, each of {plan.work.context:,} tokens. " + (
        "The catalogue's cheapest fits first. " if plan.ranked else ""
    )
    return f'<h2>Where it runs</h2><p class="note">{escape(words)}Prices at full load.</p>{_table(head, rows)}'


def _fitting(plan: Plan) -> list[Machine]:
    return [machine for machine in plan.machines if machine.fits and machine.layout is not None]


def _speed(plan: Plan) -> str:
    lines = []
    for machine in _fitting(plan)[:5]:
        points = []
        batch = 1
        while batch <= min(machine.fit.max_batch, 512):
            steps = [
                decode_step(plan.work, machine.system, layout, batch, plan.assume)
                for layout in layouts(plan.work, machine.system)
            ]
            points.append((float(batch), max(step.tokens_per_s for step in steps)))
            batch *= 2
        if len(points) > 1:
            lines.append(Line(machine.system.label, points))
    if not lines:
        return ""
    chart = line_chart(
        lines,
        title="Decode speed against batch",
        x_label="sequences at once",
        y_label="tokens a second, all together",
        log_x=True,
        log_y=True,
        y_text=lambda value: f"{value:,.0f}",
    )
    return (
        "<h2>Speed against batch</h2>"
        '<p class="note">A larger batch wakes more experts, so speed grows less than the batch does until all are '
        f"awake.</p>{chart}"
    )


def _memory(plan: Plan) -> str:
    config, names = plan.subject.config, ("experts", "trunk", "cache")
    contexts = sorted({min(config.max_context, size) for size in (plan.work.context, 32_768, config.max_context)})
    rows = []
    for context in contexts:
        cache = cache_bytes(config, context).sequence * plan.batch
        rows.append((f"{plan.batch} x {context:,} tokens", [plan.weights.experts, plan.weights.trunk, cache]))
    limit = [
        (machine.system.usable_bytes, machine.system.label)
        for machine in _fitting(plan)[:1]
        if machine.system.usable_bytes < 4 * plan.weights.total
    ]
    chart = stacked_bars(rows, names, title="Memory", text=lambda value: f"{value / 1e9:,.0f} GB", limits=limit)
    return (
        "<h2>What fills the memory</h2>"
        '<p class="note">Experts and trunk are there whatever is asked; the cache grows with every token of every '
        f"sequence.</p>{chart}"
    )


def _cost(plan: Plan) -> str:
    costs = plan.costs
    if costs is None or costs.host is None:
        return ""
    host, code = costs.host, plan.currency[1]
    anchor = costs.demand.tokens_per_month or costs.break_even or host.useful_capacity / 4
    volumes = [anchor * 10 ** (power / 48) for power in range(-72, 73)]
    lines = [Line(f"self-host, {host.machine.system.label}", [(v, host.monthly(v) * code) for v in volumes])]
    if costs.api_per_million:
        lines.append(Line("managed API", [(v, costs.api_per_million * v / 1e6 * code) for v in volumes]))
    if costs.dense is not None:
        label = f"dense {costs.dense_name}, {costs.dense.machine.system.label}"
        lines.append(Line(label, [(v, costs.dense.monthly(v) * code) for v in volumes], dashed=True))
    marks = []
    if costs.break_even is not None and volumes[0] < costs.break_even < volumes[-1]:
        marks.append((costs.break_even, host.monthly(costs.break_even) * code, "break-even"))
    unit = plan.currency[0]
    chart = line_chart(
        lines,
        title="Cost a month against volume",
        x_label="tokens a month, in and out",
        y_label=f"{unit} a month",
        log_x=True,
        log_y=True,
        x_text=_volume,
        y_text=lambda value: f"{value:,.0f}",
        marks=marks,
    )
    rows = [
        (
            route.name,
            _money(plan, route.usd_per_month, 0),
            _money(plan, route.usd_per_million),
            route.text_goes,
            route.providers,
            route.leaving,
        )
        for route in costs.routes()
    ]
    head = ("route", "a month", "per million tokens", "where the text goes", "who offers it", "leaving")
    steps = (
        "Self-hosting is a fixed bill in whole systems: the line is flat until one is full, then the next is added. "
        f"{costs.demand.output_share * 100:.0f} % of tokens are generated; peaks are {costs.demand.burstiness:g} times "
        "the mean."
    )
    return f'<h2>Cost against volume</h2><p class="note">{escape(steps)}</p>{chart}{_table(head, rows, words=True)}'


def _volume(tokens: float) -> str:
    """'100M', '10B': a tick of the volume axis."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if tokens >= size:
            return f"{tokens / size:,.3g}{unit}"
    return f"{tokens:,.0f}"


def _prices(plan: Plan) -> str:
    """API list prices of all known models against their sizes."""
    total, active = [], []
    for name, price in load_api_prices().models.items():
        if isinstance(published.find(name), NotPublished):
            continue
        counts = count(published.load(name))
        usd = price.blended(plan.output_share) * plan.currency[1]
        total.append((counts.total / 1e9, usd, name))
        active.append((counts.active / 1e9, usd, name))
    chart = scatter(
        [("by active parameters", active), ("by total parameters", total)],
        title="API prices against size",
        x_label="billions of parameters",
        y_label=f"{plan.currency[0]} per million tokens",
        x_text=lambda value: f"{value:g}" if value < 10 else f"{value:,.0f}",
        y_text=lambda value: f"{value:g}",
        highlight=plan.subject.name,
    )
    return (
        "<h2>What APIs charge for size</h2>"
        '<p class="note">Each model twice: at its active and at its total parameters. Median list price, '
        f"{load_api_prices().date}; hover a point for its name.</p>{chart}"
    )


def _versus(plan: Plan) -> str:
    other = plan.versus
    if other is None:
        return ""
    rows = [
        ("total parameters", f"{plan.counts.total:,}", f"{other.counts.total:,}"),
        ("active parameters", f"{plan.counts.active:,}", f"{other.counts.active:,}"),
        ("FLOPs a token", f"{plan.flops.total / 1e9:,.1f} G", f"{other.flops.total / 1e9:,.1f} G"),
        ("bytes read a token", f"{plan.bytes_read / 1e9:,.2f} GB", f"{other.bytes_read / 1e9:,.2f} GB"),
        ("weights", f"{plan.weights.total / 1e9:,.1f} GB", f"{other.weights.total / 1e9:,.1f} GB"),
        ("cache a sequence", format_bytes(plan.cache.sequence), format_bytes(other.cache.sequence)),
    ]
    head = ("", plan.subject.name, other.subject.name)
    return f"<h2>Beside {escape(other.subject.name)}</h2>{_table(head, rows)}"


def _day(plan: Plan) -> str:
    day = plan.day
    if day is None:
        return ""
    rows = [
        (name, *(f"{values[key]:.3f} s" for key in ("p50", "p90", "p99")))
        for name, values in (
            ("first token", day.first_token_s),
            ("between tokens", day.token_s),
            ("whole answer", day.total_s),
        )
    ]
    traffic = day.traffic
    words = (
        f"{traffic.requests:,} requests of about {traffic.prompt_tokens:,} tokens in, {traffic.answer_tokens:,} out, "
        f"on {day.devices} devices ({day.replicas} x {day.layout}); {day.busy_frac * 100:.1f} % busy, longest "
        f"queue {day.longest_queue}."
    )
    head = ("", "median", "90 %", "99 %")
    return f'<h2>A simulated day</h2><p class="note">{escape(words)}</p>{_table(head, rows)}'


def _launch(plan: Plan) -> str:
    handed = plan.hand_over()
    if handed is None:
        return ""
    commands = "\n".join((*handed.vllm, "", *handed.sglang))
    notes = "".join(f'<p class="note">{escape(words)}.</p>' for words in handed.notes)
    return (
        "<h2>How to start it</h2>"
        f'<pre style="white-space:pre-wrap;font-size:.82rem;background:#f4f6f8;padding:12px;border-radius:6px">'
        f"{escape(commands)}</pre>{notes}"
    )


def _formulas(plan: Plan) -> str:
    shown = {f"hardware.{machine.system.label}" for machine in _fitting(plan)[:2]}
    rows = [
        (each.name, each.formula, each.numbers, each.source)
        for each in plan.explain()
        if not each.name.startswith("hardware.") or each.name.rpartition(".")[0] in shown
    ]
    limits = (
        "What this does not show: the quality of the model on your text, kernels that miss the assumed shares of the "
        "hardware, and experts that tokens of one text share (uniform routing assumes none)."
    )
    notes = "".join(f'<p class="note">{escape(words)}.</p>' for words in plan.subject.explained)
    head = ("figure", "formula", "here", "source")
    return f"<h2>Where the figures come from</h2><p>{limits}</p>{notes}{_table(head, rows, words=True)}"
