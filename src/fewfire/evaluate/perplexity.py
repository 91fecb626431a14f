"""Nats of windows: batches of them go through the model, sums come out. Ids in, numbers out.

B windows a batch, L inputs of the longest. Knows no text and no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fewfire.errors import FewfireError
from fewfire.evaluate.windows import Window
from fewfire.runtime.score import token_nats

BATCH_TOKENS = 2048  # inputs, padding included, that go through the model at once
Progress = Callable[[int, float], None]  # tokens scored so far, their nats; first of all with none


@dataclass
class Tally:
    """Sums over scored tokens. `squares`: of each token's nats, for the standard error."""

    nats: float = 0.0
    squares: float = 0.0
    tokens: int = 0
    num_bytes: float = 0.0

    def add(self, nats: torch.Tensor, num_bytes: float) -> None:
        """Float64 nats of the targets of one window."""
        self.nats += float(nats.sum())
        self.squares += float(nats.square().sum())
        self.tokens += len(nats)
        self.num_bytes += num_bytes

    @property
    def nats_per_token(self) -> float:
        return self.nats / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        """exp of the mean nats; infinite where that exceeds any number."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def perplexity_error(self) -> float | None:
        """Standard error of the perplexity, were tokens independent; None below two tokens."""
        if self.tokens < 2:
            return None
        variance = max(0.0, self.squares / self.tokens - self.nats_per_token**2)
        return self.perplexity * math.sqrt(variance / (self.tokens - 1))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.inf


def score_windows(model: nn.Module, windows: Iterable[Window]) -> Iterator[tuple[Window, torch.Tensor]]:
    """Each window with the float64 nats (scored,) of its targets that count, in order.

    Raises: FewfireError where the model gives no numbers.
    """
    for batch in _batches(windows):
        longest = max(len(window.ids) for window in batch)
        tokens_BL = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask_BL = torch.zeros(len(batch), longest - 1, dtype=torch.bool)
        for row, window in enumerate(batch):
            size = len(window.ids)
            tokens_BL[row, :size] = torch.tensor(window.ids)
            mask_BL[row, size - 1 - window.scored : size - 1] = True
        nats = token_nats(model, tokens_BL, mask_BL).double()
        if bool(nats.isnan().any()):
            raise FewfireError("the model's logits hold NaN; its weights or its number format are broken")
        yield from zip(batch, nats.split([window.scored for window in batch]), strict=True)


def _batches(windows: Iterable[Window]) -> Iterator[Sequence[Window]]:
    """Neighbours together while the padded batch stays small; a causal model never sees the padding behind a text."""
    batch: list[Window] = []
    longest = 0
    for window in windows:
        inputs = len(window.ids) - 1
        if batch and max(longest, inputs) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch, longest = [], 0
        batch.append(window)
        longest = max(longest, inputs)
    if batch:
        yield batch
