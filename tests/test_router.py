"""Routers against cases worked by hand: every score rule, groups, ties, capacity, the selection bias, gradients."""

import math

import pytest
import torch

from fewfire.config import FeedForwardConfig, GroupConfig, MoEConfig, RouterConfig
from fewfire.errors import ConfigError
from fewfire.model.moe import MoELayer
from fewfire.model.router import Router, keep_best_groups, route, within_capacity


def rule(num_experts=4, top_k=2, score="softmax", renormalize=False, scale=1.0, select_bias=False, **more):
    return RouterConfig(num_experts, top_k, score, renormalize, scale, select_bias, **more)


def logs(*probabilities):
    """Logits whose softmax is `probabilities`."""
    return torch.tensor([probabilities]).log()


def sigmoid_inverse(*scores):
    return torch.logit(torch.tensor([scores]))


def check_routing(routing, ids, weights):
    assert routing.ids_TK.tolist() == [ids]
    assert routing.ids_TK.dtype == torch.int64
    assert routing.weights_TK.dtype == torch.float32
    torch.testing.assert_close(routing.weights_TK, torch.tensor([weights]), rtol=1e-6, atol=1e-6)


def test_softmax_keeps_the_scores():
    check_routing(route(logs(0.1, 0.4, 0.2, 0.3), rule()), [1, 3], [0.4, 0.3])


def test_softmax_renormalized():
    check_routing(route(logs(0.1, 0.4, 0.2, 0.3), rule(renormalize=True)), [1, 3], [4 / 7, 3 / 7])


def test_scale_comes_after_renormalization():
    check_routing(route(logs(0.1, 0.4, 0.2, 0.3), rule(renormalize=True, scale=2.5)), [1, 3], [10 / 7, 7.5 / 7])


def test_renormalize_eps_is_in_the_denominator():
    check_routing(route(logs(0.1, 0.4, 0.2, 0.3), rule(renormalize=True, renormalize_eps=0.3)), [1, 3], [0.4, 0.3])


def test_softmax_selected_is_softmax_over_the_chosen():
    logits = torch.tensor([[0.0, math.log(3.0), -5.0, math.log(2.0)]])
    check_routing(route(logits, rule(score="softmax_selected")), [1, 3], [0.6, 0.4])
    check_routing(route(logits, rule(renormalize=True)), [1, 3], [0.6, 0.4])  # the same thing, the other order


def test_sigmoid_with_bias_groups_by_top2_sum():
    # Groups {0,1} {2,3} {4,5}. Biased: .9 .1 | .55 .6 | .5 .2: sums 1.0, 1.15, .7: the first group holds the best
    # expert and comes second, the third group is out.
    scores = (0.9, 0.1, 0.35, 0.6, 0.5, 0.2)
    bias = torch.tensor([0.0, 0.0, 0.2, 0.0, 0.0, 0.0])
    config = rule(6, 3, "sigmoid", True, 2.0, True, groups=GroupConfig(3, 2, "top2_sum"), renormalize_eps=1e-20)
    total = 0.9 + 0.6 + 0.35
    check_routing(
        route(sigmoid_inverse(*scores), config, bias), [0, 3, 2], [2 * 0.9 / total, 2 * 0.6 / total, 2 * 0.35 / total]
    )


def test_top2_sum_counts_two_experts_of_a_larger_group():
    # Of three each: best two 1.0 against 1.1, all three 1.3 against 1.1.
    config = rule(6, 1, "sigmoid", groups=GroupConfig(2, 1, "top2_sum"))
    check_routing(route(sigmoid_inverse(0.6, 0.4, 0.3, 0.55, 0.55, 1e-6), config), [3], [0.55])


def test_top2_sum_masks_with_minus_infinity():
    # All biased scores of the kept group are negative: a mask of 0 would let the others in.
    config = rule(4, 2, "sigmoid", False, 1.0, True, groups=GroupConfig(2, 1, "top2_sum"))
    bias = torch.tensor([-1.0, -1.0, -3.0, -3.0])
    check_routing(route(sigmoid_inverse(0.2, 0.3, 0.9, 0.8), config, bias), [1, 0], [0.3, 0.2])


def test_groups_by_max():
    # Group sums would prefer {2,3}; the best single expert is in {0,1}.
    config = rule(4, 2, groups=GroupConfig(2, 1, "max"), scale=16.0)
    check_routing(route(logs(0.4, 0.05, 0.28, 0.27), config), [0, 1], [6.4, 0.8])


