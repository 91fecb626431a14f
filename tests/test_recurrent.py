"""The 2017 model: noisy gating against its formulas, the LSTM against its definition, training, decoding."""

import math

import pytest
import torch

from fewfire import balance
from fewfire.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    LstmConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RouterConfig,
)
from fewfire.errors import ConfigError
from fewfire.model.build import build_model
from fewfire.model.decoder import make_context
from fewfire.model.experts import reference_experts
from fewfire.model.initialise import initialise
from fewfire.model.noisy import NoisyRouter, noisy_gate
from fewfire.model.recurrent import Lstm, Recurrent

VOCAB, DIM = 30, 12


def gating(num_experts=8, top_k=2, branches=None):
    return RouterConfig(num_experts, top_k, "noisy_softmax", False, 1.0, False, branches=branches)


def model_config(router, hidden=12, **more):
    moe = MoEConfig(router, FeedForwardConfig(10, "relu", False))
    layers = (LayerConfig(LstmConfig(hidden), moe), LayerConfig(LstmConfig(DIM), None))
    return ModelConfig("fewfire", VOCAB, DIM, layers, NormConfig("rms", 1e-6), False, 64, **more)


def trained_looking(router):
    torch.manual_seed(1)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return router


def test_evaluation_is_softmax_over_the_best():
    router = trained_looking(NoisyRouter(DIM, gating())).eval()
    x = torch.randn(5, DIM)
    routing = router(x)
    logits = x @ router.weight.t()
    for t in range(5):
        best = logits[t].sort(descending=True, stable=True).indices[:2]
        assert routing.ids_TK[t].tolist() == best.tolist()
        torch.testing.assert_close(routing.weights_TK[t], torch.softmax(logits[t][best], -1))
    assert routing.load_TE is None
    assert torch.equal(router(x).weights_TK, routing.weights_TK)


def test_training_draws_noise_of_the_learned_spread():
    torch.manual_seed(0)
    clean, spread = torch.zeros(20000, 2), torch.tensor([[1.0, 3.0]]).expand(20000, 2)
    gate = noisy_gate(clean, spread, 1)
    assert gate.ids_Rk.float().mean() == pytest.approx(0.5, abs=0.02)
    # P(x, e): e's own noise anew against what the other drew, whose chance is 1/2 on average.
    assert gate.load_RN.mean(dim=0).tolist() == pytest.approx([0.5, 0.5], abs=0.02)


def test_load_is_the_chance_to_be_chosen_again():
    """Equations 8-9 against counting: fix the others' noise, draw one expert's anew many times."""
    torch.manual_seed(3)
    clean, spread, k = torch.randn(1, 5), torch.rand(1, 5) + 0.2, 2
    torch.manual_seed(4)
    gate = noisy_gate(clean, spread, k)
    torch.manual_seed(4)
    noisy = clean + torch.randn_like(clean) * spread  # the draw that the gate saw
    assert set(gate.ids_Rk[0].tolist()) == set(noisy.topk(k).indices[0].tolist())
    for e in range(5):
        others = torch.cat((noisy[0, :e], noisy[0, e + 1 :]))
        threshold = float(others.sort(descending=True).values[k - 1])
        chance = 0.5 * (1 + math.erf((float(clean[0, e]) - threshold) / float(spread[0, e]) / math.sqrt(2)))
        assert float(gate.load_RN[0, e]) == pytest.approx(chance, abs=1e-5)


def test_all_experts_chosen_is_certain():
    assert noisy_gate(torch.randn(3, 4), torch.ones(3, 4), 4).load_RN.tolist() == [[1.0] * 4] * 3


def test_hierarchy_multiplies_the_gates_of_both_levels():
    router = trained_looking(NoisyRouter(DIM, gating(12, 4, branches=3))).eval()
    x = torch.randn(6, DIM)
    routing = router(x)
    outer, inner = x @ router.branch.weight.t(), (x @ router.weight.t()).view(6, 3, 4)
    for t in range(6):
        want = {}
        branches = outer[t].topk(2)
        for b, p in zip(branches.indices.tolist(), torch.softmax(branches.values, -1).tolist()):
            best = inner[t, b].topk(2)
            for j, g in zip(best.indices.tolist(), torch.softmax(best.values, -1).tolist()):
                want[b * 4 + j] = p * g
        got = dict(zip(routing.ids_TK[t].tolist(), routing.weights_TK[t].tolist()))
        assert got == pytest.approx(want, abs=1e-6)
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.ones(6))
    torch.testing.assert_close(routing.scores_TE.sum(1), torch.ones(6))


