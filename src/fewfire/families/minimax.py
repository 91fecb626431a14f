"""MiniMax-Text-01: lightning (linear) attention with a full one every few layers; residuals add to the normed input.

Source: transformers `MiniMaxConfig`, `MiniMaxDecoderLayer`.
"""

from __future__ import annotations

from typing import Any

from fewfire.config import (
    AttentionConfig,
    LayerConfig,
    LightningConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RouterConfig,
)
from fewfire.families import decoder as common
from fewfire.families.reader import Reader
from fewfire.families.rope import read_rope, write_rope
from fewfire.families.tensors import LLAMA_ATTENTION, LLAMA_TOP, MIXTRAL_MOE, HubTensor, Rules, Stack, build, rules

_FACTORS = tuple(f"{part}_{side}_factor" for part in ("full_attn", "linear_attn", "mlp") for side in ("alpha", "beta"))


def read(hub: Reader) -> ModelConfig:
    rope = read_rope(hub, head_dim=common.head_dim(hub), max_context=common.context(hub), theta=1e6)
    attention = common.read_attention(hub, rope, window=common.read_window(hub))
    lightning = LightningConfig(attention.num_heads, attention.head_dim, common.read_activation(hub))
    hub.skip("block_size")  # how the kernel cuts the sequence
    types = common.read_layer_types(
        hub,
        ("full_attention", "linear_attention"),
        lambda index: "linear_attention" if index % 2 else "full_attention",
    )
    router = RouterConfig(
        num_experts=hub.integer(*common.EXPERTS),
        top_k=hub.integer(*common.TOP_K),
        score="softmax",
        renormalize=True,
        scale=1.0,
        select_bias=False,
        jitter=hub.number("router_jitter_noise", default=0.0),  # training only
    )
    moe = MoEConfig(router, common.gated(hub.integer("intermediate_size", minimum=1), common.read_activation(hub)))
    layers = tuple(LayerConfig(attention if name == "full_attention" else lightning, moe) for name in types)
    norm = NormConfig("rms", hub.number("rms_norm_eps", default=1e-5))
    factors = tuple(hub.number(name, default=1.0) for name in _FACTORS)
    return common.read_model(hub, "minimax", layers, norm, normed_residual=factors)


def write(config: ModelConfig) -> dict[str, Any]:
    attention, moe = common.first_mixer(config, AttentionConfig), common.first_moe(config)
    full = [isinstance(layer.mixer, AttentionConfig) for layer in config.layers]
    return {
        **common.write_model(config, "MiniMaxForCausalLM"),
        **common.write_attention(attention),
        **write_rope(common.hub_rope(attention, config.family), head_dim=attention.head_dim),
        "sliding_window": attention.window,
        "layer_types": ["full_attention" if each else "linear_attention" for each in full],
        "num_local_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "router_jitter_noise": moe.router.jitter,
        "intermediate_size": moe.expert.hidden_dim,
        "hidden_act": common.write_activation(moe.expert),
        "rms_norm_eps": config.norm.eps,
        **dict(zip(_FACTORS, config.normed_residual or (1.0,) * len(_FACTORS), strict=True)),
    }


_LIGHTNING: Rules = (
    *rules(attention_norm="input_layernorm", ffn_norm="post_attention_layernorm"),
    *rules(attention__qkv="self_attn.qkv_proj", attention__gate="self_attn.output_gate"),
    *rules(attention__norm="self_attn.norm", attention__out="self_attn.out_proj"),
)


def tensors(config: ModelConfig) -> list[HubTensor]:
    def table(layer: LayerConfig) -> Rules:
        return (*(_LIGHTNING if isinstance(layer.mixer, LightningConfig) else LLAMA_ATTENTION), *MIXTRAL_MOE)

    return build(config, LLAMA_TOP, [Stack("model.layers.{l}.", "layers.{l}.", config.layers, table)])


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    """Decay tables, which follow from the head's and the layer's number."""
    buffers = r"model\.layers\.\d+\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)"
    return (buffers, *common.tied_head(config))
