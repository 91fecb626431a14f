"""What training costs: FLOPs, device-hours, dollars, and the memory of a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewfire.config import check
from fewfire.plan.count import Counts
from fewfire.plan.hardware import System
from fewfire.plan.workload import Workload

BYTES_PER_PARAMETER = 16  # bf16 weights and gradients, float32 master copy and two moments
TRAIN_MFU = 0.35  # of the dense bf16 rate; the published cost of DeepSeek-V3 comes to the same


@dataclass(frozen=True)
class Training:
    """`num_tokens` through forward and backward. Device-hours and dollars are None where a rate or price is unknown."""

    num_tokens: float
    flops: float
    state_bytes: int
    system: System
    mfu: float

    @property
    def device_hours(self) -> float | None:
        rate = self.system.part.bf16_tflops
        return None if not rate else self.flops / (rate * 1e12 * self.mfu) / 3600

    @property
    def devices_for_memory(self) -> int:
        """The fewest devices over which weights, gradients and optimizer states can be spread."""
        return max(1, -int(-self.state_bytes // max(1.0, self.system.part.usable_bytes)))

    @property
    def days(self) -> float | None:
        """On the devices asked for, or on those that the memory takes if they are more."""
        if self.device_hours is None:
            return None
        return self.device_hours / max(self.system.count, self.devices_for_memory) / 24

    @property
    def usd(self) -> float | None:
        price = self.system.part.usd_per_hour
        return None if price is None or self.device_hours is None else price * self.device_hours

    def to_json(self) -> dict[str, Any]:
        """Figures under their units."""
        return {
            "tokens": self.num_tokens,
            "flops": self.flops,
            "state_bytes": self.state_bytes,
            "hardware": self.system.label,
            "mfu": self.mfu,
            "device_hours": self.device_hours,
            "devices_for_memory": self.devices_for_memory,
            "days": self.days,
            "usd": self.usd,
        }


def plan_training(
    work: Workload, counts: Counts, num_tokens: float, system: System, *, mfu: float = TRAIN_MFU
) -> Training:
    """FLOPs = 3 x (2 x active matmul parameters + attention over half the context) x tokens.

    Forward once, backward twice. State: 16 bytes a parameter, all experts of them.
    """
    check(0 < num_tokens < 1e18, f"training tokens ({num_tokens}) must be above 0 and below 10^18")
    half = work.at(max(1, work.context // 2)).flops
    return Training(num_tokens, 3.0 * half.total * num_tokens, counts.total * BYTES_PER_PARAMETER, system, mfu)
