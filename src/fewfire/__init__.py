"""fewfire plans, trains, explains, shrinks and serves Mixture-of-Experts language models in the memory you have.

Importing this module loads neither torch nor numpy: names are resolved when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "BudgetError": "fewfire.errors",
    "ConfigError": "fewfire.errors",
    "FewfireError": "fewfire.errors",
    "FormatError": "fewfire.errors",
    "KernelUnavailable": "fewfire.errors",
    "Lossy": "fewfire.api",
    "MoE": "fewfire.model.moe",
    "Model": "fewfire.api",
    "ModelConfig": "fewfire.config",
    "RequestError": "fewfire.errors",
    "RouterConfig": "fewfire.config",
    "load": "fewfire.api",
}
_CALLABLE_MODULES = ("plan",)  # fewfire.plan(...) is a call and fewfire.plan a package: the package is callable

__all__ = sorted([*_PUBLIC, *_CALLABLE_MODULES])


def __getattr__(name: str) -> Any:
    if name in _CALLABLE_MODULES:
        return import_module(f"fewfire.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fewfire' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
