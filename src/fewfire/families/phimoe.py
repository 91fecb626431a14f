"""Phi-3.5-MoE: LayerNorm with biases, the sparsemixer router (two masked softmaxes), a bias on the head.

Source: transformers `PhimoeConfig`, `sparsemixer`. `router_jitter_noise` is the mixer's threshold, also when running.
"""

from __future__ import annotations

from typing import Any

from fewfire.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, NormConfig, RouterConfig
from fewfire.families import decoder as common
from fewfire.families.reader import Reader
from fewfire.families.rope import read_rope, write_rope
from fewfire.families.tensors import LLAMA_ATTENTION, MIXTRAL_MOE, HubTensor, decoder


def read(hub: Reader) -> ModelConfig:
    rope = read_rope(hub, head_dim=common.head_dim(hub), max_context=common.context(hub), theta=1e6)
    attention = common.read_attention(hub, rope, window=common.read_window(hub), **common.read_bias(hub))
    hub.skip("input_jitter_noise")  # training only
    hub.expect(common.TOP_K[0], 2, why="the sparsemixer takes two experts whatever the config says")
    router = RouterConfig(
        num_experts=hub.integer(*common.EXPERTS),
        top_k=hub.integer(*common.TOP_K),
        score="sparsemixer",
        renormalize=False,
        scale=1.0,
        select_bias=False,
        jitter=hub.number("router_jitter_noise", default=0.01),
    )
    moe = MoEConfig(router, common.gated(hub.integer("intermediate_size", minimum=1), common.read_activation(hub)))
    layers = (LayerConfig(attention, moe),) * common.num_layers(hub)
    norm = NormConfig("layer", hub.number("rms_norm_eps", default=1e-5), bias=True)
    return common.read_model(hub, "phimoe", layers, norm, head_bias=hub.boolean("lm_head_bias", default=False))


def write(config: ModelConfig) -> dict[str, Any]:
    attention, moe = common.first_mixer(config, AttentionConfig), common.first_moe(config)
    return {
        **common.write_model(config, "PhimoeForCausalLM"),
        **common.write_attention(attention),
        **write_rope(common.hub_rope(attention, config.family), head_dim=attention.head_dim),
        "attention_bias": attention.qkv_bias,
        "lm_head_bias": config.head_bias,
        "sliding_window": attention.window,
        "num_local_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "router_jitter_noise": moe.router.jitter,
        "intermediate_size": moe.expert.hidden_dim,
        "hidden_act": common.write_activation(moe.expert),
        "rms_norm_eps": config.norm.eps,
    }


def tensors(config: ModelConfig) -> list[HubTensor]:
    return decoder(config, LLAMA_ATTENTION, MIXTRAL_MOE)


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    return common.tied_head(config)
