"""GPT-2: LayerNorm, learned positions, fused qkv, Conv1D weights (in, out).

Source: transformers `GPT2Config`. Hub files come with and without the `transformer.` prefix.
"""

from __future__ import annotations

from typing import Any

from fewfire.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig, NormConfig
from fewfire.families import decoder as common
from fewfire.families.reader import Reader
from fewfire.families.tensors import HubTensor, Rule, Rules, Stack, build, linear, rules

LAYOUTS = ("transformer", "bare")


def read(hub: Reader) -> ModelConfig:
    dim = hub.integer("n_embd", "hidden_size", minimum=1)
    heads = hub.integer("n_head", "num_attention_heads", minimum=1)
    context = hub.integer("n_positions", "max_position_embeddings", "n_ctx", minimum=1)
    # Neither the upcast nor the summary heads change a causal model's mathematics.
    hub.skip("reorder_and_upcast_attn", *(f"summary_{key}" for key in _SUMMARY))
    head_dim = common.share(dim, heads)
    scale = head_dim**-0.5 if hub.boolean("scale_attn_weights", default=True) else 1.0
    by_layer = hub.boolean("scale_attn_by_inverse_layer_idx", default=False)
    width = hub.integer("n_inner", default=4 * dim, minimum=1)
    ffn = FeedForwardConfig(width, common.read_activation(hub, "activation_function", default="gelu_new"), False, True)
    layers = tuple(
        LayerConfig(_attention(heads, head_dim, scale / (index + 1) if by_layer else scale), ffn)
        for index in range(hub.integer("n_layer", "num_hidden_layers", minimum=1, maximum=common.MAX_LAYERS))
    )
    return common.read_model(
        hub,
        "gpt2",
        layers,
        NormConfig("layer", hub.number("layer_norm_epsilon", default=1e-5), bias=True),
        model_dim=dim,
        max_context=context,
        learned_positions=context,
        tied_head=hub.boolean("tie_word_embeddings", default=True),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    attention = common.first_mixer(config, AttentionConfig)
    ffn = common.first_dense(config)
    last = config.layers[-1].mixer
    by_layer = len(config.layers) > 1 and isinstance(last, AttentionConfig) and last.scale != attention.scale
    return {
        **common.write_model(config, "GPT2LMHeadModel", dim="n_embd", layers="n_layer", context="n_positions"),
        "n_head": attention.num_heads,
        "n_inner": None if ffn.hidden_dim == 4 * config.model_dim else ffn.hidden_dim,
        "activation_function": "gelu_new" if ffn.activation == "gelu_tanh" else ffn.activation,
        "layer_norm_epsilon": config.norm.eps,
        "scale_attn_weights": attention.scale == attention.head_dim**-0.5,
        "scale_attn_by_inverse_layer_idx": by_layer,
    }


def tensors(config: ModelConfig, layout: str = "transformer") -> list[HubTensor]:
    prefix = "transformer." if layout == "transformer" else ""
    top: Rules = (
        Rule(f"{prefix}wte.weight", "embed.weight"),
        Rule(f"{prefix}wpe.weight", "positions.weight"),
        *linear(f"{prefix}ln_f", "norm"),
        *linear("lm_head", "head"),
    )
    return build(config, top, [Stack(prefix + "h.{l}.", "layers.{l}.", config.layers, lambda layer: _LAYER)])


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    """Causal masks that older files saved, and a stored copy of a tied head."""
    return (r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", *common.tied_head(config))


_SUMMARY = ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")
_QKV = ("attention.q", "attention.k", "attention.v")


def _conv(hub: str, *ours: str) -> Rules:
    """Conv1D stores (in, out)."""
    weights, biases = tuple(f"{name}.weight" for name in ours), tuple(f"{name}.bias" for name in ours)
    return (Rule(f"{hub}.weight", weights, transpose=True), Rule(f"{hub}.bias", biases))


_LAYER: Rules = (
    *rules(attention_norm="ln_1", ffn_norm="ln_2"),
    *_conv("attn.c_attn", *_QKV),
    *_conv("attn.c_proj", "attention.out"),
    *_conv("mlp.c_fc", "ffn.up"),
    *_conv("mlp.c_proj", "ffn.down"),
)


def _attention(heads: int, head_dim: int, scale: float) -> AttentionConfig:
    return AttentionConfig(heads, heads, head_dim, scale, rope=None, qkv_bias=True, out_bias=True)
