"""Experts: grouped = reference, outputs and all gradients, over odd sizes; one expert = dense."""

import pytest
import torch

from fewfire.config import FeedForwardConfig, RouterConfig
from fewfire.model.experts import Experts, reference_experts
from fewfire.model.feedforward import FeedForward
from fewfire.model.moe import MoE
from fewfire.model.router import route

CASES = [(0, 4, 2), (1, 4, 2), (7, 5, 3), (33, 8, 1), (64, 3, 3), (129, 16, 2)]
KINDS = [
    FeedForwardConfig(13, "silu", True),
    FeedForwardConfig(8, "gelu_tanh", True),
    FeedForwardConfig(9, "relu", False),
    FeedForwardConfig(11, "silu", True, bias=True),
    FeedForwardConfig(12, "swiglu_clamped", True, bias=True, clamp=(1.702, 7.0)),
]


def make_routing(num_tokens: int, num_experts: int, top_k: int, crowd: bool = False):
    config = RouterConfig(num_experts, top_k, "softmax", renormalize=True, scale=1.0, select_bias=False)
    logits = torch.randn(num_tokens, num_experts, requires_grad=True)
    shift = torch.zeros(num_experts)
    shift[:top_k] = 100.0 if crowd else 0.0
    return route(logits + shift, config), logits


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    probe = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    grads = torch.autograd.grad((output * probe).sum(), inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs)]


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.activation}-{'bias' if kind.bias else 'plain'}")
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), CASES)
def test_grouped_equals_reference(num_tokens, num_experts, top_k, kind, weight_on):
    torch.manual_seed(0)
    experts = Experts(10, num_experts, kind, weight_on)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(num_tokens, 10, requires_grad=True)
    routing, logits = make_routing(num_tokens, num_experts, top_k)
    inputs = [x, logits, *experts.parameters()]
    fast, slow = experts(x, routing), reference_experts(experts, x, routing)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)  # sums in another order
    if num_tokens:
        for name, got, want in zip(
            "x logits".split() + [n for n, _ in experts.named_parameters()],
            gradients(fast, inputs),
            gradients(slow, inputs),
        ):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_all_tokens_in_the_same_experts():
    torch.manual_seed(0)
    experts = Experts(6, 5, KINDS[0])
    x = torch.randn(17, 6)
    routing, _ = make_routing(17, 5, 2, crowd=True)
    assert set(routing.ids_TK.flatten().tolist()) == {0, 1}
    torch.testing.assert_close(experts(x, routing), reference_experts(experts, x, routing), rtol=1e-4, atol=1e-5)


def test_dropped_assignments_count_for_nothing():
    torch.manual_seed(0)
    experts = Experts(6, 5, KINDS[0])
    x = torch.randn(9, 6)
    routing, _ = make_routing(9, 5, 2)
    routing = routing._replace(kept_TK=torch.rand(9, 2) > 0.5)
    torch.testing.assert_close(experts(x, routing), reference_experts(experts, x, routing), rtol=1e-4, atol=1e-5)


def test_one_expert_equals_dense():
    torch.manual_seed(0)
    layer, dense = (
        MoE(model_dim=12, expert_dim=20, num_experts=1, top_k=1),
        FeedForward(12, KINDS[0].__class__(20, "silu", True)),
    )
    with torch.no_grad():
        dense.gate.weight.copy_(layer.experts.gate[0])
        dense.up.weight.copy_(layer.experts.up[0])
        dense.down.weight.copy_(layer.experts.down[0])
    x = torch.randn(3, 5, 12, requires_grad=True)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(layer(x), [x])[0], gradients(dense(x), [x])[0], rtol=1e-4, atol=1e-6)


def test_bf16_autocast_stays_near_float32():
    torch.manual_seed(0)
    experts = Experts(64, 8, FeedForwardConfig(48, "silu", True))
    x = torch.randn(200, 64)
    routing, _ = make_routing(200, 8, 2)
    exact = experts(x, routing)
    with torch.autocast("cpu", torch.bfloat16):
        rough = experts(x, routing)
    error = (rough - exact).norm() / exact.norm()
    assert 0 < error < 0.02  # bf16 keeps 8 bits: 0.4 % a rounding, three roundings deep
