"""The plain definition of every kernel, in torch: what native code is compared with, and what runs without it.

Knows no native code. Nothing here is meant to be fast.
T tokens, E experts, K slots, A kept assignments; R rows, F expert width, P = 2 F pre-activations.
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


def swiglu_forward(pre_RP: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """silu(gate) * up * weight, where a row of `pre_RP` is gate, then up (P = 2 F)."""
    gate_RF, up_RF = pre_RP.chunk(2, dim=-1)
    hidden_RF = torch.nn.functional.silu(gate_RF) * up_RF
    return hidden_RF if weights_R is None else hidden_RF * weights_R[:, None].to(pre_RP.dtype)


def swiglu_backward(
    grad_RF: Tensor, pre_RP: Tensor, weights_R: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(grad_pre_RP, hidden_RF, grad_weights_R): gradients of `swiglu_forward`, and its output again."""
    with torch.enable_grad():
        pre = pre_RP.detach().requires_grad_()
        hidden_RF = swiglu_forward(pre)
    weights_R1 = 1 if weights_R is None else weights_R[:, None].to(pre_RP.dtype)
    (grad_pre_RP,) = torch.autograd.grad(hidden_RF, pre, grad_RF * weights_R1)
    hidden_RF = hidden_RF.detach()
    if weights_R is None:
        return grad_pre_RP, hidden_RF, None
    grad_weights_R = (grad_RF * hidden_RF).sum(dim=-1, dtype=weights_R.dtype)
    return grad_pre_RP, hidden_RF * weights_R1, grad_weights_R


def sum_rows(rows_AD: Tensor, positions_TK: Tensor) -> Tensor:
    """Each token's rows added up in slot order, float32."""
    padded = torch.cat((rows_AD.float(), rows_AD.new_zeros((1, rows_AD.shape[1]), dtype=torch.float32)))
    return padded[positions_TK.clamp(min=-1)].sum(dim=1)  # a negative position is the zero row at the end
