"""gpt-oss: attention sinks, every second layer windowed, clamped experts with biases, MXFP4 on disk.

Source: transformers `GptOssConfig`, `GptOssExperts`. Expert matrices are stored (in, out), gate and up interleaved.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewfire.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RouterConfig,
)
from fewfire.errors import ConfigError
from fewfire.families import decoder as common
from fewfire.families.reader import Reader
from fewfire.families.rope import read_rope, write_rope
from fewfire.families.tensors import LLAMA_ATTENTION, HubTensor, Rule, Rules, decoder, rules

# What the class takes when a file has no rope object at all.
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read(hub: Reader) -> ModelConfig:
    if not hub.has("rope_scaling") and not hub.has("rope_parameters"):
        hub.hub["rope_scaling"] = _ROPE
    rope = read_rope(hub, head_dim=common.head_dim(hub), max_context=common.context(hub), theta=150_000.0)
    full = common.read_attention(hub, rope, sinks=True, **common.read_bias(hub, default=True))
    window = common.read_window(hub)
    types = common.read_layer_types(
        hub,
        ("sliding_attention", "full_attention"),
        lambda index: "full_attention" if index % 2 else "sliding_attention",
    )
    hub.expect("hidden_act", "silu")
    hub.skip("initial_context_length")  # rope_scaling says it again
    alpha, limit = hub.number("swiglu_alpha", default=1.702), hub.number("swiglu_limit", default=7.0)
    width = hub.integer("intermediate_size", minimum=1)
    moe = MoEConfig(
        RouterConfig(
            num_experts=hub.integer(*common.EXPERTS),
            top_k=hub.integer(*common.TOP_K),
            score="softmax_selected",
            renormalize=False,
            scale=1.0,
            select_bias=False,
            bias=True,
        ),
        FeedForwardConfig(width, "swiglu_clamped", gated=True, bias=True, clamp=(alpha, limit)),
    )
    windowed = replace(full, window=window)
    layers = tuple(LayerConfig(windowed if name == "sliding_attention" else full, moe) for name in types)
    norm = NormConfig("rms", hub.number("rms_norm_eps", default=1e-5))
    return common.read_model(hub, "gpt_oss", layers, norm)


def write(config: ModelConfig) -> dict[str, Any]:
    attention, moe = common.first_mixer(config, AttentionConfig), common.first_moe(config)
    windows = [getattr(layer.mixer, "window", None) for layer in config.layers]
    if moe.expert.clamp is None:
        raise ConfigError("family gpt_oss cannot express experts without a clamp; choose another family")
    rope = common.hub_rope(attention, config.family)
    keys = write_rope(rope, head_dim=attention.head_dim)
    if rope.scaling is None:
        keys["rope_scaling"] = {"rope_type": "default"}
    return {
        **common.write_model(config, "GptOssForCausalLM"),
        **common.write_attention(attention),
        **keys,
        "attention_bias": attention.qkv_bias,
        "sliding_window": next((each for each in windows if each is not None), None),
        "layer_types": ["full_attention" if each is None else "sliding_attention" for each in windows],
        "num_local_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "intermediate_size": moe.expert.hidden_dim,
        "hidden_act": "silu",
        "swiglu_alpha": moe.expert.clamp[0],
        "swiglu_limit": moe.expert.clamp[1],
        "rms_norm_eps": config.norm.eps,
    }


_LAYER: Rules = (
    *LLAMA_ATTENTION,
    Rule("self_attn.sinks", "attention.sinks"),
    *rules(ffn__router="mlp.router"),
    Rule("mlp.experts.gate_up_proj", ("ffn.experts.gate", "ffn.experts.up"), transpose=True, interleaved=True),
    Rule("mlp.experts.gate_up_proj_bias", ("ffn.experts.gate_bias", "ffn.experts.up_bias"), interleaved=True),
    Rule("mlp.experts.down_proj", "ffn.experts.down", transpose=True),
    Rule("mlp.experts.down_proj_bias", "ffn.experts.down_bias"),
)


def tensors(config: ModelConfig) -> list[HubTensor]:
    return decoder(config, _LAYER)


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    return common.tied_head(config)
