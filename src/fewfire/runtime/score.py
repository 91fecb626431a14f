"""How well a model predicts given tokens: summed nats, and balance while it did. Ids in, numbers out; knows no text."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewfire.balance import LoadHealth, LoadMonitor
from fewfire.model.moe import Observer

LOGITS = 2**25  # this many exist at a time, so that a large vocabulary does not cost memory


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
            nats = token_nats(model, tokens_BL, mask_BL, observe=monitor.observe)
        total += float(nats.double().sum())
        tokens += len(nats)
    model.train(was_training)
    return Score(total, tokens, tuple(monitor.health()))


@torch.no_grad()
def token_nats(model: nn.Module, tokens_BL: Tensor, mask_BL: Tensor, *, observe: Observer | None = None) -> Tensor:
    """Float32 nats of each target that counts, in the order of `mask_BL`'s True: tokens (B, L+1), mask (B, L)."""
    hidden = model.hidden(tokens_BL[:, :-1], observe=observe)[mask_BL]  # type: ignore[operator]
    targets = tokens_BL[:, 1:][mask_BL]
    rows = max(1, LOGITS // model.config.vocab_size)  # type: ignore[operator, union-attr]
    nats = [
        torch.nn.functional.cross_entropy(model.logits(part).float(), ids, reduction="none")  # type: ignore[operator]
        for part, ids in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(nats)
