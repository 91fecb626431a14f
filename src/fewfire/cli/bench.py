"""`fewfire bench PACK`: prefill and decode speed beside what the machine could do. Parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewfire.cli.streaming import (
    CachePolicy,
    Direct,
    Hot,
    KvCache,
    Lookahead,
    Memory,
    Readers,
    VerifyAlways,
    make_streaming,
)
from fewfire.errors import ConfigError

if TYPE_CHECKING:
    from fewfire.bench import Bench, KernelSpeed, Sweep
    from fewfire.trace import Replayed


def bench(
    model: Annotated[
        str | None, typer.Argument(help="The folder of a pack; `fewfire init` makes a random one. --sweep needs none.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt that is timed.", min=1)] = 512,
    new_tokens: Annotated[
        int | None, typer.Option(help="Tokens that are decoded (default: 64; all that --replay has).", min=1)
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens in the cache before decoding.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Sequences decoded at once.", min=1, max=65_536)] = 1,
    kernels: Annotated[bool, typer.Option("--kernels", help="Kernels alone, beside the machine's peaks.")] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Small random packs: one total, other active parameters; and the reverse.")
    ] = False,
    memory: Memory = None,
    kv_cache: KvCache = "bf16",
    cache_policy: CachePolicy = None,
    readers: Readers = None,
    lookahead: Lookahead = False,
    verify_always: VerifyAlways = False,
    direct: Direct = None,
    hot: Hot = None,
    warm_steps: Annotated[
        int | None,
        typer.Option(help="Steps before a streamed run (default: until all slots are full; 0: cold).", min=0),
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Decode only, with experts chosen as in this trace of `fewfire trace`.")
    ] = None,
    routing: Annotated[
        str, typer.Option(help="own: the model's routers; uniform: drawn, as the planner assumes where it knows none.")
    ] = "own",
    threads: Annotated[int | None, typer.Option(help="Threads to compute with (default: one a core).", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure prefill and decode, with probes of memory, arithmetic and disk in the same run."""
    from fewfire import bench as measure
    from fewfire.cli.output import note, print_json
    from fewfire.runtime.threads import use_threads
    from fewfire.sizes import parse_bytes

    if threads is not None:
        use_threads(threads)
    if sweep:
        if model is not None or kernels:
            raise ConfigError("--sweep makes its own packs; leave the model and --kernels out")
        swept = measure.sweep(say=note)
        print_json(swept.to_json()) if as_json else _print_sweep(swept)
        return
    if model is None:
        raise ConfigError("bench needs the folder of a pack; `fewfire init` makes a random one")
    if kernels:
        speeds = measure.bench_kernels(model, prompt_tokens=prompt_tokens, context=context or 1024, cache=kv_cache)
        print_json({"kernels": [each.to_json() for each in speeds]}) if as_json else _print_kernels(speeds)
        return
    streaming = make_streaming(
        cache_policy, readers, lookahead=lookahead, verify_always=verify_always, direct=direct, hot=hot
    )
    if replay is not None:
        from fewfire.trace import replay_pack

        replayed = replay_pack(
            model, replay, memory=memory, cache=kv_cache, streaming=streaming, warm_tokens=warm_steps or 0,
            max_tokens=new_tokens,
        )  # fmt: skip
        print_json(replayed.to_json()) if as_json else _print_replayed(replayed)
        return
    made = measure.bench(
        model,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens or 64,
        context=context,
        batch=batch,
        memory=None if memory is None else parse_bytes(memory, name="--memory"),
        cache=kv_cache,
        streaming=streaming,
        warm_steps=warm_steps,
        routing=routing,
        say=note,
    )
    if made.drift > measure.DRIFT:
        note(f"warning: memory bandwidth moved by {100 * made.drift:.0f} % during the run; run it again")
    print_json(made.to_json()) if as_json else _print(made)


