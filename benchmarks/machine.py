"""The line that every benchmark prints first: machine, commit, date."""

from __future__ import annotations

import datetime
import os
import subprocess
from pathlib import Path


def describe() -> str:
    """'AMD EPYC, 2 cores, 24 GiB; commit 1a2b3c4; 2026-11-22'."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        "processor",
    )
    kib = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"{model}, {os.cpu_count()} cores, {kib / 2**20:.0f} GiB; commit {commit or 'unknown'}; {today}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
