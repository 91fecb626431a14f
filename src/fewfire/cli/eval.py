"""`fewfire eval MODEL DATA`: perplexity, bits per byte and accuracy on the user's own data. Parses, calls, prints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fewfire.evaluate import Evaluation


_DATA = "A text file, JSONL, Parquet, or a folder of them; JSONL of question (or prompt), choices, answer."


def evaluate(
    model: Annotated[str, typer.Argument(help="A folder, a pack, a .gguf file, a hub id, or demo.")],
    data: Annotated[str, typer.Argument(help=_DATA)],
    field: Annotated[str, typer.Option(help="Where a JSONL line or a Parquet row has its text.")] = "text",
    context: Annotated[int | None, typer.Option(help="Tokens read at once (default: 2048, or all).")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens scored a window (default: the context).")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Score this many tokens at most.")] = None,
    like: Annotated[str, typer.Option(help="Whose windows: lm-eval (every token counts) or llama.cpp.")] = "lm-eval",
    ignore_key: Annotated[list[str] | None, typer.Option(help="A key of config.json or GGUF to leave aside.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads to compute with (default: one a core).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure a model on your own text or questions. docs/perplexity.md says what is counted, and how."""
    from fewfire import api
    from fewfire.cli.output import print_json
    from fewfire.cli.progress import EvalProgress
    from fewfire.data import corpus_files

    corpus_files(data)  # a mistyped path is said before a model is loaded
    loaded = api.load(model, threads=threads, ignore_keys=ignore_key or (), show_progress=sys.stderr.isatty())
    options = {"context": context, "stride": stride, "max_tokens": max_tokens, "like": like}
    with EvalProgress() as progress:
        figures = loaded.evaluate(data, field=field, progress=progress.report, **options)
    if as_json:
        print_json(figures.to_json())
    else:
        sys.stdout.write(_summary(figures))


def _summary(figures: Evaluation) -> str:
    error = "" if figures.perplexity_error is None else f" +- {figures.perplexity_error:.3f}"
    what = "questions" if figures.accuracy is not None else "texts"
    lines = []
    if figures.accuracy is not None and figures.accuracy_normalised is not None:
        by_length = f"{100 * figures.accuracy_normalised:.1f} % by probability per character"
        lines.append(f"accuracy       {100 * figures.accuracy:.1f} %, {by_length}; {figures.texts:,} questions")
        lines.append("of the right answers:")
    lines.append(f"perplexity     {figures.perplexity:.4f}{error}")
    lines.append(f"bits per byte  {figures.bits_per_byte:.4f}")
    lines.append(f"tokens         {figures.tokens:,} ({figures.num_bytes:,} bytes) of {figures.texts:,} {what}")
    if figures.accuracy is None:
        stride = "" if figures.like == "llama.cpp" else f", {figures.stride} scored each"
        lines.append(f"windows        of {figures.context} tokens{stride}, as {figures.like} cuts them")
    return "\n".join(lines) + "\n"
