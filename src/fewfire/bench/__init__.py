"""Measurements of a pack on this machine, beside what the machine could do and what the planner says."""

from fewfire.bench.kernels import KernelSpeed, bench_kernels
from fewfire.bench.run import DRIFT, Bench, Run, bench
from fewfire.bench.sweep import Sweep, SweepRow, sweep

__all__ = ["DRIFT", "Bench", "KernelSpeed", "Run", "Sweep", "SweepRow", "bench", "bench_kernels", "sweep"]