def test_hierarchical_load_follows_its_formula():
    """Load_ij = Load_primary(X)_i * Load_i(X^(i))_j / |X^(i)|."""
    router = trained_looking(NoisyRouter(DIM, gating(6, 1, branches=2)))
    x = torch.randn(40, DIM)
    routing = router(x)
    total = routing.load_TE.sum(dim=0)
    branch_of = routing.ids_TK[:, 0] // 3
    sizes = torch.bincount(branch_of, minlength=2)
    assert (routing.load_TE.view(40, 2, 3).sum(-1) > 0).nonzero()[:, 1].tolist() == branch_of.tolist()
    assert sizes.min() > 0 and 0 < total.sum() < 80
    assert balance.cv_squared(total).requires_grad


def test_gating_starts_equal_and_both_losses_have_gradients():
    torch.manual_seed(0)
    router = NoisyRouter(DIM, gating(8, 2))
    assert all(not p.any() for p in router.parameters())
    routing = router(torch.randn(400, DIM))
    assert balance.cv_squared(routing.load_TE.sum(0)) < 0.02
    gates = torch.zeros(400, 8).scatter(1, routing.ids_TK, routing.weights_TK)
    loss = balance.importance_loss(gates) + balance.cv_squared(routing.load_TE.sum(0))
    loss.backward()
    assert router.weight.grad.abs().sum() > 0 and router.noise.weight.grad.abs().sum() > 0


def test_no_tokens():
    for branches in (None, 2):
        routing = NoisyRouter(DIM, gating(8, 4, branches))(torch.zeros(0, DIM))
        assert routing.ids_TK.shape == (0, 4) and routing.load_TE.shape == (0, 8)


@torch.no_grad()
def test_lstm_is_its_definition():
    torch.manual_seed(0)
    lstm = Lstm(DIM, LstmConfig(7))
    for parameter in lstm.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model = build_model(model_config(gating(), hidden=7)).eval()
    model.layers[0].attention = lstm
    x = torch.randn(2, 6, DIM)
    hidden, cell, rows = torch.zeros(2, 7), torch.zeros(2, 7), []
    for t in range(6):
        hidden, cell = lstm.step(x[:, t], hidden, cell)
        rows.append(lstm.out(hidden))
    context = make_context(torch.zeros(2, 6, dtype=torch.long), None, None)
    torch.testing.assert_close(lstm(x, context), torch.stack(rows, dim=1), rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_stack_by_hand():
    """Residuals around every layer, a sigmoid behind the experts, nothing normed (appendix C.1)."""
    torch.manual_seed(0)
    model = build_model(model_config(gating())).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    ids = torch.randint(0, VOCAB, (1, 5))
    context = make_context(ids, None, None)
    x = model.embed.weight[ids]
    x = x + model.layers[0].attention(x, context)
    moe = model.layers[0].ffn
    x = x + torch.sigmoid(reference_experts(moe.experts, x[0], moe.router(x[0])))
    x = x + model.layers[1].attention(x, context)
    torch.testing.assert_close(model(ids), x @ model.head.weight.t(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("branches", "hidden"), [(None, 12), (None, 7), (2, 12), (2, 7)])
@torch.no_grad()
def test_cache_chunks_and_padding_change_nothing(branches, hidden):
    torch.manual_seed(0)
    model = build_model(model_config(gating(8, 4, branches), hidden)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    assert isinstance(model, Recurrent)
    ids = torch.randint(0, VOCAB, (2, 9))
    full = model(ids)
    for sizes in ([1] * 9, [4, 5]):
        cache = model.new_cache()
        got = torch.cat([model(part, cache) for part in ids.split(sizes, dim=1)], dim=1)
        torch.testing.assert_close(got, full, rtol=0, atol=1e-5)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, [0, 10]] = mask[1, [3, 4]] = False
    padded = torch.zeros(2, 11, dtype=torch.long).masked_scatter(mask, ids)
    torch.testing.assert_close(model(padded, mask_BT=mask)[mask].view_as(full), full, rtol=0, atol=1e-5)


def test_one_batch_is_overfitted_with_balanced_experts():
    torch.manual_seed(0)
    model = build_model(model_config(gating(4, 2)))
    initialise(model, 2, seed=0, std=0.1)
    assert not model.layers[0].ffn.router.weight.any()  # gates keep their zeros
    ids = torch.randint(0, VOCAB, (4, 12))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(120):
        seen = []
        logits = model(ids[:, :-1], observe=lambda layer, routing: seen.append(routing))  # noqa: B023
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        aux = sum(balance.cv_squared(routing.load_TE.sum(0)) for routing in seen)
        optimizer.zero_grad()
        (loss + 0.1 * aux).backward()
        optimizer.step()
    assert loss < 0.3
    assert len(seen) == 1


def test_an_attention_layer_is_refused():
    config = model_config(gating())
    mixed = (*config.layers, LayerConfig(AttentionConfig(2, 2, 6, 1.0, None), None))
    with pytest.raises(ConfigError, match="layer 2 of a recurrent model mixes tokens by AttentionConfig"):
        build_model(ModelConfig("fewfire", VOCAB, DIM, mixed, config.norm, False, 64))
