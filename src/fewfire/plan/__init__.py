"""Planning: parameters, bytes, speed and cost of a model before anything is bought or downloaded. Arithmetic only."""

from __future__ import annotations

from fewfire.plan.plan import Plan, plan

__all__ = ["Plan", "plan"]
