"""Traces that nobody recorded: skewed as given counts are, with experts of the last token used again. Seeded.

E experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewfire.config import check
from fewfire.trace.file import Trace


def draw_trace(
    counts: Sequence[Sequence[float]], top_k: int, num_tokens: int, *, reuse: float = 0.0, seed: int = 0
) -> Trace:
    """`num_tokens` tokens, one document, whose load for each expert of each layer follows `counts` (one row a layer).

    Each token draws anew, and then keeps each expert of the token before that it did not draw, in place of one that it
    did, with probability `reuse`: loads stay what they were. Neighbouring tokens have more than `reuse` of their
    experts in common, by what chance and skew add: with OLMoE's counts of code 0.25 gives 0.45, near what was measured
    of that model. Weights are 1 / top_k.

    Raises: ConfigError for counts that are no load of `top_k` experts a token.
    Source: Madow 1949, systematic sampling, whose chance for each expert is exactly the one asked for.
    """
    check(0 <= reuse < 1, f"reuse ({reuse}) must lie between 0 and 1")
    check(num_tokens >= 1 and top_k >= 1 and len(counts) >= 1, "a trace needs a token, a layer and an expert at least")
    generator = torch.Generator().manual_seed(seed)
    rows = [_draw_layer(_chances(row, top_k), top_k, num_tokens, reuse, generator) for row in counts]
    ids_TLK = torch.tensor(rows, dtype=torch.int32).permute(1, 0, 2).contiguous()
    num_experts = tuple(len(row) for row in counts)
    return Trace(
        ids_TLK.to(torch.int16) if max(num_experts) <= 2**15 else ids_TLK,
        torch.full(ids_TLK.shape, 1 / top_k, dtype=torch.float16),
        (0, num_tokens),
        tuple(range(len(counts))),
        num_experts,
        (top_k,) * len(counts),
        "drawn",
    )


def _chances(row: Sequence[float], top_k: int) -> Tensor:
    """How probably a token has each expert: in proportion to counts, at most 1, `top_k` in all."""
    counts_E = torch.tensor(row, dtype=torch.float64)
    good = bool(torch.isfinite(counts_E).all()) and bool((counts_E >= 0).all())
    check(good and int((counts_E > 0).sum()) >= top_k, f"counts need {top_k} experts above zero, and none below")
    chances_E, sure_E = counts_E * top_k / counts_E.sum(), torch.zeros(len(row), dtype=torch.bool)
    while bool((chances_E > 1 + 1e-12).any()):  # such an expert is always there; the others share what is left
        sure_E |= chances_E >= 1
        left_E = counts_E.masked_fill(sure_E, 0.0)
        chances_E = torch.where(sure_E, 1.0, left_E * (top_k - int(sure_E.sum())) / left_E.sum())
    return chances_E


def _draw_layer(
    chances_E: Tensor, top_k: int, num_tokens: int, reuse: float, generator: torch.Generator
) -> list[list[int]]:
    starts_T = torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    keeps_TK = (torch.rand((num_tokens, top_k), generator=generator) < reuse).tolist()
    steps_K = torch.arange(top_k, dtype=torch.float64)
    rows: list[list[int]] = []
    for token in range(num_tokens):
        order_E = torch.randperm(len(chances_E), generator=generator)
        ends_E = chances_E[order_E].cumsum(0)
        picked_K = torch.searchsorted(ends_E, steps_K + starts_T[token], right=True).clamp(max=len(chances_E) - 1)
        drawn = order_E[picked_K].tolist()
        if rows:
            old = [each for each in rows[-1] if each not in drawn]
            new = [each for each in drawn if each not in rows[-1]]
            pairs = zip(old, new, keeps_TK[token])  # as many of the one as of the other
            drawn = [each for each in drawn if each in rows[-1]] + [a if keeps else b for a, b, keeps in pairs]
        rows.append(drawn)
    return rows


def stretch_counts(
    counts: Sequence[Sequence[float]], num_layers: int, num_experts: int, *, seed: int = 0
) -> list[list[float]]:
    """Counts for a model of another shape that are as skewed. Each layer takes the curve of one of `counts`, evenly
    spread, read off at `num_experts` places from the most used to the least, and gives it to experts in a drawn
    order."""
    check(num_layers >= 1 and num_experts >= 1, "counts need a layer and an expert at least")
    generator = torch.Generator().manual_seed(seed)
    made = []
    for layer in range(num_layers):
        curve_E = torch.tensor(sorted(counts[layer * len(counts) // num_layers], reverse=True), dtype=torch.float64)
        places = (torch.arange(num_experts) + 0.5) * len(curve_E) / num_experts - 0.5
        low = places.floor().clamp(0, len(curve_E) - 1).long()
        high = (low + 1).clamp(max=len(curve_E) - 1)
        part = (places - low).clamp(0, 1)
        values_E = curve_E[low] * (1 - part) + curve_E[high] * part
        made.append(values_E[torch.randperm(num_experts, generator=generator)].tolist())
    return made
