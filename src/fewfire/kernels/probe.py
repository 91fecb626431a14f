"""What this machine can do, by native loops that do nothing else: the yardsticks beside every speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from types import ModuleType

import torch
from torch import Tensor

from fewfire.errors import KernelUnavailable
from fewfire.formats import sizes
from fewfire.kernels.isa import native
from fewfire.kernels.linear import NATIVE_FORMATS
from fewfire.plan.rates import KernelRates

READ_BYTES = 512 * 2**20  # far more than any cache holds
_ROWS, _COLUMNS = 1024, 2048  # of a product whose weight the caches hold
_PLAIN_ROWS = 128  # the same of formats of 2 and 4 bytes
_BLOCK = 16  # rows that a thread multiplies at the least
_FILL = 0x3C  # every byte of the weights: small numbers in all formats, none subnormal
_UNDISTURBED = 0.0  # of calls of microseconds the fastest: others are those that another process interrupted
TOKENS = (1, 2, 4, 8, 16, 64)


def _module() -> ModuleType:
    module = native()
    if module is None:
        raise KernelUnavailable("probes need the extension fewfire._native; build it with `pip install .`")
    return module


def _typical_s(run: Callable[[], object], seconds: float, quantile: float = 0.5) -> float:
    """Seconds of a call: that quantile of all that fit into `seconds`, of at least three."""
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < stop:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[int(len(times) * quantile)]


def read_bytes_per_s(
    threads: int, *, seconds: float = 1.0, num_bytes: int = READ_BYTES, memory: Tensor | None = None
) -> float:
    """Memory bandwidth of `threads` threads that only read, the median of passes over `num_bytes`.

    `memory`: uint8 to read instead of new memory, all of it or its first `num_bytes`.
    Raises: KernelUnavailable without the extension.
    """
    module = _module()
    memory = torch.ones(num_bytes, dtype=torch.uint8) if memory is None else memory
    count = min(num_bytes, memory.numel())
    return count / _typical_s(lambda: module.probe_read(memory.data_ptr(), count, threads), seconds)


def int8_ops_per_s(threads: int, *, seconds: float = 0.5) -> float:
    """int8 multiplications and additions per second from registers, the best of several runs. Raises as above."""
    return _best_rate(_module().probe_int8, threads, seconds)


def float_ops_per_s(threads: int, *, seconds: float = 0.5) -> float:
    """The same in float32."""
    return _best_rate(_module().probe_float, threads, seconds)


def _best_rate(run: Callable[[int, int], int], threads: int, seconds: float) -> float:
    """Operations per second: the best of runs that are long enough to time, and a twentieth of `seconds` at most."""
    rounds, took = 2_000, 0.0
    while took < min(1e-3, seconds / 40):
        rounds *= 2
        start = time.perf_counter()
        done = run(rounds, threads)
        took = time.perf_counter() - start
    best, stop = done / took, time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        done = run(rounds, threads)
        best = max(best, done / (time.perf_counter() - start))
    return best


def fork_join_s(threads: int, *, seconds: float = 0.01) -> float:
    """Seconds until all threads have done a small part of a product and the caller knows."""
    return _typical_s(_product("q8", 256, 1, threads, _Room("q8", 256, 1, 128)), seconds, _UNDISTURBED)


def product_ops_per_s(format_name: str, num_tokens: int, threads: int, *, seconds: float = 0.02) -> float:
    """Operations per second of a product with `num_tokens` tokens whose weight is in the caches.

    What a call costs besides (starting threads, codes of the tokens) is left out: a product of a block a thread.
    """
    probe = _ProductProbe(format_name, num_tokens, threads)
    probe.time(seconds)
    return probe.ops_per_s


class _ProductProbe:
    """The same in several rounds, each the fastest of its calls: their mean is what a long run meets, where work of
    others comes and goes. `room`: a weight that others may have too."""

    def __init__(self, format_name: str, num_tokens: int, threads: int, room: _Room | None = None):
        rows, few = _rows(format_name), _BLOCK * threads
        room = room or _Room(format_name, rows, num_tokens)
        self.rows, self.few, self.num_tokens = rows, few if few < rows else 0, num_tokens
        self._whole = _product(format_name, rows, num_tokens, threads, room)
        self._besides = _product(format_name, self.few, num_tokens, threads, room)
        self._took_s: list[float] = []

    def time(self, seconds: float) -> None:
        took = _typical_s(self._whole, seconds, _UNDISTURBED)
        besides = _typical_s(self._besides, seconds / 4, _UNDISTURBED) if self.few else 0.0
        self._took_s.append(max(took - besides, took / 4))

    @property
    def ops_per_s(self) -> float:
        typical = sum(self._took_s) / len(self._took_s)
        return 2 * (self.rows - self.few) * _COLUMNS * self.num_tokens / typical


def kernel_rates(
    threads: int,
    formats: Iterable[str] = NATIVE_FORMATS,
    *,
    seconds: float = 0.02,
    tokens: Iterable[int] = TOKENS,
    rounds: int = 1,
) -> KernelRates:
    """Rates of all `formats` that have kernels (bf16 always), each of `tokens` timed for `seconds` in some `rounds`."""
    names = sorted({"bf16", *formats} & NATIVE_FORMATS.keys())
    counts = sorted(tokens)
    rooms = {name: _Room(name, _rows(name), counts[-1]) for name in names}  # few MB, beside a model under a budget
    probes = {(name, count): _ProductProbe(name, count, threads, rooms[name]) for name in names for count in counts}
    for _ in range(rounds):
        for probe in probes.values():
            probe.time(seconds / rounds)
    products = {name: _smooth([(count, probes[name, count].ops_per_s) for count in counts]) for name in names}
    return KernelRates(
        products,
        float_ops_per_s=float_ops_per_s(threads, seconds=seconds),
        fork_join_s=fork_join_s(threads, seconds=seconds),
    )


def _smooth(points: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Rates that rise with the tokens, and times too: a point that does otherwise was measured while others ran."""
    least_s = float("inf")  # of these tokens and a weight
    for at, (count, rate) in reversed(list(enumerate(points))):
        least_s = min(least_s, count / rate)
        points[at] = count, count / least_s
    most, made = 0.0, []
    for count, rate in points:
        most = max(most, rate)
        made.append((count, most))
    return tuple(made)


def _rows(format_name: str) -> int:
    return _PLAIN_ROWS if format_name in ("f32", "bf16") else _ROWS


class _Room:
    """A weight of so many rows, tokens for it, and where products go."""

    def __init__(self, format_name: str, rows: int, num_tokens: int, columns: int = _COLUMNS):
        size = sizes(format_name, (rows, columns))
        self.columns = columns
        self.codes = torch.full((size.codes,), _FILL, dtype=torch.uint8)
        self.scales = torch.full((max(size.scales, 1),), _FILL, dtype=torch.uint8)
        self.values, self.out = torch.ones((num_tokens, columns)), torch.empty((num_tokens, rows))


def _product(format_name: str, rows: int, num_tokens: int, threads: int, room: _Room) -> Callable[[], None]:
    module, code = _module(), NATIVE_FORMATS[format_name]

    def run() -> None:
        module.linear(
            code,
            room.codes.data_ptr(),
            room.scales.data_ptr(),
            rows,
            room.columns,
            room.values.data_ptr(),
            num_tokens,
            room.out.data_ptr(),
            threads,
        )

    return run
