"""Progress of a long write on stderr: a bar in a terminal, otherwise a line every tenth."""

from __future__ import annotations

import time
from typing import Any

from fewfire.cli.output import console, note
from fewfire.sizes import format_bytes


class Writing:
    """A context manager that is called with (bytes done, bytes in all)."""

    def __init__(self, title: str):
        self.title, self._tenth, self._start = title, 0, 0.0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Writing:
        self._start = time.perf_counter()
        screen = console(stderr=True)
        if screen.is_terminal:
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            columns = (TextColumn(self.title), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
            self._bar = Progress(*columns, console=screen, transient=True)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is KeyboardInterrupt:
            note(f"{self.title}: stopped; the same command goes on from here")

    def __call__(self, done: int, total: int) -> None:
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(self.title, total=total)
            self._bar.update(self._task, completed=done)
        elif done * 10 // max(total, 1) > self._tenth:
            self._tenth = done * 10 // max(total, 1)
            seconds = time.perf_counter() - self._start
            note(f"{self.title}: {format_bytes(done)} of {format_bytes(total)}, {seconds:.0f} s")
