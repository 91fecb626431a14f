"""Qwen3-VL-MoE, text tower: Qwen3-MoE whose router always renormalises; the vision tower is recorded, not run.

For text alone its three-axis rope is the plain one: all axes count the same positions. Hub files store expert matrices
(in, out); transformers 5.23 writes (out, in): both are read. Source: transformers `Qwen3VLMoeTextConfig`.
"""

from __future__ import annotations

import json
from typing import Any

from fewfire.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, NormConfig, RouterConfig
from fewfire.families import decoder as common
from fewfire.families import multimodal
from fewfire.families.reader import Reader
from fewfire.families.rope import read_rope, write_rope
from fewfire.families.tensors import LLAMA_ATTENTION, LLAMA_FFN, LLAMA_TOP, HubTensor, Rule, Rules, Stack, build

LAYOUTS = ("module", "transposed")

_VISION_KEYS = (
    "vision_config",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
)
_SECTIONS = ("mrope_section", "mrope_interleaved")


def read(hub: Reader) -> ModelConfig:
    return multimodal.read(hub, "qwen3_vl_moe", _VISION_KEYS, _read_text)


def _read_text(hub: Reader, family: str, fields: dict[str, Any]) -> ModelConfig:
    context, head_dim = common.context(hub), common.head_dim(hub)
    rope = read_rope(hub, head_dim=head_dim, max_context=context, theta=5e5, neutral=_SECTIONS)
    stated = hub.hub.get("rope_scaling") or hub.hub.get("rope_parameters") or {}
    sections = {key: stated[key] for key in _SECTIONS if key in stated}
    if sections:
        fields["vision"] = json.dumps({**json.loads(fields["vision"]), "rope": sections}, sort_keys=True)
    attention = common.read_attention(hub, rope, qk_norm="head", **common.read_bias(hub))
    hub.expect("norm_topk_prob", True, why="this family's router always renormalises")
    hub.expect("use_sliding_window", False)
    hub.skip("sliding_window", "max_window_layers")
    router = RouterConfig(
        num_experts=hub.integer(*common.EXPERTS),
        top_k=hub.integer(*common.TOP_K),
        score="softmax",
        renormalize=True,
        scale=1.0,
        select_bias=False,
    )
    act = common.read_activation(hub)
    moe = MoEConfig(router, common.gated(hub.integer("moe_intermediate_size", minimum=1), act))
    sparse = common.sparse_layers(hub)
    layers = common.alternate(sparse, attention, moe, lambda: common.gated(hub.integer("intermediate_size"), act))
    hub.skip("intermediate_size")
    norm = NormConfig("rms", hub.number("rms_norm_eps", default=1e-6))
    return common.read_model(hub, family, layers, norm, **fields)


def write(config: ModelConfig) -> dict[str, Any]:
    attention, moe = common.first_mixer(config, AttentionConfig), common.first_moe(config)
    rope = write_rope(common.hub_rope(attention, config.family), head_dim=attention.head_dim)
    text = {
        **common.write_model(config, "Qwen3VLMoeForConditionalGeneration"),
        **common.write_attention(attention),
        **rope,
        **common.write_sparse_layers(config),
        "model_type": "qwen3_vl_moe_text",
        "attention_bias": attention.qkv_bias,
        "num_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "norm_topk_prob": True,
        "moe_intermediate_size": moe.expert.hidden_dim,
        "intermediate_size": common.dense_width(config, moe.expert.hidden_dim),
        "hidden_act": common.write_activation(moe.expert),
        "rms_norm_eps": config.norm.eps,
    }
    hub = multimodal.write(config, "Qwen3VLMoeForConditionalGeneration", text)
    sections = hub.pop("rope", None)
    if sections:
        text_config = hub["text_config"]
        text_config["rope_scaling"] = {"rope_type": "default", **(text_config["rope_scaling"] or {}), **sections}
    return hub


def tensors(config: ModelConfig, layout: str = "module") -> list[HubTensor]:
    transposed = layout == "transposed"
    moe: Rules = (
        Rule("mlp.gate.weight", "ffn.router.weight"),
        Rule("mlp.experts.gate_up_proj", ("ffn.experts.gate", "ffn.experts.up"), transpose=transposed),
        Rule("mlp.experts.down_proj", "ffn.experts.down", transpose=transposed),
    )
    top = tuple(Rule(rule.hub.replace("model.", "model.language_model.", 1), rule.ours) for rule in LLAMA_TOP)

    def table(layer: LayerConfig) -> Rules:
        return (*LLAMA_ATTENTION, *LLAMA_FFN, *moe)

    return build(config, top, [Stack("model.language_model.layers.{l}.", "layers.{l}.", config.layers, table)])


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    return (r"model\.visual\..*", *common.tied_head(config))
