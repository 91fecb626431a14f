"""Jamba: Mamba-1 with an attention every few layers, MoE every second one, no positions at all.

Source: transformers `JambaConfig`, `JambaMambaMixer`.
"""

from __future__ import annotations

import math
from typing import Any

from fewfire.config import (
    AttentionConfig,
    LayerConfig,
    MambaConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RouterConfig,
)
from fewfire.errors import ConfigError
from fewfire.families import decoder as common
from fewfire.families.reader import Reader
from fewfire.families.tensors import HubTensor, Rule, Rules, decoder, experts, rules


def read(hub: Reader) -> ModelConfig:
    attention = common.read_attention(hub, None)
    mamba = _read_mamba(hub)
    # Kernels, not mathematics; and lists that follow from the periods.
    hub.skip("use_mamba_kernels", "use_mambapy", "use_associative_scan", "num_logits_to_keep", "n_ctx")
    hub.skip("calc_logits_for_entire_prompt", "layers_block_type", "layer_types", "layers_num_experts")
    hub.expect("mamba_inner_layernorms", True)
    hub.expect("sliding_window", 0)
    router = RouterConfig(
        num_experts=hub.integer(*common.EXPERTS),
        top_k=hub.integer(*common.TOP_K),
        score="softmax",
        renormalize=False,
        scale=1.0,
        select_bias=False,
    )
    dense = common.gated(hub.integer("intermediate_size", minimum=1), common.read_activation(hub))
    moe, total = MoEConfig(router, dense), common.num_layers(hub)
    attends, routes = _every(hub, "attn", 8, 4), _every(hub, "expert", 2, 1)
    layers = tuple(
        LayerConfig(
            attention if index % attends[0] == attends[1] else mamba,
            moe if router.num_experts > 1 and index % routes[0] == routes[1] else dense,
        )
        for index in range(total)
    )
    context = hub.integer("max_position_embeddings", default=262_144, minimum=1)
    norm = NormConfig("rms", hub.number("rms_norm_eps", default=1e-6))
    return common.read_model(hub, "jamba", layers, norm, max_context=context)


def _every(hub: Reader, name: str, period: int, offset: int) -> tuple[int, int]:
    return (
        hub.integer(f"{name}_layer_period", default=period, minimum=1),
        hub.integer(f"{name}_layer_offset", default=offset),
    )


def _read_mamba(hub: Reader) -> MambaConfig:
    dim = common.model_dim(hub)
    rank = hub.get("mamba_dt_rank", default="auto")
    return MambaConfig(
        inner_dim=hub.integer("mamba_expand", default=2, minimum=1) * dim,
        state_dim=hub.integer("mamba_d_state", default=16, minimum=1),
        conv_kernel=hub.integer("mamba_d_conv", default=4, minimum=1),
        dt_rank=math.ceil(dim / 16) if rank == "auto" else hub.integer("mamba_dt_rank", minimum=1),
        conv_bias=hub.boolean("mamba_conv_bias", default=True),
        proj_bias=hub.boolean("mamba_proj_bias", default=False),
        activation=common.read_activation(hub),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    attention, moe = common.first_mixer(config, AttentionConfig), common.first_moe(config)
    mamba = common.first_mixer(config, MambaConfig)
    attends = [index for index, layer in enumerate(config.layers) if isinstance(layer.mixer, AttentionConfig)]
    routes = [index for index, layer in enumerate(config.layers) if isinstance(layer.ffn, MoEConfig)]
    return {
        **common.write_model(config, "JambaForCausalLM"),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        **_write_every("attn", attends, len(config.layers)),
        **_write_every("expert", routes, len(config.layers)),
        "mamba_expand": mamba.inner_dim // config.model_dim,
        "mamba_d_state": mamba.state_dim,
        "mamba_d_conv": mamba.conv_kernel,
        "mamba_dt_rank": mamba.dt_rank,
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.proj_bias,
        "num_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "intermediate_size": moe.expert.hidden_dim,
        "hidden_act": common.write_activation(moe.expert),
        "rms_norm_eps": config.norm.eps,
    }


def _write_every(name: str, indices: list[int], total: int) -> dict[str, int]:
    """Period and offset of evenly spaced `indices` (reading back checks that they are)."""
    if not indices:
        raise ConfigError(f"family jamba needs at least one {name} layer; choose another family")
    period = indices[1] - indices[0] if len(indices) > 1 else max(total, indices[0] + 1)
    return {f"{name}_layer_period": period, f"{name}_layer_offset": indices[0]}


_TOP: Rules = (
    Rule("model.embed_tokens.weight", "embed.weight"),
    *rules(norm="model.final_layernorm", head="lm_head"),
)
_NAMES: Rules = (
    *rules(attention_norm="input_layernorm", ffn_norm="pre_ff_layernorm"),
    *rules(attention__q="self_attn.q_proj", attention__k="self_attn.k_proj", attention__v="self_attn.v_proj"),
    *rules(ffn__gate="feed_forward.gate_proj", ffn__up="feed_forward.up_proj", ffn__down="feed_forward.down_proj"),
    Rule("feed_forward.router.weight", "ffn.router.weight"),
    *experts("feed_forward.experts"),
)
_MAMBA: Rules = (
    *rules(attention__in="mamba.in_proj", attention__conv="mamba.conv1d", attention__x="mamba.x_proj"),
    *rules(attention__dt="mamba.dt_proj", attention__dt_norm="mamba.dt_layernorm"),
    *rules(attention__b_norm="mamba.b_layernorm", attention__c_norm="mamba.c_layernorm"),
    *rules(attention__out="mamba.out_proj"),
    Rule("mamba.A_log", "attention.a_log"),
    Rule("mamba.D", "attention.d"),
)


def tensors(config: ModelConfig) -> list[HubTensor]:
    def table(layer: LayerConfig) -> Rules:
        mamba = isinstance(layer.mixer, MambaConfig)
        return (*_NAMES, *(_MAMBA if mamba else rules(attention__out="self_attn.o_proj")))

    return decoder(config, table, top=_TOP)


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    return common.tied_head(config)
