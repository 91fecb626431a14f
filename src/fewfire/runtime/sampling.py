"""From logits to the next token. Pure functions on one row of logits; V = vocabulary.

The order is transformers': repetition penalty, temperature, top-k, top-p, min-p, draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewfire.config import check
from fewfire.errors import FewfireError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 takes the most likely one and needs no other field but the penalty.

    `top_k` keeps the k most likely tokens (None: all); `top_p` the fewest most likely ones that reach the
    probability p (1: all); `min_p` those at least p times as likely as the best (0: all). `repetition_penalty` r
    divides positive and multiplies negative logits of every token in the text so far, the prompt included (1: off).
    `seed` None draws a new one. Source: CTRL (1909.05858, section 4.1), nucleus (1904.09751), min-p (2407.01082).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"temperature ({self.temperature}) must be 0 (the most likely token) or more; 0.7 to 1 is usual",
        )
        check(self.top_k is None or self.top_k >= 1, f"top_k ({self.top_k}) must be at least 1; leave it out for all")
        check(0 < self.top_p <= 1, f"top_p ({self.top_p}) must be above 0 and at most 1; 1 keeps all")
        check(0 <= self.min_p < 1, f"min_p ({self.min_p}) must be at least 0 and below 1; 0 keeps all")
        check(
            0.01 <= self.repetition_penalty <= 100,
            f"repetition_penalty ({self.repetition_penalty}) must be from 0.01 to 100; 1 is off, 1.1 is mild",
        )
        check(
            self.seed is None or 0 <= self.seed < 2**63,
            f"seed ({self.seed}) must be a whole number from 0 to 2^63 - 1",
        )


def penalise_repetition(logits_V: Tensor, seen_ids: Tensor, penalty: float) -> Tensor:
    """A copy in which each token of `seen_ids` (int64, any length) is `penalty` times less likely to win."""
    seen = logits_V[seen_ids]
    return logits_V.index_put((seen_ids,), torch.where(seen > 0, seen / penalty, seen * penalty))


def keep_top_k(logits_V: Tensor, top_k: int) -> Tensor:
    """-inf for all below the k-th largest; equal ones stay."""
    if top_k >= logits_V.shape[0]:
        return logits_V
    return logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], float("-inf"))


def keep_top_p(logits_V: Tensor, top_p: float) -> Tensor:
    """-inf for all after the fewest most likely tokens whose probabilities reach `top_p`; one at least stays."""
    if top_p >= 1:
        return logits_V
    ordered, ids = logits_V.sort(descending=True, stable=True)
    probabilities = torch.softmax(ordered.double(), dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    return logits_V.index_fill(0, ids[before >= top_p], float("-inf"))


def keep_min_p(logits_V: Tensor, min_p: float) -> Tensor:
    """-inf for all that are less than `min_p` times as likely as the most likely token."""
    if min_p <= 0:
        return logits_V
    return logits_V.masked_fill(logits_V < logits_V.max() + math.log(min_p), float("-inf"))


def adjusted_logits(logits_V: Tensor, sampling: Sampling, seen_ids: Tensor) -> Tensor:
    """What the draw reads at a temperature above 0: all rules of `sampling`, in order, on a copy."""
    if sampling.repetition_penalty != 1:
        logits_V = penalise_repetition(logits_V, seen_ids, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits_V
    # the best is 0, and stays it: a tiny temperature neither overflows nor becomes 0 as float32
    logits_V = (logits_V - logits_V.max()) / max(sampling.temperature, 1e-30)
    if sampling.top_k is not None:
        logits_V = keep_top_k(logits_V, sampling.top_k)
    return keep_min_p(keep_top_p(logits_V, sampling.top_p), sampling.min_p)


class Sampler:
    """Chooses tokens for one text. Remembers the text for the penalty, and its own random state.

    The same seed, sampling and logits give the same tokens, whatever else the process draws: each choice uses
    exactly one uniform number, against cumulated float64 probabilities in the order of ids.
    `seed` is the one in use, also where none was given.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int] = ()):
        self.sampling = sampling
        self.seed = sampling.seed if sampling.seed is not None else torch.Generator().seed() % 2**63
        self._generator = torch.Generator().manual_seed(self.seed)
        self._seen = dict.fromkeys(prompt_ids) if sampling.repetition_penalty != 1 else {}

    def choose(self, logits_V: Tensor) -> int:
        """The next token of float32 logits; ties at temperature 0 go to the lower id.

        Raises: FewfireError where the model gave no number.
        """
        if not math.isfinite(logits_V.max().item()):
            raise FewfireError("the model's logits hold NaN or infinity; its weights or its number format are broken")
        logits_V = adjusted_logits(logits_V, self.sampling, torch.tensor(list(self._seen), dtype=torch.int64))
        if self.sampling.temperature == 0:
            chosen = int(torch.argmax(logits_V))
        else:
            cumulated_V = torch.softmax(logits_V.double(), dim=-1).cumsum(dim=-1)
            draw = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulated_V[-1]
            chosen = int(torch.searchsorted(cumulated_V, draw, right=True))
            if chosen == len(cumulated_V):  # the draw was rounded up to the sum
                chosen = int(torch.nonzero(logits_V > float("-inf"))[-1])
        if self.sampling.repetition_penalty != 1:
            self._seen[chosen] = None
        return chosen
