"""The small files of a tokenizer: read strictly, written atomically."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from fewfire.errors import BudgetError, ConfigError, FewfireError, FormatError
from fewfire.files import read_regular

_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_failure(error: OSError, path: Path) -> FewfireError:
    """What to raise when `path` cannot be written: BudgetError when the disk is full, else ConfigError."""
    if error.errno in _FULL:
        return BudgetError(f"{path}: the disk is full - free some space, or choose a folder on another disk")
    return ConfigError(f"{path}: cannot be written ({error.strerror or error}); choose a folder that is writable")


def write_file(path: Path, content: bytes) -> None:
    """Write a whole file under a temporary name, sync it, rename it: an interrupted write leaves the old file.

    Raises: BudgetError on a full disk, ConfigError where the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass  # the folder itself is not there; the first error says so
        raise write_failure(error, path) from error


def read_bytes(path: Path) -> bytes:
    """A file's bytes. Raises ConfigError, in one line, where it cannot be read."""
    try:
        return read_regular(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ConfigError when unreadable, FormatError when it is no JSON object."""
    content = read_bytes(path)
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        raise FormatError(f"is not JSON ({error.msg}); download it again", path=str(path), offset=error.pos) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise FormatError("is not JSON; download it again", path=str(path)) from error
    if not isinstance(value, dict):
        raise FormatError(f"holds a {type(value).__name__}, expected a JSON object", path=str(path))
    return value


def json_bytes(value: Any) -> bytes:
    """Readable JSON, the same bytes for the same value."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
