"""What the planner says of a pack as it is loaded, on this machine as just measured: printed beside measurements.

The formulas are the planner's (plan/speed.py, plan/stream.py); what is known here are the slots that experts have, the
chunk of a prompt, the format of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from fewfire.config import RoutingProfile
from fewfire.plan.hardware import Part, System
from fewfire.plan.speed import bandwidth, decode_step, prefill
from fewfire.plan.stream import DISK_BYTES_PER_S, Tier, stream, stream_prefill
from fewfire.plan.workload import Assumptions, Layout, Workload
from fewfire.runtime.banks import StreamedExperts
from fewfire.runtime.engine import CACHE_ELEMENT_BYTES, NativeDecoder
from fewfire.runtime.probe import probe_part


@dataclass(frozen=True)
class Prediction:
    """Tokens/s of all sequences together, and what binds. `hit_rate`: of expert reads, as assumed (resident: 1)."""

    decode_tokens_per_s: float
    prefill_tokens_per_s: float | None
    decode_bound: str
    prefill_bound: str
    hit_rate: float
    prefill_hit_rate: float


def workload_of(module: NativeDecoder, context: int, profile: RoutingProfile | None = None) -> Workload:
    """What a step of `module` behind `context` cached tokens reads and multiplies."""
    pack = module.pack
    return Workload.of(
        pack.config,
        pack.formats,
        max(context, 1),
        profile,
        cache_element_bytes=CACHE_ELEMENT_BYTES[module.cache_format],
    )


def predict(
    module: NativeDecoder,
    part: Part,
    *,
    context: int,
    batch: int = 1,
    prompt_tokens: int = 512,
    hit_rate: float | None = None,
    prefill_hit_rate: float | None = None,
    profile: RoutingProfile | None = None,
) -> Prediction:
    """Decode behind `context` tokens of `batch` texts, and a prompt of one text, on `part` (`probe_part`).

    Where experts stream, `hit_rate` is that of decode where it is known (None: the share of experts that memory holds,
    or of `profile`'s reads), `prefill_hit_rate` that of the prompt.
    """
    work = workload_of(module, context, profile)
    assume = replace(Assumptions(), prefill_chunk=module.chunk_tokens)
    if not isinstance(module.experts, StreamedExperts):
        step = decode_step(work, System(part, 1), Layout(), batch, assume)
        fill = prefill(work, System(part, 1), Layout(), prompt_tokens, assume)
        return Prediction(step.tokens_per_s, fill.tokens_per_s, step.bound, fill.bound, 1.0, 1.0)
    disk = part.disk_gbs * 1e9 if part.disk_gbs else DISK_BYTES_PER_S
    tiers = (
        Tier("memory", module.experts.num_bytes, bandwidth(part, assume)),
        Tier("disk", float("inf"), disk),
    )
    made = stream(work, part, tiers, batch, assume, hit_rate=hit_rate)
    assert made is not None, "StreamedExperts has room for two layers' experts"
    filled = stream_prefill(work, part, tiers, prompt_tokens, assume, hit_rate=prefill_hit_rate)
    expected = made.hit_rate if prefill_hit_rate is None else prefill_hit_rate
    return Prediction(
        made.tokens_per_s, filled.tokens_per_s, made.bound, filled.bound, made.hit_rate, expected
    )  # fmt: skip


def predict_decode(module: nn.Module, *, context: int, hit_rate: float | None = None) -> float | None:
    """Tokens/s of one text, measuring this machine for some tenths of a second; None for what torch runs."""
    if not isinstance(module, NativeDecoder):
        return None
    return predict(module, probe_part(module), context=context, hit_rate=hit_rate).decode_tokens_per_s
