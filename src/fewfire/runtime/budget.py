"""A memory budget for the whole process: what is fixed, what texts take, and experts with what is left of it.

The planner's floor says what is refused (plan/memory.py); this file keeps the promise while the model runs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, Protocol

from fewfire.config import ModelConfig
from fewfire.errors import BudgetError
from fewfire.plan import resident
from fewfire.plan.limits import free_bytes, rss_bytes
from fewfire.plan.memory import LOGIT_BYTES, Floor, Formats, WeightBytes, floor_bytes
from fewfire.sizes import format_bytes

MARGIN_BYTES = 16 * 2**20  # what nobody counted: page tables of huge pages, threads' stacks, the allocator's leftovers
RESERVED_SHARE = 1 / 8  # of what is free, left to others where no budget is given
DEFAULT_CONTEXT = 4096  # as the planner's
_SCRATCH_SHARE = 1 / 8  # of what is left to experts, at most, for the scratch of a larger step


class Experts(Protocol):
    """What gives way: experts in memory."""

    @property
    def num_bytes(self) -> int: ...

    @property
    def least_bytes(self) -> int: ...

    @property
    def untouched_bytes(self) -> int: ...

    def fit(self, num_bytes: int) -> None: ...


class Spare(Protocol):
    """What lies in memory that nothing else uses."""

    def fit(self, room: int) -> None: ...


def default_budget() -> int:
    """What this process has and may still take, less an eighth of that which is left to others."""
    return rss_bytes() + int(free_bytes() * (1 - RESERVED_SHARE))


def check_floor(
    budget: int,
    config: ModelConfig,
    formats: Formats,
    context: int | None,
    *,
    weights: WeightBytes,
    cache_element_bytes: int,
    threads: int,
    more: dict[str, int] | None = None,
) -> Floor:
    """The floor of a model, and of what is wanted `more`, which is below `budget`.

    Raises: BudgetError with the table, before anything is loaded.
    """
    context = min(DEFAULT_CONTEXT, config.max_context) if context is None else context
    floor = floor_bytes(
        config, formats, context, weights=weights, cache_element_bytes=cache_element_bytes, threads=threads
    )
    own = rss_bytes() - floor.table["tokenizer"]  # which has been read by now
    needs = {**floor.table, "process": max(floor.table["process"], own), **(more or {})}
    if budget < sum(needs.values()):
        refuse(budget, needs)
    return Floor(needs)


def refuse(budget: int, needs: dict[str, int], remedy: str = "raise --memory, or shorten --context") -> NoReturn:
    """Raises BudgetError with the table of what is needed, largest part first."""
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in sorted(needs.items(), key=lambda each: -each[1]))
    total = sum(needs.values())
    raise BudgetError(
        f"a memory budget of {format_bytes(budget)} is below the floor of {format_bytes(total)} ({total} bytes): "
        f"{parts}; {remedy}",
        needs=needs,
    )


def planned_context(config: ModelConfig, context: int | None) -> int:
    """Tokens of a text that memory is planned for; never more than the model has positions."""
    return min(context or DEFAULT_CONTEXT, config.max_context)


def scratch_bytes(config: ModelConfig, num_tokens: int, context: int, threads: int) -> int:
    """What one step over `num_tokens` tokens writes besides the cache, its logits included."""
    own = resident.step_bytes(config, num_tokens, context, threads)
    return own + LOGIT_BYTES * config.vocab_size


def choose_chunk(config: ModelConfig, room: int, context: int, threads: int, *, share: float = _SCRATCH_SHARE) -> int:
    """Tokens of a prefill step: as many as fit that share of `room`, so that each expert is read for many of them."""
    fits = (n for n in resident.CHUNKS if scratch_bytes(config, n, context, threads) <= room * share)
    return next(fits, resident.CHUNKS[-1])


class Account:
    """The budget of one process while a model runs. Experts get what nothing else holds.

    `fixed_bytes`: what is there whatever the text: the process, the trunk, scratch. Threads: `give` from any, the rest
    between steps.
    """

    def __init__(self, budget_bytes: int, fixed_bytes: int, experts: Experts | None = None):
        self.budget_bytes, self.fixed_bytes = budget_bytes, fixed_bytes
        self.taken_bytes = 0
        self.experts = experts
        self.spare: Spare | None = None
        self._guard = threading.Lock()

    @property
    def expert_bytes(self) -> int:
        """What experts may use."""
        return self.budget_bytes - self.fixed_bytes - self.taken_bytes

    @property
    def least_bytes(self) -> int:
        """What experts cannot give back."""
        return 0 if self.experts is None else self.experts.least_bytes

    @property
    def room(self) -> int:
        """What may still be taken: all but the least that experts need."""
        return self.expert_bytes - self.least_bytes

    @property
    def unused_bytes(self) -> int:
        """What neither experts nor anything else holds."""
        return self.expert_bytes - (0 if self.experts is None else self.experts.num_bytes)

    def take(self, num_bytes: int, what: str) -> None:
        """Set memory aside for `what`. Raises: BudgetError where the least that experts need would not be left."""
        least, room = self.least_bytes, self.room
        if num_bytes > room:
            raise BudgetError(
                f"{what} needs {format_bytes(num_bytes)}, of which the budget of {format_bytes(self.budget_bytes)} has "
                f"{format_bytes(max(0, room))} left; raise --memory, or take a shorter text",
                needs={what: num_bytes, "fixed": self.fixed_bytes, "texts": self.taken_bytes, "experts": least},
            )
        with self._guard:
            self.taken_bytes += num_bytes
        self._fit()

    def give(self, num_bytes: int) -> None:
        """Memory that was taken is no longer held."""
        with self._guard:
            self.taken_bytes -= num_bytes

    @contextmanager
    def lent(self, num_bytes: int, what: str) -> Iterator[None]:
        """Take, and give back at the end."""
        self.take(num_bytes, what)
        try:
            yield
        finally:
            self.give(num_bytes)

    def fits(self, budget_bytes: int) -> bool:
        """Whether all that is held, and the least that experts need, fits another budget."""
        return self.fixed_bytes + self.taken_bytes + self.least_bytes <= budget_bytes

    def check_change(self, budget_bytes: int, least: int) -> None:
        """Raises: BudgetError where `budget_bytes` holds less than what is held, and `least` of experts."""
        if budget_bytes < self.fixed_bytes + self.taken_bytes + least:
            refuse(budget_bytes, {"fixed": self.fixed_bytes, "texts": self.taken_bytes, "experts in flight": least})

    def change(self, budget_bytes: int) -> None:
        """Another budget from now on. Raises: BudgetError, and nothing changes, where more is held already."""
        self.check_change(budget_bytes, self.least_bytes)
        self.budget_bytes = budget_bytes
        self._fit()

    def check(self) -> None:
        """Where the process holds more than was counted on, experts give way."""
        if self.experts is None:
            return
        excess = rss_bytes() + self.experts.untouched_bytes - (self.budget_bytes - MARGIN_BYTES // 4)
        if excess > 0 and self.expert_bytes - excess >= self.least_bytes:
            self.fixed_bytes += excess
            self._fit()

    def _fit(self) -> None:
        if self.experts is not None:
            self.experts.fit(self.expert_bytes)
        if self.spare is not None:
            self.spare.fit(self.unused_bytes)
