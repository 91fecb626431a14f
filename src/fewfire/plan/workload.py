"""A model in its formats, ready for the step formulas; the ways to spread it over devices; what formulas cannot derive.

Owns `Workload`, `Layout` and `Assumptions`, the three things that speed, fit, links and simulation are functions of.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fewfire.config import AttentionConfig, LatentAttentionConfig, LayerConfig, ModelConfig, MoEConfig, RoutingProfile
from fewfire.plan.count import Flops, decode_flops
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
from fewfire.plan.unique import Routed

if TYPE_CHECKING:
    from fewfire.plan.checkpoint import Stored

_REPEATED = ("attention", "indexer", "linear_attention", "cross_attention", "norm", "router", "select_bias")


@dataclass(frozen=True)
class Assumptions:
    """What the formulas cannot derive; every report lists it. `efficiency` None takes the part's own share.

    Calibrated on published points (docs/plan.md): launches of 60 us a layer on unified-memory parts, 125 us a
    collective over RoCE pairs, 0.4 of the dense rate in prefill, experts 1.15 times busier on the busiest device.
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
    overlap: float = 0.0  # share of the all-to-all hidden behind arithmetic
    imbalance: float = 1.15  # tokens on the busiest expert-parallel device over the mean, where no profile says
    prefill_chunk: int = 8192


@dataclass(frozen=True)
class Layout:
    """How `tensor x data x pipeline` devices share the work.

    `data` > 1: attention is repeated, each group keeps its own sequences, experts lie whole on tensor x data devices
    (expert parallel). `data` = 1: every expert is cut over the tensor ranks.
    """

    tensor: int = 1
    data: int = 1
    pipeline: int = 1

    @property
    def devices(self) -> int:
        return self.tensor * self.data * self.pipeline

    @property
    def expert(self) -> int:
        """Devices that the experts of one layer are spread over."""
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
    """A model, its formats, a context, and how its experts are routed: the bytes of every formula worked out once."""

    config: ModelConfig
    formats: Formats
    weights: WeightBytes
    context: int
    cache: CacheBytes
    trunk_bytes: int  # of trunk, read by a decode step
    flops: Flops  # of a decode step, one token
    cache_read: int  # bytes of cache that a decode step of one sequence reads
    routed: tuple[tuple[Routed, int], ...]  # each kind of MoE layer of the decoder, and how many
    profile: RoutingProfile | None = None
    scratch_bytes_per_token: float = 0.0  # activations of a step
    cache_element_bytes: int = 2

    @staticmethod
    def of(
        config: ModelConfig,
        formats: Formats,
        context: int,
        profile: RoutingProfile | None = None,
        *,
        stored: Stored | None = None,
        cache_element_bytes: int = 2,
    ) -> Workload:
        """Work out everything about `config` in `formats`; `stored`: a checkpoint's own bytes, which are taken.

        Raises: ConfigError if `profile` is of another model.
        """
        kinds: dict[MoEConfig, int] = {}
        for stack, _, moe in config.moe_layers:
            if stack == "decoder":
                kinds[moe] = kinds.get(moe, 0) + 1
        routed = tuple(
            (Routed.of(moe.router.num_experts, moe.router.top_k, profile), layers) for moe, layers in kinds.items()
        )
        weights, trunk_bytes = weight_bytes(config, formats), decode_trunk_bytes(config, formats)
        if stored is not None:
            from fewfire.plan.checkpoint import stored_weights  # only files have bytes of their own

            formula, weights = weights, stored_weights(stored, config, weights)
            trunk_bytes = round(trunk_bytes * weights.trunk / formula.trunk)
        return Workload(
            config=config,
            formats=formats,
            weights=weights,
            context=context,
            cache=cache_bytes(config, context, element_bytes=cache_element_bytes),
            trunk_bytes=trunk_bytes,
            flops=decode_flops(config, context),
            cache_read=cache_read_bytes(config, context, element_bytes=cache_element_bytes),
            cache_element_bytes=cache_element_bytes,
            routed=routed,
            profile=profile,
            scratch_bytes_per_token=activation_bytes(config, 1024) / 1024,
        )

    def at(self, context: int) -> Workload:
        """The same model at another context."""
        return replace(
            self,
            context=context,
            cache=cache_bytes(self.config, context, element_bytes=self.cache_element_bytes),
            flops=decode_flops(self.config, context),
            cache_read=cache_read_bytes(self.config, context, element_bytes=self.cache_element_bytes),
        )

    @property
    def repeated_frac(self) -> float:
        """Share of the trunk that every data-parallel group keeps: attention, norms, routers; the rest is split."""
        classes = self.weights.by_class
        kept = sum(size for kind, size in classes.items() if kind in _REPEATED)
        whole = sum(size for kind, size in classes.items() if kind != "experts")
        return kept / whole if any(kind in classes for kind in _REPEATED) else 0.7

    def trunk_share(self, layout: Layout, per_node: int) -> float:
        """What one device of `layout` holds (and reads) of the trunk: 1 / tensor ranks, and of what data-parallel
        groups do not repeat, an equal part in each node. Pipeline stages apart."""
        groups = max(1, min(layout.data, per_node // layout.tensor))
        return (self.repeated_frac + (1 - self.repeated_frac) / groups) / layout.tensor

    @property
    def num_layers(self) -> int:
        return len(self.config.layers)

    @property
    def num_moe_layers(self) -> int:
        return sum(layers for _, layers in self.routed)

    @property
    def cache_shards(self) -> int:
        """How many tensor ranks can split the cache: the kv heads; 1 for MLA's latents, which every rank keeps."""
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
