"""How well a model predicts given tokens: summed nats, and balance while it did. Ids in, numbers out; knows no text."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewfire.balance import LoadHealth, LoadMonitor

ROWS = 2048  # logits exist for this many rows at a time


@dataclass(frozen=True)
class Score:
    """`nats` summed over `tokens` targets; `health` of every MoE layer over all that was read."""

    nats: float
    tokens: int
    health: tuple[LoadHealth, ...]

    @property
    def nats_per_token(self) -> float:
        return self.nats / max(1, self.tokens)


@torch.no_grad()
def score_batches(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, autocast: torch.dtype | None = None
) -> Score:
    """`batches` of (tokens (B, L+1) int64, mask (B, L) bool: targets that count). The model's mode is restored."""
    was_training, monitor = model.training, LoadMonitor()
    model.eval()
    total, tokens = 0.0, 0
    context = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    for tokens_BL, mask_BL in batches:
        with context:
            hidden = model.hidden(tokens_BL[:, :-1], observe=monitor.observe)[mask_BL]  # type: ignore[operator]
            targets = tokens_BL[:, 1:][mask_BL]
            for start in range(0, len(targets), ROWS):
                logits = model.logits(hidden[start : start + ROWS])  # type: ignore[operator]
                rows = torch.nn.functional.cross_entropy(logits.float(), targets[start : start + ROWS], reduction="sum")
                total += float(rows.double())
        tokens += len(targets)
    model.train(was_training)
    return Score(total, tokens, tuple(monitor.health()))
