"""Which code runs a kernel: the extension at some instruction set, or the torch reference. Owns that one choice.

The choice is made at the first call, from FEWFIRE_ISA or what the processor allows, and changed by `set_isa`.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

from fewfire.config import environment
from fewfire.errors import ConfigError, KernelUnavailable

ISAS = ("auto", "reference", "scalar", "avx2", "avx512")
_BUILD = "build it with `pip install .` in a checkout of fewfire (needs a C++20 compiler)"


class _Choice:
    """The process's choice. `module` is the extension to call, or None for the reference."""

    def __init__(self) -> None:
        self.resolved = False
        self.module: ModuleType | None = None


_choice = _Choice()


@functools.cache
def _load() -> ModuleType | None:
    try:
        from fewfire import _native
    except ImportError:
        return None
    return _native


def extension() -> ModuleType | None:
    """The extension whatever kernels run on, or None where it is not built: for what has one answer only."""
    return _load()


def native() -> ModuleType | None:
    """The extension, or None where kernels run on the reference. Resolved once; safe to call from every kernel."""
    if not _choice.resolved:
        set_isa(environment("FEWFIRE_ISA") or "auto")
    return _choice.module


def set_isa(name: str) -> None:
    """Force `scalar`, `avx2` or `avx512`, or `reference` (plain torch); `auto` takes the best this machine runs.

    Applies to the whole process from the next call on.
    Raises: ConfigError for another name; KernelUnavailable where the build or the processor lacks it. `auto` without
    the extension warns, and takes the reference.
    """
    if name not in ISAS:
        raise ConfigError(f"isa ({name}) is unknown; set FEWFIRE_ISA to one of {', '.join(ISAS)}")
    module = None if name == "reference" else _load()
    if module is None and name == "auto":
        warnings.warn(
            "the extension fewfire._native is missing, so kernels run on the slower torch reference "
            f"fewfire.kernels.reference; {_BUILD}",
            RuntimeWarning,
            stacklevel=3,
        )
    elif module is None and name != "reference":
        raise KernelUnavailable(f"isa ({name}) needs the extension fewfire._native, which is missing; {_BUILD}")
    elif module is not None:
        supported = module.supported_isas()
        if name != "auto" and name not in supported:
            raise KernelUnavailable(f"isa ({name}) does not run here; use one of {', '.join(supported)}")
        module.set_isa(supported[-1] if name == "auto" else name)
    _choice.module, _choice.resolved = module, True


def current_isa() -> str:
    """What kernels run on now: `reference`, `scalar`, `avx2` or `avx512`."""
    module = native()
    return "reference" if module is None else module.current_isa()


def supported_isas() -> list[str]:
    """What `set_isa` accepts on this machine, slowest first, besides `auto`."""
    module = _load()
    return ["reference"] if module is None else ["reference", *module.supported_isas()]


def keep_freed_memory() -> bool:
    """Keep freed memory in the process from now on; call it once where training starts. False where it cannot be done.

    glibc hands every large block back at each free, and the next step faults its pages in again: on 2 cores this was
    about half of the time of a MoE layer's forward and backward over 8,192 tokens.
    """
    module = _load()
    return module is not None and module.keep_freed_memory()


def return_freed_memory() -> bool:
    """Give blocks of 1 MiB and more back at each free from now on: a memory budget counts on it. False where it cannot.

    glibc raises the size from which it does so with every large block that is freed; then some 10 MB stay with the
    process that nothing uses.
    """
    module = _load()
    return module is not None and module.return_freed_memory()
