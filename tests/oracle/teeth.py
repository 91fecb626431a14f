"""One term of the mathematics broken at a time, by a change of our config: what the comparison must notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fewfire.config import (
    AttentionConfig,
    FeedForwardConfig,
    IndexerConfig,
    LatentAttentionConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RelativeBiasConfig,
    RopeConfig,
    RopeScaling,
    RouterConfig,
)
from oracle.subject import alter

Break = Callable[[ModelConfig], ModelConfig]


def part(kind: type, /, **changes: Any) -> Break:
    return lambda config: alter(config, kind, **changes)


def model(**changes: Any) -> Break:
    return lambda config: replace(config, **changes)


def scaled(kind: type, factor: float) -> Break:
    """Every `scale` of a kind times `factor`."""

    def change(config: ModelConfig) -> ModelConfig:
        def walk(node: Any) -> Any:
            if isinstance(node, tuple):
                return tuple(walk(item) for item in node)
            if isinstance(node, kind):
                return replace(node, scale=node.scale * factor)
            if hasattr(node, "__dataclass_fields__"):
                return replace(node, **{name: walk(getattr(node, name)) for name in node.__dataclass_fields__})
            return node

        return walk(config)

    return change


def residual(index: int) -> Break:
    """One of the six numbers of a normed residual set to 1."""

    def change(config: ModelConfig) -> ModelConfig:
        assert config.normed_residual is not None
        values = list(config.normed_residual)
        values[index] = 1.0
        return replace(config, normed_residual=tuple(values))

    return change


def reversed_layers(config: ModelConfig) -> ModelConfig:
    """The mixers of the layers in reverse: windows, chunks, rope or its absence on the wrong layers."""
    mixers = [layer.mixer for layer in config.layers][::-1]
    return replace(config, layers=tuple(replace(layer, mixer=m) for layer, m in zip(config.layers, mixers)))


ROPE = {"no rope scaling": part(RopeConfig, scaling=None), "theta": part(RopeConfig, theta=700.0)}
PLAIN_ROPE = {"theta": part(RopeConfig, theta=700.0), "pairing": part(RopeConfig, pairing="interleaved")}
SCALE = {"attention scale": scaled(AttentionConfig, 1.1)}
EPS = {"eps": part(NormConfig, eps=3e-3)}
SOFTMAX_ROUTER = {
    "not renormalized": part(RouterConfig, renormalize=False),
    "top-k": part(RouterConfig, top_k=1),
    "routed scale": part(RouterConfig, scale=1.1),
    "sigmoid": part(RouterConfig, score="sigmoid"),
}
RAW_ROUTER = {
    "renormalized": part(RouterConfig, renormalize=True),
    "softmax after choice": part(RouterConfig, score="softmax_selected"),
}
SIGMOID_ROUTER = {
    "no selection bias": part(RouterConfig, select_bias=False),
    "not renormalized": part(RouterConfig, renormalize=False),
    "softmax": part(RouterConfig, score="softmax"),
    "routed scale": part(RouterConfig, scale=1.1),
}
GROUPS = {"no groups": part(RouterConfig, groups=None)}
SHARED = {"no shared expert": part(MoEConfig, shared=None, shared_gate=False)}
GATED_SHARED = {**SHARED, "no shared gate": part(MoEConfig, shared_gate=False)}
LATENT = {
    "scale without mscale": scaled(LatentAttentionConfig, 0.9),
    "rope pairing": part(RopeConfig, pairing="half"),
    "latent eps": part(LatentAttentionConfig, latent_eps=1e-2),
}
BIASES = {
    "no qkv bias": part(AttentionConfig, qkv_bias=False),
    "no out bias": part(AttentionConfig, out_bias=False),
}
GELU = {"activation": part(FeedForwardConfig, activation="gelu")}
SWITCH = {
    "no relative bias": lambda config: alter(config, AttentionConfig, relative_bias=None),
    "bucket distance": part(RelativeBiasConfig, max_distance=64),
    "scaled attention": scaled(AttentionConfig, 0.5),
    "unscaled head": model(logit_scale=1.0),
    "renormalized": part(RouterConfig, renormalize=True),
    "activation": part(FeedForwardConfig, activation="silu"),
    **EPS,
}

TEETH: dict[str, dict[str, Break]] = {
    "llama": {**ROPE, **SCALE, **EPS, **GELU, "pairing": PLAIN_ROPE["pairing"]},
    "llama-biases": {**BIASES, "no ffn bias": part(FeedForwardConfig, bias=False)},
    "gpt2": {
        **BIASES,
        **SCALE,
        **EPS,
        "activation": part(FeedForwardConfig, activation="relu"),
        "rms": part(NormConfig, kind="rms"),
        "no positions": model(learned_positions=None),
    },
    "mixtral": {**SOFTMAX_ROUTER, **PLAIN_ROPE, **GELU},
    "mixtral-window": {
        "window": part(AttentionConfig, window=None),
        "window off by one": part(AttentionConfig, window=5),
    },
    "qwen2_moe": {**RAW_ROUTER, **GATED_SHARED, "no qkv bias": BIASES["no qkv bias"], "theta": PLAIN_ROPE["theta"]},
    "qwen2_moe-window": {"window": part(AttentionConfig, window=None), "layers": reversed_layers, **SOFTMAX_ROUTER},
    "qwen3_moe": {**SOFTMAX_ROUTER, "no qk norm": part(AttentionConfig, qk_norm=None)},
    "qwen3_moe-biases": {**RAW_ROUTER, **BIASES},
    "qwen3_next": {
        **SOFTMAX_ROUTER,
        **GATED_SHARED,
        "norm without 1 +": part(NormConfig, offset=False),
        "no qk norm": part(AttentionConfig, qk_norm=None),
        "full rotation": part(RopeConfig, dim=16),
        "theta": part(RopeConfig, theta=3.0),
    },
    "olmoe": {
        **RAW_ROUTER,
        "no clip": part(AttentionConfig, clip_qkv=None),
        "no norm": part(AttentionConfig, qk_norm=None),
    },
    "olmoe-renormalized": SOFTMAX_ROUTER,
    "deepseek_v2": {
        **ROPE,
        **LATENT,
        **GROUPS,
        **SHARED,
        "routed scale": part(RouterConfig, scale=1.0),
        "renormalized": part(RouterConfig, renormalize=True),
        "no bias": part(LatentAttentionConfig, bias=False),
        "mscale of cos and sin": part(RopeScaling, attention_factor=1.0),
    },
    "deepseek_v2-lite": {**RAW_ROUTER, **LATENT, **SHARED},
    "deepseek_v3": {**ROPE, **LATENT, **SIGMOID_ROUTER, **GROUPS, **SHARED},
    "deepseek_v3-plain": {
        "renormalized": part(RouterConfig, renormalize=True),
        "pairing": part(RopeConfig, pairing="interleaved"),
        "no bias": part(LatentAttentionConfig, bias=False),
    },
    "deepseek_v32": {
        **ROPE,
        **SIGMOID_ROUTER,
        "no indexer": part(LatentAttentionConfig, indexer=None),
        "index top-k": part(IndexerConfig, top_k=5),
        "indexer pairing": part(IndexerConfig, pairing="interleaved"),
    },
    "glm_moe_dsa": {
        "no indexer": part(LatentAttentionConfig, indexer=None),
        "indexer pairing": part(IndexerConfig, pairing="half"),
        "index top-k": part(IndexerConfig, top_k=7),
        **SIGMOID_ROUTER,
    },
    "glm4_moe": {
        **SIGMOID_ROUTER,
        **GROUPS,
        **SHARED,
        "no qkv bias": BIASES["no qkv bias"],
        "no qk norm": part(AttentionConfig, qk_norm=None),
        "full rotation": part(RopeConfig, dim=16),
    },
    "dbrx": {
        **SOFTMAX_ROUTER,
        "no clip": part(AttentionConfig, clip_qkv=None),
        "theta": part(RopeConfig, theta=1e4),
        "rms": part(NormConfig, kind="rms"),
    },
    "gpt_oss": {
        **ROPE,
        **BIASES,
        "no sinks": part(AttentionConfig, sinks=False),
        "window": part(AttentionConfig, window=None),
        "layers": reversed_layers,
        "softmax before choice": part(RouterConfig, score="softmax"),
        "no router bias": part(RouterConfig, bias=False),
        "no expert bias": part(FeedForwardConfig, bias=False),
        "clamp": part(FeedForwardConfig, clamp=(1.702, 7.0)),
        "alpha": part(FeedForwardConfig, clamp=(1.0, 0.8)),
        "truncation": part(RopeScaling, truncate=True),
    },
    "phimoe": {
        **BIASES,
        "threshold": part(RouterConfig, jitter=0.01),
        "softmax": part(RouterConfig, score="softmax"),
        "softmax after choice": part(RouterConfig, score="softmax_selected"),
        "no norm bias": part(NormConfig, bias=False),
        "no head bias": model(head_bias=False),
    },
    "phimoe-longrope": {
        "no rope scaling": part(RopeConfig, scaling=None),
        "short factors": part(RopeScaling, short_factor=(1.0, 1.0, 1.0, 1.0)),
        "short mscale": part(RopeScaling, short_mscale=1.0),
        "window": part(AttentionConfig, window=None),
    },
    "granitemoe": {
        "embedding": model(embed_scale=1.0),
        "logits": model(logit_scale=1.0),
        "residual": model(residual_scale=1.0),
        "attention scale": part(AttentionConfig, scale=8**-0.5),
        "softmax before choice": part(RouterConfig, score="softmax"),
    },
    "minimax": {
        **SOFTMAX_ROUTER,
        **{f"residual {index}": residual(index) for index in range(6)},
        "plain residual": model(normed_residual=None),
    },
    "minimax_m2": {
        "no selection bias": part(RouterConfig, select_bias=False),
        "not renormalized": part(RouterConfig, renormalize=False),
        "softmax": part(RouterConfig, score="softmax"),
        "no norm": part(AttentionConfig, qk_norm=None),
        "full rotation": part(RopeConfig, dim=16),
    },
    "llama4_text": {
        "weight on output": part(RouterConfig, weight_on="output"),
        "softmax": part(RouterConfig, score="softmax_selected"),
        "no l2 norm": part(AttentionConfig, qk_norm=None),
        "no temperature": part(AttentionConfig, temperature=None),
        "chunk": part(AttentionConfig, chunk=None),
        "pairing": part(RopeConfig, pairing="half"),
        "layers": reversed_layers,
        **SHARED,
    },
    "llama4_text-plain": {**BIASES, "chunk": part(AttentionConfig, chunk=None)},
    "jamba": RAW_ROUTER,
    "qwen3_vl_moe": {**SOFTMAX_ROUTER, "no qk norm": part(AttentionConfig, qk_norm=None)},
    "grok": {
        **RAW_ROUTER,
        "no cap": part(AttentionConfig, logit_cap=None),
        "attention scale": part(AttentionConfig, scale=8**-0.5),
        "embedding": model(embed_scale=1.0),
        "logits": model(logit_scale=1.0),
        "no sandwich": model(sandwich=False),
        "activation": part(FeedForwardConfig, activation="gelu"),
    },
    "switch": SWITCH,
    "switch-capacity": {
        "dropless": part(RouterConfig, capacity=None),
        "capacity off by one": part(RouterConfig, capacity=4),
    },
}
CASES = [(name, term) for name, terms in TEETH.items() for term in terms]
