"""Llama 4, text: chunked layers with rope and full ones without, router weights on the experts' input.

Two spellings: `llama4_text` (the tower alone) and `llama4` (text_config inside a multimodal config; the vision part is
recorded, not run). Source: transformers `Llama4TextConfig`, `Llama4TextAttention`, `Llama4Router`.
"""

from __future__ import annotations

from typing import Any

from fewfire.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, NormConfig, RouterConfig
from fewfire.errors import ConfigError
from fewfire.families import decoder as common
from fewfire.families import multimodal
from fewfire.families.reader import Reader
from fewfire.families.rope import read_rope, write_rope
from fewfire.families.tensors import (
    LLAMA_ATTENTION,
    LLAMA_TOP,
    HubTensor,
    Rule,
    Rules,
    Stack,
    build,
    prefixed,
    rules,
)

_VISION_KEYS = ("vision_config", "boi_token_index", "eoi_token_index", "image_token_index")


def read(hub: Reader) -> ModelConfig:
    if hub.hub.get("model_type") == "llama4":
        return multimodal.read(hub, "llama4", _VISION_KEYS, _read_text)
    return _read_text(hub, "llama4_text", {})


def _read_text(hub: Reader, family: str, fields: dict[str, Any]) -> ModelConfig:
    hub.expect("for_llm_compressor", False)
    mixers = _read_mixers(hub)
    total, act = common.num_layers(hub), common.read_activation(hub)
    step = hub.integer("interleave_moe_layer_step", default=1, minimum=1)
    routed = hub.items("moe_layers", kind=int, default=None)
    routed = tuple(range(step - 1, total, step)) if routed is None else routed
    router = RouterConfig(
        num_experts=hub.integer(*common.EXPERTS),
        top_k=hub.integer(*common.TOP_K),
        score="sigmoid_selected",
        renormalize=False,
        scale=1.0,
        select_bias=False,
        weight_on="input",
        jitter=hub.number("router_jitter_noise", default=0.0),  # training only
    )
    expert = common.gated(hub.integer("intermediate_size", minimum=1), act)
    moe = MoEConfig(router, expert, shared=expert)  # the shared expert is in the code, in no key
    width = hub.integer("intermediate_size_mlp", default=16384, minimum=1)
    sparse = tuple(index in routed for index in range(total))
    layers = common.alternate(sparse, mixers, moe, lambda: common.gated(width, act))
    norm = NormConfig("rms", hub.number("rms_norm_eps", default=1e-5))
    return common.read_model(hub, family, layers, norm, **fields)


def _read_mixers(hub: Reader) -> tuple[AttentionConfig, ...]:
    """Rope layers (chunked by default, weightless q/k norm) and layers without rope (temperature by position)."""
    total, context = common.num_layers(hub), common.context(hub)
    rope = read_rope(hub, head_dim=common.head_dim(hub), max_context=context, theta=5e5, pairing="interleaved")
    interval = hub.integer("no_rope_layer_interval", default=4, minimum=1)
    turned = hub.items("no_rope_layers", kind=int, default=())  # 1: the layer has a rope
    turned = turned or tuple(int((index + 1) % interval != 0) for index in range(total))
    if len(turned) < total:
        raise ConfigError(f"no_rope_layers has {len(turned)} entries in config.json; expected {total}, one a layer")
    types = common.read_layer_types(
        hub,
        ("chunked_attention", "full_attention"),
        lambda index: "chunked_attention" if turned[index] else "full_attention",
    )
    chunk = hub.integer("attention_chunk_size", default=8192)
    l2 = "l2" if hub.boolean("use_qk_norm", default=True) else None
    tuning = hub.boolean("attn_temperature_tuning", default=True)
    # Older releases wrote 4 for true and kept these two at the class's values.
    temperature = (hub.number("attn_scale", default=0.1), hub.number("floor_scale", default=8192.0))
    bias = common.read_bias(hub)
    mixers = []
    for index, name in enumerate(types):
        chunked = {"chunk": chunk or None} if name == "chunked_attention" else {}
        if turned[index]:
            mixers.append(common.read_attention(hub, rope, qk_norm=l2, **chunked, **bias))
        else:
            by_position = {"temperature": temperature} if tuning else {}
            mixers.append(common.read_attention(hub, None, **by_position, **chunked, **bias))
    return tuple(mixers)


def write(config: ModelConfig) -> dict[str, Any]:
    text = {**common.write_model(config, "Llama4ForCausalLM"), **_write_text(config), "model_type": "llama4_text"}
    if config.family == "llama4_text":
        return text
    return multimodal.write(config, "Llama4ForConditionalGeneration", text)


def _write_text(config: ModelConfig) -> dict[str, Any]:
    mixers = [layer.mixer for layer in config.layers if isinstance(layer.mixer, AttentionConfig)]
    attention, moe = common.first_mixer(config, AttentionConfig), common.first_moe(config)
    with_rope = next((each for each in mixers if each.rope is not None), None)
    if with_rope is None:
        raise ConfigError(f"family {config.family} cannot express a model without any rope; choose another family")
    temperature = next((each.temperature for each in mixers if each.temperature is not None), None)
    scale, floor = temperature or (0.1, 8192.0)
    return {
        **common.write_attention(attention),
        **write_rope(common.hub_rope(with_rope, config.family), head_dim=attention.head_dim),
        "attention_bias": attention.qkv_bias,
        "no_rope_layers": [int(each.rope is not None) for each in mixers],
        "layer_types": ["full_attention" if each.chunk is None else "chunked_attention" for each in mixers],
        "attention_chunk_size": next((each.chunk for each in mixers if each.chunk is not None), 8192),
        "use_qk_norm": with_rope.qk_norm == "l2",
        "attn_temperature_tuning": temperature is not None,
        "attn_scale": scale,
        "floor_scale": int(floor),
        "moe_layers": [index for index, layer in enumerate(config.layers) if isinstance(layer.ffn, MoEConfig)],
        "num_local_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "router_jitter_noise": moe.router.jitter,
        "intermediate_size": moe.expert.hidden_dim,
        "intermediate_size_mlp": common.dense_width(config, 16384),
        "hidden_act": common.write_activation(moe.expert),
        "rms_norm_eps": config.norm.eps,
    }


_FFN: Rules = (
    *rules(ffn__gate="feed_forward.gate_proj", ffn__up="feed_forward.up_proj", ffn__down="feed_forward.down_proj"),
    Rule("feed_forward.router.weight", "ffn.router.weight"),
    Rule("feed_forward.experts.gate_up_proj", ("ffn.experts.gate", "ffn.experts.up"), transpose=True),
    Rule("feed_forward.experts.down_proj", "ffn.experts.down", transpose=True),
    *rules(ffn__shared__gate="feed_forward.shared_expert.gate_proj"),
    *rules(ffn__shared__up="feed_forward.shared_expert.up_proj"),
    *rules(ffn__shared__down="feed_forward.shared_expert.down_proj"),
)


def tensors(config: ModelConfig) -> list[HubTensor]:
    prefix = "language_model." if config.family == "llama4" else ""

    def table(layer: LayerConfig) -> Rules:
        return (*LLAMA_ATTENTION, *_FFN)

    stack = Stack(prefix + "model.layers.{l}.", "layers.{l}.", config.layers, table)
    return build(config, prefixed(prefix, LLAMA_TOP), [stack])


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    return (r"vision_model\..*", r"multi_modal_projector\..*", *common.tied_head(config, r"language_model\."))
