"""`fewfire bench PACK`: prefill and decode speed beside what the machine could do. Parses, calls, prints."""

from __future__ import annotations

from typing import Annotated

import typer


def bench(
    model: Annotated[str, typer.Argument(help="The folder of a pack; `fewfire init` makes a random one.")],
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt that is timed.", min=1)] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens that are decoded.", min=1)] = 64,
    context: Annotated[int, typer.Option(help="Tokens in the cache before decoding.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Sequences decoded at once.", min=1)] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads to compute with (default: one a core).", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure prefill and decode, with probes of memory and arithmetic in the same run."""
    import torch

    from fewfire.bench import DRIFT
    from fewfire.bench import bench as run
    from fewfire.cli.output import console, note, print_json, table
    from fewfire.sizes import format_bytes

    if threads is not None:
        torch.set_num_threads(threads)
    made = run(model, prompt_tokens=prompt_tokens, new_tokens=new_tokens, context=context, batch=batch)
    if made.drift > DRIFT:
        note(f"warning: memory bandwidth moved by {100 * made.drift:.0f} % during the run; run it again")
    if as_json:
        print_json(made.to_json())
        return
    shown = table("", "tokens/s", "share")
    shown.add_row(f"prefill of {prompt_tokens}", f"{made.prefill_tokens_per_s:.1f}",
                  f"{100 * made.compute_share:.0f} % of {made.int8_ops_per_s / 1e9:,.0f} int8 GOP/s")  # fmt: skip
    shown.add_row(f"decode, batch {batch}", f"{made.decode_tokens_per_s:.1f}",
                  f"{100 * made.bandwidth_share:.0f} % of {made.ram_read_bytes_per_s / 1e9:.1f} GB/s")  # fmt: skip
    console().print(shown)
    note(
        f"{made.bytes_per_token / 1e6:,.0f} MB a token, loaded in {made.load_s:.1f} s, "
        f"peak memory {format_bytes(made.peak_rss_bytes)}, {made.threads} threads"
    )
