"""`fewfire pack MODEL OUT`: a checkpoint quantized, or a GGUF file carried over, and laid out for running."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fewfire.quantize import Packed

PART = "Format of this part instead of --quant's."


def pack(
    model: Annotated[
        str,
        typer.Argument(help="A checkpoint's folder, the folder of a training run, a .gguf file, a hub id, or demo."),
    ],
    out: Annotated[str, typer.Argument(help="The folder to write; it must not hold anything yet.")],
    quant: Annotated[
        str | None,
        typer.Option(
            help="q4 (default): experts q4, the rest q8. mxfp4: experts mxfp4, the rest bf16. Without it, the weights "
            "of a .gguf file stay as they are."
        ),
    ] = None,
    experts: Annotated[str | None, typer.Option(help=PART)] = None,
    trunk: Annotated[str | None, typer.Option(help=PART)] = None,
    down: Annotated[str | None, typer.Option(help="Format of the experts' last matrix.")] = None,
    head: Annotated[str | None, typer.Option(help=PART)] = None,
    layers: Annotated[int | None, typer.Option(help="Only the first N layers.")] = None,
    ignore_key: Annotated[
        list[str] | None, typer.Option(help="A key of config.json, or of GGUF metadata, to leave aside.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Quantize a checkpoint, or carry a GGUF file over, into a pack, tensor by tensor.

    Nothing is in OUT before all of it was written. Interrupted, the same command goes on where it stopped.
    """
    from fewfire import api
    from fewfire.cli.output import console, note
    from fewfire.cli.writing import Writing
    from fewfire.quantize import pack as run

    with Writing(f"pack {out}") as report:
        packed = run(
            api.locate(model),
            out,
            quant=quant,
            experts=experts,
            trunk=trunk,
            down=down,
            head=head,
            layers=layers,
            ignore=tuple(ignore_key or ()),
            report=report,
            say=note,
        )
    if not as_json and packed.kept:
        console(stderr=True).print(_kept_table(packed))
    if not as_json and packed.losses:
        console(stderr=True).print(_loss_table(packed))
    show(packed, as_json)


def _kept_table(packed: Packed) -> Any:
    from fewfire.cli.output import table

    shown = table("part", "in the file", "in the pack", "values", "", title="what became of the file's tensors")
    for each in packed.kept:
        how = "requantized" if not each.exact else "as it is" if each.stored == each.format else "same values"
        shown.add_row(each.part, each.stored, each.format, f"{each.values:,}", how)
    return shown


def _loss_table(packed: Packed) -> Any:
    from fewfire.cli.output import table

    shown = table("part", "weights", "format", "values", "error", title="what quantizing changed, of each part's norm")
    for (place, part, name), loss in packed.losses.items():
        shown.add_row(place, part, name, f"{loss.values:,}", f"{100 * loss.relative:.2f} %")
    return shown


def show(packed: Packed, as_json: bool) -> None:
    """What was written: one line on stderr, or the JSON object."""
    from fewfire.cli.output import note, print_json
    from fewfire.sizes import format_bytes

    names = {"experts": packed.formats.experts, "down": packed.formats.down, "trunk": packed.formats.trunk}
    names |= {"head": packed.formats.head, "router": packed.formats.router}
    if as_json:
        losses = [
            {"part": place, "weights": part, "format": name, "values": loss.values, "relative_error": loss.relative}
            for (place, part, name), loss in packed.losses.items()
        ]
        document = {"path": str(packed.path), "bytes": packed.num_bytes, "formats": names}
        document |= {
            "overrides": len(packed.formats.overrides),
            "resumed_bytes": packed.resumed_bytes,
            "losses": losses,
        }
        print_json(document | {"kept": [asdict(each) for each in packed.kept]})
        return
    spelled = ", ".join(f"{part} {name}" for part, name in names.items())
    if packed.formats.overrides:
        spelled += f"; {len(packed.formats.overrides)} tensors otherwise"
    note(f"wrote {packed.path}: {format_bytes(packed.num_bytes)} ({spelled})")
