"""What routers do on somebody's text: recorded, kept in a file, simulated through caches, replayed by the engine."""

from __future__ import annotations

from fewfire.trace.file import Trace, read_trace, write_trace
from fewfire.trace.hot import hot_set
from fewfire.trace.profile import profile_of, save_trace
from fewfire.trace.record import record
from fewfire.trace.replay import Replayed, replay, replay_pack
from fewfire.trace.simulate import POLICIES, Simulated, Step, decode_steps, simulate, steps_of
from fewfire.trace.synthetic import draw_trace, stretch_counts

__all__ = [
    "POLICIES",
    "Replayed",
    "Simulated",
    "Step",
    "Trace",
    "decode_steps",
    "draw_trace",
    "hot_set",
    "profile_of",
    "read_trace",
    "record",
    "replay",
    "replay_pack",
    "save_trace",
    "simulate",
    "steps_of",
    "stretch_counts",
    "write_trace",
]
