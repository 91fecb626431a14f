"""How fast: the time of a decode step and of a prefill on a layout of devices, and which bound binds.

A roofline in three phases that follow one another (attention over the cache, trunk matrices, experts), each the
larger of its bytes over the bandwidth reached and its FLOPs over the rate reached; then launches and links. Decode
reads the experts that the batch wakes, not the active parameters once. What is assumed stands in `Assumptions`; where
a part's kernels were measured (this machine), their rates take the place of peaks and shares (plan/phases.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from fewfire.plan import links, resident
from fewfire.plan.count import prefill_flops
from fewfire.plan.hardware import Part, System
from fewfire.plan.phases import Phase, attention_phase, experts_phase, trunk_phase
from fewfire.plan.rates import STEP_S
from fewfire.plan.workload import Assumptions, Layout, Workload


@dataclass(frozen=True)
class StepTime:
    """One decode step of `batch` sequences. `bytes_read` by the busiest device; `bound` names the largest part."""

    batch: int
    seconds: float
    memory_s: float
    compute_s: float
    launch_s: float
    communication_s: float
    bytes_read: float
    bound: str

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.seconds


def expert_bytes(work: Workload, num_tokens: float, *, devices: int = 1) -> float:
    """Bytes of routed experts that the busiest of `devices` reads for `num_tokens` tokens, all layers."""
    awake = sum(routed.busiest(num_tokens, devices) * layers for routed, layers in work.routed)
    return awake * work.weights.per_expert


def bytes_per_step(work: Workload, batch: float) -> float:
    """Bytes one device would read for a decode step: awake experts + trunk + everybody's cache."""
    cache = work.cache_read * batch
    return expert_bytes(work, batch) + work.trunk_bytes + cache


def arithmetic_rate(part: Part, format_name: str) -> float | None:
    """FLOP/s of matrix products on weights of `format_name`: fp8 and mxfp4 in fp8 where the part has it, else bf16."""
    if format_name in ("fp8", "mxfp4") and part.fp8_tflops:
        return part.fp8_tflops * 1e12
    return part.bf16_tflops * 1e12 if part.bf16_tflops else None


def bandwidth(part: Part, assume: Assumptions) -> float:
    """Bytes/s of memory that a step reaches."""
    return part.bandwidth_gbs * 1e9 * (assume.efficiency or part.efficiency)


def imbalance(work: Workload, layout: Layout, assume: Assumptions) -> float:
    """Tokens of the busiest expert-parallel device over the mean: from the profile, else assumed; 1 without EP."""
    if layout.data == 1 or not work.routed:
        return 1.0
    measured = work.routed[0][0].imbalance(layout.expert)
    return assume.imbalance if measured is None else measured


def _seconds(flops: float, rate: float | None, mfu: float) -> float:
    return 0.0 if rate is None else flops / (rate * mfu)


def decode_step(work: Workload, system: System, layout: Layout, batch: int, assume: Assumptions) -> StepTime:
    """Time of one decode step of `batch` sequences at the workload's context.

    seconds = sum over phases of max(bytes / bandwidth, FLOPs / rate) + launches + collectives. A pipeline passes
    `pipeline` micro-batches through stages of an equal share of the layers.
    """
    part, stages, formats = system.part, layout.pipeline, work.formats
    if part.kernels is not None and layout.devices == 1:
        return _measured_step(work, part, batch, assume)
    micro = max(1.0, batch / stages)
    local = max(1.0, micro / layout.data)
    rate = bandwidth(part, assume)
    shards = min(layout.tensor, work.cache_shards)
    cache = work.cache_read * local / shards
    trunk = work.trunk_bytes * work.trunk_share(layout, part.per_node)
    experts = expert_bytes(work, micro, devices=layout.expert if layout.data > 1 else 1)
    experts = experts if layout.data > 1 else experts / layout.tensor
    flops = work.flops
    plain, mfu = arithmetic_rate(part, "bf16"), assume.decode_mfu
    compute = [
        _seconds(flops.attention * local / layout.tensor, plain, mfu),
        _seconds(
            (flops.matmul - flops.experts) * local / layout.tensor, arithmetic_rate(part, work.formats.trunk), mfu
        ),
        _seconds(flops.experts * micro / layout.expert, arithmetic_rate(part, formats.experts), mfu)
        * imbalance(work, layout, assume),
    ]
    memory = [cache / rate, trunk / rate, experts / rate]
    launch_s = (part.launch_s or assume.launch_s[part.kind]) * work.num_layers
    links_s = links.step_seconds(work, system, layout, local, assume)
    seconds = sum(map(max, memory, compute)) + launch_s + links_s
    parts = {"memory": sum(memory), "compute": sum(compute), "launches": launch_s, "links": links_s}
    return StepTime(
        batch=batch,
        seconds=seconds,
        memory_s=sum(memory),
        compute_s=sum(compute),
        launch_s=launch_s,
        communication_s=links_s,
        bytes_read=(cache + trunk + experts) / stages,
        bound=max(parts, key=lambda name: parts[name]),
    )


