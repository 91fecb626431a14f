"""What all verbs share in printing: one JSON object on stdout, tables that fit a terminal, notes on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MAX_WIDTH = 100


def print_json(document: Any) -> None:
    """One JSON object on stdout and nothing else. Not-a-number and infinity become null."""
    sys.stdout.write(json.dumps(_finite(document), ensure_ascii=False, indent=2) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def console(*, stderr: bool = False) -> Console:
    """A rich console of at most 100 columns; 100 where the output is no terminal, so that files read well."""
    from rich.console import Console

    probe = Console(stderr=stderr, highlight=False)
    width = min(probe.width, MAX_WIDTH) if probe.is_terminal else MAX_WIDTH
    return Console(stderr=stderr, highlight=False, width=width)


def table(*columns: str, title: str | None = None) -> Table:
    """A table without outer borders: the first column left, the others right."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, show_edge=False)
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index == 0 else "right", no_wrap=True, vertical="bottom")
    return made


def note(message: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"{message}\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all. Raises ConfigError where its folder cannot be written."""
    import os

    from fewfire.errors import ConfigError

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError) as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another place") from error
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
