"""Planning: parameters, bytes, speed and cost of a model before anything is bought or downloaded. Arithmetic only.

The package is callable: `fewfire.plan("mixtral-8x7b")` is `fewfire.plan.plan("mixtral-8x7b")`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from fewfire.plan.plan import Plan, plan

__all__ = ["Plan", "plan"]


class _CallablePackage(ModuleType):
    """Importing a submodule sets `fewfire.plan` to this package whatever was there: so the package is the function."""

    def __call__(self, *arguments: Any, **options: Any) -> Plan:
        return plan(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
