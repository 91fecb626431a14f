"""Choosing experts and sorting tokens by them. T tokens, E experts, K slots, A kept assignments.

Native for float32 scores on the CPU; other floats and devices run on the reference, with the same result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewfire.errors import ConfigError
from fewfire.kernels import reference
from fewfire.kernels.isa import native


def top_k(scores_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best scores of each row and their ids: (values_TK in the dtype of the scores, ids_TK int64).

    Best first; ties go to the lower id; NaN comes after every number. Differentiable in the scores.
    Exactness: ids and values equal to `reference.top_k` bit for bit.
    Raises: ConfigError unless scores are a floating (T, E) and 0 <= k <= E.
    """
    if scores_TE.dim() != 2 or not scores_TE.is_floating_point():
        raise ConfigError(
            f"scores ({tuple(scores_TE.shape)}, {scores_TE.dtype}) must be a floating matrix of tokens x experts"
        )
    num_tokens, num_experts = scores_TE.shape
    if not 0 <= k <= num_experts:
        raise ConfigError(f"top_k ({k}) must be between 0 and the number of experts ({num_experts})")
    module = native()
    if module is None or scores_TE.dtype != torch.float32 or scores_TE.device.type != "cpu":
        return reference.top_k(scores_TE, k)
    scores = scores_TE.detach().contiguous()
    ids_TK = torch.empty((num_tokens, k), dtype=torch.int64)
    values_TK = torch.empty((num_tokens, k))
    module.top_k_rows(scores.data_ptr(), num_tokens, num_experts, k, ids_TK.data_ptr(), values_TK.data_ptr())
    if scores_TE.requires_grad and torch.is_grad_enabled():
        values_TK = scores_TE.gather(1, ids_TK)
    return values_TK, ids_TK


def group_by_expert(ids_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sort assignments by expert, stable: (order_A, offsets_E1), both int64.

    Assignment a = t * K + k. `order_A[offsets_E1[e] : offsets_E1[e + 1]]` are expert e's, in increasing order; those
    that `kept_TK` (bool) drops go nowhere, and their ids may be anything. A is the number kept.
    Exactness: equal to `reference.group_by_expert`.
    Raises: ConfigError for a shape or dtype that does not fit, or a kept id outside [0, num_experts).
    """
    if ids_TK.dtype != torch.int64 or num_experts < 1:
        raise ConfigError(f"expert ids ({ids_TK.dtype}) must be int64, and num_experts ({num_experts}) at least 1")
    if kept_TK is not None and (kept_TK.shape != ids_TK.shape or kept_TK.dtype != torch.bool):
        raise ConfigError(
            f"kept ({tuple(kept_TK.shape)}, {kept_TK.dtype}) must be bool of the ids' shape {tuple(ids_TK.shape)}"
        )
    module = native()
    if module is None or ids_TK.device.type != "cpu":
        _check_range(ids_TK if kept_TK is None else ids_TK[kept_TK], num_experts)
        return reference.group_by_expert(ids_TK, num_experts, kept_TK)
    ids, kept = ids_TK.contiguous(), None if kept_TK is None else kept_TK.contiguous()
    count = ids.numel()
    order_N = torch.empty(count, dtype=torch.int64)
    offsets_E1 = torch.empty(num_experts + 1, dtype=torch.int64)
    kept_address = 0 if kept is None else kept.data_ptr()
    first_bad = module.group_by_expert(
        ids.data_ptr(), kept_address, count, num_experts, order_N.data_ptr(), offsets_E1.data_ptr()
    )
    if first_bad != count:
        _check_range(ids.flatten()[first_bad], num_experts)
    return order_N if kept is None else order_N[: int(offsets_E1[-1])], offsets_E1


def _check_range(ids: Tensor, num_experts: int) -> None:
    outside = (ids < 0) | (ids >= num_experts)
    if bool(outside.any()):
        bad = int(ids[outside].flatten()[0])
        raise ConfigError(f"expert id ({bad}) is outside the {num_experts} experts; ids are 0 to {num_experts - 1}")