def test_groups_of_one_and_all_groups():
    choice = torch.tensor([[0.3, 0.1, 0.2]])
    assert torch.equal(keep_best_groups(choice, GroupConfig(1, 1, "top2_sum")), choice)
    assert torch.equal(keep_best_groups(choice, GroupConfig(3, 3, "max")), choice)
    kept = keep_best_groups(choice, GroupConfig(3, 1, "top2_sum"))  # a group of one expert has no second
    assert kept.tolist() == [[pytest.approx(0.3), -math.inf, -math.inf]]


def test_sigmoid_selected():
    check_routing(
        route(sigmoid_inverse(0.2, 0.7, 0.9, 0.4), rule(score="sigmoid_selected", weight_on="input")),
        [2, 1],
        [0.9, 0.7],
    )


def test_plain_sigmoid_chooses_by_score_plus_bias():
    config = rule(3, 2, "sigmoid", True, 1.0, True)
    check_routing(route(sigmoid_inverse(0.2, 0.6, 0.5), config, torch.tensor([0.5, 0.0, 0.0])), [0, 1], [0.25, 0.75])


def test_sparsemixer():
    """Round 1: best 2.0; those within 2 * jitter of it, relative to max(|l|, best), share a softmax. Round 2: without
    the first. The two weights are not normalised together."""
    logits = torch.tensor([[1.0, 2.0, 1.9, -3.0]])
    first = 1 / (1 + math.exp(-0.1))  # (2 - 1.9) / 2 = .05 <= .1 stays; (2 - 1) / 2 goes
    second = 1.0  # best 1.9: (1.9 - 1) / 1.9 > .1: alone
    check_routing(route(logits, rule(score="sparsemixer", jitter=0.05)), [1, 2], [first, second])
    everyone = torch.softmax(logits, -1)[0, 1].item()
    without = 1 / (1 + math.exp(-0.9) + math.exp(-4.9))
    check_routing(route(logits, rule(score="sparsemixer", jitter=10.0)), [1, 2], [everyone, without])


def test_sparsemixer_measures_distance_by_the_larger_of_logit_and_best():
    # (2 - 1) / max(1, 2) = .5 stays under 2 * .3; by |l| alone it would be 1 and go. -5: 7 / 5 goes.
    logits = torch.tensor([[1.0, 2.0, -5.0]])
    config = rule(3, 1, "sparsemixer", jitter=0.3)
    check_routing(route(logits, config), [1], [1 / (1 + math.exp(-1))])


def test_sparsemixer_with_negative_logits_and_ties():
    # factor is max(|l|, best) per expert: for l = -2, best = -1: (-1 + 2) / 2 = .5 <= 2 * .25
    logits = torch.tensor([[-2.0, -1.0, -1.0]])
    total = math.exp(-1) + 2 * math.exp(0)
    second = 1 / (1 + math.exp(-1))
    check_routing(route(logits, rule(3, 2, "sparsemixer", jitter=0.25)), [1, 2], [1 / total, second])


@pytest.mark.parametrize("score", ["softmax", "softmax_selected", "sigmoid", "sigmoid_selected", "sparsemixer"])
def test_ties_go_to_the_lower_id(score):
    config = rule(9, 3, score, jitter=0.1)
    ids = route(torch.zeros(5, 9), config).ids_TK
    assert ids.tolist() == [[0, 1, 2]] * 5
    logits = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]])
    assert route(logits, config).ids_TK.tolist() == [[1, 3, 4]]


def test_group_ties_go_to_the_lower_group():
    for score in ("max", "top2_sum"):
        config = rule(8, 2, "sigmoid", groups=GroupConfig(4, 2, score))
        assert route(torch.zeros(1, 8), config).ids_TK.tolist() == [[0, 1]]


@pytest.mark.parametrize("score", ["softmax", "softmax_selected", "sigmoid", "sigmoid_selected", "sparsemixer"])
def test_one_expert_and_no_tokens(score):
    config = rule(1, 1, score, jitter=0.1)
    routing = route(torch.tensor([[0.3], [-2.0]]), config)
    assert routing.ids_TK.tolist() == [[0], [0]]
    want = torch.sigmoid(torch.tensor([[0.3], [-2.0]])) if score.startswith("sigmoid") else torch.ones(2, 1)
    torch.testing.assert_close(routing.weights_TK, want)
    empty = route(torch.zeros(0, 5), rule(5, 3, score, renormalize=True, jitter=0.1))
    assert empty.ids_TK.shape == empty.weights_TK.shape == (0, 3)
    assert empty.scores_TE.shape == (0, 5)


