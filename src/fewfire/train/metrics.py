"""What a run writes down: metrics.jsonl, one object a line, and TensorBoard scalars. Resuming never repeats a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewfire.checkpoints.atomic import write_bytes, write_failure


class MetricsLog:
    """Appends to `folder`/metrics.jsonl; lines of steps after `resume_step` are dropped first.

    A line cut short by a crash is dropped too. TensorBoard files lie in `folder`/tensorboard when asked for.
    """

    def __init__(self, folder: Path, resume_step: int, tensorboard: bool):
        self.path = folder / "metrics.jsonl"
        kept = [line for line in self._lines() if json.loads(line)["step"] <= resume_step]
        write_bytes(self.path, "".join(line + "\n" for line in kept).encode())
        self._stream = open(self.path, "a", encoding="utf-8")
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [line for line in lines[:-1] if line.startswith("{") and line.endswith("}")]

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line {"kind", "step", ...}; numbers go to TensorBoard as kind/name."""
        try:
            self._stream.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._stream.flush()
        except OSError as error:
            raise write_failure(error, self.path) from error
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._stream.close()
        if self._board is not None:
            self._board.close()
