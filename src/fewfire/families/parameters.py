"""The names and shapes of our own parameters, from a ModelConfig alone: what `model/` builds and packs store.

Owns the vocabulary of state-dict keys. Knows no hub name. All linear weights are (out, in).
"""

from __future__ import annotations

from fewfire.config import (
    AttentionConfig,
    DeltaNetConfig,
    FeedForwardConfig,
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

Shapes = dict[str, tuple[int, ...]]


def parameters(config: ModelConfig) -> Shapes:
    """Name -> shape of every parameter of `config`, selection biases included, in the order the model runs them.

    A tied head has no entry; multi-token-prediction layers have none.
    """
    dim = config.model_dim
    shapes: Shapes = {"embed.weight": (config.vocab_size, dim)}
    if config.learned_positions is not None:
        shapes["positions.weight"] = (config.learned_positions, dim)
    if config.encoder:
        for index, layer in enumerate(config.encoder):
            shapes.update(_prefixed(f"encoder.layers.{index}.", layer_parameters(layer, config)))
        shapes.update(_norm("encoder.norm", dim, config.norm))
    for index, layer in enumerate(config.layers):
        shapes.update(_prefixed(f"layers.{index}.", layer_parameters(layer, config)))
    shapes.update(_norm("norm", dim, config.norm))
    if not config.tied_head:
        shapes["head.weight"] = (config.vocab_size, dim)
    if config.head_bias:
        shapes["head.bias"] = (config.vocab_size,)
    return shapes


def layer_parameters(layer: LayerConfig, config: ModelConfig) -> Shapes:
    """Name -> shape of one layer of `config`, names without the layer's prefix."""
    dim, norm, shapes = config.model_dim, config.norm, Shapes()
    if layer.mixer is not None:
        shapes.update(_norm("attention_norm", dim, norm))
        shapes.update(_prefixed("attention.", _mixer(layer.mixer, dim)))
        if config.sandwich:
            shapes.update(_norm("attention_post_norm", dim, norm))
    if layer.cross is not None:
        shapes.update(_norm("cross_norm", dim, norm))
        shapes.update(_prefixed("cross.", _attention(layer.cross, dim)))
    if layer.ffn is not None:
        shapes.update(_norm("ffn_norm", dim, norm))
        moe = isinstance(layer.ffn, MoEConfig)
        shapes.update(_prefixed("ffn.", _moe(layer.ffn, dim) if moe else _feed_forward(layer.ffn, dim)))
        if config.sandwich:
            shapes.update(_norm("ffn_post_norm", dim, norm))
    return shapes


def count(shapes: Shapes) -> int:
    """How many numbers all `shapes` hold together."""
    total = 0
    for shape in shapes.values():
        size = 1
        for extent in shape:
            size *= extent
        total += size
    return total


# ---------------------------------------------------------------------------------------------------------- parts


def _prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def _norm(name: str, dim: int, norm: NormConfig) -> Shapes:
    if norm.kind == "none":
        return {}
    shapes: Shapes = {f"{name}.weight": (dim,)}
    return shapes | {f"{name}.bias": (dim,)} if norm.bias else shapes


def _linear(name: str, out: int, into: int, bias: bool = False) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def _mixer(mixer: Mixer, dim: int) -> Shapes:
    if isinstance(mixer, AttentionConfig):
        return _attention(mixer, dim)
    if isinstance(mixer, LatentAttentionConfig):
        return _latent(mixer, dim)
    if isinstance(mixer, DeltaNetConfig):
        return _delta_net(mixer, dim)
    if isinstance(mixer, LightningConfig):
        width = mixer.num_heads * mixer.head_dim
        return (
            _linear("qkv", 3 * width, dim)
            | {"norm.weight": (width,)}
            | _linear("gate", width, dim)
            | _linear("out", dim, width)
        )
    if isinstance(mixer, MambaConfig):
        return _mamba(mixer, dim)
    assert isinstance(mixer, LstmConfig)
    gates = 4 * mixer.hidden_dim  # input, forget, cell, output
    shapes: Shapes = {"weight_ih": (gates, dim), "weight_hh": (gates, mixer.hidden_dim), "bias": (gates,)}
    return shapes if mixer.hidden_dim == dim else shapes | _linear("out", dim, mixer.hidden_dim)


def _attention(attention: AttentionConfig, dim: int) -> Shapes:
    heads, kv = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    queries = 2 * heads if attention.output_gate else heads
    shapes = _linear("q", queries, dim, attention.qkv_bias)
    shapes |= _linear("k", kv, dim, attention.qkv_bias) | _linear("v", kv, dim, attention.qkv_bias)
    shapes |= _linear("out", dim, heads, attention.out_bias)
    if attention.qk_norm == "head":
        shapes |= {"q_norm.weight": (attention.head_dim,), "k_norm.weight": (attention.head_dim,)}
    if attention.qk_norm == "full":
        shapes |= {"q_norm.weight": (heads,), "k_norm.weight": (kv,)}
    if attention.sinks:
        shapes["sinks"] = (attention.num_heads,)
    if attention.relative_bias is not None and attention.relative_bias.owner:
        shapes["relative_bias.weight"] = (attention.relative_bias.num_buckets, attention.num_heads)
    return shapes


def _latent(mla: LatentAttentionConfig, dim: int) -> Shapes:
    queries = mla.num_heads * (mla.nope_dim + mla.rope_dim)
    if mla.q_rank is None:
        shapes = _linear("q", queries, dim)
    else:
        shapes = _linear("q_down", mla.q_rank, dim, mla.bias) | {"q_down_norm.weight": (mla.q_rank,)}
        shapes |= _linear("q_up", queries, mla.q_rank)
    shapes |= _linear("kv_down", mla.kv_rank + mla.rope_dim, dim, mla.bias) | {"kv_down_norm.weight": (mla.kv_rank,)}
    shapes |= _linear("kv_up", mla.num_heads * (mla.nope_dim + mla.value_dim), mla.kv_rank)
    shapes |= _linear("out", dim, mla.num_heads * mla.value_dim, mla.bias)
    indexer = mla.indexer
    if indexer is not None and not indexer.shared:
        assert mla.q_rank is not None, "an indexer reads the queries' latent: q_rank must be set"
        shapes |= _linear("indexer.q_up", indexer.num_heads * indexer.head_dim, mla.q_rank)
        shapes |= _linear("indexer.k", indexer.head_dim, dim)
        shapes |= {"indexer.k_norm.weight": (indexer.head_dim,), "indexer.k_norm.bias": (indexer.head_dim,)}
        shapes |= _linear("indexer.head_weights", indexer.num_heads, dim)
    return shapes


def _delta_net(net: DeltaNetConfig, dim: int) -> Shapes:
    keys, values = net.num_key_heads * net.key_dim, net.num_value_heads * net.value_dim
    return (
        _linear("qkvz", 2 * keys + 2 * values, dim)
        | _linear("ba", 2 * net.num_value_heads, dim)
        | {"conv.weight": (2 * keys + values, 1, net.conv_kernel)}
        | {"a_log": (net.num_value_heads,), "dt_bias": (net.num_value_heads,), "norm.weight": (net.value_dim,)}
        | _linear("out", dim, values)
    )


def _mamba(mamba: MambaConfig, dim: int) -> Shapes:
    inner, state, rank = mamba.inner_dim, mamba.state_dim, mamba.dt_rank
    shapes = _linear("in", 2 * inner, dim, mamba.proj_bias) | {"conv.weight": (inner, 1, mamba.conv_kernel)}
    shapes |= {"conv.bias": (inner,)} if mamba.conv_bias else {}
    shapes |= _linear("x", rank + 2 * state, inner) | _linear("dt", inner, rank, True)
    shapes |= {"dt_norm.weight": (rank,), "b_norm.weight": (state,), "c_norm.weight": (state,)}
    shapes |= {"a_log": (inner, state), "d": (inner,)}
    return shapes | _linear("out", dim, inner, mamba.proj_bias)


def _feed_forward(ffn: FeedForwardConfig | MoEConfig | None, dim: int) -> Shapes:
    assert isinstance(ffn, FeedForwardConfig)
    shapes = _linear("gate", ffn.hidden_dim, dim, ffn.bias) if ffn.gated else {}
    return shapes | _linear("up", ffn.hidden_dim, dim, ffn.bias) | _linear("down", dim, ffn.hidden_dim, ffn.bias)


def _moe(moe: FeedForwardConfig | MoEConfig | None, dim: int) -> Shapes:
    assert isinstance(moe, MoEConfig)
    router, expert = moe.router, moe.expert
    experts, width = router.num_experts, expert.hidden_dim
    noisy = router.score == "noisy_softmax"
    shapes = _linear("router", experts, dim, router.bias)
    shapes |= {"router.noise.weight": (experts, dim)} if noisy else {}
    if router.branches is not None:
        # 2017, appendix B: a first level picks branches; the rows of router.weight are grouped by branch.
        shapes["router.branch.weight"] = (router.branches, dim)
        shapes |= {"router.branch_noise.weight": (router.branches, dim)} if noisy else {}
    if router.select_bias:
        shapes["router.select_bias"] = (experts,)
    if expert.gated:
        shapes["experts.gate"] = (experts, width, dim)
    shapes |= {"experts.up": (experts, width, dim), "experts.down": (experts, dim, width)}
    if expert.bias:
        shapes |= {"experts.gate_bias": (experts, width)} if expert.gated else {}
        shapes |= {"experts.up_bias": (experts, width), "experts.down_bias": (experts, dim)}
    if moe.shared is not None:
        shapes |= _prefixed("shared.", _feed_forward(moe.shared, dim))
    if moe.shared_gate:
        shapes["shared_gate.weight"] = (1, dim)
    return shapes
