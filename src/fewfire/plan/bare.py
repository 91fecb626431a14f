"""Bare sizes as models: '30b', '400b-a30b'. Total and active are taken at their word; the shape is a typical one.

Owns the guess of a shape whose parameters come out near the sizes, so that memory, cache and speed can be worked out;
whoever prints it says that the shape is assumed.
"""

from __future__ import annotations

import re
from dataclasses import replace

from fewfire.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
    RouterConfig,
    check,
)
from fewfire.plan.count import Counts, count
from fewfire.sizes import parse_count

_PATTERN = re.compile(r"(\d+(?:\.\d+)?[mbt])(?:-a(\d+(?:\.\d+)?[mbt]))?", re.IGNORECASE)
_VOCAB, _HEAD_DIM, _KV_HEADS, _TOP_K = 128_000, 128, 8, 8
ASSUMED = "shape assumed: grouped-query attention with 8 KV heads of 128, vocabulary 128k, top-8 routing"


def is_bare_size(name: str) -> bool:
    """True of '30b' and '400b-a30b', whatever the case."""
    return _PATTERN.fullmatch(name.strip()) is not None


def _shape(trunk: float, feed_forward_share: float) -> tuple[int, int]:
    """(model_dim, layers) of a model about 100 times as wide as deep whose attention and tables take `trunk`.

    Per layer 2.25 D^2 of attention, plus 12 D^2 x `feed_forward_share` for what else lies in the trunk.
    """
    low, high = 128, 65_536
    while high - low > 128:
        dim = (low + high) // 2 // 128 * 128
        layers = max(2, dim // 100)
        size = 2 * _VOCAB * dim + layers * dim * dim * (2.25 + 12 * feed_forward_share)
        low, high = (dim, high) if size <= trunk else (low, dim)
    return max(128, low), max(2, low // 100)


def _attention(dim: int) -> AttentionConfig:
    heads = max(_KV_HEADS, dim // _HEAD_DIM // _KV_HEADS * _KV_HEADS)
    return AttentionConfig(heads, _KV_HEADS, _HEAD_DIM, _HEAD_DIM**-0.5, RopeConfig(1e6, _HEAD_DIM))


def _model(dim: int, layers: int, ffn: FeedForwardConfig | MoEConfig) -> ModelConfig:
    layer = LayerConfig(_attention(dim), ffn)
    return ModelConfig("fewfire", _VOCAB, dim, (layer,) * layers, NormConfig("rms", 1e-6), False, 131_072)


def bare_model(name: str) -> tuple[ModelConfig, Counts]:
    """A typical shape for a bare size, and its counts with total and active set to exactly what was asked.

    Raises: ConfigError if the active size is no less than the total, or too small a part of it to build.
    """
    match = _PATTERN.fullmatch(name.strip())
    check(match is not None, f"model ({name}) is not a size; write it as 30b or 400b-a30b")
    assert match is not None
    total = parse_count(match.group(1))
    active = parse_count(match.group(2)) if match.group(2) else total
    check(total >= 1_000_000, f"model ({name}) has under a million parameters; write a size such as 125m or 30b")
    check(total <= 10**15, f"model ({name}) exceeds 1000t parameters; write a size such as 400b-a30b")
    check(active <= total, f"active size of {name} exceeds its total; swap them or drop the -a part")
    if active == total:
        dim, layers = _shape(total, 0.8)
        rest = count(_model(dim, layers, FeedForwardConfig(1, "silu", True))).total
        width = max(1, round((total - rest) / (3 * dim * layers)))
        config = _model(dim, layers, FeedForwardConfig(width, "silu", True))
    else:
        config = _bare_moe(total, active, name)
    return config, _exact(count(config), total, active)


def _bare_moe(total: int, active: int, name: str) -> ModelConfig:
    """About a third of the active parameters are trunk; the experts hold the rest, their number from the ratio."""
    trunk = 0.35 * active
    experts = round(_TOP_K * (total - trunk) / (active - trunk) / 8) * 8
    check(2 <= experts <= 1_000_000, f"active size of {name} is too small a part of its total; raise it")
    top_k = min(_TOP_K, max(1, experts - 1))
    routed = (total - active) / (1 - top_k / experts)
    dim, layers = _shape(max(total - routed, 0.1 * active), 0.0)
    width = max(1, round(routed / (3 * dim * layers * experts)))
    router = RouterConfig(experts, top_k, "softmax", True, 1.0, False)
    return _model(dim, layers, MoEConfig(router, FeedForwardConfig(width, "silu", True)))


def _exact(counts: Counts, total: int, active: int) -> Counts:
    """Counts with total and active as asked; the difference goes to the feed-forward."""
    if not counts.experts:
        by_class = {**counts.by_class, "dense_ffn": counts.by_class["dense_ffn"] + total - counts.total}
        return replace(
            counts, total=total, active=total, trunk=total, by_class=by_class,
            active_excluding_embedding=total - counts.embedding,
        )  # fmt: skip
    active_experts = min(active, max(0, active - counts.trunk))
    trunk = active - active_experts
    by_class = {**counts.by_class, "experts": total - trunk}
    return replace(
        counts, total=total, active=active, active_excluding_embedding=active - counts.embedding,
        experts=total - trunk, trunk=trunk, active_experts=active_experts, by_class=by_class,
    )  # fmt: skip
