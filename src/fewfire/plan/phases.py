"""What a step of some tokens costs where kernels were measured: attention, trunk and experts, read and multiplied.

One step reads each awake weight once, whatever the number of its tokens, and multiplies it with every token that wants
it; the two overlap. N new tokens of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fewfire.config import AttentionConfig, LatentAttentionConfig, LayerConfig, MoEConfig
from fewfire.plan.count import mixer_flops
from fewfire.plan.hardware import Part
from fewfire.plan.memory import Formats, expert_bytes
from fewfire.plan.rates import overlapped
from fewfire.plan.shapes import TensorSpec, decoder_blocks, outer_tensors
from fewfire.plan.unique import Routed
from fewfire.plan.workload import Workload

_LOGIT_NUMBERS = 4  # of a row, that a logit costs as much as: new memory, and the choice of a token


@dataclass(frozen=True)
class Phase:
    """Reading and arithmetic of one kind of work in all layers together."""

    num_bytes: float
    reading_s: float
    arithmetic_s: float

    @property
    def seconds(self) -> float:
        return overlapped(self.reading_s, self.arithmetic_s)


@dataclass(frozen=True)
class ExpertLayers:
    """`layers` MoE layers of one kind: weights of one expert by format, and its bytes."""

    routed: Routed
    layers: int
    weights: dict[str, float]
    num_bytes: int
    row_numbers: int  # of a token's rows, of all its experts


def weights_by_format(specs: Iterator[TensorSpec], formats: Formats) -> dict[str, float]:
    """Weights that are multiplied with a token, by the format that they are stored in."""
    sums: dict[str, float] = {}
    for spec in specs:
        if spec.matmul:
            sums[formats.of(spec)] = sums.get(formats.of(spec), 0) + spec.matmul
    return sums


def expert_layers(work: Workload) -> list[ExpertLayers]:
    """The decoder's kinds of MoE layers."""
    made = []
    for layer, copies, specs in decoder_blocks(work.config):
        if not isinstance(layer.ffn, MoEConfig):
            continue
        router = layer.ffn.router
        weights = weights_by_format((spec for spec in specs if spec.kind == "experts"), work.formats)
        one = {name: count / router.top_k for name, count in weights.items()}
        routed = Routed.of(router.num_experts, router.top_k, work.profile)
        num_bytes = expert_bytes(specs, router.num_experts, work.formats)
        row_numbers = router.top_k * (2 * work.config.model_dim + layer.ffn.expert.hidden_dim)
        made.append(ExpertLayers(routed, copies, one, num_bytes, row_numbers))
    return made


def experts_phase(work: Workload, part: Part, rate: float, num_tokens: float) -> Phase:
    """Routed experts of all layers for N tokens; `rate` in bytes/s of memory."""
    assert part.kernels is not None
    num_bytes = arithmetic_s = 0.0
    for kind in expert_layers(work):
        awake = kind.routed.unique(num_tokens)
        each = num_tokens * kind.routed.top_k / awake if awake else 0.0
        num_bytes += awake * kind.layers * kind.num_bytes
        arithmetic_s += part.kernels.rows_s(num_tokens * kind.layers * kind.row_numbers)
        for name, count in kind.weights.items():
            arithmetic_s += part.kernels.product_s(name, awake * kind.layers * count, each)
    return Phase(num_bytes, num_bytes / rate, arithmetic_s)


def trunk_phase(work: Workload, part: Part, rate: float, num_tokens: float, num_heads: float) -> Phase:
    """All other matrices for N tokens, the head for `num_heads` of them."""
    assert part.kernels is not None
    products: list[tuple[str, float, float]] = []
    for _, copies, specs in decoder_blocks(work.config):
        inner = (spec for spec in specs if spec.kind != "experts")
        products += [(name, n * copies, num_tokens) for name, n in weights_by_format(inner, work.formats).items()]
    outer = weights_by_format(iter(outer_tensors(work.config)), work.formats)
    products += [(name, count, num_heads) for name, count in outer.items() if num_heads]
    arithmetic_s = sum(part.kernels.product_s(*product) for product in products)
    arithmetic_s += part.kernels.rows_s(num_tokens * sum(map(_row_numbers, work.config.layers)))
    arithmetic_s += part.kernels.rows_s(num_tokens * 2 * work.config.model_dim * work.num_layers)  # norms
    arithmetic_s += part.kernels.rows_s(num_heads * _LOGIT_NUMBERS * work.config.vocab_size)
    return Phase(work.trunk_bytes, work.trunk_bytes / rate, arithmetic_s)


def attention_phase(work: Workload, part: Part, rate: float, num_tokens: float, seen: int, texts: float) -> Phase:
    """Scores and values of N tokens that see `seen` cached ones on average; the cache of `texts` texts is read once."""
    assert part.kernels is not None
    arithmetic_s = 0.0
    for layer, copies, _ in decoder_blocks(work.config):
        flops = mixer_flops(layer.mixer, seen) * copies * num_tokens
        arithmetic_s += part.kernels.attention_s(flops, is_latent=isinstance(layer.mixer, LatentAttentionConfig))
    num_bytes = work.cache_read * texts
    return Phase(num_bytes, num_bytes / rate, arithmetic_s)


def _row_numbers(layer: LayerConfig) -> int:
    """Numbers of a token's rows in attention and in feed-forwards that every token passes."""
    dense = layer.ffn.shared if isinstance(layer.ffn, MoEConfig) else layer.ffn
    fed = 0 if dense is None else 2 * dense.hidden_dim
    match layer.mixer:
        case AttentionConfig() as mixer:
            return fed + 2 * (mixer.num_heads + 2 * mixer.num_kv_heads) * mixer.head_dim  # products, then attention
        case LatentAttentionConfig() as mixer:
            widths = mixer.nope_dim + mixer.rope_dim + mixer.value_dim
            return fed + mixer.num_heads * widths + mixer.kv_rank + mixer.rope_dim + (mixer.q_rank or 0)
        case _:
            return fed
