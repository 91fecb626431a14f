"""This machine as a part of the catalogue: the profile that `fewfire doctor` stores and `--hardware here` reads."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fewfire.config import cache_folder
from fewfire.errors import ConfigError, FormatError
from fewfire.plan.hardware import Part
from fewfire.plan.rates import FORKS_PER_LAYER, KernelRates

PROFILE_NAME = "machine.json"


@dataclass(frozen=True)
class MachineProfile:
    """What was measured of this machine: bytes, bytes per second, operations per second; None where unknown.

    `ram_read_bytes_per_s`: of all threads together, the most of what any number of them reaches. Disk: random reads of
    `disk_record_bytes`; the same by size. `kernels`: of the native ones, where the extension is built.
    """

    host: str
    date: str
    cpu: str
    isa: tuple[str, ...]
    cores: int
    threads: int
    ram_bytes: int
    memory_limit_bytes: int | None
    ram_read_bytes_per_s: float
    disk_read_bytes_per_s: float | None
    disk_path: str
    disk_direct: bool
    float_ops_per_s: float | None
    int8_ops_per_s: float | None
    ram_read_bytes_per_s_by_threads: dict[str, float] = field(default_factory=dict)
    disk_record_bytes: int | None = None
    disk_read_bytes_per_s_by_size: dict[str, float] = field(default_factory=dict)
    kernel_isa: str | None = None
    kernels: KernelRates | None = None

    def to_json(self) -> dict[str, Any]:
        """The profile as one object."""
        rates = {"kernels": None if self.kernels is None else self.kernels.to_json()}
        return {**asdict(replace(self, kernels=None)), "isa": list(self.isa), **rates}

    @staticmethod
    def from_json(document: dict[str, Any]) -> MachineProfile:
        """Raises KeyError, TypeError, ValueError or AttributeError where it is of another form."""
        rates = document.get("kernels")
        kernels = None if rates is None else KernelRates.from_json(rates)
        return MachineProfile(**{**document, "isa": tuple(document["isa"]), "kernels": kernels})

    def part(self) -> Part:
        """This machine as a Part: bandwidth is measured, so all of it counts; memory is the smaller limit's."""
        memory = min(self.ram_bytes, self.memory_limit_bytes or self.ram_bytes)
        reserve = 0.0 if memory < self.ram_bytes else min(2.0, 0.1 * memory / 1e9)
        return Part(
            name=f"this machine, {self.cpu}",
            kind="cpu",
            memory_gb=memory / 1e9,
            memory_bytes=memory,
            reserve_gb=reserve,
            bandwidth_gbs=self.ram_read_bytes_per_s / 1e9,
            efficiency=1.0,
            aliases=("here",),
            bf16_tflops=self.float_ops_per_s / 1e12 if self.float_ops_per_s else None,
            int8_tflops=self.int8_ops_per_s / 1e12 if self.int8_ops_per_s else None,
            disk_gbs=self.disk_read_bytes_per_s / 1e9 if self.disk_read_bytes_per_s else None,
            launch_s=FORKS_PER_LAYER * self.kernels.fork_join_s if self.kernels else None,
            kernels=self.kernels,
            sources=(f"fewfire doctor, {self.date}",),
        )


def profile_path() -> Path:
    """Where the profile is kept."""
    return cache_folder() / PROFILE_NAME


def store_profile(profile: MachineProfile) -> Path:
    """Write the profile whole or not at all; its path."""
    path = profile_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(profile.to_json(), indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def load_profile() -> MachineProfile:
    """The stored profile. Raises ConfigError if there is none, FormatError if it is damaged."""
    path = profile_path()
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError("hardware (here) has no profile yet; run `fewfire doctor` once") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); run `fewfire doctor` again") from error
    except ValueError as error:
        raise FormatError("is no JSON; run `fewfire doctor` again", path=str(path)) from error
    try:
        return MachineProfile.from_json(document)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise FormatError("is of another version; run `fewfire doctor` again", path=str(path)) from error
