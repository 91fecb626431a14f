"""Options of every verb that runs a pack within a memory budget: one spelling, one meaning, defaults of `Streaming`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fewfire.runtime.banks import Streaming

_PANEL = "Memory"

MEMORY = Annotated[
    str | None,
    typer.Option(
        help="Most resident memory of the process, as 8GiB (default: what is free, less an eighth).",
        rich_help_panel=_PANEL,
    ),
]
KV_CACHE = Annotated[str, typer.Option(help="Format of keys and values: bf16 or q8.", rich_help_panel=_PANEL)]
CACHE_POLICY = Annotated[
    str, typer.Option(help="Which expert leaves memory for another: lru, lfru or s3fifo.", rich_help_panel=_PANEL)
]
READERS = Annotated[int, typer.Option(help="Threads that read experts from disk.", rich_help_panel=_PANEL)]
LOOKAHEAD = Annotated[
    bool,
    typer.Option(
        "--lookahead",
        help="Ask the next layer's router beforehand; off by itself where slower.",
        rich_help_panel=_PANEL,
    ),
]


def streaming(policy: str, readers: int, lookahead: bool) -> Streaming:
    """The settings. Raises ConfigError, naming what is allowed."""
    from fewfire.runtime.banks import Streaming

    return Streaming(policy=policy, num_readers=readers, lookahead=lookahead)  # type: ignore[arg-type]
