"""`fewfire export MODEL OUT --to hf|gguf`: a model leaves fewfire in a form that others load. Parses, calls, prints."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def export(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id, or demo.")],
    out: Annotated[str, typer.Argument(help="The folder (hf) or file (gguf) to write; it must not be there yet.")],
    to: Annotated[str, typer.Option(help="hf: as transformers and servers load it. gguf: as llama.cpp does.")],
    dtype: Annotated[str | None, typer.Option(help="hf: f32, bf16 or fp16 (default: every tensor as it is).")] = None,
    quant: Annotated[str | None, typer.Option(help="gguf: f32, bf16, fp16 (default), q8_0 or q4_0.")] = None,
    ignore_key: Annotated[list[str] | None, typer.Option(help="A key of config.json or GGUF to leave aside.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Write a model as others load it. Nothing is left in OUT unless all of it was written."""
    from fewfire import api
    from fewfire.cli.output import note, print_json
    from fewfire.sizes import format_bytes

    progress = sys.stderr.isatty()
    exported = api.export(
        model, out, to=to, dtype=dtype, quant=quant, ignore_keys=ignore_key or (), show_progress=progress
    )
    for line in exported.notes:
        note(f"note: {line}")
    if as_json:
        print_json({"path": str(exported.path), "format": to, "bytes": exported.num_bytes, "files": exported.files})
        return
    count = "1 file" if len(exported.files) == 1 else f"{len(exported.files)} files"
    note(f"wrote {exported.path}: {count}, {format_bytes(exported.num_bytes)}")
