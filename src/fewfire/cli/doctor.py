"""`fewfire doctor`: what this machine can do, measured in seconds and stored for `fewfire plan --hardware here`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fewfire.plan.here import MachineProfile


def doctor(
    disk: Annotated[
        Path | None, typer.Option(help="Folder whose disk is measured (default: the cache folder).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Instruction sets, cores, memory and its limit, memory and disk bandwidth; the profile `--hardware here` uses."""
    from fewfire.cli.output import note, print_json
    from fewfire.config import cache_folder, check
    from fewfire.plan.here import store_profile
    from fewfire.runtime.probe import probe_machine

    folder = disk or cache_folder()
    if disk is None:
        folder.mkdir(parents=True, exist_ok=True)
    check(folder.is_dir(), f"--disk ({folder}) is no folder; give one on the disk to measure")
    profile = probe_machine(folder, say=lambda what: note(f"measuring {what} ..."))
    path = store_profile(profile)
    if as_json:
        print_json({**profile.to_json(), "path": str(path)})
    else:
        _print_profile(profile, path)


def _print_profile(profile: MachineProfile, path: Path) -> None:
    from fewfire.cli.output import console, table
    from fewfire.sizes import format_bytes

    rows = table("", "this machine")
    limit = profile.memory_limit_bytes
    disk = profile.disk_read_bytes_per_s
    way = "past the page cache" if profile.disk_direct else "through the page cache"
    rows.add_row("processor", profile.cpu)
    rows.add_row("instruction sets", " ".join(profile.isa) or "none known")
    rows.add_row("cores, threads used", f"{profile.cores}, {profile.threads}")
    rows.add_row("memory", format_bytes(profile.ram_bytes))
    rows.add_row("memory limit (cgroup)", format_bytes(limit) if limit else "none")
    for count, speed in profile.ram_read_bytes_per_s_by_threads.items():
        rows.add_row(f"memory reads, {count} thread{'s' * (count != '1')}", f"{speed / 1e9:.1f} GB/s")
    for size, speed in profile.disk_read_bytes_per_s_by_size.items():
        rows.add_row(f"disk reads of {format_bytes(int(size))}", f"{speed / 1e9:.2f} GB/s, {way}")
    if not disk:
        rows.add_row("disk reads", "not measured: no room")
    rate = profile.float_ops_per_s
    rows.add_row("float32 arithmetic", f"{rate / 1e9:,.0f} GFLOP/s" if rate else "not measured")
    ints = profile.int8_ops_per_s
    rows.add_row("int8 arithmetic", f"{ints / 1e9:,.0f} GOP/s" if ints else "not measured: no extension")
    if profile.kernels is not None:
        rows.add_row("kernels", str(profile.kernel_isa))
        for name, points in profile.kernels.products.items():
            one, many = points[0][1], points[-1][1]
            rows.add_row(f"{name} products", f"{one / 1e9:,.0f} GOP/s of 1 token, {many / 1e9:,.0f} of {points[-1][0]}")
        rows.add_row("all threads start and end", f"{profile.kernels.fork_join_s * 1e6:.1f} us")
    out = console()
    out.print(rows)
    out.print()
    out.print(f"Stored in {path}; `fewfire plan MODEL --hardware here` uses it.", soft_wrap=True)
