"""SwiGLU over rows with the routing weight folded in, forward and backward in one pass each.

Native for float32 and bfloat16 on the CPU; other dtypes and devices run on the reference.
R rows, F expert width, P = 2 F: a row is the gate's pre-activations, then the up projection's.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fewfire.errors import ConfigError
from fewfire.kernels import reference
from fewfire.kernels.isa import native


def swiglu_forward(pre_RP: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """silu(gate) * up * weight: (R, F) in the dtype of `pre_RP`. `weights_R` float32, None for 1. No autograd.

    Exactness: float32 within 1e-6 relative of `reference.swiglu_forward`; bf16 rounds once instead of thrice.
    Raises: ConfigError for shapes or dtypes that do not fit.
    """
    module = _choose(pre_RP, weights_R)
    if module is None:
        return reference.swiglu_forward(pre_RP, weights_R)
    pre, weights = pre_RP.contiguous(), None if weights_R is None else weights_R.contiguous()
    rows, width = pre.shape[0], pre.shape[1] // 2
    hidden_RF = pre.new_empty((rows, width))
    is_bf16 = pre.dtype == torch.bfloat16
    addresses = pre.data_ptr(), _address(weights), rows, width, hidden_RF.data_ptr()
    module.swiglu_forward(is_bf16, *addresses, torch.get_num_threads())
    return hidden_RF


def swiglu_backward(
    grad_RF: Tensor, pre_RP: Tensor, weights_R: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `swiglu_forward`, and its output again: (grad_pre_RP, hidden_RF, grad_weights_R or None).

    `grad_RF` is the gradient by the (weighted) output, in the dtype of `pre_RP`. No autograd.
    Exactness: float32 within 1e-5 relative of `reference.swiglu_backward`.
    Raises: ConfigError for shapes or dtypes that do not fit.
    """
    module = _choose(pre_RP, weights_R)
    if grad_RF.shape != (pre_RP.shape[0], pre_RP.shape[1] // 2) or grad_RF.dtype != pre_RP.dtype:
        raise ConfigError(
            f"gradient ({tuple(grad_RF.shape)}, {grad_RF.dtype}) must be {pre_RP.dtype} of half the width of the "
            f"pre-activations {tuple(pre_RP.shape)}"
        )
    if module is None:
        return reference.swiglu_backward(grad_RF, pre_RP, weights_R)
    grad, pre = grad_RF.contiguous(), pre_RP.contiguous()
    weights = None if weights_R is None else weights_R.contiguous()
    rows, width = grad.shape
    grad_pre_RP, hidden_RF = torch.empty_like(pre), torch.empty_like(grad)
    grad_weights_R = None if weights is None else torch.empty_like(weights)
    inputs = grad.data_ptr(), pre.data_ptr(), _address(weights)
    outputs = grad_pre_RP.data_ptr(), hidden_RF.data_ptr(), _address(grad_weights_R)
    module.swiglu_backward(pre.dtype == torch.bfloat16, *inputs, rows, width, *outputs, torch.get_num_threads())
    return grad_pre_RP, hidden_RF, grad_weights_R


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _choose(pre_RP: Tensor, weights_R: Tensor | None) -> ModuleType | None:
    """Validate; the extension where it has this dtype and device, else None."""
    if pre_RP.dim() != 2 or pre_RP.shape[1] % 2 or not pre_RP.is_floating_point():
        raise ConfigError(
            f"pre-activations ({tuple(pre_RP.shape)}, {pre_RP.dtype}) must be a floating matrix of even width"
        )
    if weights_R is not None and weights_R.shape != (pre_RP.shape[0],):
        raise ConfigError(f"weights {tuple(weights_R.shape)} must be one per row of {tuple(pre_RP.shape)}")
    if pre_RP.device.type != "cpu" or pre_RP.dtype not in (torch.float32, torch.bfloat16):
        return None
    if weights_R is not None and weights_R.dtype != torch.float32:
        raise ConfigError(f"weights ({weights_R.dtype}) must be float32")
    return native()