def _print(made: Bench) -> None:
    from fewfire.cli.output import console, note, table
    from fewfire.sizes import format_bytes

    def rate(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    shown = table("", "tokens/s", "predicted", "router", "share")
    routers = made.router_share or {}
    shown.add_row(
        f"prefill of {made.prompt_tokens}", rate(made.prefill_tokens_per_s), rate(made.predicted_prefill_tokens_per_s),
        _percent(routers.get("prefill")),
        f"{_percent(made.compute_share)} of {made.int8_ops_per_s / 1e9:,.0f} int8 GOP/s",
    )  # fmt: skip
    shown.add_row(
        f"decode, batch {made.batch}", rate(made.decode_tokens_per_s), rate(made.predicted_decode_tokens_per_s),
        _percent(routers.get("decode")),
        f"{_percent(made.bandwidth_share)} of {made.ram_read_bytes_per_s / 1e9:.1f} GB/s",
    )  # fmt: skip
    console().print(shown)
    reads = (made.experts or {}).get("decode")
    if reads is not None and made.access != "resident":
        at = made.predicted_at_hit_rate or {}
        note(
            f"decode found {_percent(reads.hit_rate)} of its experts in memory ({_percent(reads.expected_hit_rate)} "
            f"expected; {rate(at.get('decode_tokens_per_s'))} tokens/s predicted at that), read "
            f"{reads.bytes_read / 1e6:,.0f} MB {made.access}, waited {reads.stall_s:.2f} s; disk "
            f"{(made.disk_read_bytes_per_s or 0) / 1e9:.2f} GB/s, {_percent(reads.disk_share)} of its bound reached"
        )
    note(
        f"{made.bytes_per_token / 1e6:,.0f} MB a token, loaded in {made.load_s:.1f} s, "
        f"peak memory {format_bytes(made.peak_rss_bytes)}, {made.threads} threads"
    )


def _print_replayed(made: Replayed) -> None:
    from fewfire.cli.output import console, note, table
    from fewfire.sizes import format_bytes

    shown = table("", "tokens/s", "predicted", "found in memory", "simulated", "at best")
    shown.add_row(
        f"decode of {made.tokens} tokens", f"{made.decode_tokens_per_s:.2f}",
        f"{made.predicted_decode_tokens_per_s:.2f}", _percent(made.hit_rate), _percent(made.simulated_hit_rate),
        _percent(made.belady_hit_rate),
    )  # fmt: skip
    console().print(shown)
    disk = "" if made.disk_read_bytes_per_s is None else f" of a disk of {made.disk_read_bytes_per_s / 1e9:.2f} GB/s"
    note(
        f"{made.slots} of {made.records} experts in memory, {format_bytes(made.bytes_read)} read{disk}, waited "
        f"{made.stall_s:.1f} s of {made.seconds:.1f}; peak memory {format_bytes(made.peak_rss_bytes)}"
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def _print_kernels(speeds: list[KernelSpeed]) -> None:
    from fewfire.cli.output import console, table

    shown = table("kernel", "tokens", "GOP/s", "of peak", "GB/s", "of reads")
    for each in speeds:
        read = "-" if each.bytes_per_s is None else f"{each.bytes_per_s / 1e9:.1f}"
        shown.add_row(
            each.name, str(each.tokens), f"{each.ops_per_s / 1e9:,.1f}", _percent(each.compute_share), read,
            _percent(each.bandwidth_share),
        )  # fmt: skip
    console().print(shown)


def _print_sweep(swept: Sweep) -> None:
    from fewfire.cli.output import console, table
    from fewfire.sizes import format_bytes, format_count

    for title, rows in (("One total, more active", swept.by_active), ("One active, more total", swept.by_total)):
        shown = table("experts", "a token", "total", "active", "memory", "MB a token", "decode", "prefill", title=title)
        for row in rows:
            shown.add_row(
                str(row.num_experts), str(row.top_k), format_count(row.total), format_count(row.active),
                format_bytes(row.resident_bytes), f"{row.bytes_per_token / 1e6:.1f}", f"{row.decode_tokens_per_s:.1f}",
                f"{row.prefill_tokens_per_s:.1f}",
            )  # fmt: skip
        console().print(shown)
        console().print()
