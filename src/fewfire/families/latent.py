"""What DeepSeek's descendants share in hub configs: latent attention, the sigmoid router, dense first layers.

Owns the keys of MLA, of `n_group` routing and of multi-token prediction, and their tensor names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewfire.config import (
    GroupConfig,
    IndexerConfig,
    LatentAttentionConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    MtpConfig,
    RopeConfig,
    RouterConfig,
)
from fewfire.errors import ConfigError
from fewfire.families import decoder as common
from fewfire.families.parameters import count, layer_parameters
from fewfire.families.reader import Reader
from fewfire.families.rope import Pairing, mscale, read_rope, write_scaling
from fewfire.families.tensors import LLAMA_FFN, LLAMA_TOP, QWEN_MOE, HubTensor, Rules, decoder, rules, shared

# ---------------------------------------------------------------------------------------------------------- tensors

ATTENTION: Rules = (
    *rules(attention_norm="input_layernorm", ffn_norm="post_attention_layernorm"),
    *rules(attention__q="self_attn.q_proj", attention__q_down="self_attn.q_a_proj"),
    *rules(attention__q_down_norm="self_attn.q_a_layernorm", attention__q_up="self_attn.q_b_proj"),
    *rules(attention__kv_down="self_attn.kv_a_proj_with_mqa", attention__kv_down_norm="self_attn.kv_a_layernorm"),
    *rules(attention__kv_up="self_attn.kv_b_proj", attention__out="self_attn.o_proj"),
    *rules(attention__indexer__q_up="self_attn.indexer.wq_b", attention__indexer__k="self_attn.indexer.wk"),
    *rules(attention__indexer__k_norm="self_attn.indexer.k_norm"),
    *rules(attention__indexer__head_weights="self_attn.indexer.weights_proj"),
)


def tensors(config: ModelConfig) -> list[HubTensor]:
    return decoder(config, ATTENTION, LLAMA_FFN, QWEN_MOE, shared("shared_experts"), top=LLAMA_TOP)


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    """A stored copy of a tied head, and the layers after the last: multi-token prediction."""
    return (*common.tied_head(config), *mtp_tensors(config))


# -------------------------------------------------------------------------------------------------------- attention


def read_latent(
    hub: Reader, *, pairing: Pairing, q_rank: int | None, indexer: IndexerConfig | None = None
) -> LatentAttentionConfig:
    """MLA. The softmax scale holds YaRN's square; `latent_eps` is 1e-6 whatever the model's eps.

    Source: DeepSeek-V2 report, section 2.1; `yarn_apply_mscale` of transformers' deepseek_v3.
    """
    nope, turned = hub.integer("qk_nope_head_dim", minimum=1), hub.integer("qk_rope_head_dim", minimum=2)
    rope = read_rope(hub, head_dim=turned, max_context=common.context(hub), theta=10_000.0, pairing=pairing)
    hub.expect("qk_head_dim", nope + turned)
    # A head's shape is said by the five keys of MLA: what these two hold is read by nobody.
    hub.skip("head_dim", "num_key_value_heads")
    return LatentAttentionConfig(
        num_heads=common.num_heads(hub),
        q_rank=q_rank,
        kv_rank=hub.integer("kv_lora_rank", minimum=1),
        nope_dim=nope,
        rope_dim=turned,
        value_dim=hub.integer("v_head_dim", minimum=1),
        scale=(nope + turned) ** -0.5 * _temperature(rope),
        rope=rope,
        bias=hub.boolean("attention_bias", default=False),
        indexer=indexer,
    )


def write_latent(mla: LatentAttentionConfig) -> dict[str, Any]:
    return {
        "num_attention_heads": mla.num_heads,
        "num_key_value_heads": mla.num_heads,
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_nope_head_dim": mla.nope_dim,
        "qk_rope_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
        "attention_bias": mla.bias,
        "rope_theta": mla.rope.theta,
        "rope_scaling": write_scaling(mla.rope.scaling),
    }


def _temperature(rope: RopeConfig) -> float:
    scaling = rope.scaling
    if scaling is None or not scaling.mscale_all_dim:
        return 1.0
    return mscale(scaling.factor, scaling.mscale_all_dim) ** 2


# ----------------------------------------------------------------------------------------------------- feed-forward


def read_sigmoid_router(hub: Reader, *, groups: int, top_groups: int, scale: float) -> RouterConfig:
    """DeepSeek-V3's router; the keywords are the class's defaults of n_group, topk_group, routed_scaling_factor.

    One group is no grouping. Source: DeepSeek-V3 report, section 2.1.2.
    """
    hub.expect("scoring_func", "sigmoid")
    hub.expect("topk_method", "noaux_tc")
    hub.expect("moe_router_dtype", "float32", "fp32")
    num_groups = hub.integer("n_group", default=groups, minimum=1)
    best = hub.integer("topk_group", default=top_groups, minimum=1)
    return RouterConfig(
        num_experts=hub.integer(*common.EXPERTS),
        top_k=hub.integer(*common.TOP_K),
        score="sigmoid",
        renormalize=hub.boolean("norm_topk_prob", default=True),
        scale=hub.number("routed_scaling_factor", default=scale),
        select_bias=True,
        groups=GroupConfig(num_groups, best, "top2_sum") if num_groups > 1 else None,
        renormalize_eps=1e-20,
    )


def write_router(router: RouterConfig) -> dict[str, Any]:
    groups = router.groups
    return {
        "n_routed_experts": router.num_experts,
        "num_experts_per_tok": router.top_k,
        "n_group": 1 if groups is None else groups.num_groups,
        "topk_group": 1 if groups is None else groups.top_groups,
        "routed_scaling_factor": router.scale,
        "norm_topk_prob": router.renormalize,
    }


def read_moe(hub: Reader, router: RouterConfig) -> MoEConfig:
    """Routed experts of `moe_intermediate_size` and `n_shared_experts` shared ones, kept as one."""
    width, act = hub.integer("moe_intermediate_size", minimum=1), common.read_activation(hub)
    num_shared = hub.integer("n_shared_experts", default=0)
    return MoEConfig(router, common.gated(width, act), common.gated(width * num_shared, act) if num_shared else None)


def write_moe(config: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    width = moe.expert.hidden_dim
    return {
        **write_router(moe.router),
        "moe_intermediate_size": width,
        "n_shared_experts": 0 if moe.shared is None else moe.shared.hidden_dim // width,
        "intermediate_size": common.dense_width(config, width),
        "hidden_act": common.write_activation(moe.expert),
    }


def read_layers(
    hub: Reader, mixers: Any, moe: MoEConfig, *, dense: int, listed: bool = False
) -> tuple[LayerConfig, ...]:
    """`first_k_dense_replace` dense layers (`dense` where absent), then MoE; `listed`: mlp_layer_types wins."""
    total = common.num_layers(hub)
    hub.expect("moe_layer_freq", 1, [1] * total)
    first = hub.integer("first_k_dense_replace", default=dense)
    sparse = tuple(index >= first for index in range(total))
    names = hub.items("mlp_layer_types", kind=str, length=total, default=None) if listed else None
    if names is not None:
        if set(names) - {"dense", "sparse"}:
            raise ConfigError("mlp_layer_types in config.json must name dense or sparse for each layer")
        sparse = tuple(name == "sparse" for name in names)
    width = hub.integer("intermediate_size", default=None, minimum=1)
    act = common.read_activation(hub)
    return common.alternate(sparse, mixers, moe, lambda: common.gated(width or hub.integer("intermediate_size"), act))


def write_layers(config: ModelConfig, listed: bool = False) -> dict[str, Any]:
    sparse = [isinstance(layer.ffn, MoEConfig) for layer in config.layers]
    first = sparse.index(True)
    if listed and not all(sparse[first:]):
        return {"first_k_dense_replace": first, "mlp_layer_types": ["sparse" if each else "dense" for each in sparse]}
    return {"first_k_dense_replace": first}


# -------------------------------------------------------------------------------------------- multi-token prediction


def with_mtp(hub: Reader, config: ModelConfig, *, copies: bool) -> ModelConfig:
    """`config` with the multi-token-prediction layers that the checkpoint stores, counted apart.

    Each is one more MoE layer, three norms and a projection of 2D to D; `copies`: it stores an embedding and a head
    of its own. Source: DeepSeek-V3 report, section 2.2, and its README_WEIGHTS.
    """
    number = hub.integer("num_nextn_predict_layers", "num_mtp_layers", default=0)
    if not number:
        return config
    dim, layer = config.model_dim, config.layers[-1]
    mixer = layer.mixer
    if isinstance(mixer, LatentAttentionConfig) and mixer.indexer is not None:  # its indexer is its own
        layer = replace(layer, mixer=replace(mixer, indexer=replace(mixer.indexer, shared=False)))
    size = count(layer_parameters(layer, config)) + 3 * dim + 2 * dim * dim
    size += 2 * config.vocab_size * dim if copies else 0
    return replace(config, mtp=MtpConfig(number, number * size))


def write_mtp(config: ModelConfig) -> dict[str, Any]:
    return {"num_nextn_predict_layers": 0 if config.mtp is None else config.mtp.num_layers}


def mtp_tensors(config: ModelConfig) -> tuple[str, ...]:
    """The pattern of the layers after the last one, where the config says that there are some."""
    if config.mtp is None:
        return ()
    first = len(config.layers)
    numbers = "|".join(str(first + index) for index in range(config.mtp.num_layers))
    return (rf"model\.layers\.({numbers})\..*",)
