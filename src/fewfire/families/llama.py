"""Llama: the dense decoder that most others descend from.

Source: transformers `LlamaConfig`.
"""

from __future__ import annotations

from typing import Any

from fewfire.config import AttentionConfig, LayerConfig, ModelConfig, NormConfig
from fewfire.families import decoder as common
from fewfire.families.reader import Reader
from fewfire.families.rope import read_rope, write_rope
from fewfire.families.tensors import LLAMA_ATTENTION, LLAMA_FFN, HubTensor, decoder


def read(hub: Reader) -> ModelConfig:
    head_dim, context = common.head_dim(hub), common.context(hub)
    rope = read_rope(hub, head_dim=head_dim, max_context=context, theta=10_000.0)
    attention = common.read_attention(hub, rope, **common.read_bias(hub))
    bias = hub.boolean("mlp_bias", default=False)
    ffn = common.gated(hub.integer("intermediate_size", minimum=1), common.read_activation(hub), bias=bias)
    layers = (LayerConfig(attention, ffn),) * common.num_layers(hub)
    norm = NormConfig("rms", hub.number("rms_norm_eps", default=1e-6))
    return common.read_model(hub, "llama", layers, norm)


def write(config: ModelConfig) -> dict[str, Any]:
    attention = common.first_mixer(config, AttentionConfig)
    ffn = common.first_dense(config)
    return {
        **common.write_model(config, "LlamaForCausalLM"),
        **common.write_attention(attention),
        **write_rope(common.hub_rope(attention, config.family), head_dim=attention.head_dim),
        "attention_bias": attention.qkv_bias,
        "intermediate_size": ffn.hidden_dim,
        "hidden_act": common.write_activation(ffn),
        "mlp_bias": ffn.bias,
        "rms_norm_eps": config.norm.eps,
    }


def tensors(config: ModelConfig) -> list[HubTensor]:
    return decoder(config, LLAMA_ATTENTION, LLAMA_FFN)


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    return common.tied_head(config)
