"""Options of every verb that runs a pack in a memory budget, and the settings they make. Parses only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from fewfire.runtime.banks import Streaming

Memory = Annotated[
    str | None,
    typer.Option(help="Bound on the memory of the whole process, e.g. 8GiB (default: what is left, less an eighth)."),
]
KvCache = Annotated[Literal["bf16", "q8"], typer.Option(help="Format of a pack's keys and values.")]
CachePolicy = Annotated[
    Literal["lru", "lfru", "s3fifo"] | None,
    typer.Option(help="Which expert leaves memory for another (default: the best measured)."),
]
Readers = Annotated[int | None, typer.Option(help="Threads that read experts from disk.", min=1, max=64)]
Lookahead = Annotated[
    bool, typer.Option("--lookahead", help="Ask the next layer's router beforehand; stops where it does not pay.")
]
VerifyAlways = Annotated[
    bool, typer.Option("--verify-always", help="Compare checksums at every read, not only at an expert's first.")
]
Direct = Annotated[
    bool | None,
    typer.Option("--direct/--buffered", help="Read past the page cache, or through it (default: the faster)."),
]
Hot = Annotated[
    Path | None,
    typer.Option(help="A trace of `fewfire trace`: the experts it used most are in memory from the start."),
]


def make_streaming(
    policy: str | None,
    readers: int | None,
    *,
    lookahead: bool,
    verify_always: bool,
    direct: bool | None,
    hot: Path | None,
) -> Streaming:
    """Settings of the options above; what was not given stays at its default."""
    from fewfire.runtime.banks import Streaming
    from fewfire.trace import hot_set, read_trace

    trace = None if hot is None else read_trace(hot)
    given = {
        "hot": None if trace is None else hot_set(trace, sum(trace.num_experts)),
        "policy": policy,
        "num_readers": readers,
        "lookahead": lookahead,
        "verify_always": verify_always,
        "direct": direct,
    }
    return Streaming(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
