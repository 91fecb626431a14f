"""`fewfire init NAME OUT`: a random pack of a published shape, for measuring before anything is downloaded."""

from __future__ import annotations

from typing import Annotated

import typer

from fewfire.cli.pack import PART


def init(
    model: Annotated[str, typer.Argument(help="A published name; `fewfire models` lists them.")],
    out: Annotated[str, typer.Argument(help="The folder to write; it must not hold anything yet.")],
    quant: Annotated[
        str, typer.Option(help="q4: experts q4, the rest q8. mxfp4: experts mxfp4, the rest bf16.")
    ] = "q4",
    experts: Annotated[str | None, typer.Option(help=PART)] = None,
    trunk: Annotated[str | None, typer.Option(help=PART)] = None,
    down: Annotated[str | None, typer.Option(help="Format of the experts' last matrix.")] = None,
    head: Annotated[str | None, typer.Option(help=PART)] = None,
    layers: Annotated[int | None, typer.Option(help="Only the first N layers.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Write random weights of any published shape straight into a pack, with a tokenizer.

    Interrupted, the same command goes on where it stopped.
    """
    from fewfire.cli.output import note
    from fewfire.cli.pack import show
    from fewfire.cli.writing import Writing
    from fewfire.quantize import initialise

    with Writing(f"init {out}") as report:
        packed = initialise(
            model,
            out,
            quant=quant,
            seed=seed,
            layers=layers,
            experts=experts,
            trunk=trunk,
            down=down,
            head=head,
            report=report,
            say=note,
        )
    show(packed, as_json)
