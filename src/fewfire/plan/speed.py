"""How fast: the time of a decode step and of a prefill on a layout of devices, and which bound binds.

A roofline with named parts: bytes over the bandwidth that is reached, FLOPs over the rate that is reached, launches,
and links. Decode reads the experts that the batch wakes, not the active parameters once. Every constant that is
measured rather than derived stands in `Assumptions`, so that a report can list it and a user can change it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil

from fewfire.config import AttentionConfig, LatentAttentionConfig, LayerConfig, ModelConfig, MoEConfig, RoutingProfile
from fewfire.plan.count import decode_flops, prefill_flops
from fewfire.plan.hardware import Part, System
from fewfire.plan.memory import (
    CacheBytes,
    Formats,
    WeightBytes,
    activation_bytes,
    cache_bytes,
    cache_read_bytes,
    decode_trunk_bytes,
    weight_bytes,
)
from fewfire.plan.unique import profile_unique, uniform_max_active, unique_experts


@dataclass(frozen=True)
class Assumptions:
    """What the formulas cannot derive. `efficiency` None takes the part's own share of its bandwidth.

    Launch seconds are a layer's kernels without matrix work; latencies are one collective's, small messages.
    Calibrated on published decode points (docs/plan.md): unified 60 us a layer, RoCE pairs 125 us a collective.
    """

    efficiency: float | None = None
    prefill_mfu: float = 0.40
    decode_mfu: float = 0.50
    launch_s: dict[str, float] = field(
        default_factory=lambda: {"gpu": 20e-6, "unified": 60e-6, "cpu": 30e-6, "laptop": 30e-6}
    )
    node_latency_s: float = 12e-6
    network_latency_s: float = 25e-6
    ethernet_latency_s: float = 125e-6
    link_efficiency: float = 0.8
    overlap: float = 0.0  # share of all-to-all hidden behind arithmetic; two batches in flight hide most of it
    prefill_chunk: int = 8192


@dataclass(frozen=True)
class Layout:
    """How `tensor x data x pipeline` devices share the work; experts are spread over tensor x data of them."""

    tensor: int = 1
    data: int = 1
    pipeline: int = 1

    @property
    def devices(self) -> int:
        return self.tensor * self.data * self.pipeline

    @property
    def expert(self) -> int:
        return self.tensor * self.data

    @property
    def name(self) -> str:
        parts = [(self.tensor, "TP"), (self.data, "DP"), (self.pipeline, "PP")]
        named = [f"{letters}{size}" for size, letters in parts if size > 1]
        if self.data > 1:
            named.append(f"EP{self.expert}")
        return "+".join(named) or "one device"


@dataclass(frozen=True)
class Workload:
    """A model in its formats, with the bytes that every step formula needs worked out once."""

    config: ModelConfig
    formats: Formats
    weights: WeightBytes
    context: int
    cache: CacheBytes
    trunk_bytes: int  # of trunk, read by a decode step
    profile: RoutingProfile | None = None

    @staticmethod
    def of(config: ModelConfig, formats: Formats, context: int, profile: RoutingProfile | None = None) -> Workload:
        return Workload(
            config=config,
            formats=formats,
            weights=weight_bytes(config, formats),
            context=context,
            cache=cache_bytes(config, context),
            trunk_bytes=decode_trunk_bytes(config, formats),
            profile=profile,
        )

    def at(self, context: int) -> Workload:
        """The same model at another context."""
        return replace(self, context=context, cache=cache_bytes(self.config, context))

    @property
    def num_layers(self) -> int:
        return len(self.config.layers)

    @property
    def cache_shards(self) -> int:
        """How many tensor-parallel ranks can split the cache: kv heads; 1 for MLA's latents, which every rank keeps."""
        heads = [_cache_heads(layer) for layer in self.config.layers]
        return max(1, min((count for count in heads if count), default=1))


def _cache_heads(layer: LayerConfig) -> int:
    match layer.mixer:
        case AttentionConfig():
            return layer.mixer.num_kv_heads
        case LatentAttentionConfig():
            return 1
        case _:
            return 0


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


def expert_bytes(work: Workload, num_tokens: float, *, devices: int = 1, profile: bool = True) -> float:
    """Bytes of routed experts that the busiest of `devices` reads for a step of `num_tokens` tokens, all layers.

    One device: U(B), uniform or from the profile. Several: the expected most on one of them, by the uniform formula
    scaled with the profile's share of U(B) where there is one.
    """
    per_layer: dict[MoEConfig, int] = {}
    for stack, _, moe in work.config.moe_layers:
        if stack == "decoder":
            per_layer[moe] = per_layer.get(moe, 0) + 1
    total = 0.0
    for moe, layers in per_layer.items():
        router = moe.router
        awake = uniform_max_active(router.num_experts, router.top_k, num_tokens, devices)
        if work.profile is not None and profile:
            uniform = unique_experts(router.num_experts, router.top_k, num_tokens)
            awake *= profile_unique(work.profile, num_tokens) / uniform
        total += awake * work.weights.per_expert * layers
    return total


