"""`fewfire trace MODEL DATA OUT`: records what the routers choose on the user's own text. Parses, calls, prints."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewfire.cli.streaming import Memory
from fewfire.errors import ConfigError

if TYPE_CHECKING:
    from fewfire.trace import Trace


def trace(
    model: Annotated[str, typer.Argument(help="A folder, a pack, a .gguf file, a hub id, or demo.")],
    data: Annotated[str, typer.Argument(help="A text file, JSONL, Parquet, or a folder of them.")],
    out: Annotated[Path, typer.Argument(help="The trace file to write, e.g. trace.safetensors.")],
    field: Annotated[str, typer.Option(help="Where a JSONL line or a Parquet row has its text.")] = "text",
    max_tokens: Annotated[int, typer.Option(help="Tokens read at most.", min=1)] = 32768,
    context: Annotated[int | None, typer.Option(help="Tokens of a document; longer texts become several.")] = None,
    memory: Memory = None,
    ignore_key: Annotated[list[str] | None, typer.Option(help="A key of config.json or GGUF to leave aside.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads to compute with (default: one a core).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Record which experts every token is sent to. docs/trace.md describes the file, and what it is good for."""
    from fewfire import api
    from fewfire.cli.live import LiveLine
    from fewfire.cli.output import print_json
    from fewfire.data import corpus_files

    corpus_files(data)  # a mistyped path is said before a model is loaded
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; name a file in it, e.g. {out / 'trace.safetensors'}")
    loaded = api.load(
        model,
        threads=threads,
        memory=memory,
        context=context,
        ignore_keys=ignore_key or (),
        show_progress=sys.stderr.isatty(),
    )
    begin = time.monotonic()
    with LiveLine() as line:

        def show(done: int, total: int) -> None:
            now = time.monotonic()
            if line.is_due(now):
                line.show(f"{done:,} of {total:,} tokens, {done / max(1e-9, now - begin):,.0f} tokens/s")

        made = loaded.trace(data, out, field=field, max_tokens=max_tokens, context=context, progress=show)
    if as_json:
        print_json(
            {
                "tokens": made.num_tokens,
                "documents": made.num_documents,
                "layers": len(made.layers),
                "path": str(out),
            }
        )
    else:
        sys.stdout.write(_summary(made, out))


def _summary(trace: Trace, out: Path) -> str:
    from fewfire.plan.profile import read_profile
    from fewfire.sizes import format_bytes

    layers = f"{len(trace.layers)} MoE layer" + "s" * (len(trace.layers) != 1)
    lines = [
        f"{trace.num_tokens:,} tokens of {trace.num_documents:,} documents through {layers}",
        f"{out}, {format_bytes(out.stat().st_size)}",
    ]
    if len(set(zip(trace.num_experts, trace.top_k))) == 1:
        curve = dict(read_profile(out).cache_curve)
        shown = [
            f"{100 * share:.0f} %: {100 * curve[share]:.0f} %" for share in (0.1, 0.25, 0.5, 0.75) if share in curve
        ]
        if shown:
            lines.append(f"experts in memory, and how often decode finds its own there: {', '.join(shown)}")
    return "\n".join(lines) + "\n"
