"""`fewfire export MODEL OUT --to hf`: a model leaves fewfire in a form that others load."""

from __future__ import annotations

from typing import Annotated

import typer


def export(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, the folder of a training run, or demo.")],
    out: Annotated[str, typer.Argument(help="The folder to write; it must not hold anything yet.")],
    to: Annotated[str, typer.Option(help="hf: config.json, safetensors and tokenizer, as transformers loads them.")],
    dtype: Annotated[str | None, typer.Option(help="f32, bf16 or fp16 (default: every tensor as it is).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Write a model in hub layout. Nothing is left in OUT unless all of it was written."""
    from fewfire import api
    from fewfire.cli.output import note, print_json
    from fewfire.sizes import format_bytes

    exported = api.export(model, out, to=to, dtype=dtype)
    if as_json:
        print_json({"path": str(exported.path), "format": to, "bytes": exported.num_bytes, "files": exported.files})
        return
    note(f"wrote {exported.path}: {len(exported.files)} files, {format_bytes(exported.num_bytes)}")
