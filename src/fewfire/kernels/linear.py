"""Products with weights as packs hold them: activations become int8 for each token and 128 columns, outliers 15 bits.

Native on the CPU for every format that packs hold. T tokens, K inputs, N outputs, G groups of 128 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewfire.config import check
from fewfire.formats import Encoded, sizes
from fewfire.kernels import reference
from fewfire.kernels.isa import native
from fewfire.kernels.reference import Activations

# The order of WeightFormat in native/include/quantized.hpp.
NATIVE_FORMATS = {
    "f32": 0, "bf16": 1, "q8": 2, "q4": 3, "mxfp4": 4, "q4_0": 5, "q4_1": 6, "q8_0": 7, "q4_k": 8, "q6_k": 9,
}  # fmt: skip
GROUP, SUMS = 128, 13


def quantize_activations(x_TK: Tensor) -> tuple[Activations, Tensor]:
    """Codes and scales, and int32 sums (T, 13 G) of codes without high parts: of each 128, each 32, each 16.

    Exactness: equal to `reference.quantize_activations` bit for bit.
    Raises: ConfigError unless `x_TK` is a float32 matrix.
    """
    x = _checked(x_TK)
    tokens, columns = x.shape
    groups = -(-columns // GROUP)
    module = native()
    if module is None:
        made = reference.quantize_activations(x)
        integers = made.codes_TGk.int()
        sums = [integers.unflatten(-1, (-1, run)).sum(dim=-1, dtype=torch.int32).flatten(1) for run in (128, 32, 16)]
        return made, torch.cat(sums, dim=1)
    codes, high = torch.zeros((2, tokens, groups, GROUP), dtype=torch.int8)
    scales, sums_TS = torch.empty((tokens, groups)), torch.empty((tokens, groups * SUMS), dtype=torch.int32)
    addresses = (each.data_ptr() for each in (codes, high, scales, sums_TS))
    module.quantize_rows(x.data_ptr(), tokens, columns, *addresses)
    return Activations(codes, high, scales), sums_TS


def linear(x_TK: Tensor, weight: Encoded, name: str, shape: tuple[int, int], *, threads: int = 0) -> Tensor:
    """(T, N) float32: `x_TK` times a `weight` of `shape` (N, K) in format `name`. `threads` 0: one a core.

    Exactness: quantized weights equal `reference.linear` bit for bit, on every instruction set, whatever else is in the
    batch and however many threads run; f32 and bf16 are within 1e-5 of it, and depend on neither as well.
    Raises: ConfigError where shapes or bytes do not fit.
    """
    x = _checked(x_TK)
    size = sizes(name, shape)
    check(
        x.shape[1] == shape[1] and (weight.codes.numel(), weight.scales.numel()) == size,
        f"a weight of {list(shape)} in {name} has {size.codes} + {size.scales} bytes and takes rows of {shape[1]}; got "
        f"{weight.codes.numel()} + {weight.scales.numel()} and {list(x.shape)}",
    )
    module = native()
    if module is None:
        return reference.linear(x, weight, name, shape)
    out = torch.empty((x.shape[0], shape[0]))
    module.linear(
        NATIVE_FORMATS[name],
        weight.codes.contiguous().data_ptr(),
        weight.scales.contiguous().data_ptr(),
        *shape,
        x.data_ptr(),
        x.shape[0],
        out.data_ptr(),
        threads,
    )
    return out


def _checked(x_TK: Tensor) -> Tensor:
    fits = x_TK.dim() == 2 and x_TK.dtype == torch.float32 and x_TK.device.type == "cpu"
    check(fits, f"activations ({tuple(x_TK.shape)}, {x_TK.dtype}, {x_TK.device}) must be a float32 matrix on the CPU")
    return x_TK.contiguous()
