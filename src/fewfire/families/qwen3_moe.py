"""Qwen3-MoE: q/k norms per head before the rope, softmax router, no shared expert.

Source: transformers `Qwen3MoeConfig`. `head_dim` is no field of that class: it comes from the file.
"""

from __future__ import annotations

from typing import Any

from fewfire.config import AttentionConfig, ModelConfig, MoEConfig, NormConfig, RouterConfig
from fewfire.families import decoder as common
from fewfire.families.reader import Reader
from fewfire.families.rope import read_rope, write_rope
from fewfire.families.tensors import LLAMA_ATTENTION, LLAMA_FFN, QWEN_MOE, HubTensor, decoder


def read(hub: Reader) -> ModelConfig:
    rope = read_rope(hub, head_dim=common.head_dim(hub), max_context=common.context(hub), theta=10_000.0)
    sliding = hub.boolean("use_sliding_window", default=False)
    window = common.read_window(hub) if sliding else None
    hub.skip("sliding_window", "max_window_layers")
    attention = common.read_attention(hub, rope, qk_norm="head", window=window, **common.read_bias(hub))
    hub.expect("use_qk_norm", True)
    hub.expect("qkv_bias", False)
    hub.expect("shared_expert_intermediate_size", 0)
    router = RouterConfig(
        num_experts=hub.integer(*common.EXPERTS),
        top_k=hub.integer(*common.TOP_K),
        score="softmax",
        renormalize=hub.boolean("norm_topk_prob", default=False),  # the class's default; releases say true
        scale=1.0,
        select_bias=False,
    )
    act = common.read_activation(hub)
    moe = MoEConfig(router, common.gated(hub.integer("moe_intermediate_size", minimum=1), act))
    sparse = common.sparse_layers(hub)
    layers = common.alternate(sparse, attention, moe, lambda: common.gated(hub.integer("intermediate_size"), act))
    hub.skip("intermediate_size")
    norm = NormConfig("rms", hub.number("rms_norm_eps", default=1e-6))
    return common.read_model(hub, "qwen3_moe", layers, norm)


def write(config: ModelConfig) -> dict[str, Any]:
    attention = common.first_mixer(config, AttentionConfig)
    moe = common.first_moe(config)
    return {
        **common.write_model(config, "Qwen3MoeForCausalLM"),
        **common.write_attention(attention),
        **write_rope(common.hub_rope(attention, config.family), head_dim=attention.head_dim),
        **common.write_sparse_layers(config),
        "attention_bias": attention.qkv_bias,
        "use_sliding_window": attention.window is not None,
        "sliding_window": attention.window,
        "num_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "norm_topk_prob": moe.router.renormalize,
        "moe_intermediate_size": moe.expert.hidden_dim,
        "intermediate_size": common.dense_width(config, moe.expert.hidden_dim),
        "hidden_act": common.write_activation(moe.expert),
        "rms_norm_eps": config.norm.eps,
    }


def tensors(config: ModelConfig) -> list[HubTensor]:
    return decoder(config, LLAMA_ATTENTION, LLAMA_FFN, QWEN_MOE)


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    return common.tied_head(config)
