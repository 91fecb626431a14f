"""Attention against a loop over tokens that follows the definition; caches, padding and chunks change nothing."""

import math

import pytest
import torch

from fewfire.config import (
    AttentionConfig,
    DeltaNetConfig,
    FeedForwardConfig,
    IndexerConfig,
    LatentAttentionConfig,
    LayerConfig,
    LightningConfig,
    MambaConfig,
    ModelConfig,
    NormConfig,
    RelativeBiasConfig,
    RopeConfig,
)
from fewfire.errors import ConfigError
from fewfire.model.attention import attend, relative_buckets
from fewfire.model.build import build_model
from fewfire.model.cache import Growing
from fewfire.model.decoder import make_context
from fewfire.model.delta import DeltaNet, Lightning, Mamba, delta_rule, delta_rule_chunked, short_convolution, unit
from fewfire.model.latent import Indexer, LatentAttention

DIM, VOCAB = 24, 50
NORM = NormConfig("rms", 1e-5)
ROPE = RopeConfig(1e4, 6)
GQA = AttentionConfig(4, 2, 8, 8**-0.5, ROPE)


def attention(**changes):
    return AttentionConfig(**{**GQA.__dict__, **changes})


def latent(q_rank=12, pairing="interleaved", **changes):
    rope = RopeConfig(1e4, 4, pairing)
    return LatentAttentionConfig(3, q_rank, 10, 6, 4, 5, 10**-0.5, rope, **changes)


def indexer(top_k=4, **changes):
    return IndexerConfig(16, 8, top_k, "half", **changes)


MIXERS = {
    "plain": [attention()],
    "multi-query": [attention(num_kv_heads=1)],
    "window": [attention(window=3), attention(window=1)],
    "window longer than the text": [attention(window=100)],
    "chunk": [attention(chunk=4)],
    "sinks": [attention(sinks=True, window=4), attention(sinks=True)],
    "cap": [attention(logit_cap=2.0)],
    "clip": [attention(clip_qkv=0.5)],
    "biases": [attention(qkv_bias=True, out_bias=True)],
    "head norms": [attention(qk_norm="head")],
    "full norms": [attention(qk_norm="full", clip_qkv=0.7)],
    "llama 4": [attention(qk_norm="l2", chunk=5), attention(rope=None, temperature=(0.3, 4.0))],
    "gate": [attention(output_gate=True, qk_norm="head")],
    "interleaved": [attention(rope=RopeConfig(1e4, 8, "interleaved"))],
    "latent": [latent(), latent(bias=True, pairing="half")],
    "latent without q rank": [latent(q_rank=None)],
    "indexer": [latent(indexer=indexer()), latent(indexer=indexer(shared=True)), latent(indexer=indexer(5))],
    "delta": [DeltaNetConfig(2, 4, 6, 5, 4), DeltaNetConfig(3, 3, 4, 4, 2)],
    "lightning": [LightningConfig(3, 8), LightningConfig(2, 5)],
    "mamba": [MambaConfig(20, 6, 4, 3, True, True), MambaConfig(10, 4, 3, 2, False, False)],
}


def build(mixers, seed=0, **more):
    torch.manual_seed(seed)
    layers = tuple(LayerConfig(mixer, FeedForwardConfig(16, "silu", True)) for mixer in mixers)
    model = build_model(ModelConfig("test", VOCAB, DIM, layers, NORM, False, 512, **more)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.dim() == 1:
                parameter.normal_(std=0.3)
            elif "a_log" not in name:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)  # sums in another order, logits of order 1


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_cache_chunks_and_padding_change_nothing(name):
    model = build(MIXERS[name])
    ids = torch.randint(0, VOCAB, (2, 14))
    full = model(ids)
    for sizes in ([1] * 14, [5, 1, 1, 7], [14]):
        cache = model.new_cache()
        close(torch.cat([model(part, cache) for part in ids.split(sizes, dim=1)], dim=1), full)
        assert cache.length == 14
    mask = torch.ones(2, 18, dtype=torch.bool)  # two of the first row's columns left, two right; the second anywhere
    mask[0, [0, 1, 16, 17]] = mask[1, [0, 4, 5, 12]] = False
    padded = torch.full((2, 18), 7).masked_scatter(mask, ids)
    close(model(padded, mask_BT=mask)[mask].view_as(full), full)
    cache = model.new_cache()
    parts = zip(padded.split([6, 1, 11], 1), mask.split([6, 1, 11], 1))
    pieces = [model(part, cache, mask_BT=real) for part, real in parts]
    close(torch.cat(pieces, dim=1)[mask].view_as(full), full)


