"""Rows added up by where they belong. T tokens, K slots, A rows, D width. Native for float32 and bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from fewfire.errors import ConfigError
from fewfire.kernels import reference
from fewfire.kernels.isa import native


def sum_rows(rows_AD: Tensor, positions_TK: Tensor) -> Tensor:
    """(T, D) float32: the sum of the rows that `positions_TK` (int64) names, in slot order; -1 adds nothing.

    No autograd.

    Exactness: equal to `reference.sum_rows` up to the order of two float32 additions.
    Raises: ConfigError for shapes or dtypes that do not fit, or a position beyond the rows.
    """
    if rows_AD.dim() != 2 or positions_TK.dim() != 2 or positions_TK.dtype != torch.int64:
        raise ConfigError(
            f"rows {tuple(rows_AD.shape)} and positions ({tuple(positions_TK.shape)}, {positions_TK.dtype}) "
            "must be a matrix and an int64 matrix"
        )
    if positions_TK.numel() and int(positions_TK.max()) >= rows_AD.shape[0]:
        raise ConfigError(f"position ({int(positions_TK.max())}) is beyond the {rows_AD.shape[0]} rows")
    module = native()
    if module is None or rows_AD.device.type != "cpu" or rows_AD.dtype not in (torch.float32, torch.bfloat16):
        return reference.sum_rows(rows_AD, positions_TK)
    rows, positions = rows_AD.contiguous(), positions_TK.contiguous()
    (count, slots), width = positions.shape, rows.shape[1]
    sums_TD = torch.empty((count, width), dtype=torch.float32)
    addresses = rows.data_ptr(), positions.data_ptr()
    is_bf16 = rows.dtype == torch.bfloat16
    module.sum_rows(is_bf16, *addresses, count, slots, width, sums_TD.data_ptr(), torch.get_num_threads())
    return sums_TD
