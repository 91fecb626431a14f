"""The one door to native code: a kernel validates shapes and dtypes once, picks native or reference, and calls it."""

from fewfire.kernels.activation import swiglu_backward, swiglu_forward
from fewfire.kernels.checksum import crc32c, join_crc32c, read_checked
from fewfire.kernels.isa import current_isa, keep_freed_memory, return_freed_memory, set_isa, supported_isas
from fewfire.kernels.linear import linear, quantize_activations
from fewfire.kernels.rows import sum_rows
from fewfire.kernels.selection import group_by_expert, top_k

__all__ = [
    "crc32c",
    "current_isa",
    "group_by_expert",
    "join_crc32c",
    "keep_freed_memory",
    "linear",
    "quantize_activations",
    "read_checked",
    "return_freed_memory",
    "set_isa",
    "sum_rows",
    "supported_isas",
    "swiglu_backward",
    "swiglu_forward",
    "top_k",
]
