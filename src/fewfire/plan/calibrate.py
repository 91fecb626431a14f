"""One or two measured points turn assumptions into facts: fits the bandwidth share and the fixed time of a step.

A point above its own roof is not fitted but refused: then the run stores less than was said, or the machine is another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fewfire.config import check
from fewfire.errors import ConfigError
from fewfire.plan.hardware import System
from fewfire.plan.speed import bytes_per_step, decode_step
from fewfire.plan.workload import Assumptions, Layout, Workload


@dataclass(frozen=True)
class Point:
    """A measured decode speed beside its prediction and its roof (peak bandwidth, nothing else), tokens/s."""

    batch: int
    measured: float
    predicted: float
    roof: float

    @property
    def above_roof(self) -> bool:
        return self.measured > self.roof

    @property
    def error(self) -> float:
        """Prediction over measurement, less one."""
        return self.predicted / self.measured - 1


def roof(work: Workload, system: System, batch: int) -> float:
    """Tokens/s if a step took only the time to read its bytes once at peak bandwidth over all devices."""
    return batch / (bytes_per_step(work, batch) / (system.part.bandwidth_gbs * 1e9 * system.count))


def compare(
    work: Workload, system: System, layout: Layout, measured: Mapping[int, float], assume: Assumptions
) -> list[Point]:
    """Each measured point (batch -> tokens/s) beside what is predicted under `assume`."""
    points = []
    for batch, speed in sorted(measured.items()):
        check(speed > 0 and batch > 0, f"measured point {batch}={speed} must have a batch and a speed above zero")
        step = decode_step(work, system, layout, batch, assume)
        points.append(Point(batch, speed, step.tokens_per_s, roof(work, system, batch)))
    return points


def calibrate(
    work: Workload, system: System, layout: Layout, measured: Mapping[int, float], assume: Assumptions
) -> Assumptions:
    """Assumptions under which the measured points come out.

    One point: the share of the bandwidth. Two or more: least squares of t = t0 + bytes / (share x bandwidth), t0
    spread over the layers' launches. Raises ConfigError for a point above its roof, or points that fit no line.
    """
    for point in compare(work, system, layout, measured, assume):
        if point.above_roof:
            raise ConfigError(
                f"{point.measured:g} tokens/s at batch {point.batch} is above its roof of {point.roof:.1f} on "
                f"{system.label}; check --quant and --context, or the machine"
            )
    peak = system.part.bandwidth_gbs * 1e9 * system.count
    times = {batch: batch / speed for batch, speed in measured.items()}
    sizes = {batch: bytes_per_step(work, batch) / peak for batch in measured}
    if len(measured) == 1:
        (batch,) = measured
        step = decode_step(work, system, layout, batch, assume)
        fixed = step.seconds - step.memory_s
        share = sizes[batch] / max(times[batch] - fixed, sizes[batch])
        return replace(assume, efficiency=share)
    mean_x = sum(sizes.values()) / len(sizes)
    mean_y = sum(times.values()) / len(times)
    spread = sum((sizes[batch] - mean_x) ** 2 for batch in sizes)
    check(spread > 0, "measured points of one batch cannot separate fixed time from reading; give another batch")
    slope = sum((sizes[batch] - mean_x) * (times[batch] - mean_y) for batch in sizes) / spread
    fixed = mean_y - slope * mean_x
    check(slope >= 1 and fixed >= 0, "measured points fit no line of fixed time and reading; measure them again")
    communication = decode_step(work, system, layout, 1, assume).communication_s
    launch = max(0.0, fixed - communication) / work.num_layers
    return replace(assume, efficiency=1 / slope, launch_s=dict.fromkeys(assume.launch_s, launch))


def parse_measured(text: str) -> dict[int, float]:
    """'1=17.0,4=36.4' -> {1: 17.0, 4: 36.4}; a bare '17' is batch 1. ConfigError where it is not that."""
    points: dict[int, float] = {}
    for part in text.split(","):
        batch, _, speed = part.rpartition("=")
        try:
            points[int(batch) if batch else 1] = float(speed)
        except ValueError as error:
            raise ConfigError(f"--measured ({text}) is not batch=tokens/s; write it as 1=17.0,4=36.4") from error
    return points
