"""The dense feed-forward and the activations that experts share with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewfire.config import FeedForwardConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def activate(gate: Tensor | None, up: Tensor, config: FeedForwardConfig) -> Tensor:
    """What lies between the projections: elementwise, same shape out. `gate` is None where `config.gated` is False."""
    if config.clamp is not None:
        assert gate is not None
        alpha, limit = config.clamp
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * (gate * torch.sigmoid(alpha * gate))
    hidden = up if gate is None else gate
    hidden = ACTIVATIONS[config.activation](hidden)
    return hidden if gate is None else hidden * up


class FeedForward(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) where it is not gated. (..., D) -> (..., D)."""

    def __init__(self, model_dim: int, config: FeedForwardConfig):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(model_dim, config.hidden_dim, bias=config.bias) if config.gated else None
        self.up = nn.Linear(model_dim, config.hidden_dim, bias=config.bias)
        self.down = nn.Linear(config.hidden_dim, model_dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = None if self.gate is None else self.gate(x)
        return self.down(activate(gate, self.up(x), self.config))
