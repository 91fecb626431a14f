"""A pack decodes with the routing of a trace: how fast it is, and what its cache does, when experts are chosen so.

What is computed is the pack's own; only who computes it is the trace's choice. L MoE layers, N tokens, K experts.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewfire.checkpoints.pack import is_pack
from fewfire.config import check
from fewfire.errors import ConfigError
from fewfire.plan.limits import peak_rss_bytes
from fewfire.runtime.banks import StreamedExperts, Streaming
from fewfire.runtime.engine import NativeDecoder, PagedCache, Replay
from fewfire.runtime.packed import load_pack
from fewfire.runtime.predict import predict
from fewfire.runtime.probe import DiskSamples, pieces_of, probe_part
from fewfire.sizes import parse_bytes
from fewfire.trace.file import Trace, read_trace
from fewfire.trace.simulate import decode_steps, simulate


@dataclass(frozen=True)
class Replayed:
    """Decode of `tokens` tokens, after `warm_tokens` that are not counted. `slots`: experts that memory holds, of
    `records`; `stall_s`: seconds in which nothing was computed because no expert was there. Beside them what the
    simulator makes of the same trace and slots, Belady's policy, and the planner's speed at the hit rate that was seen,
    on this machine as measured right after (`disk_read_bytes_per_s`: None where nothing streams)."""

    tokens: int
    warm_tokens: int
    decode_tokens_per_s: float
    seconds: float
    slots: int
    records: int
    hits: int
    misses: int
    bytes_read: int
    evictions: int
    stall_s: float
    peak_rss_bytes: int
    simulated_hit_rate: float
    belady_hit_rate: float
    predicted_decode_tokens_per_s: float
    disk_read_bytes_per_s: float | None

    @property
    def hit_rate(self) -> float:
        wanted = self.hits + self.misses
        return self.hits / wanted if wanted else 1.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"hit_rate": self.hit_rate}


def replay_pack(
    pack: str | Path,
    trace: str | Path | Trace,
    *,
    memory: str | int | None = None,
    context: int | None = None,
    cache: str = "bf16",
    streaming: Streaming | None = None,
    warm_tokens: int = 0,
    max_tokens: int | None = None,
) -> Replayed:
    """Load `pack` within `memory` (as `fewfire.load`) and `replay` a trace, given as such or as a file.

    Raises: as `load_pack`, `read_trace` and `replay`; ConfigError for what does not run natively.
    """
    known = trace if isinstance(trace, Trace) else read_trace(trace)
    check(is_pack(pack), f"{pack} is no pack; `fewfire pack` or `fewfire init` makes one")
    budget = None if memory is None else parse_bytes(memory, name="memory")
    module = load_pack(pack, memory=budget, context=context, cache=cache, streaming=streaming)
    if not isinstance(module, NativeDecoder):
        raise ConfigError(f"{pack} does not run on the native engine, which alone replays routing; replay another pack")
    return replay(module, known, warm_tokens=warm_tokens, max_tokens=max_tokens)


@torch.inference_mode()
def replay(module: NativeDecoder, trace: Trace, *, warm_tokens: int = 0, max_tokens: int | None = None) -> Replayed:
    """Decode token by token, each layer's experts taken from `trace`; its documents begin with an empty cache each.

    Tokens are the trace's own where the model has them, else drawn. The head runs too, as in decode. A document longer
    than the model's context goes on with an empty cache. At most `max_tokens` are timed, after `warm_tokens`.
    Raises: ConfigError where trace and model differ in layers, experts or top_k, or the trace is too short.
    """
    check_fits(module, trace)
    last = trace.num_tokens if max_tokens is None else min(trace.num_tokens, warm_tokens + max_tokens)
    check(0 <= warm_tokens < last, f"warm_tokens ({warm_tokens}) leaves nothing of {trace.num_tokens} tokens to time")
    decoding = _Decoding(module, trace)
    decoding.run(0, warm_tokens)
    before, disk, seconds = module.experts.counts(), DiskSamples(module), 0.0
    for first, stop in pieces_of(last - warm_tokens):
        disk.take()
        start = time.perf_counter()
        decoding.run(warm_tokens + first, warm_tokens + stop)
        seconds += time.perf_counter() - start
    disk.take()
    counts = module.experts.counts().since(before)
    wanted = counts.total.hits + counts.total.misses
    rate = counts.total.hits / wanted if wanted else 1.0
    part = disk.on(probe_part(module))
    predicted = predict(module, part, context=decoding.mean_context, hit_rate=rate)
    policy = module.experts.settings.policy if isinstance(module.experts, StreamedExperts) else None
    return Replayed(
        tokens=last - warm_tokens,
        warm_tokens=warm_tokens,
        decode_tokens_per_s=(last - warm_tokens) / seconds,
        seconds=seconds,
        slots=_slots(module),
        records=sum(trace.num_experts),
        hits=counts.total.hits,
        misses=counts.total.misses,
        bytes_read=counts.bytes_read,
        evictions=counts.evictions,
        stall_s=counts.stall_s,
        peak_rss_bytes=peak_rss_bytes(),
        simulated_hit_rate=_simulated(module, trace, warm_tokens, last, policy) if policy else 1.0,
        belady_hit_rate=_simulated(module, trace, warm_tokens, last, "belady") if policy else 1.0,
        predicted_decode_tokens_per_s=predicted.decode_tokens_per_s,
        disk_read_bytes_per_s=part.disk_gbs * 1e9 if policy and part.disk_gbs else None,
    )


def _slots(module: NativeDecoder) -> int:
    records = sum(layer.num_experts for layer in module.pack.layout.experts)
    return module.experts.slots if isinstance(module.experts, StreamedExperts) else records


def _simulated(module: NativeDecoder, trace: Trace, warm: int, last: int, policy: str) -> float:
    """Hit rate of tokens [warm, last) in a cache that was empty at first."""
    whole = simulate(trace.num_experts, decode_steps(trace, 0, last), _slots(module), policy)
    before = simulate(trace.num_experts, decode_steps(trace, 0, warm), _slots(module), policy)
    hits, misses = whole.hits - before.hits, whole.misses - before.misses
    return hits / (hits + misses) if hits + misses else 1.0


def check_fits(module: NativeDecoder, trace: Trace) -> None:
    """Raise ConfigError unless `trace` could be of this model."""
    routers = [moe.router for _, _, moe in module.config.moe_layers]
    have, want = [router.num_experts for router in routers], list(trace.num_experts)
    check(
        have == want,
        f"the trace is of layers of {_few(want)} experts, the model has {_few(have)}; record it on this one",
    )
    top_k = {router.top_k for router in routers}
    width = trace.ids_TLK.shape[-1]
    check(top_k == {width}, f"the trace has {width} experts a token, the model {top_k}; record it on this one")


def _few(numbers: list[int]) -> str:
    return ", ".join(f"{numbers.count(each)} x {each}" for each in sorted(set(numbers))) or "none"


def replay_of(trace: Trace, start: int, end: int) -> Replay:
    """Tokens [start, end) as the engine takes them."""
    part = slice(start, end)
    return Replay(
        trace.ids_TLK[part].transpose(0, 1).to(torch.int32).contiguous(),
        trace.weights_TLK[part].transpose(0, 1).float().contiguous(),
    )


class _Decoding:
    """Steps of one token each."""

    def __init__(self, module: NativeDecoder, trace: Trace):
        self.module, self.trace = module, trace
        self.tokens_T, self.starts = _tokens(module, trace), set(trace.documents)
        self.cache = self._new_cache()

    def _new_cache(self) -> PagedCache:
        """Room for the longest document at once, so that experts keep their slots while it grows."""
        cache = self.module.new_cache()
        longest = max(end - start for start, end in pairwise(self.trace.documents))
        cache.of(1)[0].reserve(min(longest, self.module.config.max_context))
        return cache

    @property
    def mean_context(self) -> int:
        """Tokens in the cache in the middle of a document."""
        sizes = [end - start for start, end in pairwise(self.trace.documents)]
        return max(1, min(sum(sizes) // len(sizes), self.module.config.max_context) // 2)

    def run(self, start: int, end: int) -> None:
        module = self.module
        for token in range(start, end):
            if token in self.starts or self.cache.length >= module.config.max_context:
                del self.cache  # its memory first
                self.cache = self._new_cache()
            ids_N, routing = self.tokens_T[token : token + 1], replay_of(self.trace, token, token + 1)
            module.logits(module.run(self.cache.of(1), [ids_N], replay=routing))


def _tokens(module: NativeDecoder, trace: Trace) -> Tensor:
    vocab = module.config.vocab_size
    if trace.tokens is not None and int(trace.tokens.max()) < vocab:
        return trace.tokens.long()
    return torch.randint(0, vocab, (trace.num_tokens,), generator=torch.Generator().manual_seed(0))