@torch.no_grad()
def test_padding_may_begin_or_end_after_the_first_call():
    model = build([attention(window=5), latent()])
    ids = torch.randint(0, VOCAB, (2, 9))
    full, cache = model(ids), model.new_cache()
    first = model(ids[:, :4], cache)
    gap = torch.tensor([[True, False], [False, True]])
    middle = model(torch.stack((ids[:, 4], ids[:, 4]), dim=1), cache, mask_BT=gap)[gap]
    last = model(ids[:, 5:], cache)
    close(torch.cat((first, middle[:, None], last), dim=1), full)


def test_a_cache_grows_without_losing_anything():
    torch.manual_seed(0)
    whole, growing, end = torch.randn(2, 3, 230, 4), Growing(), 0
    for part in whole.split([1, 63, 1, 100, 40, 25], dim=2):
        end += part.shape[2]
        assert torch.equal(growing.append(part), whole[:, :, :end])
    growing.truncate(70)
    assert torch.equal(growing.append(whole[:, :, 70:71]), whole[:, :, :71])


def by_hand(q, k, v, visible, scale, cap=None, sinks=None, bias=None):
    """(B, H, T, d) by four loops, float64."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        g, weights = h * k.shape[1] // q.shape[1], {}
        for s in range(k.shape[2]):
            if visible(t, s):
                x = float(torch.dot(q[b, h, t].double(), k[b, g, s].double())) * scale
                x = cap * math.tanh(x / cap) if cap else x
                weights[s] = math.exp(x + (float(bias[b, h, t, s]) if bias is not None else 0.0))
        total = sum(weights.values()) + (math.exp(float(sinks[h])) if sinks is not None else 0.0)
        for s, weight in weights.items():
            out[b, h, t] += weight / total * v[b, g, s].double()
    return out.float()


def random_qkv(heads=4, kv_heads=2, tokens=6, length=6, width=5):
    torch.manual_seed(3)
    return (
        torch.randn(2, heads, tokens, width),
        torch.randn(2, kv_heads, length, width),
        torch.randn(2, kv_heads, length, 3),
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attend_by_the_definition(kv_heads):
    q, k, v = random_qkv(kv_heads=kv_heads)
    sinks, bias = torch.randn(4), torch.randn(2, 4, 6, 6)
    earlier = lambda t, s: s <= t  # noqa: E731
    close(attend(q, k, v, None, scale=0.6, causal=True), by_hand(q, k, v, earlier, 0.6))
    close(attend(q, k, v, None, scale=0.6, causal=False), by_hand(q, k, v, lambda t, s: True, 0.6))
    close(attend(q, k, v, None, scale=0.6, causal=True, logit_cap=0.7), by_hand(q, k, v, earlier, 0.6, cap=0.7))
    close(attend(q, k, v, None, scale=0.6, causal=True, sinks_H=sinks), by_hand(q, k, v, earlier, 0.6, sinks=sinks))
    close(attend(q, k, v, None, scale=0.6, causal=True, bias=bias), by_hand(q, k, v, earlier, 0.6, bias=bias))


def test_masks_by_the_definition():
    context = make_context(torch.zeros(1, 9, dtype=torch.long), None, None)
    assert context.mask(None, None) is None and context.mask(9, None) is None and context.mask(None, 9) is None
    grid = [(i, j) for i in range(9) for j in range(9)]
    window, chunk = context.mask(3, None)[0, 0], context.mask(None, 4)[0, 0]
    assert all(bool(window[i, j]) == (i - 3 < j <= i) for i, j in grid)
    assert all(bool(chunk[i, j]) == (j <= i and i // 4 == j // 4) for i, j in grid)


def test_mask_hides_padding_and_counts_positions_without_it():
    mask = torch.tensor([[False, False, True, True, True], [True, True, True, False, False]])
    context = make_context(torch.zeros(2, 5, dtype=torch.long), None, mask)
    assert context.positions_BT.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
    visible = context.mask(2, None)[:, 0]
    assert visible[0, 4].tolist() == [False, False, False, True, True]
    assert visible[0, 0, 0]  # itself: no row without anything
    assert visible[1, 2].tolist() == [False, True, True, False, False]
    assert visible[1, 4].tolist() == [False, True, True, False, True]


@torch.no_grad()
def test_llama4_temperature_by_hand():
    """Only positions whose (p + 1) / floor reaches 1 are sharpened."""
    config = attention(rope=None, temperature=(0.5, 4.0), num_heads=1, num_kv_heads=1)
    model = build([config])
    module = model.layers[0].attention
    x = torch.randn(1, 9, DIM)
    context = make_context(torch.zeros(1, 9, dtype=torch.long), None, None)
    q, k, v = (linear(x)[:, None] for linear in (module.q, module.k, module.v))
    factors = [1 + 0.5 * math.log1p((p + 1) // 4) for p in range(9)]
    assert factors[:3] == [1.0] * 3 and factors[3] > 1
    q = q * torch.tensor(factors)[None, None, :, None]
    want = module.out(by_hand(q, k, v, lambda t, s: s <= t, config.scale)[:, 0])
    close(module(x, context), want)


def test_t5_buckets_by_hand():
    config = RelativeBiasConfig(32, 128, True)
    distance = torch.tensor([-1000, -128, -17, -16, -15, -1, 0, 1, 8, 16, 1000])
    causal = relative_buckets(distance, config, bidirectional=False).tolist()
    assert causal == [31, 31, 16, 16, 15, 1, 0, 0, 0, 0, 0]
    both = relative_buckets(distance, config, bidirectional=True).tolist()
    assert both == [15, 15, 10, 10, 9, 1, 0, 17, 24, 26, 31]


@torch.no_grad()
def test_absorbed_latents_equal_expanded_ones():
    torch.manual_seed(0)
    module = LatentAttention(DIM, latent(), NORM)
    q_n, q_r = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5, 4)
    latents, keys = torch.randn(2, 1, 5, 10), torch.randn(2, 1, 5, 4)
    close(module._absorbed(q_n, q_r, latents, keys, None), module._expanded(q_n, q_r, latents, keys, None))


@torch.no_grad()
def test_the_latent_cache_is_compact():
    model = build([latent(indexer=indexer())])
    cache = model.new_cache()
    model(torch.randint(0, VOCAB, (1, 7)), cache)
    sizes = {
        name: state.append(torch.empty(1, 1, 0, width)).shape
        for (name, state), width in zip(sorted(cache.layers[0].items()), (8, 10, 4))
    }
    assert sizes == {"indexer_keys": (1, 1, 7, 8), "latents": (1, 1, 7, 10), "rope_keys": (1, 1, 7, 4)}


@torch.no_grad()
def test_indexer_by_the_definition():
    torch.manual_seed(2)
    config, mla = indexer(3), latent(indexer=indexer(3))
    module = Indexer(DIM, 12, config)
    torch.nn.init.normal_(module.k_norm.bias)
    x, q_latent = torch.randn(1, 8, DIM), torch.randn(1, 8, 12)
    context = make_context(torch.zeros(1, 8, dtype=torch.long), None, None)
    got = module(x, q_latent, context, mla, None)
    cos, sin = (values[0].double() for values in context.angles(mla.rope))

    def turned(vector, position):  # half pairing over the first four of eight
        a, b = vector[:2].clone(), vector[2:4].clone()
        vector = vector.clone()
        vector[:2], vector[2:4] = a * cos[position] - b * sin[position], b * cos[position] + a * sin[position]
        return vector

    keys = torch.nn.functional.layer_norm(module.k(x), (8,), module.k_norm.weight, module.k_norm.bias, 1e-6)[0].double()
    for t in range(8):
        queries = module.q_up(q_latent)[0, t].view(16, 8).double()
        weights = module.head_weights(x)[0, t].double() / 4
        scores = [
            sum(
                float(weights[h]) * max(0.0, float(turned(queries[h], t) @ turned(keys[s], s)) * 8**-0.5)
                for h in range(16)
            )
            for s in range(t + 1)
        ]
        best = sorted(range(t + 1), key=lambda s: (-scores[s], s))[:3]
        assert set(got[0, t, : t + 1].nonzero().flatten().tolist()) == set(best)


def test_indexer_needs_a_query_latent():
    with pytest.raises(ConfigError, match="q_rank"):
        LatentAttention(DIM, latent(q_rank=None, indexer=indexer()), NORM)


@pytest.mark.parametrize("tokens", [0, 1, 5, 64, 130])
def test_chunked_delta_rule_is_the_recurrence(tokens):
    torch.manual_seed(0)
    q, k = (unit(torch.randn(2, 3, tokens, 6)) for _ in range(2))
    v, state = torch.randn(2, 3, tokens, 5), torch.randn(2, 3, 6, 5)
    decay, beta = -torch.rand(2, 3, tokens), torch.rand(2, 3, tokens)
    for got, want in zip(delta_rule_chunked(q, k, v, decay, beta, state), delta_rule(q, k, v, decay, beta, state)):
        close(got, want)


def test_strong_decay_gives_no_infinity():
    q, k = (unit(torch.randn(1, 1, 70, 4)) for _ in range(2))
    v, state = torch.randn(1, 1, 70, 4), torch.randn(1, 1, 4, 4)
    decay = torch.full((1, 1, 70), -50.0, requires_grad=True)
    y, _ = delta_rule_chunked(q, k, v, decay, torch.ones(1, 1, 70), state)
    assert y.isfinite().all()
    assert torch.autograd.grad(y.sum(), decay)[0].isfinite().all()


def test_short_convolution_by_hand():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 6, 3), torch.randn(3, 4), torch.randn(3)
    got, left = short_convolution(x, weight, bias, None, None)
    for t in range(6):
        want = bias.clone()
        for w in range(4):
            if t - 3 + w >= 0:
                want = want + weight[:, w] * x[0, t - 3 + w]
        close(got[0, t], want)
    assert torch.equal(left, x[:, 3:])


@torch.no_grad()
def test_lightning_by_the_recurrence():
    torch.manual_seed(0)
    module = Lightning(DIM, LightningConfig(2, 4), NORM, depth=0.25)
    x = torch.randn(1, 70, DIM)
    context = make_context(torch.zeros(1, 70, dtype=torch.long), None, None)
    rates = [(2.0**-4) ** (h + 1) * (1 - 0.25 + 1e-5) for h in range(2)]
    qkv = torch.nn.functional.silu(module.qkv(x))[0].view(70, 2, 12)
    rows = []
    state = torch.zeros(2, 4, 4)
    for t in range(70):
        row = []
        for h in range(2):
            q, k, v = qkv[t, h].split(4)
            state[h] = math.exp(-rates[h]) * state[h] + torch.outer(k, v)
            row.append(q @ state[h])
        rows.append(torch.cat(row))
    y = torch.stack(rows)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
    close(module(x, context)[0], module.out(torch.sigmoid(module.gate(x[0])) * y))


@pytest.mark.parametrize("module", [DeltaNet, Lightning, Mamba])
def test_linear_mixers_have_all_gradients(module):
    configs = {DeltaNet: MIXERS["delta"][0], Lightning: MIXERS["lightning"][0], Mamba: MIXERS["mamba"][0]}
    mixer = module(DIM, configs[module], NORM, **({"depth": 0.5} if module is Lightning else {}))
    context = make_context(torch.zeros(2, 6, dtype=torch.long), None, None)
    mixer(torch.randn(2, 6, DIM), context).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mixer.parameters())


@torch.no_grad()
def test_too_long_for_learned_positions():
    model = build([attention(rope=None)], learned_positions=8)
    model(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ConfigError, match="9 tokens exceed"):
        model(torch.zeros(1, 9, dtype=torch.long))


@pytest.mark.parametrize("name", MIXERS)
def test_training_in_bfloat16_is_close_and_has_gradients(name):
    """Under autocast, as training runs: recurrences and indexers keep float32 inside."""
    model = build(MIXERS[name]).train()
    ids = torch.randint(0, VOCAB, (2, 12))
    with torch.no_grad():
        want = model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(ids)
    assert got.dtype == torch.float32
    if name != "indexer":  # another token chosen is another model
        assert (got - want).abs().mean() < 0.05  # 2^-8 relative, through two layers; logits are of order 1
    got.square().mean().backward()
    unseen = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert all(".indexer." in key for key in unseen)


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_bfloat16_weights_run_with_a_cache(name):
    model = build(MIXERS[name]).bfloat16()
    ids, cache = torch.randint(0, VOCAB, (1, 8)), model.new_cache()
    full = model(ids)
    steps = torch.cat([model(part, cache) for part in ids.split([3, 1, 4], dim=1)], dim=1)
    assert full.dtype == steps.dtype == torch.float32 and full.isfinite().all()
    if name != "indexer":
        assert (steps - full).abs().mean() < 0.05
