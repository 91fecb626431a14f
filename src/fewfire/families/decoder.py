"""What the hub configs of decoder-only families have in common: sizes, tokens, attention keys, which layers are MoE.

Owns the shared spelling. A family file calls these with its own keys and defaults; `write_*` mirror `read_*`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fewfire.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    Mixer,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
)
from fewfire.errors import ConfigError
from fewfire.families.reader import Reader, read_format, read_tokens, write_format, write_tokens

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "moe_topk")

MAX_LAYERS = 10_000  # a broken file must not fill the memory

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
HUB_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}

Part = TypeVar("Part")


def read_model(
    hub: Reader, family: str, layers: tuple[LayerConfig, ...], norm: NormConfig, **fields: Any
) -> ModelConfig:
    """A ModelConfig from the keys that llama and its descendants share; `fields` override or add.

    `tie_word_embeddings` is false where absent, as in every class that uses this.
    """
    hub.expect("is_encoder_decoder", False)
    hub.expect("is_decoder", False, True)
    hub.expect("add_cross_attention", False)
    hub.expect("pruned_heads", {})
    values: dict[str, Any] = {"vocab_size": hub.integer("vocab_size", minimum=1), **read_tokens(hub), **fields}
    if "model_dim" not in values:
        values["model_dim"] = model_dim(hub)
    if "max_context" not in values:
        values["max_context"] = context(hub)
    if "tied_head" not in values:
        values["tied_head"] = hub.boolean("tie_word_embeddings", default=False)
    if "native_format" not in values:
        values["native_format"] = read_format(hub)
    return ModelConfig(family=family, layers=layers, norm=norm, **values)


def write_model(
    config: ModelConfig,
    architecture: str,
    *,
    dim: str = "hidden_size",
    layers: str = "num_hidden_layers",
    context: str = "max_position_embeddings",
) -> dict[str, Any]:
    """The keys of `read_model`; `dim`, `layers` and `context` are what the family calls them."""
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        dim: config.model_dim,
        layers: len(config.layers),
        context: config.max_context,
        "tie_word_embeddings": config.tied_head,
        **write_tokens(config),
        **write_format(config.native_format),
    }


def model_dim(hub: Reader) -> int:
    return hub.integer("hidden_size", minimum=1)


def context(hub: Reader) -> int:
    return hub.integer("max_position_embeddings", minimum=1)


def num_layers(hub: Reader) -> int:
    return hub.integer("num_hidden_layers", minimum=1, maximum=MAX_LAYERS)


# ------------------------------------------------------------------------------------------------------ attention


def num_heads(hub: Reader) -> int:
    return hub.integer("num_attention_heads", minimum=1)


def head_dim(hub: Reader) -> int:
    """`head_dim`, or the model's width shared among the heads where the file leaves it out."""
    return hub.integer("head_dim", default=share(model_dim(hub), num_heads(hub)), minimum=1)


def share(width: int, heads: int) -> int:
    """Each head's part of `width`, rounded down, and never nothing."""
    return max(width // heads, 1)


def read_attention(hub: Reader, rope: RopeConfig | None, **fields: Any) -> AttentionConfig:
    """Grouped-query attention; without `num_key_value_heads` every head has its own keys. `fields` override or add."""
    heads, dim = num_heads(hub), head_dim(hub)
    values: dict[str, Any] = {"scale": dim**-0.5, **fields}
    kv_heads = hub.integer("num_key_value_heads", default=heads, minimum=1)
    return AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, rope=rope, **values)


def write_attention(attention: AttentionConfig) -> dict[str, Any]:
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
    }


def read_bias(hub: Reader, default: bool = False) -> dict[str, bool]:
    """`attention_bias`: on q, k, v and out."""
    bias = hub.boolean("attention_bias", default=default)
    return {"qkv_bias": bias, "out_bias": bias}


def read_window(hub: Reader) -> int | None:
    """`sliding_window`; a window that no token can leave is none (Phi-3.5-MoE: 131072 of 131072)."""
    window = hub.integer("sliding_window", default=None)
    return None if not window or window >= context(hub) else window


