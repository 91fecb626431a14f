"""The compiled kernels, called by `fewfire.kernels` and runtime's banks only. Contracts: native/include/dispatch.hpp.

Arrays are addresses of contiguous memory that the caller keeps alive; sizes are in elements; 0 is null.
"""

def supported_isas() -> list[str]: ...
def current_isa() -> str: ...
def set_isa(name: str) -> None: ...
def keep_freed_memory() -> bool: ...
def top_k_rows(scores: int, rows: int, columns: int, k: int, ids: int, values: int, /) -> None: ...
def group_by_expert(ids: int, kept: int, count: int, num_experts: int, order: int, offsets: int, /) -> int: ...
def swiglu_forward(
    is_bf16: bool, pre: int, weights: int, rows: int, width: int, hidden: int, num_threads: int, /
) -> None: ...
def swiglu_backward(
    is_bf16: bool,
    grad_hidden: int,
    pre: int,
    weights: int,
    rows: int,
    width: int,
    grad_pre: int,
    hidden: int,
    grad_weights: int,
    num_threads: int,
    /,
) -> None: ...
def sum_rows(
    is_bf16: bool, rows: int, positions: int, count: int, slots: int, width: int, sums: int, num_threads: int, /
) -> None: ...
