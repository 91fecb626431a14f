"""OLMoE: q/k norms over the whole projection, optional clipping of q, k and v, router weights not renormalised.

Source: transformers `OlmoeConfig`.
"""

from __future__ import annotations

from typing import Any

from fewfire.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, NormConfig, RouterConfig
from fewfire.families import decoder as common
from fewfire.families.reader import Reader
from fewfire.families.rope import read_rope, write_rope
from fewfire.families.tensors import LLAMA_ATTENTION, QWEN_MOE, HubTensor, decoder


def read(hub: Reader) -> ModelConfig:
    rope = read_rope(hub, head_dim=common.head_dim(hub), max_context=common.context(hub), theta=10_000.0)
    clip = hub.number("clip_qkv", default=None)
    attention = common.read_attention(hub, rope, qk_norm="full", clip_qkv=clip, **common.read_bias(hub))
    router = RouterConfig(
        num_experts=hub.integer(*common.EXPERTS),
        top_k=hub.integer(*common.TOP_K),
        score="softmax",
        renormalize=hub.boolean("norm_topk_prob", default=False),  # the class's default and the release's
        scale=1.0,
        select_bias=False,
    )
    moe = MoEConfig(router, common.gated(hub.integer("intermediate_size", minimum=1), common.read_activation(hub)))
    layers = (LayerConfig(attention, moe),) * common.num_layers(hub)
    norm = NormConfig("rms", hub.number("rms_norm_eps", default=1e-5))
    return common.read_model(hub, "olmoe", layers, norm)


def write(config: ModelConfig) -> dict[str, Any]:
    attention = common.first_mixer(config, AttentionConfig)
    moe = common.first_moe(config)
    return {
        **common.write_model(config, "OlmoeForCausalLM"),
        **common.write_attention(attention),
        **write_rope(common.hub_rope(attention, config.family), head_dim=attention.head_dim),
        "attention_bias": attention.qkv_bias,
        "clip_qkv": attention.clip_qkv,
        "num_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "norm_topk_prob": moe.router.renormalize,
        "intermediate_size": moe.expert.hidden_dim,
        "hidden_act": common.write_activation(moe.expert),
        "rms_norm_eps": config.norm.eps,
    }


def tensors(config: ModelConfig) -> list[HubTensor]:
    return decoder(config, LLAMA_ATTENTION, QWEN_MOE)


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    return common.tied_head(config)
