"""Qwen3-Next: gated delta nets with a gated full attention every fourth layer, norms that apply 1 + w.

Source: transformers `Qwen3NextConfig`.
"""

from __future__ import annotations

from typing import Any

from fewfire.config import AttentionConfig, DeltaNetConfig, ModelConfig, MoEConfig, NormConfig
from fewfire.families import decoder as common
from fewfire.families import qwen2_moe
from fewfire.families.reader import Reader
from fewfire.families.rope import read_rope, write_partial, write_rope
from fewfire.families.tensors import LLAMA_ATTENTION, LLAMA_FFN, LLAMA_TOP, HubTensor, Rule, Stack, build, rules


def read(hub: Reader) -> ModelConfig:
    rope = read_rope(hub, head_dim=common.head_dim(hub), max_context=common.context(hub), theta=10_000.0, partial=0.25)
    attention = common.read_attention(hub, rope, qk_norm="head", output_gate=True, **common.read_bias(hub))
    net = DeltaNetConfig(
        num_key_heads=hub.integer("linear_num_key_heads", minimum=1),
        num_value_heads=hub.integer("linear_num_value_heads", minimum=1),
        key_dim=hub.integer("linear_key_head_dim", minimum=1),
        value_dim=hub.integer("linear_value_head_dim", minimum=1),
        conv_kernel=hub.integer("linear_conv_kernel_dim", minimum=1),
        activation=common.read_activation(hub),
    )
    interval = hub.integer("full_attention_interval", default=4, minimum=1)
    types = common.read_layer_types(
        hub,
        ("linear_attention", "full_attention"),
        lambda index: "linear_attention" if (index + 1) % interval else "full_attention",
    )
    mixers = tuple(attention if name == "full_attention" else net for name in types)
    act = common.read_activation(hub)
    moe = MoEConfig(
        qwen2_moe.read_router(hub, renormalize=True),
        common.gated(hub.integer("moe_intermediate_size", minimum=1), act),
        common.gated(hub.integer("shared_expert_intermediate_size", minimum=1), act),
        shared_gate=True,
    )
    sparse = common.sparse_layers(hub)
    layers = common.alternate(sparse, mixers, moe, lambda: common.gated(hub.integer("intermediate_size"), act))
    hub.skip("intermediate_size")
    norm = NormConfig("rms", hub.number("rms_norm_eps", default=1e-6), offset=True)
    return common.read_model(hub, "qwen3_next", layers, norm)


def write(config: ModelConfig) -> dict[str, Any]:
    attention = common.first_mixer(config, AttentionConfig)
    net = common.first_mixer(config, DeltaNetConfig)
    full = [isinstance(layer.mixer, AttentionConfig) for layer in config.layers]
    return {
        **common.write_model(config, "Qwen3NextForCausalLM"),
        **common.write_attention(attention),
        **write_rope(common.hub_rope(attention, config.family), head_dim=attention.head_dim),
        "partial_rotary_factor": write_partial(common.hub_rope(attention, config.family).dim, attention.head_dim),
        **common.write_sparse_layers(config),
        **qwen2_moe.write_moe(config),
        "attention_bias": attention.qkv_bias,
        "layer_types": ["full_attention" if each else "linear_attention" for each in full],
        "linear_num_key_heads": net.num_key_heads,
        "linear_num_value_heads": net.num_value_heads,
        "linear_key_head_dim": net.key_dim,
        "linear_value_head_dim": net.value_dim,
        "linear_conv_kernel_dim": net.conv_kernel,
        "rms_norm_eps": config.norm.eps,
    }


_DELTA_NET = (
    *rules(attention_norm="input_layernorm", ffn_norm="post_attention_layernorm"),
    *rules(attention__qkvz="linear_attn.in_proj_qkvz", attention__ba="linear_attn.in_proj_ba"),
    *rules(attention__conv="linear_attn.conv1d", attention__norm="linear_attn.norm"),
    *rules(attention__out="linear_attn.out_proj"),
    Rule("linear_attn.A_log", "attention.a_log"),
    Rule("linear_attn.dt_bias", "attention.dt_bias"),
)


def tensors(config: ModelConfig) -> list[HubTensor]:
    def table(layer: Any) -> tuple[Rule, ...]:
        mixer = _DELTA_NET if isinstance(layer.mixer, DeltaNetConfig) else LLAMA_ATTENTION
        return (*mixer, *LLAMA_FFN, *qwen2_moe.MOE)

    return build(config, LLAMA_TOP, [Stack("model.layers.{l}.", "layers.{l}.", config.layers, table)])


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    """Multi-token prediction, which the config does not announce."""
    return (r"mtp\..*", *common.tied_head(config))