def test_select_bias_changes_choice_never_weights():
    torch.manual_seed(0)
    logits, config = torch.randn(50, 8), rule(8, 3, "sigmoid", select_bias=True)
    bias = torch.randn(8) * 2
    plain, biased = route(logits, config, torch.zeros(8)), route(logits, config, bias)
    assert not torch.equal(plain.ids_TK, biased.ids_TK)
    torch.testing.assert_close(biased.weights_TK, torch.sigmoid(logits).gather(1, biased.ids_TK), rtol=0, atol=0)
    assert torch.equal(biased.scores_TE, plain.scores_TE)
    want = (torch.sigmoid(logits) + bias).sort(dim=-1, descending=True).indices[:, :3]
    assert torch.equal(biased.ids_TK, want)


@pytest.mark.parametrize(
    "config",
    [
        rule(6, 2, "softmax", renormalize=True, scale=1.7),
        rule(6, 2, "softmax_selected"),
        rule(6, 3, "sigmoid", True, 2.5, groups=GroupConfig(3, 2, "top2_sum"), renormalize_eps=1e-20),
        rule(6, 2, "sigmoid_selected"),
        rule(6, 2, "sparsemixer", jitter=0.3),
    ],
    ids=lambda config: config.score,
)
def test_weights_have_the_gradient_of_their_formula(config):
    """Against central differences in float64; the choice itself is locally constant."""
    torch.manual_seed(1)
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: route(x, config).weights_TK, (logits,), eps=1e-6, atol=1e-5)


def test_scores_have_a_gradient_and_the_bias_none():
    router = Router(5, rule(4, 2, "sigmoid", True, 1.0, True))
    routing = router(torch.randn(3, 5))
    assert routing.scores_TE.requires_grad and routing.logits_TE.requires_grad
    assert not router.select_bias.requires_grad
    assert "select_bias" in router.state_dict() and "select_bias" not in dict(router.named_parameters())


def test_projection_is_float32_whatever_the_input_and_autocast():
    torch.manual_seed(0)
    router = Router(64, rule(8, 2, bias=True))
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.bias)
    x = torch.randn(7, 64).bfloat16()
    want = x.float() @ router.weight.float().t() + router.bias
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x)
    assert routing.logits_TE.dtype == torch.float32
    torch.testing.assert_close(routing.logits_TE, want, rtol=1e-6, atol=1e-5)


def test_jitter_is_for_training_only():
    torch.manual_seed(0)
    router, x = Router(16, rule(jitter=0.2)), torch.randn(5, 16)
    torch.nn.init.normal_(router.weight)
    router.train()
    assert not torch.equal(router(x).logits_TE, router(x).logits_TE)
    router.eval()
    torch.testing.assert_close(router(x).logits_TE, x @ router.weight.t())


def test_capacity_keeps_the_earlier_positions_of_each_sequence():
    ids = torch.tensor([[0], [0], [1], [0], [0], [1], [1], [0]])
    kept = within_capacity(ids, 3, 2, length=4)
    assert kept.flatten().tolist() == [True, True, True, False, True, True, True, True]
    one = within_capacity(ids, 3, 2)
    assert one.flatten().tolist() == [True, True, True, False, False, True, False, False]
    assert within_capacity(ids[:0], 3, 2, length=4).shape == (0, 1)


def test_a_dropped_token_gets_nothing_and_rows_do_not_share_capacity():
    torch.manual_seed(0)
    moe = MoELayer(8, MoEConfig(rule(2, 1, capacity=2), FeedForwardConfig(5, "relu", False)))
    torch.nn.init.normal_(moe.router.weight)
    torch.nn.init.normal_(moe.experts.down)
    x = torch.randn(1, 8).expand(3, 4, 8)  # all tokens alike: all to one expert
    y = moe(x)
    assert torch.equal(y[:, 2:], torch.zeros(3, 2, 8))
    assert y[:, :2].abs().sum() > 0
    torch.testing.assert_close(y, moe(x[:1]).expand(3, 4, 8))


def test_bad_configurations_are_named():
    with pytest.raises(ConfigError, match="top_k \\(5\\) exceeds num_experts \\(4\\)"):
        rule(4, 5)
    with pytest.raises(ConfigError, match="groups"):
        rule(6, 2, groups=GroupConfig(4, 2, "max"))
    with pytest.raises(ConfigError, match="exceeds the experts of 1 groups"):
        rule(6, 4, groups=GroupConfig(3, 1, "max"))
    with pytest.raises(ConfigError, match="must divide num_experts"):
        rule(16, 4, "noisy_softmax", branches=5)
    with pytest.raises(ConfigError, match="square"):
        rule(16, 3, "noisy_softmax", branches=4)