def decode_phases(work: Workload, part: Part, batch: float, assume: Assumptions) -> tuple[Phase, Phase, Phase]:
    """Attention, trunk and experts of a decode step of `batch` sequences, on a part whose kernels were measured."""
    rate = bandwidth(part, assume)
    return (
        attention_phase(work, part, rate, batch, work.context, batch),
        trunk_phase(work, part, rate, batch, batch),
        experts_phase(work, part, rate, batch),
    )


def launches(work: Workload, part: Part, assume: Assumptions) -> float:
    """Seconds of a step that neither read nor multiply."""
    each = (part.launch_s or assume.launch_s[part.kind]) * work.num_layers
    return each + (STEP_S if part.kernels is not None else 0.0)


def _measured_step(work: Workload, part: Part, batch: int, assume: Assumptions) -> StepTime:
    phases = decode_phases(work, part, batch, assume)
    launch_s = launches(work, part, assume)
    memory_s, compute_s = sum(each.reading_s for each in phases), sum(each.arithmetic_s for each in phases)
    parts = {"memory": memory_s, "compute": compute_s, "launches": launch_s}
    return StepTime(
        batch=batch,
        seconds=sum(each.seconds for each in phases) + launch_s,
        memory_s=memory_s,
        compute_s=compute_s,
        launch_s=launch_s,
        communication_s=0.0,
        bytes_read=sum(each.num_bytes for each in phases),
        bound=max(parts, key=lambda name: parts[name]),
    )


@dataclass(frozen=True)
class PrefillTime:
    """Prompts of `num_tokens` through the model, `together` at a time: seconds to the first token of each.

    `seconds` is None where the part's arithmetic rate is not published.
    """

    num_tokens: int
    seconds: float | None
    bound: str
    together: int = 1

    @property
    def tokens_per_s(self) -> float | None:
        return None if not self.seconds else self.num_tokens * self.together / self.seconds


def prefill(work: Workload, system: System, layout: Layout, num_tokens: int, assume: Assumptions) -> PrefillTime:
    """Prompts in chunks that each read every weight once: thousands of tokens wake every expert.

    seconds = max(weights / bandwidth, FLOPs / (mfu x rate)) + launches + collectives. Each data-parallel group takes
    prompts of its own and a pipeline holds one a stage, so `data x pipeline` prompts pass together.
    """
    part = system.part
    if part.kernels is not None and layout.devices == 1:
        return measured_prefill(work, part, num_tokens, assume)
    rate = arithmetic_rate(part, work.formats.experts if work.config.is_moe else work.formats.trunk)
    if rate is None:
        return PrefillTime(num_tokens, None, f"the arithmetic rate of {part.name} is not published")
    chunks = ceil(num_tokens / assume.prefill_chunk)
    tokens = min(num_tokens, assume.prefill_chunk)
    read = expert_bytes(work, tokens * layout.data) / layout.expert + work.trunk_bytes * work.trunk_share(
        layout, part.per_node
    )
    memory_s = chunks * read / bandwidth(part, assume)
    flops = prefill_flops(work.config, num_tokens)
    compute_s = flops / (rate * assume.prefill_mfu * layout.tensor) * imbalance(work, layout, assume)
    launch_s = chunks * (part.launch_s or assume.launch_s[part.kind]) * work.num_layers
    links_s = chunks * links.step_seconds(work, system, layout, tokens, assume, prefill=True)
    parts = {"memory": memory_s, "compute": compute_s, "launches": launch_s, "links": links_s}
    seconds = max(memory_s, compute_s) + launch_s + links_s
    bound = max(parts, key=lambda name: parts[name])
    return PrefillTime(num_tokens, seconds, bound, layout.data * layout.pipeline)


def chunk_phases(
    work: Workload, part: Part, num_tokens: int, assume: Assumptions
) -> Iterator[tuple[int, Phase, Phase, Phase]]:
    """Each chunk of a prompt: its tokens; attention, trunk and experts. The head runs once, at the end."""
    rate, chunk = bandwidth(part, assume), min(assume.prefill_chunk, resident.CHUNKS[0])
    for start in range(0, num_tokens, chunk):
        tokens = min(chunk, num_tokens - start)
        seen, ends = start + (tokens + 1) // 2, start + tokens == num_tokens
        yield (
            tokens,
            attention_phase(work.at(start + tokens), part, rate, tokens, seen, 1),
            trunk_phase(work, part, rate, tokens, 1 if ends else 0),
            experts_phase(work, part, rate, tokens),
        )


def measured_prefill(work: Workload, part: Part, num_tokens: int, assume: Assumptions) -> PrefillTime:
    """A prompt on a part whose kernels were measured: the phases of its chunks, one after another."""
    parts = {"memory": 0.0, "compute": 0.0, "launches": 0.0}
    seconds = 0.0
    for _, *phases in chunk_phases(work, part, num_tokens, assume):
        parts["memory"] += sum(each.reading_s for each in phases)
        parts["compute"] += sum(each.arithmetic_s for each in phases)
        parts["launches"] += launches(work, part, assume)
        seconds += sum(each.seconds for each in phases)
    bound = max(parts, key=lambda name: parts[name])
    return PrefillTime(num_tokens, seconds + parts["launches"], bound)
