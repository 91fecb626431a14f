"""Switch Transformer: a T5 encoder-decoder whose sparse layers send each token to one expert of limited capacity.

`dense_act_fn` gated-gelu (Switch-XXL) has three matrices, named as in T5 1.1: transformers' class documents the value
and cannot run it. Source: transformers `SwitchTransformersConfig`; Fedus et al. 2021, section 2.
"""

from __future__ import annotations

from typing import Any

from fewfire.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RelativeBiasConfig,
    RouterConfig,
)
from fewfire.errors import ConfigError
from fewfire.families import decoder as common
from fewfire.families.reader import Reader, read_format, read_tokens, write_format, write_tokens
from fewfire.families.tensors import HubTensor, Rule, Rules, Stack, build, rules

_ACTIVATIONS = {"relu": ("relu", False), "gated-gelu": ("gelu_tanh", True)}
_CONTEXT = 512  # T5's training length: the hub's n_positions, which transformers' class leaves out


def read(hub: Reader) -> ModelConfig:
    hub.expect("is_encoder_decoder", True)
    for name in ("is_decoder", "add_cross_attention"):
        hub.skip(name)  # set on the stacks when the class builds them
    hub.expect("pruned_heads", {})
    # Training only, or stored and used by nobody (padding does take capacity).
    hub.skip("add_router_probs", "router_ignore_padding_tokens", "router_type", "output_past", "num_selected_experts")
    hub.expect("router_dtype", "float32")
    dim = hub.integer("d_model", "hidden_size", minimum=1)
    dense, moe = _read_ffn(hub)
    encoder = hub.integer("num_layers", minimum=1, maximum=common.MAX_LAYERS)
    decoder = hub.integer("num_decoder_layers", default=encoder, minimum=1, maximum=common.MAX_LAYERS)
    in_encoder = _sparse(hub, "encoder", encoder)
    in_decoder = _sparse(hub, "decoder", decoder)
    cross = _attention(hub, None, causal=False)
    tied = hub.boolean("tie_word_embeddings", default=True)
    return ModelConfig(
        family="switch_transformers",
        vocab_size=hub.integer("vocab_size", minimum=1),
        model_dim=dim,
        encoder=tuple(
            LayerConfig(_attention(hub, index, causal=False), moe if index in in_encoder else dense)
            for index in range(encoder)
        ),
        layers=tuple(
            LayerConfig(_attention(hub, index, causal=True), moe if index in in_decoder else dense, cross)
            for index in range(decoder)
        ),
        norm=NormConfig("rms", hub.number("layer_norm_epsilon", default=1e-6)),
        tied_head=tied,
        max_context=hub.integer("n_positions", default=_CONTEXT, minimum=1),
        logit_scale=dim**-0.5 if tied else 1.0,
        **read_tokens(hub),
        decoder_start_token_id=hub.integer("decoder_start_token_id", default=None),
        native_format=read_format(hub),
    )


def _read_ffn(hub: Reader) -> tuple[FeedForwardConfig, MoEConfig]:
    names = ("dense_act_fn", "feed_forward_proj")
    name = hub.string(*names, default="relu")
    if name not in _ACTIVATIONS:
        raise ConfigError(f"dense_act_fn is {name!r} in config.json; expected one of {', '.join(_ACTIVATIONS)}")
    activation, gated = _ACTIVATIONS[name]
    hub.expect("is_gated_act", gated)
    ffn = FeedForwardConfig(hub.integer("d_ff", minimum=1), activation, gated)  # type: ignore[arg-type]
    router = RouterConfig(
        num_experts=hub.integer(*common.EXPERTS),
        top_k=1,
        score="softmax",
        renormalize=False,
        scale=1.0,
        select_bias=False,
        bias=hub.boolean("router_bias", default=False),
        jitter=hub.number("router_jitter_noise", default=0.01),  # training only
        capacity=hub.integer("expert_capacity", default=64, minimum=1),
    )
    return ffn, MoEConfig(router, ffn)


