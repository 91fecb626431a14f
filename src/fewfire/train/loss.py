"""The head and its cross entropy in one autograd node: logits exist for a slice of rows at a time.

N rows, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS = 1024  # 1024 x 8192 float32 logits are 32 MiB: a slice stays near the caches


class HeadCrossEntropy(torch.autograd.Function):
    """Mean negative log likelihood (nats) of `targets_N` under softmax(scale * hidden @ weight^T).

    Gradients of both inputs are computed in the forward pass, slice by slice. Products run in `dtype`, the
    softmax in float32. Exactness: equals F.cross_entropy of the full logits up to `dtype`'s rounding.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, scale: float, dtype: torch.dtype
    ) -> Tensor:
        rows, weight = hidden_ND.shape[0], weight_VD.to(dtype)
        total = torch.zeros((), dtype=torch.float64)
        dhidden = torch.empty_like(hidden_ND)
        dweight = torch.zeros(weight_VD.shape, dtype=torch.float32)
        for start in range(0, rows, ROWS):
            hidden = hidden_ND[start : start + ROWS].to(dtype)
            targets = targets_N[start : start + ROWS, None]
            logits = torch.mm(hidden, weight.t()).float()
            if scale != 1.0:
                logits *= scale
            logits -= logits.amax(dim=-1, keepdim=True)
            picked = logits.gather(1, targets)
            sums = logits.exp_().sum(dim=-1, keepdim=True)
            total += (sums.log() - picked).sum(dtype=torch.float64)
            logits /= sums  # now probabilities; minus one-hot is the gradient
            logits.scatter_add_(1, targets, torch.full_like(picked, -1.0))
            gradient = (logits * (scale / rows)).to(dtype)
            dhidden[start : start + ROWS] = torch.mm(gradient, weight)
            dweight += torch.mm(gradient.t(), hidden)
        ctx.save_for_backward(dhidden, dweight.to(weight_VD.dtype))
        return (total / max(rows, 1)).float()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple:
        dhidden, dweight = ctx.saved_tensors
        return dhidden * dloss, dweight * dloss, None, None, None


def head_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Scalar loss in nats per token; see `HeadCrossEntropy`."""
    loss: Tensor = HeadCrossEntropy.apply(hidden_ND, weight_VD, targets_N, scale, dtype)
    return loss
