"""Does it fit: weights, cache and activations on each device of a layout, and which layouts are worth comparing."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from fewfire.config import AttentionConfig, LatentAttentionConfig, ModelConfig
from fewfire.plan.hardware import System
from fewfire.plan.workload import Layout, Workload

SERVING_CHUNK, LOCAL_CHUNK = 8192, 512  # tokens of a prefill step whose activations need room
UNBOUNDED = 1_000_000  # sequences, where a sequence keeps nothing


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

    The trunk is split over tensor and pipeline ranks; data-parallel groups repeat its attention, norms and routers;
    experts are split over all devices; GQA's cache over at most its kv heads; every tensor rank keeps MLA's latents
    whole. Source of the usable memory: `hardware.Part.usable_bytes`.
    """
    part = system.part
    stage = ceil(work.num_layers / layout.pipeline) / work.num_layers  # the longest: stages hold whole layers
    weights = work.weights.trunk * work.trunk_share(layout, part.per_node) + work.weights.experts / layout.expert
    weights *= stage
    usable = part.usable_bytes
    per_sequence = work.cache.sequence * stage / min(layout.tensor, work.cache_shards)
    chunk = SERVING_CHUNK if part.kind == "gpu" and part.memory_gb >= 40 else LOCAL_CHUNK
    room = usable - weights - work.scratch_bytes_per_token * chunk / layout.expert
    if room <= 0:
        most = 0
    elif per_sequence == 0:
        most = UNBOUNDED
    else:
        most = int(room // per_sequence) * layout.data
    if most >= batch:
        return Fit(True, "", weights, usable, most)
    if room <= 0:
        reason = f"weights take {weights / 1e9:.1f} GB a device, {usable / 1e9:.1f} GB is usable"
    else:
        held = f"{weights / 1e9:.1f} GB of weights a device"
        reason = f"the cache of {batch} x {work.context} tokens does not fit beside {held}"
    return Fit(False, reason, weights, usable, most)


def layouts(work: Workload, system: System) -> list[Layout]:
    """The ways to spread a model over a system worth comparing: TP in a node, DP attention + EP, pipelines of nodes.

    Tensor parallel divides the heads and leaves a node only where the whole system is two nodes or a node is one
    device.
    """
    count, per_node = system.count, system.part.per_node
    heads = _attention_heads(work.config)
    options: list[Layout] = []
    for tensor in (size for size in range(min(count, 64), 0, -1) if count % size == 0 and heads % size == 0):
        rest = count // tensor
        if tensor > per_node and count > 2 * per_node:
            continue
        if rest == 1:
            options.append(Layout(tensor=tensor))
            continue
        if rest <= work.num_layers:
            options.append(Layout(tensor=tensor, pipeline=rest))
        if work.config.is_moe and (work.num_moe_layers == 0 or rest * tensor <= _max_experts(work)):
            options.append(Layout(tensor=tensor, data=rest))
    return options or [Layout(pipeline=count)]


def _max_experts(work: Workload) -> int:
    return max(routed.num_experts for routed, _ in work.routed)


def _attention_heads(config: ModelConfig) -> int:
    for layer in config.layers:
        if isinstance(layer.mixer, AttentionConfig | LatentAttentionConfig):
            return layer.mixer.num_heads
    return 64
