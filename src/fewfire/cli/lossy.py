"""What `generate` says about lossy modes: its options, the warning that one is on, and how far results were off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fewfire.api import Agreement, Lossy

PreferCached = Annotated[
    float,
    typer.Option(help="Lossy: in decode, how far routers lean to experts in memory, 0 (exact) to 1."),
]
ExpertTopP = Annotated[
    float,
    typer.Option(help="Lossy: a token keeps the fewest of its experts that reach this share of their weight."),
]
LowPrecision = Annotated[
    str | None,
    typer.Option(help="Lossy: a smaller pack of the model, kept in memory; stands in for experts still on disk."),
]


def make_lossy(prefer_cached: float, expert_top_p: float, low_precision: str | None) -> Lossy | None:
    """What the options ask for; None, and nothing is said, where results are exact."""
    from fewfire.api import Lossy
    from fewfire.cli.output import note

    lossy = Lossy(prefer_cached, expert_top_p, low_precision)
    if not lossy.modes:
        return None
    note(f"warning: results are not exact: {', '.join(lossy.modes)}; how far they are off is measured after the text")
    return lossy


def lossy_line(measured: Agreement | None) -> str:
    """The end of the summary; nothing where results are exact."""
    if measured is None:
        return ""
    if measured.agreement is None or measured.kl is None:
        return f"; lossy ({', '.join(measured.modes)}): no token to compare with exact routing"
    return (
        f"; lossy ({', '.join(measured.modes)}): first choice as exact routing's in {100 * measured.agreement:.1f} % "
        f"of {measured.positions} new tokens, KL {measured.kl:.4f} nats"
    )
