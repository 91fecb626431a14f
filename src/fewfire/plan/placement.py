"""Which device holds which experts: in their order, or balanced by load with the hottest ones copied.

Owns the packing. The aim is even load; since the slowest device sets the pace, that is also the least wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from fewfire.config import check


@dataclass(frozen=True)
class Placement:
    """`devices[d]` lists the experts that device d holds; a copied expert is on several."""

    devices: tuple[tuple[int, ...], ...]

    def copies(self, num_experts: int) -> list[int]:
        """How many devices hold each expert."""
        counts = [0] * num_experts
        for device in self.devices:
            for expert in device:
                counts[expert] += 1
        return counts

    def loads(self, shares: Sequence[float]) -> list[float]:
        """Tokens on each device per token of the batch, an expert's tokens split evenly over its copies."""
        copies = self.copies(len(shares))
        return [sum(shares[expert] / copies[expert] for expert in device) for device in self.devices]

    def imbalance(self, shares: Sequence[float]) -> float:
        """The fullest device's load over the mean: 1 is even."""
        loads = self.loads(shares)
        return max(loads) * len(loads) / sum(loads)

    @property
    def physical_to_logical(self) -> list[int]:
        """The expert in each slot, devices one after another: what serving engines call this map."""
        return [expert for device in self.devices for expert in device]


def place(shares: Sequence[float], num_devices: int, *, replicas: int = 0, balance: bool = True) -> Placement:
    """Spread experts of load `shares` over `num_devices`, with `replicas` extra slots for copies of hot ones.

    `balance` False: in order, as engines start. True: the expert with the highest load a copy is copied until the
    slots are used, then the heaviest copies go first, each to the emptiest device that has room and no copy of it.
    Equal slots a device. Raises ConfigError if the slots do not divide.
    """
    num_experts = len(shares)
    check(num_devices >= 1, f"devices ({num_devices}) must be at least 1")
    slots = num_experts + replicas
    if not balance:
        held = -(-slots // num_devices)
        order = [*range(num_experts), *range(replicas)]
        devices = [tuple(order[start : start + held]) for start in range(0, slots, held)]
        return Placement(tuple(devices) + ((),) * (num_devices - len(devices)))
    check(
        slots % num_devices == 0,
        f"{num_experts} experts and {replicas} replicas do not divide over {num_devices} devices; "
        f"use {-slots % num_devices + replicas} replicas",
    )
    copies = _copy_hot(shares, replicas, num_devices)
    return _pack(shares, copies, num_devices, slots // num_devices)


def _copy_hot(shares: Sequence[float], replicas: int, num_devices: int) -> list[int]:
    copies = [1] * len(shares)
    heap = [(-share, expert) for expert, share in enumerate(shares)]
    heapify(heap)
    for _ in range(replicas):
        _, expert = heappop(heap)
        copies[expert] += 1
        if copies[expert] < num_devices:
            heappush(heap, (-shares[expert] / copies[expert], expert))
    return copies


def _pack(shares: Sequence[float], copies: Sequence[int], num_devices: int, held: int) -> Placement:
    items = [(shares[expert] / count, expert) for expert, count in enumerate(copies) for _ in range(count)]
    items.sort(key=lambda item: (-item[0], item[1]))
    loads = [0.0] * num_devices
    devices: list[list[int]] = [[] for _ in range(num_devices)]
    for load, expert in items:
        room = [index for index in range(num_devices) if len(devices[index]) < held]
        free = [index for index in room if expert not in devices[index]] or room
        target = min(free, key=lambda index: (loads[index], index))
        devices[target].append(expert)
        loads[target] += load
    return Placement(tuple(tuple(sorted(device)) for device in devices))


@dataclass(frozen=True)
class PlacementGain:
    """What balancing does to a layer's busiest device, mean over the profile's layers, in order against balanced.

    `imbalance`: its tokens over the mean. `awake`: experts awake on it in a step of `num_tokens` tokens: balancing
    tokens is not balancing what decode reads.
    """

    devices: int
    replicas: int
    num_tokens: int
    imbalance_in_order: float
    imbalance_balanced: float
    awake_in_order: float
    awake_balanced: float
