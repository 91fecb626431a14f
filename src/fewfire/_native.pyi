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
    tokens: int,
    out: int,
    num_threads: int,
    /,
) -> None: ...
def read_row(format: int, codes: int, scales: int, rows: int, columns: int, row: int, out: int, /) -> None: ...
def probe_int8(rounds: int, num_threads: int, /) -> int: ...
def probe_float(rounds: int, num_threads: int, /) -> int: ...
def probe_read(address: int, count: int, num_threads: int, /) -> int: ...
def crc32c(before: int, address: int, count: int, /) -> int: ...
def read_checked(file: int, offset: int, count: int, to: int, before: int, /) -> tuple[int, int, int]: ...
def read_plain(file: int, offset: int, count: int, to: int, /) -> tuple[int, int]: ...
def pool_size() -> int: ...

class ExpertSource:
    def counts(self) -> tuple[list[list[int]], int, int, int, float, bool, int]: ...

class ResidentExperts(ExpertSource):
    def __init__(
        self, layers: list[tuple[int, int, int]], checksums: list[int], memory: int, owner: object
    ) -> None: ...
    def verify(self) -> None: ...

class ReadError(Exception):
    """args: kind (0 the system, 1 the file's end, 2 a checksum), layer, expert, offset, errno."""

class ExpertStore(ExpertSource):
    def __init__(
        self, layers: list[tuple[int, int, int]], checksums: list[int], settings: dict[str, Any], owner: object
    ) -> None: ...
    def set_capacity(self, slots: int, /) -> None: ...
    def seed(self, records: list[tuple[int, int]], /) -> int: ...
    def residents(self) -> list[tuple[int, int]]: ...

def simulate(
    policy: int,
    first_ids: list[int],
    capacity: int,
    events: list[tuple[int, int, int, bool, bool]],
    experts: list[int],
    /,
) -> tuple[list[list[int]], int]: ...

class ExpertBank:
    def __init__(self, layout: dict[str, Any], layer: int, source: ExpertSource, /) -> None: ...
    def run(
        self,
        values: int,
        chosen: int,
        weights: int,
        tokens: int,
        top_k: int,
        is_input_weighted: bool,
        out: int,
        num_threads: int,
        /,
    ) -> None: ...

class Engine:
    def __init__(self, spec: dict[str, Any], experts: ExpertSource | None) -> None: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...
    def take_timings(self) -> list[float]: ...
    def step(
        self,
        ids: int,
        positions: int,
        page_starts: int,
        pages: int,
        count: int,
        hidden: int,
        routes: list[int],
        num_threads: int,
        /,
    ) -> None: ...
    def head(self, hidden: int, count: int, logits: int, num_threads: int, /) -> None: ...
