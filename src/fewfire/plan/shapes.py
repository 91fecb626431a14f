"""Every tensor of a model, by name and shape, straight from `ModelConfig`: what all other arithmetic sums over.

Owns the state-dict names and shapes of our models. Knows no format, no torch. Identical layers are listed once
(cached), so a 61-layer model costs two layers' work.

Legend of names: D model_dim, F hidden width, E experts. All linear weights are (out_features, in_features).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from fewfire.config import (
    AttentionConfig,
    DeltaNetConfig,
    FeedForwardConfig,
    IndexerConfig,
    LatentAttentionConfig,
    LayerConfig,
    LightningConfig,
    LstmConfig,
    MambaConfig,
    Mixer,
    ModelConfig,
    MoEConfig,
    NormConfig,
)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor. `kind` is its class in every breakdown; `matmul`: multiplied with each token that reaches it."""

    name: str
    shape: tuple[int, ...]
    kind: str
    matmul: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def _linear(name: str, kind: str, outputs: int, inputs: int, bias: bool = False) -> list[TensorSpec]:
    weight = TensorSpec(f"{name}.weight", (outputs, inputs), kind, matmul=True)
    return [weight, TensorSpec(f"{name}.bias", (outputs,), kind)] if bias else [weight]


def _norm(name: str, dim: int, norm: NormConfig | None = None) -> list[TensorSpec]:
    """A norm of `dim`; without `norm` a plain RMS weight."""
    specs = [TensorSpec(f"{name}.weight", (dim,), "norm")]
    if norm is not None and norm.bias:
        specs.append(TensorSpec(f"{name}.bias", (dim,), "norm"))
    return specs


def _attention(prefix: str, kind: str, mixer: AttentionConfig, model_dim: int) -> list[TensorSpec]:
    q_dim, kv_dim = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
    specs = _linear(f"{prefix}.q", kind, q_dim * (2 if mixer.output_gate else 1), model_dim, mixer.qkv_bias)
    specs += _linear(f"{prefix}.k", kind, kv_dim, model_dim, mixer.qkv_bias)
    specs += _linear(f"{prefix}.v", kind, kv_dim, model_dim, mixer.qkv_bias)
    specs += _linear(f"{prefix}.out", kind, model_dim, q_dim, mixer.out_bias)
    if mixer.qk_norm == "head":
        specs += _norm(f"{prefix}.q_norm", mixer.head_dim) + _norm(f"{prefix}.k_norm", mixer.head_dim)
    elif mixer.qk_norm == "full":
        specs += _norm(f"{prefix}.q_norm", q_dim) + _norm(f"{prefix}.k_norm", kv_dim)
    if mixer.sinks:
        specs.append(TensorSpec(f"{prefix}.sinks", (mixer.num_heads,), kind))
    if mixer.relative_bias is not None and mixer.relative_bias.owner:
        shape = (mixer.relative_bias.num_buckets, mixer.num_heads)
        specs.append(TensorSpec(f"{prefix}.relative_bias.weight", shape, kind))
    return specs


def _indexer(prefix: str, indexer: IndexerConfig, query_dim: int, model_dim: int) -> list[TensorSpec]:
    if indexer.shared:
        return []
    return [
        *_linear(f"{prefix}.q_up", "indexer", indexer.num_heads * indexer.head_dim, query_dim),
        *_linear(f"{prefix}.k", "indexer", indexer.head_dim, model_dim),
        *_linear(f"{prefix}.head_weights", "indexer", indexer.num_heads, model_dim),
        TensorSpec(f"{prefix}.k_norm.weight", (indexer.head_dim,), "norm"),
        TensorSpec(f"{prefix}.k_norm.bias", (indexer.head_dim,), "norm"),
    ]


def _latent_attention(prefix: str, mixer: LatentAttentionConfig, model_dim: int) -> list[TensorSpec]:
    heads, bias, kind = mixer.num_heads, mixer.bias, "attention"
    q_dim = heads * (mixer.nope_dim + mixer.rope_dim)
    if mixer.q_rank is None:
        specs = _linear(f"{prefix}.q", kind, q_dim, model_dim)
    else:
        specs = _linear(f"{prefix}.q_down", kind, mixer.q_rank, model_dim, bias)
        specs += _norm(f"{prefix}.q_down_norm", mixer.q_rank)
        specs += _linear(f"{prefix}.q_up", kind, q_dim, mixer.q_rank)
    specs += _linear(f"{prefix}.kv_down", kind, mixer.kv_rank + mixer.rope_dim, model_dim, bias)
    specs += _norm(f"{prefix}.kv_down_norm", mixer.kv_rank)
    specs += _linear(f"{prefix}.kv_up", kind, heads * (mixer.nope_dim + mixer.value_dim), mixer.kv_rank)
    specs += _linear(f"{prefix}.out", kind, model_dim, heads * mixer.value_dim, bias)
    if mixer.indexer is not None:
        specs += _indexer(f"{prefix}.indexer", mixer.indexer, mixer.q_rank or model_dim, model_dim)
    return specs


