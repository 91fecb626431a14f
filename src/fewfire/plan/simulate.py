"""A serving day, request by request: arrivals, prompts, answers, continuous batching, on as many devices as asked.

Discrete events, not steps: between two events on a replica its batch is constant, so every running answer grows at
1 / step(batch) and only arrivals, ends of prefill and ends of answers are events. Ten thousand requests on a thousand
devices take seconds. Deterministic for a seed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import cos, exp, log, pi
from typing import TYPE_CHECKING, Any

from fewfire.config import check
from fewfire.plan.fit import fit
from fewfire.plan.hardware import System
from fewfire.plan.speed import decode_step, prefill
from fewfire.plan.workload import Assumptions, Layout, Workload

if TYPE_CHECKING:
    from random import Random

DAY_S = 86_400.0


@dataclass(frozen=True)
class Traffic:
    """A day's requests. Arrivals are Poisson with a daily swing (`peak` over mean at the busiest hour); lengths are
    log-normal around the means with spread `sigma`."""

    requests: int = 10_000
    prompt_tokens: int = 2000
    answer_tokens: int = 300
    peak: float = 2.0
    sigma: float = 0.6
    seed: int = 0

    def __post_init__(self) -> None:
        check(1 <= self.requests <= 10_000_000, f"requests ({self.requests}) must be 1 to 10000000 a day")
        check(1 <= self.prompt_tokens <= 10**7, f"prompt tokens ({self.prompt_tokens}) must be 1 to 10000000")
        check(1 <= self.answer_tokens <= 10**7, f"answer tokens ({self.answer_tokens}) must be 1 to 10000000")
        check(1 <= self.peak <= 2, f"peak ({self.peak}) is the busiest hour over the mean; use 1 to 2")

    def draw(self) -> list[tuple[float, int, int]]:
        """(arrival second, prompt tokens, answer tokens), by arrival."""
        from random import Random  # its hashing libraries are slow to load, and only a simulated day needs them

        random = Random(self.seed)
        swing = self.peak - 1.0
        found: list[float] = []
        while len(found) < self.requests:
            moment = random.random() * DAY_S
            if random.random() * self.peak <= 1.0 - swing * cos(2 * pi * moment / DAY_S):
                found.append(moment)
        found.sort()
        prompts = [self._length(random, self.prompt_tokens) for _ in found]
        answers = [self._length(random, self.answer_tokens) for _ in found]
        return list(zip(found, prompts, answers))

    def _length(self, random: Random, mean: int) -> int:
        return max(1, round(exp(random.gauss(log(mean) - self.sigma**2 / 2, self.sigma))))


@dataclass
class _Request:
    arrival: float
    prompt: int
    answer: int
    first_token: float = 0.0
    done: float = 0.0


@dataclass
class _Replica:
    """One copy of the model. `progress`: tokens that each running answer has grown by since the start of the day."""

    max_batch: int
    progress: float = 0.0
    clock: float = 0.0
    running: list[tuple[float, int, _Request]] = field(default_factory=list)  # heap by the progress at which they end
    waiting: deque[_Request] = field(default_factory=deque)
    filling: tuple[float, _Request] | None = None  # (end of prefill, request)
    version: int = 0
    busy_s: float = 0.0

    @property
    def load(self) -> int:
        return len(self.running) + len(self.waiting) + (self.filling is not None)


class _Rates:
    """Step time by batch and prefill time by length, worked out once and interpolated."""

    def __init__(self, work: Workload, system: System, layout: Layout, max_batch: int, assume: Assumptions):
        sizes = sorted({min(max_batch, 2**power) for power in range(24)} | {max_batch})
        self.steps = [(size, decode_step(work, system, layout, size, assume).seconds) for size in sizes]
        self.lengths = [
            (length, prefill(work, system, layout, length, assume).seconds or 0.0)
            for length in (1, 128, 512, 2048, 8192, 32_768)
        ]

    def step(self, batch: int) -> float:
        return _interpolate(self.steps, batch)

    def fill(self, length: int) -> float:
        return _interpolate(self.lengths, length)


def _interpolate(points: list[tuple[int, float]], at: float) -> float:
    before = points[0]
    for point in points:
        if point[0] >= at:
            if point[0] == before[0]:
                return point[1]
            share = (at - before[0]) / (point[0] - before[0])
            return before[1] + share * (point[1] - before[1])
        before = point
    return before[1] * at / before[0]


@dataclass(frozen=True)
class Day:
    """What the day came to. Percentiles are over requests, in seconds; `token_s` is time between tokens."""

    traffic: Traffic
    replicas: int
    devices: int
    layout: str
    max_batch: int
    makespan_s: float
    first_token_s: dict[str, float]
    token_s: dict[str, float]
    total_s: dict[str, float]
    output_tokens_per_s: float
    input_tokens_per_s: float
    busy_frac: float
    longest_queue: int

    def to_json(self) -> dict[str, Any]:
        """Figures by name; the traffic included."""
        return {**self.__dict__, "traffic": self.traffic.__dict__}


def simulate_day(
    work: Workload, system: System, layout: Layout, replicas: int, traffic: Traffic, assume: Assumptions | None = None
) -> Day:
    """Run a day on `replicas` copies, each on `layout` of the system's part, requests going to the shortest queue.

    A replica prefills one prompt at a time, first come first served, and answers do not grow meanwhile; up to its
    memory's batch run together. Raises ConfigError if a copy does not fit.
    """
    assume = assume or Assumptions()
    single = System(system.part, layout.devices)
    mean_context = min(work.config.max_context, traffic.prompt_tokens + traffic.answer_tokens // 2)
    work = work.at(mean_context)
    verdict = fit(work, single, layout, 1)
    check(verdict.fits, f"{single.label} cannot hold a copy: {verdict.reason}; give more devices or a smaller format")
    check(1 <= replicas <= 100_000, f"replicas ({replicas}) must be 1 to 100000")
    limit = min(verdict.max_batch, 1024 * layout.data)
    rates = _Rates(work, single, layout, limit, assume)
    return _Run(rates, [_Replica(limit) for _ in range(replicas)], traffic).day(layout)


class _Run:
    def __init__(self, rates: _Rates, replicas: list[_Replica], traffic: Traffic):
        self.rates, self.replicas, self.traffic = rates, replicas, traffic
        self.events: list[tuple[float, int, int, int]] = []  # (time, order, replica, version)
        self.order, self.longest_queue = 0, 0
        self.finished: list[_Request] = []

    def day(self, layout: Layout) -> Day:
        for arrival, prompt, answer in self.traffic.draw():
            self._run_until(arrival)
            index = self._shortest()
            replica = self.replicas[index]
            self._advance(replica, arrival)
            replica.waiting.append(_Request(arrival, prompt, answer))
            self.longest_queue = max(self.longest_queue, len(replica.waiting))
            self._schedule(index)
        self._run_until(float("inf"))
        return self._report(layout)

    def _shortest(self) -> int:
        best, least = 0, None
        for index, replica in enumerate(self.replicas):
            load = replica.load
            if load == 0:
                return index
            if least is None or load < least:
                best, least = index, load
        return best

    def _run_until(self, moment: float) -> None:
        while self.events and self.events[0][0] <= moment:
            time, _, index, version = heappop(self.events)
            replica = self.replicas[index]
            if version != replica.version:
                continue
            self._advance(replica, time)
            self._finish(replica, time)
            self._schedule(index)

    def _advance(self, replica: _Replica, time: float) -> None:
        """Let the running answers grow up to `time`; while a prompt is prefilled they wait."""
        elapsed = time - replica.clock
        if replica.filling is not None or replica.running:
            replica.busy_s += elapsed
        if replica.running and replica.filling is None:
            replica.progress += elapsed / self.rates.step(len(replica.running))
        replica.clock = time

    def _finish(self, replica: _Replica, time: float) -> None:
        if replica.filling is not None and replica.filling[0] <= time + 1e-9:
            request = replica.filling[1]
            replica.filling = None
            request.first_token = time
            if request.answer == 1:
                request.done = time
                self.finished.append(request)
            else:
                self.order += 1
                heappush(replica.running, (replica.progress + request.answer - 1, self.order, request))
        while replica.running and replica.running[0][0] <= replica.progress + 1e-6:
            _, _, request = heappop(replica.running)
            request.done = time
            self.finished.append(request)

    def _schedule(self, index: int) -> None:
        """Start the next prefill if there is room, and note when something next ends on this replica."""
        replica = self.replicas[index]
        if replica.filling is None and replica.waiting and len(replica.running) < replica.max_batch:
            request = replica.waiting.popleft()
            replica.filling = (replica.clock + self.rates.fill(request.prompt), request)
        replica.version += 1
        if replica.filling is not None:
            time = replica.filling[0]
        elif replica.running:
            left = max(0.0, replica.running[0][0] - replica.progress)
            time = replica.clock + left * self.rates.step(len(replica.running))
        else:
            return
        self.order += 1
        heappush(self.events, (time, self.order, index, replica.version))

    def _report(self, layout: Layout) -> Day:
        done = self.finished
        makespan = max(max(request.done for request in done), DAY_S)
        first = sorted(request.first_token - request.arrival for request in done)
        total = sorted(request.done - request.arrival for request in done)
        tokens = sorted(
            (request.done - request.first_token) / (request.answer - 1) for request in done if request.answer > 1
        )
        return Day(
            traffic=self.traffic,
            replicas=len(self.replicas),
            devices=len(self.replicas) * layout.devices,
            layout=layout.name,
            max_batch=self.replicas[0].max_batch,
            makespan_s=makespan,
            first_token_s=_percentiles(first),
            token_s=_percentiles(tokens),
            total_s=_percentiles(total),
            output_tokens_per_s=sum(request.answer for request in done) / makespan,
            input_tokens_per_s=sum(request.prompt for request in done) / makespan,
            busy_frac=sum(replica.busy_s for replica in self.replicas) / (makespan * len(self.replicas)),
            longest_queue=self.longest_queue,
        )


def _percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {"p50": 0.0, "p90": 0.0, "p99": 0.0}
    return {f"p{share}": values[min(len(values) - 1, len(values) * share // 100)] for share in (50, 90, 99)}
