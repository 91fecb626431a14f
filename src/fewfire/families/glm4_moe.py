"""GLM-4.5 and Air: grouped-query attention with half of each head turned, DeepSeek-V3's router and shared expert.

Source: transformers `Glm4MoeConfig`. The bias is on q, k and v, never on the output.
"""

from __future__ import annotations

from typing import Any

from fewfire.config import AttentionConfig, ModelConfig, NormConfig
from fewfire.families import decoder as common
from fewfire.families import latent
from fewfire.families.reader import Reader
from fewfire.families.rope import read_rope, write_partial, write_rope
from fewfire.families.tensors import LLAMA_ATTENTION, LLAMA_FFN, QWEN_MOE, HubTensor, decoder, shared

ignored_tensors = latent.ignored_tensors


def read(hub: Reader) -> ModelConfig:
    rope = read_rope(hub, head_dim=common.head_dim(hub), max_context=common.context(hub), theta=10_000.0, partial=0.5)
    norm_heads = hub.boolean("use_qk_norm", default=False)
    attention = common.read_attention(
        hub,
        rope,
        qkv_bias=hub.boolean("attention_bias", default=False),
        qk_norm="head" if norm_heads else None,
    )
    moe = latent.read_moe(hub, latent.read_sigmoid_router(hub, groups=1, top_groups=1, scale=1.0))
    layers = latent.read_layers(hub, attention, moe, dense=1)
    norm = NormConfig("rms", hub.number("rms_norm_eps", default=1e-5))
    return latent.with_mtp(hub, common.read_model(hub, "glm4_moe", layers, norm), copies=True)


def write(config: ModelConfig) -> dict[str, Any]:
    attention = common.first_mixer(config, AttentionConfig)
    rope = common.hub_rope(attention, config.family)
    return {
        **common.write_model(config, "Glm4MoeForCausalLM"),
        **common.write_attention(attention),
        **write_rope(rope, head_dim=attention.head_dim),
        "partial_rotary_factor": write_partial(rope.dim, attention.head_dim),
        "attention_bias": attention.qkv_bias,
        "use_qk_norm": attention.qk_norm == "head",
        **latent.write_moe(config, common.first_moe(config)),
        **latent.write_layers(config),
        **latent.write_mtp(config),
        "rms_norm_eps": config.norm.eps,
    }


def tensors(config: ModelConfig) -> list[HubTensor]:
    return decoder(config, LLAMA_ATTENTION, LLAMA_FFN, QWEN_MOE, shared("shared_experts"))