def read_layer_types(hub: Reader, allowed: tuple[str, ...], default: Callable[[int], str]) -> tuple[str, ...]:
    """`layer_types`, one of `allowed` a layer; `default` of the layer's index where the file leaves the list out."""
    total = num_layers(hub)
    types = hub.items("layer_types", kind=str, length=total, default=None)
    types = tuple(default(index) for index in range(total)) if types is None else types
    for index, name in enumerate(types):
        if name not in allowed:
            raise ConfigError(f"layer_types[{index}] is {name!r} in config.json; expected {' or '.join(allowed)}")
    return types


# --------------------------------------------------------------------------------------------------- feed-forward


def read_activation(hub: Reader, *names: str, default: str = "silu") -> Any:
    """The activation by our name."""
    names = names or ("hidden_act",)
    value = hub.string(*names, default=default)
    if value not in ACTIVATIONS:
        raise ConfigError(f"{names[0]} is {value!r} in config.json; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def write_activation(ffn: FeedForwardConfig) -> str:
    """The activation by the hub's name (ours, where the hub has none: reading it back then says so)."""
    return HUB_ACTIVATIONS.get(ffn.activation, ffn.activation)


def gated(hidden_dim: int, activation: Any = "silu", **fields: Any) -> FeedForwardConfig:
    return FeedForwardConfig(hidden_dim, activation, gated=True, **fields)


def sparse_layers(hub: Reader) -> tuple[bool, ...]:
    """Qwen's rule: layer i is MoE unless listed in `mlp_only_layers` or skipped by `decoder_sparse_step`."""
    dense = hub.items("mlp_only_layers", kind=int, default=())
    step = hub.integer("decoder_sparse_step", default=1, minimum=1)
    routed = hub.integer(*EXPERTS) > 0
    return tuple(routed and i not in dense and (i + 1) % step == 0 for i in range(num_layers(hub)))


def alternate(
    sparse: tuple[bool, ...], mixers: Mixer | tuple[Mixer, ...], moe: MoEConfig, dense: Callable[[], FeedForwardConfig]
) -> tuple[LayerConfig, ...]:
    """Layers that are MoE where `sparse` says so; `dense` is asked only if one is not. One mixer, or one a layer."""
    plain = None if all(sparse) else dense()
    each = mixers if isinstance(mixers, tuple) else (mixers,) * len(sparse)
    return tuple(LayerConfig(mixer, moe if routed else plain) for mixer, routed in zip(each, sparse, strict=True))


def write_sparse_layers(config: ModelConfig) -> dict[str, Any]:
    dense = [i for i, layer in enumerate(config.layers) if not isinstance(layer.ffn, MoEConfig)]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


# ------------------------------------------------------------------------------------- taking a config apart again


def first_mixer(config: ModelConfig, kind: type[Part], required: bool = True) -> Part:
    """The first mixer of `kind`: the writers' sample; that the others agree is checked by reading back."""
    return _first([layer.mixer for layer in config.layers], kind, config, "mixer", required)


def first_moe(config: ModelConfig) -> MoEConfig:
    return _first([layer.ffn for layer in config.layers], MoEConfig, config, "ffn", True)


def first_dense(config: ModelConfig) -> FeedForwardConfig:
    return _first([layer.ffn for layer in config.layers], FeedForwardConfig, config, "ffn", True)


def dense_width(config: ModelConfig, default: int) -> int:
    """The width of the dense layers; `default` where every layer is MoE (the hub still wants a number)."""
    dense = [layer.ffn.hidden_dim for layer in config.layers if isinstance(layer.ffn, FeedForwardConfig)]
    return dense[0] if dense else default


def _first(parts: list[Any], kind: type[Part], config: ModelConfig, name: str, required: bool) -> Part:
    found = [part for part in parts if isinstance(part, kind)]
    if not found and required:
        have = " and ".join(sorted({type(part).__name__ for part in parts}))
        raise ConfigError(
            f"family {config.family} cannot express this model: no layer has a {kind.__name__} as {name} (they have "
            f"{have}); choose another family"
        )
    return found[0] if found else None  # type: ignore[return-value]


def tied_head(config: ModelConfig, prefix: str = "") -> tuple[str, ...]:
    """The pattern of a head that a file stores although it is tied to the embedding. `prefix` is a pattern too."""
    return (rf"({prefix})?lm_head\.weight",) if config.tied_head else ()


def hub_rope(attention: AttentionConfig, family: str) -> RopeConfig:
    """The rope of `attention`, which `family` cannot do without."""
    if attention.rope is None:
        raise ConfigError(f"family {family} cannot express attention without rope; choose another family")
    return attention.rope
