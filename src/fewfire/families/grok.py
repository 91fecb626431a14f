"""Grok-1 (model_type grok-1): sandwich norms, capped attention scores, softmax router without renormalising.

Source: xai-org/grok-1 `model.py`, `run.py`; tensor names of the PyTorch ports. transformers has no such type.
"""

from __future__ import annotations

from typing import Any

from fewfire.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, NormConfig, RouterConfig
from fewfire.families import decoder as common
from fewfire.families.reader import Reader
from fewfire.families.rope import read_rope, write_rope
from fewfire.families.tensors import LLAMA_TOP, HubTensor, Rule, Rules, decoder, experts, rules


def read(hub: Reader) -> ModelConfig:
    rope = read_rope(hub, head_dim=common.head_dim(hub), max_context=common.context(hub), theta=10_000.0)
    attention = common.read_attention(
        hub, rope, scale=hub.number("attn_output_multiplier"), logit_cap=hub.number("max_attn_value")
    )
    router = RouterConfig(
        num_experts=hub.integer(*common.EXPERTS),
        top_k=hub.integer(*common.TOP_K),
        score="softmax",
        renormalize=False,
        scale=1.0,
        select_bias=False,
    )
    act = common.read_activation(hub, default="gelu_pytorch_tanh")
    layer = LayerConfig(attention, MoEConfig(router, common.gated(hub.integer("intermediate_size", minimum=1), act)))
    return common.read_model(
        hub,
        "grok-1",
        (layer,) * common.num_layers(hub),
        NormConfig("rms", hub.number("rms_norm_eps", default=1e-5)),
        tied_head=hub.boolean("tie_word_embeddings", default=True),
        embed_scale=hub.number("embedding_multiplier_scale"),
        logit_scale=hub.number("output_multiplier_scale"),
        sandwich=True,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    attention, moe = common.first_mixer(config, AttentionConfig), common.first_moe(config)
    return {
        **common.write_model(config, "Grok1ModelForCausalLM"),
        **common.write_attention(attention),
        **write_rope(common.hub_rope(attention, config.family), head_dim=attention.head_dim),
        "attn_output_multiplier": attention.scale,
        "max_attn_value": attention.logit_cap,
        "embedding_multiplier_scale": config.embed_scale,
        "output_multiplier_scale": config.logit_scale,
        "num_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "intermediate_size": moe.expert.hidden_dim,
        "hidden_act": common.write_activation(moe.expert),
        "rms_norm_eps": config.norm.eps,
    }


_TOP: Rules = tuple(Rule("model.norm.scale", rule.ours) if rule.ours == "norm.weight" else rule for rule in LLAMA_TOP)
_LAYER: Rules = (
    Rule("pre_attn_norm.scale", "attention_norm.weight"),
    Rule("post_attn_norm.scale", "attention_post_norm.weight"),
    Rule("pre_moe_norm.scale", "ffn_norm.weight"),
    Rule("post_moe_norm.scale", "ffn_post_norm.weight"),
    *rules(attention__q="attn.q_proj", attention__k="attn.k_proj", attention__v="attn.v_proj"),
    *rules(attention__out="attn.o_proj", ffn__router="moe_block.gate"),
    *experts("moe_block.experts", "linear", "linear_v", "linear_1"),
)


def tensors(config: ModelConfig) -> list[HubTensor]:
    return decoder(config, _LAYER, top=_TOP)


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    return common.tied_head(config)
