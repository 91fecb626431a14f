"""What this process may use: memory that the machine or its cgroup leaves, hardware threads. Standard library only.

cgroup version 2 and 1 on Linux; elsewhere what the system says of physical memory.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
_Names = tuple[str, str, str, tuple[str, ...]]  # folder, limit, use, file pages in memory.stat
_V2: _Names = ("sys/fs/cgroup", "memory.max", "memory.current", ("file",))
_V1: _Names = (
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_UNLIMITED = 2**60  # version 1 writes "no limit" as a number of this size


def memory_limit(root: Path = ROOT) -> int | None:
    """The tightest cgroup memory limit of this process (version 2 or 1), None without one."""
    return min((limit for limit, _, _ in _cgroups(root)), default=None)


def ram_bytes() -> int:
    """Physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes(root: Path = ROOT) -> int:
    """What this process may still take: the least that the machine and each of its cgroups have left.

    File pages that the system keeps count as free: it gives them up.
    """
    left = [limit - used for limit, used, _ in _cgroups(root)]
    available = _read_fields(root / "proc/meminfo").get("MemAvailable:")
    left.append(ram_bytes() if available is None else available * 1024)
    return max(0, min(left))


def rss_bytes() -> int:
    """Resident memory of this process now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_rss_bytes()


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident so far.

    Linux says so in /proc; its getrusage would report the parent's peak in a freshly started child.
    """
    peak = _read_fields(Path("/proc/self/status")).get("VmHWM:")
    if peak is not None:
        return peak * 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def usable_threads() -> int:
    """Hardware threads that this process may run on, its cgroup's quota included."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return threads
    return threads if quota == "max" else max(1, min(threads, round(int(quota) / int(period))))


def _cgroups(root: Path) -> Iterator[tuple[int, int, Path]]:
    """(limit, bytes in use without file pages, folder) of every memory cgroup above this process that has a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_name, used_name, file_names = _V2
        elif "memory" in controllers.split(","):
            base, limit_name, used_name, file_names = _V1
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            folder = (root / base).joinpath(*parts[:depth])
            limit = _read_number(folder / limit_name)
            if limit is None:
                continue
            fields = _read_fields(folder / "memory.stat")
            used = (_read_number(folder / used_name) or 0) - sum(fields.get(name, 0) for name in file_names)
            yield limit, max(0, used), folder


def _read_number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < _UNLIMITED else None


def _read_fields(file: Path) -> dict[str, int]:
    """'name number' lines of a file; empty where it cannot be read."""
    try:
        lines = file.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    words = (line.split() for line in lines)
    return {each[0]: int(each[1]) for each in words if len(each) > 1 and each[1].isdigit()}
