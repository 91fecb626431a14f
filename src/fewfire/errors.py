"""The error tree: what callers can catch. Owns no message; knows no layer above it.

FewfireError                     one root for callers; the cli prints one line
├── ConfigError(ValueError)      names the key, the value, what is allowed
├── FormatError(ValueError)      a file is malformed: names file, record, offset
├── BudgetError                  memory or disk below the floor; carries the plan
├── KernelUnavailable            says what is missing and how to build it
└── RequestError(ValueError)     HTTP 4xx: status, parameter, code
"""

from __future__ import annotations

_LONGEST_NAME = 120  # characters of a name from a file that a message shows


def _one_line(text: str) -> str:
    """`text` with what breaks the line or drives a terminal escaped: names in messages come from hostile files."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _shown(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."


class FewfireError(Exception):
    """Root of every error that fewfire raises on purpose. `str(error)` is one line: what - expected - how to fix."""

    exit_status = 1


class ConfigError(FewfireError, ValueError):
    """The user's mistake: a key, a value or a path. The cli exits with status 2."""

    exit_status = 2

    def __init__(self, message: str):
        super().__init__(_one_line(message))


class FormatError(FewfireError, ValueError):
    """A file is malformed.

    `path` is the file, `record` the tensor or key inside it, `offset` the byte (both None where they do not apply).
    """

    exit_status = 2

    def __init__(self, message: str, *, path: str | None = None, record: str | None = None, offset: int | None = None):
        self.path, self.record, self.offset = path, record, offset
        named = (path, None if record is None else _shown(record), None if offset is None else f"byte {offset}")
        where = [part for part in named if part is not None]
        super().__init__(_one_line(f"{': '.join(where)}: {message}" if where else message))


class BudgetError(FewfireError):
    """Memory or disk below the floor. `needs` maps each part to its bytes, so that the message can show the table."""

    def __init__(self, message: str, *, needs: dict[str, int] | None = None):
        self.needs = needs or {}
        super().__init__(message)


class KernelUnavailable(FewfireError):
    """A native kernel was asked for by name and is not there. Says what is missing and how to build it."""


class RequestError(FewfireError, ValueError):
    """A request that a client must change: HTTP status, the parameter at fault, a short code."""

    exit_status = 2

    def __init__(self, message: str, *, status: int = 400, parameter: str | None = None, code: str | None = None):
        self.status, self.parameter, self.code = status, parameter, code
        super().__init__(message)
