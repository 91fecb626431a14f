"""Training checkpoints: one file a save, whole or absent, from which a run goes on bit for bit.

Owns file names and what is inside; knows no loop. A file holds model, optimizer, step, data position and RNG state.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fewfire.checkpoints.atomic import replacing_file
from fewfire.errors import FormatError

VERSION = 1
_NAME = re.compile(r"step-(\d+)\.pt")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as step-N.pt in `folder`, synced and renamed; then drop all but the newest `keep`.

    Raises: BudgetError on a full disk, ConfigError where the folder cannot be written; older files stay.
    """
    path = folder / f"step-{step:08d}.pt"
    with replacing_file(path) as stream:
        remembering = _Remembering(stream)
        try:
            torch.save({"version": VERSION, "step": step, **state}, remembering)  # type: ignore[arg-type]
        except RuntimeError:
            if remembering.error is not None:  # torch reports its own surprise instead of the disk's reason
                raise remembering.error from None
            raise
    for old in checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


class _Remembering:
    """A stream to write to that keeps the reason why a write failed."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            return self.stream.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.stream.flush()


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name).group(1)))  # type: ignore[union-attr]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` was given. Only plain values and tensors are accepted from the file.

    Raises: FormatError for a truncated, damaged or foreign file, saying what to do.
    """
    remedy = "remove it to go on from the checkpoint before, or start in another folder"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"not a whole checkpoint ({reason[:80]}); {remedy}", path=str(path)) from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise FormatError(f"no training checkpoint of version {VERSION}; {remedy}", path=str(path))
    return state
