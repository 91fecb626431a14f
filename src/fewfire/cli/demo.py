"""`fewfire demo`: trains a small MoE, its dense twin and the MoE without balancing, and shows what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewfire.config import check

if TYPE_CHECKING:
    from rich.console import Console

    from fewfire.demo import DemoResult
    from fewfire.demo.disk import OnDisk
    from fewfire.demo.smollm2 import SmolResult


def demo(
    minutes: Annotated[float, typer.Option(help="About how long to train on two cores.")] = 6.0,
    seed: Annotated[int, typer.Option(help="Seed of weights and data order.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: all cores).")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train again even if a finished demo is kept.")] = False,
    model: Annotated[str | None, typer.Option(help="smollm2: a real model instead, if it is installed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """The whole way, offline: plan, train, compare, look at the router, generate. Afterwards `demo` is a MODEL."""
    from fewfire.cli.output import console, print_json

    out = console()
    if model is not None:
        check(model == "smollm2", f"model {model!r} is none of the demo's; expected smollm2, or none to train one")
        check((minutes, seed, fresh) == (6.0, 0, False), "minutes, seed and fresh are for training; smollm2 is trained")
        _show_smollm2(out, threads=threads, as_json=as_json)
        return
    if not as_json:
        _print_plans(out)
    from fewfire.cli.progress import TrainProgress
    from fewfire.demo import run_demo
    from fewfire.demo.story import summary

    result, kept = run_demo(
        lambda title: TrainProgress(title, quiet=as_json), minutes=minutes, seed=seed, fresh=fresh, threads=threads or 0
    )
    if as_json:
        print_json({**summary(result), "kept": kept})
        return
    if kept:
        out.print("\nTrained before and kept; `fewfire demo --fresh` trains again.", style="dim")
    print_result(result, out)


def _print_plans(out: Console) -> None:
    """The gap between two numbers, before anything is trained."""
    from fewfire.plan import plan
    from fewfire.sizes import format_bytes, format_count

    out.print("\nWhat a token costs and what memory must hold are two numbers", style="bold")
    for name in ("mixtral-8x7b", "llama-2-70b"):
        made = plan(name)
        counts = made.counts
        weights = format_bytes(made.weights.total, binary=False)
        out.print(
            f"  {name:13} {format_count(counts.total):>6} parameters, {weights} to hold; "
            f"{format_count(counts.active)} active: {made.flops.total / 1e9:.0f} GFLOP a token"
        )
        if name == "mixtral-8x7b":
            out.print(f"  {made.sentence}", style="dim", soft_wrap=True)


def print_result(result: DemoResult, out: Console) -> None:
    """The table, the routes, the samples, and where things lie."""
    out.print()
    out.print(_table(result))
    out.print(
        "Held-out text of the Python standard library. Compressors, each file alone: "
        + ", ".join(f"{name} {bits:.2f}" for name, bits in result.yardsticks.items())
        + " bits per byte.",
        style="dim",
        soft_wrap=True,
    )
    for sentence in verdicts(result):
        out.print(f"- {sentence}", soft_wrap=True)
    for line, routes in result.routes.items():
        out.print(f"\nExperts for: {line.strip()}", style="bold", soft_wrap=True)
        out.print(_routes_table(routes))
    out.print("\nWhat the MoE writes (prompt in bold)", style="bold")
    for prompt, text in result.samples:
        _print_sample(out, prompt, text)
    if result.disk is not None:
        _print_disk(result.disk, out)
    out.print(f"\npicture  {result.picture}", soft_wrap=True)
    out.print(f"model    {result.model}", soft_wrap=True)
    if result.disk is not None:
        out.print(f"pack     {result.disk.pack}", soft_wrap=True)
    out.print("It is now a MODEL: fewfire generate demo --prompt 'def main('", soft_wrap=True)
    if result.seconds:
        out.print(f"took     {result.seconds / 60:.1f} minutes", style="dim")


def _print_disk(disk: OnDisk, out: Console) -> None:
    """The same model packed, with and without all of its experts in memory."""
    from fewfire.cli.output import table
    from fewfire.sizes import format_bytes

    out.print(
        f"\nPacked to {disk.format}: {format_bytes(disk.checkpoint_bytes)} become {format_bytes(disk.pack_bytes)}, "
        f"{format_bytes(disk.expert_bytes)} of it experts. Then half of those stay on disk",
        style="bold",
        soft_wrap=True,
    )
    shown = table("experts in memory", "tokens/s", "predicted", "found in memory", "read")
    speeds = (disk.resident_tokens_per_s, disk.resident_predicted), (disk.disk_tokens_per_s, disk.disk_predicted)
    (fast, expected), (slow, expected_slow) = (
        (f"{speed:,.0f}", "-" if predicted is None else f"{predicted:,.0f}") for speed, predicted in speeds
    )
    shown.add_row(f"all, {format_bytes(disk.expert_bytes)}", fast, expected, "100 %", "-")
    found = f"{100 * disk.hit_rate:.0f} %"
    shown.add_row(format_bytes(disk.slot_bytes), slow, expected_slow, found, format_bytes(disk.bytes_read))
    out.print(shown)
    same = "the same, bit for bit" if disk.same_tokens else "NOT the same"
    out.print(f"- {disk.num_tokens} tokens, {same}; experts read {disk.access}.", soft_wrap=True)


def _table(result: DemoResult) -> Any:
    from fewfire.cli.output import table
    from fewfire.sizes import format_bytes, format_count

    shown = table("", "total", "active", "memory", "tokens", "tokens/s", "bits/byte", "MaxVio*", "dead")
    for row in result.rows:
        shown.add_row(
            row.name,
            format_count(row.total),
            format_count(row.active),
            format_bytes(row.memory_bytes),
            format_count(row.tokens),
            f"{row.tokens_per_s:,.0f}",
            f"{row.bits_per_byte:.3f}",
            "-" if row.max_vio_excess is None else f"{row.max_vio_excess:.2f}",
            "-" if row.num_dead is None else str(row.num_dead),
        )
    shown.caption = (
        "memory: float32 weights   MaxVio*: worst layer's (max load / mean - 1), less what chance alone shows"
    )
    shown.caption_justify = "left"
    return shown


def verdicts(result: DemoResult) -> list[str]:
    """What the figures say, whatever they are."""
    moe, dense, unbalanced, end = result.rows
    gap = dense.bits_per_byte - moe.bits_per_byte
    better = "below" if gap > 0 else "above"
    excess, without = end.max_vio_excess or 0.0, unbalanced.max_vio_excess or 0.0
    best = min(result.yardsticks, key=lambda name: result.yardsticks[name])
    reach = [name for name, bits in result.yardsticks.items() if end.bits_per_byte < bits]
    return [
        f"At equal tokens and equal active FLOPs the MoE is {abs(gap):.3f} bits per byte {better} its dense twin, "
        f"at {moe.tokens_per_s / dense.tokens_per_s:.2f} of its speed "
        f"and {moe.total / dense.total:.1f} times its memory.",
        f"Without balancing the busiest expert takes {without + 1:.1f} times its share or more "
        f"({unbalanced.num_dead} dead); with it, {excess + 1:.1f} ({end.num_dead} dead).",
        f"At its end the MoE is at {end.bits_per_byte:.3f} bits per byte: "
        + (f"below {' and '.join(reach)}" if reach else f"above {' and '.join(result.yardsticks)}")
        + (f", not below {best}." if reach and best not in reach else "."),
    ]


def _routes_table(routes: list[tuple[str, list[list[int]]]]) -> Any:
    from rich.text import Text

    from fewfire.cli.output import table

    layers = len(routes[0][1]) if routes else 0
    shown = table("token", *(f"MoE layer {layer + 1}" for layer in range(layers)))
    for piece, chosen in routes:
        cells = (Text("+".join(str(expert) for expert in experts)) for experts in chosen)
        shown.add_row(Text(repr(piece)[1:-1]), *cells)
    return shown


def _print_sample(out: Console, prompt: str, text: str) -> None:
    from rich.text import Text

    shown = Text(prompt, style="bold")
    shown.append(text, style="not bold")
    out.print(shown)
    out.print("  ...", style="dim")


def _show_smollm2(out: Console, *, threads: int | None, as_json: bool) -> None:
    from dataclasses import asdict

    from fewfire.cli.output import print_json
    from fewfire.cli.progress import EvalProgress
    from fewfire.demo.smollm2 import run_smollm2

    with EvalProgress(quiet=as_json) as progress:
        result = run_smollm2(threads=threads, progress=progress.report)
    if as_json:
        print_json(asdict(result) | {"evaluation": result.evaluation.to_json()})
        return
    _print_smollm2(result, out)


def _print_smollm2(result: SmolResult, out: Console) -> None:
    """The conversation, then the figures."""
    from rich.text import Text

    from fewfire.sizes import format_bytes, format_count

    for answer in result.answers:
        out.print(Text(f"\n{answer.prompt}", style="bold"))
        out.print(Text(answer.text + ("" if answer.finish_reason == "stop" else " ...")), soft_wrap=True)
    figures, last = result.evaluation, result.answers[-1]
    prefill = [answer.prefill_tokens_per_s or 0.0 for answer in result.answers]
    out.print(
        f"\nparameters     {format_count(result.total)}, {format_count(result.active)} active; "
        f"loaded in {result.load_s:.1f} s, peak memory {format_bytes(result.peak_rss_bytes)}",
        f"\nspeed          prefill {max(prefill):.0f}, decode {last.decode_tokens_per_s or 0.0:.1f}, "
        f"evaluation {result.eval_tokens_per_s:.0f} tokens/s",
        f"\nperplexity     {figures.perplexity:.3f}, {figures.bits_per_byte:.3f} bits per byte, "
        f"on {figures.tokens:,} tokens of Python's standard library",
        "\n               (public text, which the model may have seen in training)",
        f"\nIt is a MODEL: fewfire generate {result.path} --chat --prompt 'Hello'",
        sep="",
        soft_wrap=True,
    )
