"""Training speed of a MoE beside a dense model of equal active FLOPs, interleaved in one run.

Prints tokens/s of both, the median ratio and its spread. Before timing, the MoE's gradients are checked against the
plain loop over experts. Bar: 0.80 at 16 experts, top-2 and at least 8,192 tokens a step.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from machine import describe

from fewfire import kernels
from fewfire.balance import load_balancing_loss, mean_over_layers, z_loss
from fewfire.config import FeedForwardConfig
from fewfire.model.decoder import Decoder
from fewfire.model.experts import Experts, reference_experts
from fewfire.model.initialise import initialise
from fewfire.model.moe import MoELayer
from fewfire.model.router import Router
from fewfire.train.architecture import build_config
from fewfire.train.loss import head_cross_entropy
from fewfire.train.optimizer import make_optimizer
from fewfire.train.settings import BalanceSettings, ModelSettings, OptimizerSettings

VOCAB = 4096


class Subject:
    """A model, its optimizer, and one training step on random tokens (balance losses included)."""

    def __init__(self, settings: ModelSettings, dtype: torch.dtype):
        config = build_config(settings, BalanceSettings(), vocab_size=VOCAB, seq_len=256, eos_token_id=0)
        self.model, self.dtype = Decoder(config), dtype
        initialise(self.model, len(config.layers), 0)
        self.optimizer = make_optimizer(self.model, OptimizerSettings())

    def step(self, tokens_BL: torch.Tensor) -> float:
        begin = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        terms: list[torch.Tensor] = []

        def observe(_: int, routing) -> None:
            terms.append(load_balancing_loss(routing) + 0.1 * z_loss(routing))

        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            hidden = self.model.hidden(tokens_BL[:, :-1], observe=observe)
        loss = head_cross_entropy(
            hidden.flatten(0, 1), self.model.head.weight, tokens_BL[:, 1:].flatten(), dtype=self.dtype
        )
        (loss + 0.01 * mean_over_layers(terms)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return time.perf_counter() - begin


def check_gradients() -> None:
    """Raise unless the grouped experts' outputs and gradients equal the double loop's."""
    torch.manual_seed(0)
    router_config = (
        build_config(ModelSettings(num_experts=16, top_k=2), BalanceSettings(), vocab_size=8, seq_len=8, eos_token_id=0)
        .layers[0]
        .ffn.router
    )  # type: ignore[union-attr]
    experts, router = Experts(24, 16, FeedForwardConfig(20, "silu", True)), Router(24, router_config)
    x = torch.randn(100, 24, requires_grad=True)
    routing = router(x)
    for one, two in zip(
        torch.autograd.grad(experts(x, routing).square().sum(), list(experts.parameters()), retain_graph=True),
        torch.autograd.grad(reference_experts(experts, x, routing).square().sum(), list(experts.parameters())),
    ):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


def compare(model_dim: int, expert_dim: int, precision: str, tokens: int, pairs: int, loop: bool) -> None:
    """One line: dense and MoE tokens/s and the ratio, over `pairs` interleaved pairs of steps."""
    shape = dict(
        model_dim=model_dim, num_layers=4, num_heads=model_dim // 64, num_kv_heads=model_dim // 64, head_dim=64
    )
    moe_settings = ModelSettings(num_experts=16, top_k=2, expert_dim=expert_dim, **shape)
    # the router costs a token as much as num_experts / 3 units of width: the dense twin gets them, rounded up
    dense_settings = ModelSettings(family="llama", num_experts=0, dense_dim=2 * expert_dim + 8, **shape)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[precision]
    moe, dense = Subject(moe_settings, dtype), Subject(dense_settings, dtype)
    if loop:
        for block in moe.model.layers:
            assert isinstance(block.ffn, MoELayer) and isinstance(block.ffn.experts, Experts)
            block.ffn.experts.forward = _by_loop(block.ffn.experts)  # type: ignore[method-assign]
    batch = torch.randint(VOCAB, (tokens // 256, 257), generator=torch.Generator().manual_seed(0))
    for subject in (moe, dense):
        subject.step(batch)
    times = [(dense.step(batch), moe.step(batch)) for _ in range(pairs)]
    ratios = sorted(d / m for d, m in times)
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    dense_speed, moe_speed = (tokens / statistics.median(column) for column in zip(*times))
    name = "plain loop over experts" if loop else "grouped"
    print(
        f"d {model_dim}, width {expert_dim}, {precision}, {tokens} tokens a step, {name}: "
        f"dense {dense_speed:,.0f} tok/s, MoE {moe_speed:,.0f} tok/s, "
        f"ratio {statistics.median(ratios):.2f} ({low:.2f}-{high:.2f}, {pairs} pairs)",
        flush=True,
    )


def _by_loop(experts: Experts):
    """The same bank with one autograd node an expert and operation: what a plain implementation does."""

    def forward(x_TD: torch.Tensor, routing) -> torch.Tensor:
        order_A, offsets = kernels.group_by_expert(routing.ids_TK, experts.num_experts, routing.kept_TK)
        weights_A = routing.weights_TK.flatten()[order_A]
        return experts._by_group(x_TD, weights_A, order_A // routing.ids_TK.shape[1], offsets.tolist())

    return forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--loop", action="store_true", help="also time the plain loop over experts")
    arguments = parser.parse_args()
    kernels.keep_freed_memory()
    check_gradients()
    print(f"training speed: {describe()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    for model_dim, expert_dim in ((256, 256), (512, 512)):
        for precision in ("f32", "bf16"):
            compare(model_dim, expert_dim, precision, arguments.tokens, arguments.pairs, loop=False)
    if arguments.loop:
        compare(256, 256, "f32", arguments.tokens, arguments.pairs, loop=True)


if __name__ == "__main__":
    main()
