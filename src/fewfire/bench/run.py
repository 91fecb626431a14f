"""How fast a pack runs here: prefill and decode of random tokens, between probes, beside the planner's figures.

Knows the engine and the planner's counts, no terminal. B sequences, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewfire.bench.routing import Own, Source, Uniform
from fewfire.checkpoints.pack import is_pack, open_pack
from fewfire.config import check
from fewfire.kernels.probe import int8_ops_per_s, read_bytes_per_s
from fewfire.plan.count import prefill_flops
from fewfire.plan.hardware import Part
from fewfire.plan.limits import peak_rss_bytes
from fewfire.plan.speed import bytes_per_step
from fewfire.plan.workload import Workload
from fewfire.runtime.banks import ExpertCounts, ResidentExperts, StreamedExperts, Streaming
from fewfire.runtime.engine import CACHE_ELEMENT_BYTES, NativeDecoder, Replay
from fewfire.runtime.packed import Module, experts_of, load_pack
from fewfire.runtime.predict import predict
from fewfire.runtime.probe import DiskSamples, pieces_of, probe_part, read_own_bytes_per_s

DRIFT = 0.10  # probes before and after may differ by this much
ATTEMPTS = 3  # of a run, until they do not
WARM_STEPS = 256  # of decode at most before a streamed run, until every slot holds an expert
Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """What is measured. `memory` bounds the process, `cache` is the format of keys and values, `streaming` says how
    experts come from disk where they do not fit; `warm_steps` of decode go before the clock starts there (None: until
    all slots are full), 0 starts with none of the experts in memory. `routing`: the model's own, or drawn uniformly."""

    prompt_tokens: int = 512
    new_tokens: int = 64
    context: int = 0
    batch: int = 1
    memory: int | None = None
    cache: str = "bf16"
    streaming: Streaming | None = None
    warm_steps: int | None = None
    routing: str = "own"

    def __post_init__(self) -> None:
        least = min(self.prompt_tokens, self.new_tokens, self.batch)
        check(least >= 1 and self.context >= 0, "bench needs at least one token of each")
        check(self.cache in CACHE_ELEMENT_BYTES, f"kv cache ({self.cache}) is not one of bf16, q8")
        check(self.routing in ("own", "uniform"), f"routing ({self.routing}) is not one of own, uniform")
        check(self.warm_steps is None or self.warm_steps >= 0, f"warm steps ({self.warm_steps}) must not be negative")

    @property
    def seen(self) -> int:
        """Tokens in the cache in the middle of decoding."""
        return max(1, self.context + self.new_tokens // 2)


@dataclass(frozen=True)
class ExpertsRead:
    """Experts of one timed part: distinct ones wanted in each step and layer, and what came from disk."""

    hits: int
    misses: int
    hit_rate: float
    expected_hit_rate: float
    bytes_read: int
    stall_s: float
    prefetch_useful: int
    prefetch_late: int
    prefetch_wasted: int
    disk_bound_tokens_per_s: float | None
    disk_share: float | None


@dataclass(frozen=True)
class Bench:
    """One measurement. Shares are of what the probes of the same run found; `drift` is how far those differ.

    `bytes_per_token`: weights and cache that one decoded token reads: counted from the pack, experts as they were
    wanted. `phases`: seconds a prompt, and a step of decode, by kind of work; `router_share` of their time. `experts`
    and what is predicted is None where torch runs.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    predicted_prefill_tokens_per_s: float | None
    predicted_decode_tokens_per_s: float | None
    predicted_at_hit_rate: dict[str, float] | None
    bytes_per_token: int
    bandwidth_share: float
    compute_share: float
    peak_rss_bytes: int
    load_s: float
    ram_read_bytes_per_s: float
    int8_ops_per_s: float
    disk_read_bytes_per_s: float | None
    drift: float
    attempts: int
    invariant: bool
    prompt_tokens: int
    new_tokens: int
    context: int
    batch: int
    threads: int
    kv_cache: str
    routing: str
    budget_bytes: int | None
    expert_bytes: int | None
    access: str
    router_share: dict[str, float] | None = None
    phases: dict[str, dict[str, float]] | None = None
    experts: dict[str, ExpertsRead] | None = None
    invariant_reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Timed:
    """Seconds of one part, its phases, its experts."""

    seconds: float
    phases: dict[str, float] = field(default_factory=dict)
    experts: ExpertCounts | None = None


@dataclass
class _Attempt:
    before: float
    after: float
    prefill: _Timed
    decode: _Timed
    part: Part | None

    @property
    def bandwidth(self) -> float:
        return (self.before + self.after) / 2

    @property
    def drift(self) -> float:
        return abs(self.after - self.before) / self.bandwidth


def bench(
    model: str | Path,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    context: int = 0,
    batch: int = 1,
    memory: int | None = None,
    cache: str = "bf16",
    streaming: Streaming | None = None,
    warm_steps: int | None = None,
    routing: str = "own",
    say: Say = lambda message: None,
) -> Bench:
    """Load the pack `model`; time a prompt of `prompt_tokens`, then `new_tokens` of decode from a cache of `context`.

    `batch` sequences are decoded at once; speeds count all their tokens. The rest as `Run`. Probes go before and after;
    a run within which they drift is repeated, up to three times, and the steadiest counts. `say` hears of it.
    Raises: ConfigError for what is no pack or exceeds the model's context, KernelUnavailable without the extension,
    BudgetError where `memory` is below the floor.
    """
    run = Run(prompt_tokens, new_tokens, context, batch, memory, cache, streaming, warm_steps, routing)
    check(is_pack(model), f"{model} is no pack; `fewfire pack` or `fewfire init` makes one")
    config = open_pack(model).config
    most = max(prompt_tokens, context + new_tokens + 1)
    check(most <= config.max_context, f"{most} tokens exceed the model's context of {config.max_context}")
    int8 = int8_ops_per_s(torch.get_num_threads())
    start = time.perf_counter()
    module = load_pack(model, memory=memory, context=most, cache=cache, streaming=streaming)
    load_s = time.perf_counter() - start
    experts = experts_of(module)
    if isinstance(experts, ResidentExperts):
        experts.verify()  # checksums are compared at first use: not within what is timed
    check(
        routing == "own" or isinstance(module, NativeDecoder),
        f"{model} runs on torch, which follows its own routing only; leave --routing out",
    )
    attempts: list[_Attempt] = []
    with torch.inference_mode():
        _warm(module, run, say)
        while not attempts or (attempts[-1].drift > DRIFT and len(attempts) < ATTEMPTS):
            if attempts:
                say(f"memory bandwidth moved by {100 * attempts[-1].drift:.0f} % during the run; measuring again")
            attempts.append(_attempt(module, run, len(attempts)))
    best = min(attempts, key=lambda each: each.drift)
    return _result(module, run, best, int8=int8, load_s=load_s, attempts=len(attempts))


def _attempt(module: Module, run: Run, seed: int) -> _Attempt:
    before = _bandwidth(module)
    generator = torch.Generator().manual_seed(seed)
    size = (run.batch, max(run.prompt_tokens, run.context + run.new_tokens + 1))
    ids_BT = torch.randint(0, module.config.vocab_size, size, generator=generator)
    source = _source(module, run, seed)
    replay = source.take(run.prompt_tokens)
    parts = _parts(module, before)
    prefill = _timed(module, lambda: _prefill(module, ids_BT[:1, : run.prompt_tokens], replay))
    parts += _parts(module, before)
    cache: Any = module.new_cache()
    if run.context:
        module.hidden(ids_BT[:, : run.context], cache)
    replays = [source.take(run.batch) for _ in range(run.new_tokens)]
    pieces = [
        partial(_decode, module, ids_BT, cache, run.context + start, replays[start:stop])
        for start, stop in pieces_of(run.new_tokens)
    ]
    if not isinstance(module, NativeDecoder):
        return _Attempt(before, _bandwidth(module), prefill, _timed(module, *pieces), None)
    disk = DiskSamples(module)
    disk.take()
    decode = _timed(module, *pieces, after_each=disk.take)
    after = _bandwidth(module)
    return _Attempt(before, after, prefill, decode, disk.on(_between(*parts, bandwidth=(before + after) / 2)))


def _parts(module: Module, bandwidth: float) -> list[Part]:
    """This machine as it is now; nothing where torch runs."""
    return [probe_part(module, bandwidth=bandwidth)] if isinstance(module, NativeDecoder) else []


def _between(first: Part, second: Part, *, bandwidth: float) -> Part:
    """The machine as it was on average: others' work on it comes and goes within seconds."""
    assert first.kernels is not None and second.kernels is not None
    return replace(first, kernels=first.kernels.between(second.kernels), bandwidth_gbs=bandwidth / 1e9)


def _bandwidth(module: Module) -> float:
    """Over the model's own weights, so that the probe takes no memory; new memory where torch holds them."""
    if isinstance(module, NativeDecoder):
        return read_own_bytes_per_s(module, seconds=0.4)
    return read_bytes_per_s(torch.get_num_threads(), num_bytes=128 * 2**20)


def _timed(module: Module, *pieces: Callable[[], None], after_each: Callable[[], None] = lambda: None) -> _Timed:
    """All pieces as one; the clock stands while `after_each` runs."""
    experts = experts_of(module)
    before = None if experts is None else experts.counts()
    if isinstance(module, NativeDecoder):
        module.take_timings()
    made = _Timed(0.0)
    for piece in pieces:
        start = time.perf_counter()
        piece()
        made.seconds += time.perf_counter() - start
        after_each()
    if isinstance(module, NativeDecoder):
        made.phases = module.take_timings()
    if experts is not None and before is not None:
        made.experts = experts.counts().since(before)
    return made


def _source(module: Module, run: Run, seed: int) -> Source:
    """Whose routing the run follows: the one place where another, such as a trace's, comes in."""
    return Uniform(module, seed) if run.routing == "uniform" and isinstance(module, NativeDecoder) else Own()


def _routed(replay: Replay | None) -> dict[str, Any]:
    return {} if replay is None else {"replay": replay}


def _prefill(module: Any, ids_1T: Tensor, replay: Replay | None) -> None:
    module.logits(module.hidden(ids_1T, module.new_cache(), **_routed(replay))[:, -1])


def _decode(module: Any, ids_BT: Tensor, cache: Any, context: int, replays: Sequence[Replay | None]) -> None:
    """A step for each of `replays`; each chooses its most likely token and goes on with a random one, so that routing
    stays spread: random models fall into loops."""
    for at, replay in enumerate(replays, context):
        module.logits(module.hidden(ids_BT[:, at : at + 1], cache, **_routed(replay))[:, -1]).argmax(dim=-1)


def _warm(module: Module, run: Run, say: Say) -> None:
    """The prompt once, so that pages of code, weights and scratch have been touched; where experts stream, decode fills
    all slots before it, or as many steps as the run says go first, and neither for a cold start."""
    generator = torch.Generator().manual_seed(1)
    ids_1T = torch.randint(0, module.config.vocab_size, (1, run.prompt_tokens), generator=generator)
    if not isinstance(module, NativeDecoder) or not isinstance(module.experts, StreamedExperts):
        return _prefill(module, ids_1T, None)
    if run.warm_steps == 0:
        return
    say("filling the slots of experts ...")
    source = _source(module, run, ATTEMPTS)
    for step in _steps(run.warm_steps, module.experts):
        ids_11 = torch.randint(0, module.config.vocab_size, (1, 1), generator=torch.Generator().manual_seed(step))
        module.hidden(ids_11, replay=source.take(1))
    _prefill(module, ids_1T, source.take(run.prompt_tokens))


def _steps(wanted: int | None, experts: StreamedExperts) -> Iterator[int]:
    for step in range(WARM_STEPS if wanted is None else wanted):
        if wanted is None and not experts.has_empty_slots:
            return
        yield step


def _result(module: Module, run: Run, best: _Attempt, *, int8: float, load_s: float, attempts: int) -> Bench:
    native = isinstance(module, NativeDecoder)
    step_bytes = _step_bytes(module, run, best.decode)
    peak = peak_rss_bytes()
    predicted = at_hit_rate = phases = router_share = reads = None
    account = None
    if isinstance(module, NativeDecoder) and best.part is not None:
        account = module.account
        options: dict[str, Any] = {"context": run.seen, "batch": run.batch, "prompt_tokens": run.prompt_tokens}
        predicted = predict(module, best.part, **options)
        reads = {
            "prefill": _reads(best.prefill, run.prompt_tokens, predicted.prefill_hit_rate, best.part),
            "decode": _reads(best.decode, run.new_tokens * run.batch, predicted.hit_rate, best.part),
        }
        if isinstance(module.experts, StreamedExperts):
            known = predict(
                module,
                best.part,
                hit_rate=reads["decode"].hit_rate,
                prefill_hit_rate=reads["prefill"].hit_rate,
                **options,
            )
            at_hit_rate = {
                "prefill_tokens_per_s": known.prefill_tokens_per_s or 0.0,
                "decode_tokens_per_s": known.decode_tokens_per_s,
            }
        phases = {
            "prefill": best.prefill.phases,
            "decode_step": {name: value / run.new_tokens for name, value in best.decode.phases.items()},
        }
        router_share = {
            "prefill": best.prefill.phases["route"] / best.prefill.seconds,
            "decode": best.decode.phases["route"] / best.decode.seconds,
        }
    experts = experts_of(module)
    disk = None if best.part is None or best.part.disk_gbs is None else best.part.disk_gbs * 1e9
    return Bench(
        prefill_tokens_per_s=run.prompt_tokens / best.prefill.seconds,
        decode_tokens_per_s=run.batch * run.new_tokens / best.decode.seconds,
        predicted_prefill_tokens_per_s=None if predicted is None else predicted.prefill_tokens_per_s,
        predicted_decode_tokens_per_s=None if predicted is None else predicted.decode_tokens_per_s,
        predicted_at_hit_rate=at_hit_rate,
        bytes_per_token=round(step_bytes / run.batch),
        bandwidth_share=step_bytes * run.new_tokens / best.decode.seconds / best.bandwidth,
        compute_share=prefill_flops(module.config, run.prompt_tokens) / best.prefill.seconds / int8,
        peak_rss_bytes=peak,
        load_s=load_s,
        ram_read_bytes_per_s=best.bandwidth,
        int8_ops_per_s=int8,
        disk_read_bytes_per_s=disk,
        drift=best.drift,
        attempts=attempts,
        invariant=native,
        invariant_reason=None if native else "torch does the arithmetic",
        prompt_tokens=run.prompt_tokens,
        new_tokens=run.new_tokens,
        context=run.context,
        batch=run.batch,
        threads=torch.get_num_threads(),
        kv_cache=run.cache,
        routing=run.routing,
        budget_bytes=None if account is None else account.budget_bytes,
        expert_bytes=None if experts is None else experts.num_bytes,
        access="resident" if experts is None or experts.access is None else str(experts.access),
        router_share=router_share,
        phases=phases,
        experts=reads,
    )


def _step_bytes(module: Module, run: Run, decode: _Timed) -> float:
    """Bytes of weights and cache that a step of decode reads; experts as many as were wanted, where they count."""
    pack_formats = module.pack.formats if isinstance(module, NativeDecoder) else None
    experts = experts_of(module)
    formats = pack_formats or (None if experts is None else experts.pack.formats)
    if formats is None:
        return 0.0
    element_bytes = CACHE_ELEMENT_BYTES[run.cache]
    work = Workload.of(module.config, formats, run.seen, cache_element_bytes=element_bytes)
    if decode.experts is None or not decode.experts.layers:
        return bytes_per_step(work, run.batch)
    total = decode.experts.total
    wanted = (total.hits + total.misses) / run.new_tokens
    return work.trunk_bytes + work.cache_read * run.batch + wanted * work.weights.per_expert


def _reads(timed: _Timed, tokens: int, expected: float, part: Part) -> ExpertsRead:
    counts = timed.experts or ExpertCounts()
    total = counts.total if counts.layers else None
    hits, misses = (total.hits, total.misses) if total else (0, 0)
    disk_s = counts.bytes_read / (part.disk_gbs * 1e9) if part.disk_gbs else 0.0
    return ExpertsRead(
        hits=hits,
        misses=misses,
        hit_rate=hits / (hits + misses) if hits + misses else 1.0,
        expected_hit_rate=expected,
        bytes_read=counts.bytes_read,
        stall_s=counts.stall_s,
        prefetch_useful=total.prefetch_useful if total else 0,
        prefetch_late=counts.prefetch_late,
        prefetch_wasted=total.prefetch_wasted if total else 0,
        disk_bound_tokens_per_s=tokens / disk_s if disk_s else None,
        disk_share=disk_s / timed.seconds if disk_s else None,
    )
