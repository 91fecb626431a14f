"""A checkpoint's values become a pack's bytes, with the error that each layer takes."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from typing import Any

import torch

from fewfire.checkpoints.gguf import GgufValues
from fewfire.checkpoints.pack_source import HubValues
from fewfire.config import ModelConfig
from fewfire.formats import Encoded, decode, encode, transcode
from fewfire.plan.memory import UNQUANTIZED

_LAYER = re.compile(r"^(?:encoder\.)?layers\.\d+")


Place = tuple[str, str, str]  # (layer or outer part, experts|trunk, format)


@dataclass
class Loss:
    """What quantizing cost one part: `relative` is the norm of the difference over the norm of the weights."""

    squared_error: float = 0.0
    squared_weights: float = 0.0
    values: int = 0

    @property
    def relative(self) -> float:
        return (self.squared_error / self.squared_weights) ** 0.5 if self.squared_weights else 0.0

    def add(self, other: Loss) -> None:
        self.squared_error += other.squared_error
        self.squared_weights += other.squared_weights
        self.values += other.values


class Quantizer:
    """A pack's source and ledger: a checkpoint's values, encoded, and what that cost. Threads: any number."""

    def __init__(self, values: HubValues | GgufValues, config: ModelConfig):
        self.values, self.config = values, config
        self.losses: dict[Place, Loss] = {}
        self._made: dict[tuple[str, int | None], tuple[Place, Loss]] = {}
        self._lock = threading.Lock()

    def encoded(self, name: str, expert: int | None, format_name: str, shape: tuple[int, ...]) -> Encoded:
        record = name if expert is None else f"{name}[{expert}]"
        if isinstance(self.values, GgufValues) and format_name not in UNQUANTIZED:
            if self.values.home(name) == format_name:
                return transcode(self.values.read_blocks(name, expert), format_name, record=record)
        values = self.values.read(name, expert).reshape(shape)
        made = encode(values, format_name, record=record)
        if format_name not in UNQUANTIZED:
            layer = _LAYER.match(name)
            place = layer.group() if layer else name.split(".")[0]
            part = "experts" if ".experts." in name else "trunk"
            self._made[name, expert] = (
                (place, part, format_name),
                _loss(values.float(), decode(made, format_name, shape)),
            )
        return made

    def take(self, name: str, expert: int | None) -> Any:
        """What quantizing a parameter cost, as JSON; None where it is exact."""
        found = self._made.pop((name, expert), None)
        if found is None:
            return None
        self._count(*found)
        return [*found[0], found[1].squared_error, found[1].squared_weights, found[1].values]

    def put_back(self, remarks: Any) -> None:
        place, part, format_name, error, power, count = remarks
        self._count((place, part, format_name), Loss(error, power, count))

    def _count(self, place: Place, loss: Loss) -> None:
        with self._lock:
            self.losses.setdefault(place, Loss()).add(loss)


def _loss(values: torch.Tensor, back: torch.Tensor) -> Loss:
    error = float((back - values).square().sum(dtype=torch.float64))
    return Loss(error, float(values.square().sum(dtype=torch.float64)), values.numel())
