"""The plain definition of every kernel, in torch: what native code is compared with, and what runs without it.

Knows no native code. Nothing here is meant to be fast. T tokens, E experts, K slots, A kept assignments.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, best first, ties to the lower id, NaN after every number."""
    # An ascending sort of the negation is stable in id, and torch's order puts NaN last.
    ids_TK = torch.sort(-scores_TE.detach(), dim=-1, stable=True).indices[:, :k].contiguous()
    return scores_TE.gather(1, ids_TK), ids_TK


def group_by_expert(ids_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Flat assignments sorted by expert, and where each expert's begin."""
    flat_N = ids_TK.reshape(-1)
    if kept_TK is None:
        order_A = torch.argsort(flat_N, stable=True)
        kept_ids_A = flat_N
    else:
        kept_A = kept_TK.reshape(-1).nonzero().flatten()
        kept_ids_A = flat_N[kept_A]
        order_A = kept_A[torch.argsort(kept_ids_A, stable=True)]
    counts_E = torch.bincount(kept_ids_A, minlength=num_experts)
    offsets_E1 = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_TK.device)
    torch.cumsum(counts_E, 0, out=offsets_E1[1:])
    return order_A, offsets_E1