def _delta_net(prefix: str, mixer: DeltaNetConfig, model_dim: int) -> list[TensorSpec]:
    keys, values = mixer.num_key_heads * mixer.key_dim, mixer.num_value_heads * mixer.value_dim
    kind = "linear_attention"
    return [
        *_linear(f"{prefix}.qkvz", kind, 2 * keys + 2 * values, model_dim),
        *_linear(f"{prefix}.ba", kind, 2 * mixer.num_value_heads, model_dim),
        TensorSpec(f"{prefix}.conv.weight", (2 * keys + values, 1, mixer.conv_kernel), kind),
        TensorSpec(f"{prefix}.a_log", (mixer.num_value_heads,), kind),
        TensorSpec(f"{prefix}.dt_bias", (mixer.num_value_heads,), kind),
        *_norm(f"{prefix}.norm", mixer.value_dim),
        *_linear(f"{prefix}.out", kind, model_dim, values),
    ]


def _lightning(prefix: str, mixer: LightningConfig, model_dim: int) -> list[TensorSpec]:
    inner, kind = mixer.num_heads * mixer.head_dim, "linear_attention"
    return [
        *_linear(f"{prefix}.qkv", kind, 3 * inner, model_dim),
        *_linear(f"{prefix}.gate", kind, inner, model_dim),
        *_norm(f"{prefix}.norm", inner),
        *_linear(f"{prefix}.out", kind, model_dim, inner),
    ]


def _mamba(prefix: str, mixer: MambaConfig, model_dim: int) -> list[TensorSpec]:
    inner, state, rank, kind = mixer.inner_dim, mixer.state_dim, mixer.dt_rank, "linear_attention"
    specs = _linear(f"{prefix}.in", kind, 2 * inner, model_dim, mixer.proj_bias)
    specs.append(TensorSpec(f"{prefix}.conv.weight", (inner, 1, mixer.conv_kernel), kind))
    if mixer.conv_bias:
        specs.append(TensorSpec(f"{prefix}.conv.bias", (inner,), kind))
    specs += _linear(f"{prefix}.x", kind, rank + 2 * state, inner)
    specs += _linear(f"{prefix}.dt", kind, inner, rank, bias=True)
    specs += _norm(f"{prefix}.dt_norm", rank) + _norm(f"{prefix}.b_norm", state) + _norm(f"{prefix}.c_norm", state)
    specs.append(TensorSpec(f"{prefix}.a_log", (inner, state), kind))
    specs.append(TensorSpec(f"{prefix}.d", (inner,), kind))
    return specs + _linear(f"{prefix}.out", kind, model_dim, inner, mixer.proj_bias)


def _lstm(prefix: str, mixer: LstmConfig, model_dim: int) -> list[TensorSpec]:
    hidden, kind = mixer.hidden_dim, "lstm"
    specs = [
        TensorSpec(f"{prefix}.weight_ih", (4 * hidden, model_dim), kind, matmul=True),
        TensorSpec(f"{prefix}.weight_hh", (4 * hidden, hidden), kind, matmul=True),
        TensorSpec(f"{prefix}.bias_ih", (4 * hidden,), kind),
        TensorSpec(f"{prefix}.bias_hh", (4 * hidden,), kind),
    ]
    return specs if hidden == model_dim else specs + _linear(f"{prefix}.out", kind, model_dim, hidden)


def _mixer(prefix: str, mixer: Mixer, model_dim: int) -> list[TensorSpec]:
    match mixer:
        case AttentionConfig():
            return _attention(prefix, "attention", mixer, model_dim)
        case LatentAttentionConfig():
            return _latent_attention(prefix, mixer, model_dim)
        case DeltaNetConfig():
            return _delta_net(prefix, mixer, model_dim)
        case LightningConfig():
            return _lightning(prefix, mixer, model_dim)
        case MambaConfig():
            return _mamba(prefix, mixer, model_dim)
        case LstmConfig():
            return _lstm(prefix, mixer, model_dim)


def _feed_forward(prefix: str, kind: str, ffn: FeedForwardConfig, model_dim: int) -> list[TensorSpec]:
    specs = _linear(f"{prefix}.gate", kind, ffn.hidden_dim, model_dim, ffn.bias) if ffn.gated else []
    specs += _linear(f"{prefix}.up", kind, ffn.hidden_dim, model_dim, ffn.bias)
    return specs + _linear(f"{prefix}.down", kind, model_dim, ffn.hidden_dim, ffn.bias)


