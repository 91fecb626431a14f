"""`fewfire generate MODEL`: a text goes on, in the terminal or as one JSON object. Parses, calls the API, prints."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewfire.cli.lossy import ExpertTopP, LowPrecision, PreferCached, lossy_line, make_lossy
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
    from collections.abc import Iterator

    from fewfire.api import Experts, Generated, Model, Stream


def generate(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id, or demo.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from; - reads it from stdin.")],
    chat: Annotated[bool, typer.Option("--chat", help="Answer the prompt, through the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: instructions before the prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 256,
    context: Annotated[int | None, typer.Option(help="Prompt and new tokens together at most (default: all).")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token; 0.7 to 1 is usual.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k most likely tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw among the most likely tokens that reach this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Draw among tokens at least this share as likely as the best.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what was said becomes less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    ignore_key: Annotated[list[str] | None, typer.Option(help="A key of config.json or GGUF to leave aside.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads to compute with (default: one a core).")] = None,
    memory: Memory = None,
    kv_cache: KvCache = "bf16",
    cache_policy: CachePolicy = None,
    readers: Readers = None,
    lookahead: Lookahead = False,
    verify_always: VerifyAlways = False,
    direct: Direct = None,
    hot: Hot = None,
    prefer_cached: PreferCached = 0.0,
    expert_top_p: ExpertTopP = 1.0,
    low_precision: LowPrecision = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Go on from a prompt, or answer it with --chat. Speeds go to stderr."""
    text = _read_prompt(prompt)
    from fewfire import api

    start = time.perf_counter()
    loaded = api.load(
        model,
        threads=threads,
        memory=memory,
        context=context,
        cache=kv_cache,
        streaming=make_streaming(
            cache_policy, readers, lookahead=lookahead, verify_always=verify_always, direct=direct, hot=hot
        ),
        lossy=make_lossy(prefer_cached, expert_top_p, low_precision),
        ignore_keys=ignore_key or (),
        show_progress=sys.stderr.isatty(),
    )
    load_s = time.perf_counter() - start
    stream = loaded.stream(
        text,
        chat=chat,
        system=system,
        stop=stop or (),
        max_tokens=max_tokens,
        context=context,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    if as_json:
        from fewfire.cli.output import print_json

        for _ in _watched(stream):
            pass
        result = stream.result()
        print_json({**to_json(result, _predicted(loaded, result)), "load_s": load_s})
        return
    status = _show(loaded, stream, load_s)
    if status:
        raise typer.Exit(status)


def _read_prompt(prompt: str) -> str:
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt on stdin is not UTF-8 (byte {error.start}); convert it") from error


def _predicted(model: Model, result: Generated) -> float | None:
    """Decode speed by the planner, where one was measured, with the hits that were found; asked afterwards, so that no
    token waits for the probe."""
    if result.decode_tokens_per_s is None or result.lossy is not None:  # the planner's formulas are of exact routing
        return None
    found = result.experts.hit_rate if result.experts.streamed else None
    return model.predict_decode(context=result.prompt_tokens + len(result.token_ids) // 2, hit_rate=found)


def _show(model: Model, stream: Stream, load_s: float) -> int:
    """Write pieces as they come; 130 where the user interrupted, with what there is so far."""
    from fewfire.cli.output import note

    status = 0
    try:
        for piece in _watched(stream):
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    sys.stdout.write("\n")
    sys.stdout.flush()
    result = stream.result()
    predicted = None if status else _predicted(model, result)
    note(f"loaded in {load_s:.1f} s; {_summary(result, predicted, interrupted=status != 0)}")
    return status


def _watched(stream: Stream) -> Iterator[str]:
    """The pieces, while a line in the terminal says how fast they come and where experts are found."""
    from fewfire.cli.live import LiveLine

    with LiveLine() as line:
        for piece in stream:
            if line.is_due(time.monotonic()):
                line.show(_state(stream.result()))
            yield piece


def _state(result: Generated) -> str:
    from fewfire.sizes import format_bytes

    speed, experts = result.decode_tokens_per_s, result.experts
    shown = f"{len(result.token_ids)} tokens" + ("" if speed is None else f", {speed:.1f}/s")
    if not experts.streamed:
        return shown
    return (
        f"{shown}; experts {100 * experts.hit_rate:.0f} % in memory, {format_bytes(experts.bytes_read)} read, "
        f"stalled {experts.stall_s:.1f} s"
    )


def _experts_line(experts: Experts) -> str:
    """What came from disk; nothing where all experts are in memory."""
    from fewfire.sizes import format_bytes

    if not experts.streamed:
        return ""
    ahead = f", read ahead: {experts.prefetch_useful} useful, {experts.prefetch_late} late, "
    ahead += f"{experts.prefetch_wasted} wasted"
    return (
        f"; experts: {100 * experts.hit_rate:.0f} % of {experts.hits + experts.misses} in memory "
        f"({format_bytes(experts.budget_bytes)}), {format_bytes(experts.bytes_read)} read {experts.access}, "
        f"stalled {experts.stall_s:.1f} s{ahead if experts.prefetch_useful + experts.prefetch_wasted else ''}"
    )


def _summary(result: Generated, predicted: float | None, *, interrupted: bool) -> str:
    from fewfire.sizes import format_bytes

    def rate(value: float | None) -> str:
        return "" if value is None else f" at {value:.1f} tokens/s"

    beside = "" if predicted is None else f" ({predicted:.1f} predicted)"
    ended = "interrupted" if interrupted else f"ended by {result.finish_reason}"
    return (
        f"{result.prompt_tokens} prompt tokens{rate(result.prefill_tokens_per_s)}, "
        f"{len(result.token_ids)} new{rate(result.decode_tokens_per_s)}{beside}, {ended}; "
        f"peak memory {format_bytes(result.peak_rss_bytes)}, seed {result.seed}{_experts_line(result.experts)}"
        f"{lossy_line(result.lossy)}"
    )


def to_json(result: Generated, predicted: float | None = None) -> dict[str, Any]:
    """The contract's object of one generation. `predicted`: decode tokens/s by the planner."""
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "prompt_tokens": result.prompt_tokens,
        "prefill_tokens_per_s": result.prefill_tokens_per_s,
        "decode_tokens_per_s": result.decode_tokens_per_s,
        "predicted_decode_tokens_per_s": predicted,
        "invariant": result.invariant,
        "invariant_reason": result.invariant_reason,
        "peak_rss_bytes": result.peak_rss_bytes,
        "experts": result.experts.to_json(),
        "lossy": None if result.lossy is None else asdict(result.lossy),
        "finish_reason": result.finish_reason,
        "seed": result.seed,
    }
