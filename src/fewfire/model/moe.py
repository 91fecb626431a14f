"""The MoE layer: router + expert bank + shared expert. A plain nn.Module; usable in anybody's model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewfire.config import FeedForwardConfig, MoEConfig, RouterConfig
from fewfire.errors import ConfigError
from fewfire.model.experts import Experts
from fewfire.model.feedforward import FeedForward
from fewfire.model.noisy import NoisyRouter
from fewfire.model.router import Router
from fewfire.routing import ExpertBank, Routing

Observer = Callable[[int, Routing], None]  # (layer index, its routing)


class MoELayer(nn.Module):
    """y = sum over chosen experts of weight * expert(x), plus the shared expert. (..., D) -> (..., D).

    `forward` hands each Routing to `observe(layer, routing)`; nothing is stored.
    """

    def __init__(self, model_dim: int, config: MoEConfig, layer: int = 0):
        super().__init__()
        self.config, self.layer = config, layer
        noisy = config.router.score == "noisy_softmax"
        self.router: Router | NoisyRouter = (NoisyRouter if noisy else Router)(model_dim, config.router)
        self.experts: ExpertBank | Experts = Experts(
            model_dim, config.router.num_experts, config.expert, config.router.weight_on
        )
        self.shared = None if config.shared is None else FeedForward(model_dim, config.shared)
        self.shared_gate = nn.Linear(model_dim, 1, bias=False) if config.shared_gate else None

    def forward(self, x: Tensor, observe: Observer | None = None) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.router(x_TD, x.shape[-2] if x.dim() > 2 else None)
        if observe is not None:
            observe(self.layer, routing)
        y_TD = self.experts(x_TD, routing)
        if self.shared is not None:
            shared_TD = self.shared(x_TD)
            if self.shared_gate is not None:
                shared_TD = shared_TD * torch.sigmoid(self.shared_gate(x_TD))
            y_TD = y_TD + shared_TD
        return y_TD.reshape(x.shape)


class MoE(MoELayer):
    """An MoE layer by its dimensions: `fewfire.MoE(model_dim=512, expert_dim=1024, num_experts=16, top_k=2)`.

    `router`: a RouterConfig for any other rule than the default, which is softmax over the chosen experts
    (Mixtral's). Raises ConfigError where `router` disagrees with `num_experts` or `top_k`.
    """

    def __init__(
        self,
        model_dim: int,
        expert_dim: int,
        num_experts: int,
        top_k: int,
        *,
        router: RouterConfig | None = None,
        shared_dim: int = 0,
        activation: str = "silu",
        gated: bool = True,
    ):
        if router is None:
            router = RouterConfig(num_experts, top_k, "softmax", renormalize=True, scale=1.0, select_bias=False)
        if (router.num_experts, router.top_k) != (num_experts, top_k):
            raise ConfigError(
                f"router says {router.num_experts} experts, top {router.top_k}, the layer {num_experts}, top {top_k}; "
                "give both the same"
            )
        expert = FeedForwardConfig(expert_dim, activation, gated)  # type: ignore[arg-type]
        shared = FeedForwardConfig(shared_dim, activation, gated) if shared_dim else None  # type: ignore[arg-type]
        super().__init__(model_dim, MoEConfig(router, expert, shared))
