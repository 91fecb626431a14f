"""DBRX: nested configs, LayerNorm without bias, one fused and clipped Wqkv, experts folded into two axes.

Source: transformers `DbrxConfig`. transformers 5.23 turns by `rope_parameters` and ignores `attn_config.rope_theta`,
for which the weights were trained: reading takes the latter first, writing writes both.
"""

from __future__ import annotations

from typing import Any

from fewfire.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, NormConfig, RopeConfig, RouterConfig
from fewfire.errors import ConfigError
from fewfire.families import decoder as common
from fewfire.families.reader import Reader
from fewfire.families.tensors import HubTensor, Rule, Rules, decoder, rules


def read(hub: Reader) -> ModelConfig:
    inner, outer = hub.section("attn_config"), hub.section("ffn_config")
    attention = _read_attention(hub, inner)
    moe = _read_moe(outer)
    for section in (inner, outer):
        # A PretrainedConfig's leftovers; the model's own values stand at the top level.
        section.skip("model_type", "tie_word_embeddings", "hidden_size", "torch_dtype", "dtype", "is_encoder_decoder")
        section.skip("is_decoder", "add_cross_attention", "pruned_heads", "bos_token_id", "eos_token_id")
        section.skip("pad_token_id", "decoder_start_token_id", "uniform_expert_assignment", "moe_loss_weight")
        section.close()
    hub.expect("num_key_value_heads", attention.num_kv_heads)
    total = hub.integer("n_layers", "num_hidden_layers", minimum=1, maximum=common.MAX_LAYERS)
    return common.read_model(
        hub,
        "dbrx",
        (LayerConfig(attention, moe),) * total,
        NormConfig("layer", 1e-5),
        model_dim=hub.integer("d_model", "hidden_size", minimum=1),
        max_context=hub.integer("max_seq_len", "max_position_embeddings", minimum=1),
    )


def _read_attention(hub: Reader, inner: Reader) -> AttentionConfig:
    heads = hub.integer("n_heads", "num_attention_heads", minimum=1)
    head_dim = common.share(hub.integer("d_model", "hidden_size", minimum=1), heads)
    theta = inner.number("rope_theta", default=None)
    rope = hub.section("rope_parameters", default=None)
    if rope is not None:
        rope.expect("rope_type", "default")
        stated = rope.number("rope_theta", default=None)
        if theta is not None and stated is not None and theta != stated:
            raise ConfigError(
                f"attn_config.rope_theta is {theta} and rope_parameters.rope_theta {stated}; --ignore-key the wrong one"
            )
        theta = stated if theta is None else theta
        rope.close()
    theta = hub.number("rope_theta", default=10_000.0) if theta is None else theta
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=inner.integer("kv_n_heads", minimum=1),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=RopeConfig(theta, head_dim),
        clip_qkv=inner.number("clip_qkv", default=None),
    )


def _read_moe(outer: Reader) -> MoEConfig:
    act = outer.section("ffn_act_fn", default=None)
    activation = "silu" if act is None else common.read_activation(act, "name")
    norm = outer.number("moe_normalize_expert_weights", default=None)
    if norm not in (None, 1.0):
        raise ConfigError(f"ffn_config.moe_normalize_expert_weights is {norm}; expected 1 (the sum) or null")
    router = RouterConfig(
        num_experts=outer.integer("moe_num_experts"),
        top_k=outer.integer("moe_top_k"),
        score="softmax",
        renormalize=norm is not None,
        scale=1.0,
        select_bias=False,
        jitter=outer.number("moe_jitter_eps", default=0.0),  # training only
    )
    return MoEConfig(router, common.gated(outer.integer("ffn_hidden_size", minimum=1), activation))


def write(config: ModelConfig) -> dict[str, Any]:
    attention, moe = common.first_mixer(config, AttentionConfig), common.first_moe(config)
    rope = common.hub_rope(attention, config.family)
    return {
        **common.write_model(config, "DbrxForCausalLM", dim="d_model", layers="n_layers", context="max_seq_len"),
        "n_heads": attention.num_heads,
        "attn_config": {
            "clip_qkv": attention.clip_qkv,
            "kv_n_heads": attention.num_kv_heads,
            "rope_theta": rope.theta,
        },
        "rope_parameters": {"rope_type": "default", "rope_theta": rope.theta},
        "ffn_config": {
            "ffn_act_fn": {"name": common.write_activation(moe.expert)},
            "ffn_hidden_size": moe.expert.hidden_dim,
            "moe_num_experts": moe.router.num_experts,
            "moe_top_k": moe.router.top_k,
            "moe_jitter_eps": moe.router.jitter or None,
            "moe_normalize_expert_weights": 1.0 if moe.router.renormalize else None,
        },
    }


_TOP: Rules = (
    Rule("transformer.wte.weight", "embed.weight"),
    *rules(norm="transformer.norm_f", head="lm_head"),
)
_LAYER: Rules = (
    *rules(attention_norm="norm_attn_norm.norm_1", ffn_norm="norm_attn_norm.norm_2"),
    Rule("norm_attn_norm.attn.Wqkv.weight", ("attention.q.weight", "attention.k.weight", "attention.v.weight")),
    Rule("norm_attn_norm.attn.out_proj.weight", "attention.out.weight"),
    Rule("ffn.router.layer.weight", "ffn.router.weight"),
    Rule("ffn.experts.mlp.w1", "ffn.experts.gate", flat=True),
    Rule("ffn.experts.mlp.v1", "ffn.experts.up", flat=True),
    Rule("ffn.experts.mlp.w2", "ffn.experts.down", transpose=True, flat=True),
)


def tensors(config: ModelConfig) -> list[HubTensor]:
    return decoder(config, _LAYER, top=_TOP, prefix="transformer.blocks.{l}.")
