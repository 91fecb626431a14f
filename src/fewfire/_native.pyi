"""The compiled kernels, called by `fewfire.kernels` and runtime's banks only. Contracts: native/include/dispatch.hpp.

Arrays are addresses of contiguous memory that the caller keeps alive; sizes are in elements; 0 is null.
"""

from typing import Any

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
def quantize_rows(values: int, rows: int, columns: int, codes: int, scales: int, sums: int, /) -> None: ...
def linear(
    format: int,
    codes: int,
    scales: int,
    rows: int,
    columns: int,
    values: int,
    act_codes: int,
    act_scales: int,
    sums: int,
    tokens: int,
    out: int,
    num_threads: int,
    /,
) -> None: ...
def probe_int8(rounds: int, num_threads: int, /) -> int: ...
def probe_read(address: int, count: int, num_threads: int, /) -> int: ...

class Engine:
    def __init__(self, spec: dict[str, Any]) -> None: ...
    @property
    def page_elements(self) -> int: ...
    def step(
        self,
        ids: int,
        positions: int,
        page_starts: int,
        pages: int,
        count: int,
        hidden: int,
        routes: int,
        route_weights: int,
        route_logits: int,
        num_threads: int,
        /,
    ) -> None: ...
    def head(self, hidden: int, count: int, logits: int, num_threads: int, /) -> None: ...
