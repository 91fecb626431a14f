"""Long work in the terminal. A training run: one live block with loss, speed, time left, the router's health.

Where stderr is no terminal it prints one line a report instead. Knows the trainer's reports, not the trainer.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewfire.cli.output import console, table

if TYPE_CHECKING:
    from rich.console import Group

    from fewfire.balance import LoadHealth
    from fewfire.train.loop import EvalReport, StepReport

BARS = " ▁▂▃▄▅▆▇█"
ALARM = 0.5  # MaxVio above its noise floor


def load_bars(load: tuple[int, ...], columns: int = 32) -> str:
    """Each expert's load as a bar against the mean (a full bar is twice the mean); wide layers are folded."""
    fold = -(-len(load) // columns)
    sums = [sum(load[start : start + fold]) for start in range(0, len(load), fold)]
    mean = sum(sums) / max(1, len(sums))
    if mean == 0:
        return BARS[0] * len(sums)
    return "".join(BARS[min(len(BARS) - 1, round(value / mean * (len(BARS) - 1) / 2))] for value in sums)


def duration(seconds: float) -> str:
    """'4 s', '2:05 min', '3:20 h'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 100 else f"{minutes // 60}:{minutes % 60:02d} h"


class TrainProgress:
    """A trainer's reporter. Use as a context manager: it owns the live block on stderr while inside."""

    def __init__(self, title: str = "", quiet: bool = False):
        self.title, self.quiet = title, quiet
        self._console = console(stderr=True)
        self._live: Any = None
        self._step: StepReport | None = None
        self._evaluation: EvalReport | None = None

    def __enter__(self) -> TrainProgress:
        if self._console.is_terminal and not self.quiet:
            from rich.live import Live

            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def started(self, trainer: Any) -> None:
        self._say(f"{self.title or trainer.folder}: {trainer.settings.run.steps} steps, from step {trainer.step}")

    def stepped(self, report: StepReport) -> None:
        self._step = report
        if self._live is not None:
            self._live.update(self._block())
        else:
            self._say(self._line(report))

    def evaluated(self, report: EvalReport) -> None:
        self._evaluation = report
        self._say(f"step {report.step}: held out {report.bits_per_byte:.3f} bits per byte")

    def saved(self, path: Path) -> None:
        """Nothing to show: every save is announced by its file."""

    def _say(self, message: str) -> None:
        if self.quiet:
            return
        if self._live is not None:
            self._live.console.print(message, style="dim")
        else:
            sys.stderr.write(message + "\n")
            sys.stderr.flush()

    @staticmethod
    def _line(report: StepReport) -> str:
        bad = [health for health in report.health if health.excess > ALARM]
        dead = sum(health.num_dead for health in report.health)
        router = ""
        if report.health:
            router = f", MaxVio over its floor {max(h.excess for h in report.health):.2f}, dead {dead}"
            router += f" (layers {', '.join(str(health.layer) for health in bad)})" if bad else ""
        return (
            f"step {report.step}/{report.total_steps}: loss {report.loss:.3f}, {report.tokens_per_s:,.0f} tok/s, "
            f"{duration(report.seconds_left)} left{router}"
        )

    def _block(self) -> Group:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        assert self._step is not None
        report = self._step
        title = f"{self.title}   " if self.title else ""
        head = Text(
            f"{title}step {report.step}/{report.total_steps}   loss {report.loss:.3f}   "
            f"{report.tokens_per_s:,.0f} tok/s   {duration(report.seconds_left)} left"
        )
        if self._evaluation is not None:
            head.append(f"   held out {self._evaluation.bits_per_byte:.3f} bits/byte")
        parts: list[Any] = [head, ProgressBar(total=report.total_steps, completed=report.step, width=80)]
        if report.health:
            parts.append(self._router_table(report.health))
        return Group(*parts)

    @staticmethod
    def _router_table(healths: tuple[LoadHealth, ...], most: int = 12) -> Any:
        shown = table("layer", "load per expert, full bar = twice the mean", "MaxVio", "floor", "dead")
        shown.columns[1].justify = "left"
        chosen = sorted(sorted(healths, key=lambda health: -health.excess)[:most], key=lambda health: health.layer)
        for health in chosen:
            style = "red" if health.excess > ALARM or health.num_dead else None
            cells = (load_bars(health.load), f"{health.max_vio:.2f}", f"{health.noise_floor:.2f}", str(health.num_dead))
            shown.add_row(str(health.layer), *cells, style=style)
        return shown


class EvalProgress:
    """An evaluation's tokens, perplexity and speed: one line rewritten in a terminal, else one each 10 s."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._every_s = 0.2 if self._terminal else 10.0
        self._told = time.perf_counter()
        self._begin = self._told
        self._open = False

    def report(self, tokens: int, nats: float) -> None:
        now = time.perf_counter()
        if tokens == 0:
            self._begin = now  # what was done before the evaluation is none of its speed
        if self.quiet or tokens == 0 or now - self._told < self._every_s:
            return
        self._told, mean = now, nats / max(1, tokens)
        perplexity = math.exp(mean) if mean < 700 else math.inf
        line = f"{tokens:,} tokens, perplexity {perplexity:.3f}, {tokens / (now - self._begin):,.0f} tokens/s"
        sys.stderr.write(f"\r{line}\x1b[K" if self._terminal else f"{line}\n")
        sys.stderr.flush()
        self._open = self._terminal

    def __enter__(self) -> EvalProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
