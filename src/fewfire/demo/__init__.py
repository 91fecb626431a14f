"""The demo: the main job on real text that every machine has, offline. What it trains is the model `demo`."""

from __future__ import annotations

from fewfire.demo.story import DemoResult, Row, run_demo

__all__ = ["DemoResult", "Row", "run_demo"]
