"""Granite-MoE: four multipliers, softmax over the chosen experts, gate and up fused per bank.

Source: transformers `GraniteMoeConfig`. The attention scale is `attention_multiplier`, not head_dim ** -0.5.
"""

from __future__ import annotations

import math
from typing import Any

from fewfire.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, NormConfig, RouterConfig, check
from fewfire.families import decoder as common
from fewfire.families.reader import Reader
from fewfire.families.rope import read_rope, write_rope
from fewfire.families.tensors import LLAMA_ATTENTION, HubTensor, Rule, Rules, decoder


def read(hub: Reader) -> ModelConfig:
    rope = read_rope(hub, head_dim=common.head_dim(hub), max_context=common.context(hub), theta=10_000.0)
    scale = hub.number("attention_multiplier", default=1.0)
    attention = common.read_attention(hub, rope, scale=scale, **common.read_bias(hub))
    router = RouterConfig(
        num_experts=hub.integer(*common.EXPERTS),
        top_k=hub.integer(*common.TOP_K),
        score="softmax_selected",
        renormalize=False,
        scale=1.0,
        select_bias=False,
    )
    moe = MoEConfig(router, common.gated(hub.integer("intermediate_size", minimum=1), common.read_activation(hub)))
    scaling = hub.number("logits_scaling", default=1.0)
    check(scaling != 0, "logits_scaling is 0 in config.json; expected the number that logits are divided by")
    return common.read_model(
        hub,
        "granitemoe",
        (LayerConfig(attention, moe),) * common.num_layers(hub),
        NormConfig("rms", hub.number("rms_norm_eps", default=1e-6)),
        embed_scale=hub.number("embedding_multiplier", default=1.0),
        logit_scale=1.0 / scaling,
        residual_scale=hub.number("residual_multiplier", default=1.0),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    attention, moe = common.first_mixer(config, AttentionConfig), common.first_moe(config)
    return {
        **common.write_model(config, "GraniteMoeForCausalLM"),
        **common.write_attention(attention),
        **write_rope(common.hub_rope(attention, config.family), head_dim=attention.head_dim),
        "attention_bias": attention.qkv_bias,
        "attention_multiplier": attention.scale,
        "embedding_multiplier": config.embed_scale,
        "logits_scaling": _inverse(config.logit_scale),
        "residual_multiplier": config.residual_scale,
        "num_local_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "intermediate_size": moe.expert.hidden_dim,
        "hidden_act": common.write_activation(moe.expert),
        "rms_norm_eps": config.norm.eps,
    }


def _inverse(scale: float) -> float:
    """The divisor that reads back to exactly `scale`: 1 / scale, or its neighbour where rounding loses a bit."""
    divisor = 1.0 / scale
    near = (divisor, math.nextafter(divisor, math.inf), math.nextafter(divisor, 0.0))
    return next((each for each in near if 1.0 / each == scale), divisor)


_LAYER: Rules = (
    *LLAMA_ATTENTION,
    Rule("block_sparse_moe.router.layer.weight", "ffn.router.weight"),
    Rule("block_sparse_moe.input_linear.weight", ("ffn.experts.gate", "ffn.experts.up")),
    Rule("block_sparse_moe.output_linear.weight", "ffn.experts.down"),
)


def tensors(config: ModelConfig) -> list[HubTensor]:
    return decoder(config, _LAYER)


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    return common.tied_head(config)
