"""A line at the terminal's last row that is kept up to date while text scrolls above it."""

from __future__ import annotations

import shutil
import sys
from types import TracebackType
from typing import Self, TextIO

from fewfire.config import environment

_SECONDS = 0.2  # between two states


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty()


class LiveLine:
    """`show` writes one line below the text of stdout, on stderr; nothing where stderr is no terminal.

    Where stdout is the terminal too, text scrolls in a region of its own (DECSTBM) above the line.
    """

    def __init__(self) -> None:
        size = shutil.get_terminal_size()
        self.is_on = _is_terminal(sys.stderr) and environment("TERM", "dumb") != "dumb" and size.lines > 4
        self._below_text = self.is_on and _is_terminal(sys.stdout)
        self._rows, self._columns = size.lines, size.columns
        self._next_s = 0.0

    def __enter__(self) -> Self:
        if self._below_text:  # make room, then keep the last row out of what scrolls; the cursor stays in its line
            self._write(f"\n\x1b[A\x1b7\x1b[1;{self._rows - 1}r\x1b8")
        return self

    def is_due(self, now_s: float) -> bool:
        """Whether it is time for another state."""
        if not self.is_on or now_s < self._next_s:
            return False
        self._next_s = now_s + _SECONDS
        return True

    def show(self, line: str) -> None:
        """Write `line`, cut to the terminal's width, instead of the one before."""
        if not self.is_on:
            return
        line = line[: self._columns - 1]
        if self._below_text:
            sys.stdout.flush()
            self._write(f"\x1b7\x1b[{self._rows};1H\x1b[2K\x1b[2m{line}\x1b[0m\x1b8")
        else:
            self._write(f"\r\x1b[2K{line}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._below_text:
            sys.stdout.flush()
            self._write(f"\x1b7\x1b[{self._rows};1H\x1b[2K\x1b[r\x1b8")
        elif self.is_on:
            self._write("\r\x1b[2K")

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
