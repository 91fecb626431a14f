"""Balance: every loss by its value at balance and at collapse, and the rule that moves the selection bias."""

import math

import pytest
import torch

from fewfire.balance import (
    LoadMonitor,
    SelectBiasUpdate,
    count_load,
    cv_squared,
    importance_loss,
    load_balancing_loss,
    load_health,
    noise_floor,
    z_loss,
)
from fewfire.config import RouterConfig
from fewfire.model.router import route


def config(experts: int, top_k: int, score: str = "softmax") -> RouterConfig:
    return RouterConfig(experts, top_k, score, renormalize=False, scale=1.0, select_bias=False)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_selected"])
@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (8, 2), (6, 6)])
def test_loss_is_one_at_balance_and_e_over_k_at_collapse(experts, top_k, score):
    cyclic = torch.stack([torch.roll(torch.arange(experts).float(), s) for s in range(experts)])  # each expert equally
    assert load_balancing_loss(route(cyclic, config(experts, top_k, score))).item() == pytest.approx(1.0, abs=1e-6)
    crowd = torch.full((16, experts), -30.0)
    crowd[:, :top_k] = 0.0
    want = experts / top_k
    assert load_balancing_loss(route(crowd, config(experts, top_k, score))).item() == pytest.approx(want, rel=1e-3)


def test_two_collapsed_layers_do_not_cancel():
    left, right = torch.full((8, 4), -30.0), torch.full((8, 4), -30.0)
    left[:, :2], right[:, 2:] = 0.0, 0.0
    losses = [load_balancing_loss(route(logits, config(4, 2))) for logits in (left, right)]
    assert torch.stack(losses).mean().item() == pytest.approx(2.0, rel=1e-3)


def test_gradient_pushes_the_crowded_expert_down():
    logits = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    logits[:, 2] += 2.0
    logits.requires_grad_()
    load_balancing_loss(route(logits, config(4, 1))).backward()
    assert logits.grad.sum(dim=0).argmax().item() == 2


def test_z_loss_by_hand_and_not_shift_invariant():
    assert z_loss(route(torch.zeros(5, 8), config(8, 2))).item() == pytest.approx(math.log(8) ** 2, rel=1e-6)
    assert z_loss(route(torch.ones(5, 8), config(8, 2))).item() == pytest.approx((math.log(8) + 1) ** 2, rel=1e-6)


def test_losses_without_tokens():
    routing = route(torch.zeros(0, 4), config(4, 2))
    assert load_balancing_loss(routing).item() == 1.0
    assert z_loss(routing).item() == 0.0
    assert count_load(routing).tolist() == [0, 0, 0, 0]


def test_importance_by_hand():
    assert importance_loss(torch.full((3, 4), 0.25)).item() == 0.0
    assert cv_squared(torch.tensor([1.0, 3.0])).item() == pytest.approx(0.25)


def test_select_bias_moves_towards_the_starved_and_stays_centred():
    update, bias = SelectBiasUpdate(0.1), torch.zeros(4)
    logits = torch.tensor([[4.0, 3, 2, 1]]).repeat(10, 1)
    update.observe(0, route(logits, config(4, 2, "sigmoid")))
    update.apply({0: bias})
    torch.testing.assert_close(bias, torch.tensor([-0.1, -0.1, 0.1, 0.1]))
    update.apply({0: bias})  # nothing observed since: nothing moves
    torch.testing.assert_close(bias, torch.tensor([-0.1, -0.1, 0.1, 0.1]))


def test_dropped_slots_count_in_no_load():
    routing = route(torch.tensor([[2.0, 1, 0], [2, 1, 0]]), config(3, 2))
    routing = routing._replace(kept_TK=torch.tensor([[True, False], [True, True]]))
    assert count_load(routing).tolist() == [2, 1, 0]


def test_health_by_hand():
    health = load_health(3, torch.tensor([6, 2, 0, 0]))
    assert (health.layer, health.num_dead) == (3, 2)
    assert health.max_vio == pytest.approx(2.0)
    assert health.noise_floor == pytest.approx(math.sqrt(2 * math.log(4) / 2))
    assert load_health(0, torch.tensor([5, 5])).entropy_frac == pytest.approx(1.0)


def test_uniform_routing_stays_near_its_noise_floor():
    generator = torch.Generator().manual_seed(0)
    loads = [torch.bincount(torch.randint(64, (256 * 64,), generator=generator), minlength=64) for _ in range(20)]
    mean = sum(load_health(0, load).max_vio for load in loads) / len(loads)
    assert mean == pytest.approx(noise_floor(64, 256 * 64), rel=0.25)


def test_monitor_adds_up():
    monitor = LoadMonitor()
    for _ in range(2):
        monitor.observe(1, route(torch.tensor([[1.0, 0], [1, 0]]), config(2, 1)))
    assert [h.load for h in monitor.health()] == [(4, 0)]