def bytes_per_step(work: Workload, batch: int) -> float:
    """Bytes one device would read for a decode step: awake experts + trunk + everybody's cache."""
    cache = cache_read_bytes(work.config, work.context) * batch
    return expert_bytes(work, batch) + work.trunk_bytes + cache


def arithmetic_rate(part: Part, format_name: str) -> float | None:
    """FLOP/s of matrix products on weights of `format_name`: fp8 and mxfp4 in fp8 where the part has it, else bf16."""
    if format_name in ("fp8", "mxfp4") and part.fp8_tflops:
        return part.fp8_tflops * 1e12
    return part.bf16_tflops * 1e12 if part.bf16_tflops else None


def _link(system: System, span: int) -> tuple[float, bool]:
    """(bytes/s one way a device, crosses nodes) for a group of `span` devices."""
    part = system.part
    inside = span <= part.per_node
    if inside:
        return (part.link_gbs or 8.0) * 1e9, False
    return (part.node_link_gbs or 12.5) * 1e9, True


def _latency(system: System, crosses: bool, assume: Assumptions) -> float:
    if not crosses:
        return assume.node_latency_s
    return assume.network_latency_s if (system.part.node_link_gbs or 0) >= 50 else assume.ethernet_latency_s


def all_to_all_seconds(work: Workload, system: System, layout: Layout, tokens: float, assume: Assumptions) -> float:
    """Dispatch and combine of one MoE layer for `tokens` tokens a device: activations out in fp8, sums back in bf16.

    Between nodes a token travels once to each node that holds one of its experts (then inside by the faster link);
    group-limited routers bound those nodes.
    """
    moe = next((moe for _, _, moe in work.config.moe_layers), None)
    if moe is None or layout.expert == 1:
        return 0.0
    per_token = work.config.model_dim * 3.0
    nodes = ceil(layout.expert / system.part.per_node)
    reached = nodes * (1 - (1 - 1 / nodes) ** moe.router.top_k)
    if moe.router.groups is not None:
        reached = min(reached, moe.router.groups.top_groups)
    remote = reached * (nodes - 1) / nodes
    inside = min(moe.router.top_k, layout.expert) * (1 - 1 / layout.expert)
    fast = inside * per_token * tokens / ((system.part.link_gbs or 8.0) * 1e9 * assume.link_efficiency)
    slow = remote * per_token * tokens / ((system.part.node_link_gbs or 12.5) * 1e9 * assume.link_efficiency)
    return max(fast, slow) + 2 * _latency(system, nodes > 1, assume)


def communication_seconds(work: Workload, system: System, layout: Layout, tokens: float, assume: Assumptions) -> float:
    """All layers' collectives for `tokens` tokens a data-parallel group: all-reduce over TP, all-to-all over EP."""
    seconds = 0.0
    layers = work.num_layers
    if layout.tensor > 1:
        rate, crosses = _link(system, layout.tensor)
        payload = tokens * work.config.model_dim * 2 * 2 * (layout.tensor - 1) / layout.tensor
        one = payload / (rate * assume.link_efficiency) + _latency(system, crosses, assume)
        seconds += one * layers * (1 if layout.data > 1 else 2)
    if layout.data > 1:
        moe_layers = sum(stack == "decoder" for stack, _, _ in work.config.moe_layers)
        one = all_to_all_seconds(work, system, layout, tokens / layout.tensor, assume)
        seconds += one * moe_layers * (1 - assume.overlap)
    if layout.pipeline > 1:
        rate, crosses = _link(system, system.count)
        hop = tokens * work.config.model_dim * 2 / (rate * assume.link_efficiency) + _latency(system, crosses, assume)
        seconds += hop * layout.pipeline
    return seconds


def decode_step(work: Workload, system: System, layout: Layout, batch: int, assume: Assumptions) -> StepTime:
    """Time of one decode step of `batch` sequences at the workload's context.

    seconds = max(bytes / (efficiency x bandwidth), FLOPs / (mfu x rate)) + launches + collectives. A pipeline passes
    `pipeline` micro-batches through stages of an equal share of layers.
    """
    part, stages = system.part, layout.pipeline
    micro: float = max(1.0, batch / stages)
    local = max(1.0, micro / layout.data)
    shards = min(layout.tensor, work.cache_shards)
    cache = cache_read_bytes(work.config, work.context) * local / shards
    experts = expert_bytes(work, micro, devices=layout.expert if layout.data > 1 else 1)
    experts = experts if layout.data > 1 else experts / layout.tensor
    read = (work.trunk_bytes / layout.tensor + experts + cache) / stages
    bandwidth = part.bandwidth_gbs * 1e9 * (assume.efficiency or part.efficiency)
    memory_s = read / bandwidth * stages
    compute_s = _decode_compute(work, part, layout, micro, assume)
    launch_s = (part.launch_s or assume.launch_s[part.kind]) * work.num_layers
    communication_s = communication_seconds(work, system, layout, local, assume)
    seconds = max(memory_s, compute_s) + launch_s + communication_s
    parts = {"memory": memory_s, "compute": compute_s, "launches": launch_s, "links": communication_s}
    return StepTime(
        batch, seconds, memory_s, compute_s, launch_s, communication_s, read, max(parts, key=lambda name: parts[name])
    )