def _sparse(hub: Reader, stack: str, total: int) -> frozenset[int]:
    """Which layers of a stack are sparse: i % step == 1, or all of them at step 1."""
    number = hub.integer(f"num_sparse_{stack}_layers", default=3)
    if number > total:
        raise ConfigError(f"num_sparse_{stack}_layers ({number}) exceeds the stack's {total} layers; lower it")
    hub.expect(f"{stack}_sparse_step", total // number if number else total)
    return _spaced(number, total)


def _spaced(number: int, total: int) -> frozenset[int]:
    """The layers that are sparse when `number` of `total` were asked for (rounding can make them more)."""
    step = total // number if number else total
    return frozenset(index for index in range(total) if step == 1 or index % step == 1)


def _number(layers: tuple[LayerConfig, ...]) -> int:
    """The number to ask for so that just these layers are sparse; their count where no number does."""
    sparse = {index for index, layer in enumerate(layers) if isinstance(layer.ffn, MoEConfig)}
    fits = (number for number in range(len(layers) + 1) if _spaced(number, len(layers)) == sparse)
    return next(fits, len(sparse))


def _attention(hub: Reader, index: int | None, *, causal: bool) -> AttentionConfig:
    """T5 attention: scores unscaled, no bias terms, distances learned by the first layer (None: cross-attention)."""
    heads, head_dim = hub.integer("num_heads", "num_attention_heads", minimum=1), hub.integer("d_kv", minimum=1)
    buckets = hub.integer("relative_attention_num_buckets", default=32, minimum=1)
    distance = hub.integer("relative_attention_max_distance", default=128, minimum=1)
    bias = None if index is None else RelativeBiasConfig(buckets, distance, owner=index == 0)
    return AttentionConfig(heads, heads, head_dim, scale=1.0, rope=None, relative_bias=bias, causal=causal)


def write(config: ModelConfig) -> dict[str, Any]:
    attention = common.first_mixer(config, AttentionConfig)
    moe_layers = [moe for _, _, moe in config.moe_layers]
    if not moe_layers or attention.relative_bias is None:
        raise ConfigError(f"family {config.family} needs MoE layers and relative positions; choose another family")
    moe, bias = moe_layers[0], attention.relative_bias
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    expert = (str(moe.expert.activation), moe.expert.gated)
    return {
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "model_type": config.family,
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.model_dim,
        "d_kv": attention.head_dim,
        "d_ff": moe.expert.hidden_dim,
        "num_heads": attention.num_heads,
        "num_layers": len(config.encoder),
        "num_decoder_layers": len(config.layers),
        "num_sparse_encoder_layers": _number(config.encoder),
        "num_sparse_decoder_layers": _number(config.layers),
        "num_experts": moe.router.num_experts,
        "expert_capacity": moe.router.capacity,
        "router_bias": moe.router.bias,
        "router_jitter_noise": moe.router.jitter,
        "router_dtype": "float32",
        "relative_attention_num_buckets": bias.num_buckets,
        "relative_attention_max_distance": bias.max_distance,
        "dense_act_fn": names.get(expert, expert[0]),
        "layer_norm_epsilon": config.norm.eps,
        "n_positions": config.max_context,
        "tie_word_embeddings": config.tied_head,
        "decoder_start_token_id": config.decoder_start_token_id,
        **write_tokens(config),
        **write_format(config.native_format),
    }


_TOP: Rules = (
    Rule("shared.weight", "embed.weight"),
    *rules(encoder__norm="encoder.final_layer_norm", norm="decoder.final_layer_norm", head="lm_head"),
)


def _layer_rules(feed_forward: int) -> Rules:
    """The rules of a block whose feed-forward is its layer `feed_forward`: 1 in the encoder, 2 in the decoder."""
    self_, mlp = "layer.0.SelfAttention", f"layer.{feed_forward}.mlp"
    return (
        *rules(attention_norm="layer.0.layer_norm", attention__q=f"{self_}.q", attention__k=f"{self_}.k"),
        *rules(attention__v=f"{self_}.v", attention__out=f"{self_}.o"),
        Rule(f"{self_}.relative_attention_bias.weight", "attention.relative_bias.weight"),
        *rules(cross_norm="layer.1.layer_norm", cross__q="layer.1.EncDecAttention.q"),
        *rules(cross__k="layer.1.EncDecAttention.k", cross__v="layer.1.EncDecAttention.v"),
        *rules(cross__out="layer.1.EncDecAttention.o", ffn_norm=f"layer.{feed_forward}.layer_norm"),
        *rules(ffn__router=f"{mlp}.router.classifier"),
    )


def _ffn_rules(layer: LayerConfig, feed_forward: int) -> Rules:
    ffn, mlp = layer.ffn, f"layer.{feed_forward}.mlp"
    expert = ffn.expert if isinstance(ffn, MoEConfig) else ffn
    up = "wi_1" if expert is not None and expert.gated else "wi"
    bank = f"{mlp}.experts.expert_{{e}}"
    return (
        *rules(ffn__gate=f"{mlp}.wi_0", ffn__up=f"{mlp}.{up}", ffn__down=f"{mlp}.wo"),
        Rule(f"{bank}.wi_0.weight", "ffn.experts.gate"),
        Rule(f"{bank}.{up}.weight", "ffn.experts.up"),
        Rule(f"{bank}.wo.weight", "ffn.experts.down"),
    )


def tensors(config: ModelConfig) -> list[HubTensor]:
    stacks = [
        Stack(
            f"{name}.block.{{l}}.",
            ours,
            layers,
            lambda layer, index=index: (*_layer_rules(index), *_ffn_rules(layer, index)),  # type: ignore[misc]
        )
        for name, ours, layers, index in (
            ("encoder", "encoder.layers.{l}.", config.encoder, 1),
            ("decoder", "layers.{l}.", config.layers, 2),
        )
    ]
    return build(config, _TOP, stacks)


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    """Copies of the shared table that older files stored; with an untied head transformers lets them differ."""
    copies = (r"(encoder|decoder)\.embed_tokens\.weight",) if config.tied_head else ()
    return (*copies, *common.tied_head(config))
