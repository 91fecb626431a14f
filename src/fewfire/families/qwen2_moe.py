"""Qwen2-MoE: biases on q, k and v, softmax router, one shared expert behind a sigmoid gate.

Source: transformers `Qwen2MoeConfig`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewfire.config import AttentionConfig, ModelConfig, MoEConfig, NormConfig, RouterConfig
from fewfire.families import decoder as common
from fewfire.families.reader import Reader
from fewfire.families.rope import read_rope, write_rope
from fewfire.families.tensors import LLAMA_ATTENTION, LLAMA_FFN, QWEN_MOE, HubTensor, decoder, rules, shared


def read(hub: Reader) -> ModelConfig:
    rope = read_rope(hub, head_dim=common.head_dim(hub), max_context=common.context(hub), theta=10_000.0)
    full = common.read_attention(hub, rope, qkv_bias=hub.boolean("qkv_bias", default=True))
    sliding = hub.boolean("use_sliding_window", default=False)
    window = common.read_window(hub) if sliding else None
    last = hub.integer("max_window_layers", default=28)
    types = common.read_layer_types(
        hub,
        ("full_attention", "sliding_attention"),
        lambda index: "sliding_attention" if sliding and index % 2 == 0 and index < last else "full_attention",
    )
    hub.skip("sliding_window")
    mixers = tuple(replace(full, window=window) if name == "sliding_attention" else full for name in types)
    act = common.read_activation(hub)
    moe = MoEConfig(
        read_router(hub, renormalize=False),
        common.gated(hub.integer("moe_intermediate_size", minimum=1), act),
        common.gated(hub.integer("shared_expert_intermediate_size", minimum=1), act),
        shared_gate=True,
    )
    sparse = common.sparse_layers(hub)
    layers = common.alternate(sparse, mixers, moe, lambda: common.gated(hub.integer("intermediate_size"), act))
    hub.skip("intermediate_size")
    norm = NormConfig("rms", hub.number("rms_norm_eps", default=1e-6))
    return common.read_model(hub, "qwen2_moe", layers, norm)


def read_router(hub: Reader, renormalize: bool) -> RouterConfig:
    """Qwen's router; `renormalize` is the class's default of norm_topk_prob."""
    return RouterConfig(
        num_experts=hub.integer(*common.EXPERTS),
        top_k=hub.integer(*common.TOP_K),
        score="softmax",
        renormalize=hub.boolean("norm_topk_prob", default=renormalize),
        scale=1.0,
        select_bias=False,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    attention = common.first_mixer(config, AttentionConfig)
    windows = [getattr(layer.mixer, "window", None) for layer in config.layers]
    window = next((each for each in windows if each is not None), None)
    return {
        **common.write_model(config, "Qwen2MoeForCausalLM"),
        **common.write_attention(attention),
        **write_rope(common.hub_rope(attention, config.family), head_dim=attention.head_dim),
        **common.write_sparse_layers(config),
        **write_moe(config),
        "qkv_bias": attention.qkv_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": len(config.layers),
        "layer_types": ["full_attention" if each is None else "sliding_attention" for each in windows],
        "rms_norm_eps": config.norm.eps,
    }


def write_moe(config: ModelConfig) -> dict[str, Any]:
    """Router, routed and shared experts, as Qwen2-MoE and Qwen3-Next spell them."""
    moe = common.first_moe(config)
    width = moe.expert.hidden_dim
    return {
        "num_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "norm_topk_prob": moe.router.renormalize,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width if moe.shared is None else moe.shared.hidden_dim,
        "intermediate_size": common.dense_width(config, width),
        "hidden_act": common.write_activation(moe.expert),
    }


MOE = (*QWEN_MOE, *shared("shared_expert"), *rules(ffn__shared_gate="mlp.shared_expert_gate"))


def tensors(config: ModelConfig) -> list[HubTensor]:
    return decoder(config, LLAMA_ATTENTION, LLAMA_FFN, MOE)


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    return common.tied_head(config)