def _decode_compute(work: Workload, part: Part, layout: Layout, micro: float, assume: Assumptions) -> float:
    flops = decode_flops(work.config, work.context)
    rate, plain = arithmetic_rate(part, work.formats.experts), arithmetic_rate(part, "bf16")
    if rate is None or plain is None:
        return 0.0
    return micro * (flops.matmul / rate + flops.attention / plain) / (layout.expert * assume.decode_mfu)


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
    a prompt of its own and a pipeline holds one a stage, so `data x pipeline` prompts pass together.
    """
    part = system.part
    rate = arithmetic_rate(part, work.formats.experts)
    if rate is None:
        return PrefillTime(num_tokens, None, f"the arithmetic rate of {part.name} is not published")
    chunks = ceil(num_tokens / assume.prefill_chunk)
    bandwidth = part.bandwidth_gbs * 1e9 * (assume.efficiency or part.efficiency)
    tokens = min(num_tokens, assume.prefill_chunk)
    read = expert_bytes(work, tokens * layout.data) / layout.expert + work.trunk_bytes / layout.tensor
    memory_s = chunks * read / bandwidth
    compute_s = prefill_flops(work.config, num_tokens) / (rate * assume.prefill_mfu * layout.tensor)
    launch_s = chunks * (part.launch_s or assume.launch_s[part.kind]) * work.num_layers
    communication_s = chunks * communication_seconds(work, system, layout, tokens, assume)
    parts = {"memory": memory_s, "compute": compute_s, "launches": launch_s, "links": communication_s}
    seconds = max(memory_s, compute_s) + launch_s + communication_s
    bound = max(parts, key=lambda name: parts[name])
    return PrefillTime(num_tokens, seconds, bound, layout.data * layout.pipeline)


@dataclass(frozen=True)
class Fit:
    """Whether a layout holds the model, and how many sequences its memory leaves room for."""

    fits: bool
    reason: str
    weights_per_device: float
    usable_per_device: float
    max_batch: int


def fit(work: Workload, system: System, layout: Layout, batch: int) -> Fit:
    """Weights, activations and `batch` sequences' cache on each device against what its memory leaves.

    usable = reported memory x utilisation - reserve (`Part.usable_bytes`); the trunk is split over TP and pipeline
    and repeated over DP; experts are split over all; GQA's cache over at most its kv heads; MLA's latents are kept
    whole by every TP rank.
    """
    weights = work.weights.trunk / (layout.tensor * layout.pipeline) + work.weights.experts / layout.devices
    usable = system.part.usable_bytes
    shards = min(layout.tensor, work.cache_shards) * layout.pipeline
    per_sequence = work.cache.sequence / shards
    scratch = activation_bytes(work.config, 512) / layout.tensor
    room = usable - weights - scratch
    most = int(room // per_sequence) * layout.data if room > 0 and per_sequence > 0 else 0
    if room > 0 and per_sequence == 0:
        most = 1_000_000
    if most >= batch:
        return Fit(True, "", weights, usable, most)
    if room <= 0:
        reason = f"weights take {weights / 1e9:.1f} GB a device, {usable / 1e9:.1f} GB is usable"
    else:
        held = f"{weights / 1e9:.1f} GB of weights a device"
        reason = f"the cache of {batch} x {work.context} tokens does not fit beside {held}"
    return Fit(False, reason, weights, usable, most)


def layouts(work: Workload, system: System) -> list[Layout]:
    """The ways to spread a model over a system worth comparing: TP in a node, DP attention + EP, pipelines of nodes."""
    count, per_node = system.count, system.part.per_node
    heads = _attention_heads(work.config)
    options: list[Layout] = []
    for tensor in sorted({size for size in range(1, min(count, 64) + 1) if count % size == 0}, reverse=True):
        if heads % tensor:
            continue
        rest = count // tensor
        if tensor > per_node and count > 2 * per_node:
            continue
        if rest == 1:
            options.append(Layout(tensor=tensor))
            continue
        options.append(Layout(tensor=tensor, pipeline=rest))
        if work.config.is_moe:
            options.append(Layout(tensor=tensor, data=rest))
    return options or [Layout(pipeline=count)]


def _attention_heads(config: ModelConfig) -> int:
    heads = 0
    for layer in config.layers:
        if isinstance(layer.mixer, AttentionConfig | LatentAttentionConfig):
            heads = layer.mixer.num_heads
    return heads or 64