def _router(prefix: str, moe: MoEConfig, model_dim: int) -> list[TensorSpec]:
    router = moe.router
    specs = _linear(prefix, "router", router.num_experts, model_dim, router.bias)
    noisy = router.score == "noisy_softmax"
    if noisy:
        specs.append(TensorSpec(f"{prefix}.noise.weight", (router.num_experts, model_dim), "router"))
    if router.branches is not None:
        specs += _linear(f"{prefix}.branch", "router", router.branches, model_dim)
        if noisy:
            specs.append(TensorSpec(f"{prefix}.branch_noise.weight", (router.branches, model_dim), "router"))
    if router.select_bias:
        specs.append(TensorSpec(f"{prefix}.select_bias", (router.num_experts,), "select_bias"))
    return specs


def _moe(prefix: str, moe: MoEConfig, model_dim: int) -> list[TensorSpec]:
    experts, width, bank = moe.router.num_experts, moe.expert.hidden_dim, f"{prefix}.experts"
    specs = _router(f"{prefix}.router", moe, model_dim)
    into = ["gate", "up"] if moe.expert.gated else ["up"]
    specs += [TensorSpec(f"{bank}.{name}", (experts, width, model_dim), "experts", matmul=True) for name in into]
    specs.append(TensorSpec(f"{bank}.down", (experts, model_dim, width), "experts", matmul=True))
    if moe.expert.bias:
        specs += [TensorSpec(f"{bank}.{name}_bias", (experts, width), "experts") for name in into]
        specs.append(TensorSpec(f"{bank}.down_bias", (experts, model_dim), "experts"))
    if moe.shared is not None:
        specs += _feed_forward(f"{prefix}.shared", "shared_expert", moe.shared, model_dim)
    if moe.shared_gate:
        specs.append(TensorSpec(f"{prefix}.shared_gate.weight", (1, model_dim), "shared_expert", matmul=True))
    return specs


@lru_cache(maxsize=1024)
def layer_tensors(layer: LayerConfig, model_dim: int, norm: NormConfig, sandwich: bool) -> tuple[TensorSpec, ...]:
    """The tensors of one block, named from inside it (`attention.q.weight`)."""
    specs: list[TensorSpec] = []
    if layer.mixer is not None:
        if not isinstance(layer.mixer, LstmConfig):
            specs += _norm("attention_norm", model_dim, norm)
            specs += _norm("attention_post_norm", model_dim, norm) if sandwich else []
        specs += _mixer("attention", layer.mixer, model_dim)
    if layer.cross is not None:
        specs += _norm("cross_norm", model_dim, norm)
        specs += _attention("cross", "cross_attention", layer.cross, model_dim)
    if layer.ffn is not None:
        if not isinstance(layer.mixer, LstmConfig):
            specs += _norm("ffn_norm", model_dim, norm)
            specs += _norm("ffn_post_norm", model_dim, norm) if sandwich else []
        if isinstance(layer.ffn, MoEConfig):
            specs += _moe("ffn", layer.ffn, model_dim)
        else:
            specs += _feed_forward("ffn", "dense_ffn", layer.ffn, model_dim)
    return tuple(specs)


def outer_tensors(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """What lies outside the blocks. A tied table is listed once, as the embedding: it is the head too, so `matmul`."""
    dim, recurrent = config.model_dim, any(isinstance(layer.mixer, LstmConfig) for layer in config.layers)
    specs = [TensorSpec("embed.weight", (config.vocab_size, dim), "embedding", matmul=config.tied_head)]
    if config.learned_positions is not None:
        specs.append(TensorSpec("positions.weight", (config.learned_positions, dim), "positions"))
    if config.encoder:
        specs += _norm("encoder.norm", dim, config.norm)
    specs += [] if recurrent else _norm("norm", dim, config.norm)
    if not config.tied_head:
        specs += _linear("head", "head", config.vocab_size, dim, config.head_bias)
    elif config.head_bias:
        specs.append(TensorSpec("head.bias", (config.vocab_size,), "head"))
    return tuple(specs)


def distinct_layers(config: ModelConfig) -> list[tuple[LayerConfig, int]]:
    """(layer, how many blocks are exactly like it), encoder and decoder together."""
    seen: dict[LayerConfig, int] = {}
    for layer in (*config.encoder, *config.layers):
        seen[layer] = seen.get(layer, 0) + 1
    return list(seen.items())


def model_tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor under its full name, encoder first, then the decoder's blocks, then what lies outside."""
    for stack, layers in (("encoder.layers", config.encoder), ("layers", config.layers)):
        for index, layer in enumerate(layers):
            for spec in layer_tensors(layer, config.model_dim, config.norm, config.sandwich):
                yield TensorSpec(f"{stack}.{index}.{spec.name}", spec.shape, spec.kind, spec.matmul)
    yield from outer_tensors(config)
