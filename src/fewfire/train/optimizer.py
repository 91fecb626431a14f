"""AdamW with decay groups, and the learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from fewfire.train.settings import OptimizerSettings


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Matrices (experts included) decay; embeddings, norms, biases and sinks do not. The same order every time."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_table = name in ("embed.weight", "positions.weight")
        (decayed if parameter.dim() >= 2 and not is_table else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.eps, fused=True)


def learning_rate(step: int, total_steps: int, settings: OptimizerSettings) -> float:
    """The rate of step `step` (0-based): linear warm-up, then cosine, or constant and a linear end (wsd)."""
    peak, floor = settings.learning_rate, settings.learning_rate * settings.min_rate_frac
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.schedule == "wsd":
        decay_steps = max(1, round(total_steps * settings.decay_frac))
        left = total_steps - step
        return peak if left >= decay_steps else floor + (peak - floor) * left / decay_steps
    span = max(1, total_steps - settings.warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - settings.warmup_steps) / span)))
