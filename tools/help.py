"""Writes docs/help.md from the command line itself, so that the two cannot drift. `--check` only compares."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TARGET = Path(__file__).parents[1] / "docs" / "help.md"


def help_text() -> str:
    """`fewfire --help` and `fewfire VERB --help` of every verb, as one page."""
    from fewfire.cli.main import VERBS

    parts = ["# Command line", "", "Written by `make help`; do not edit.", "", *_block("")]
    for verb in VERBS:
        parts += [f"## {verb}", "", *_block(verb)]
    return "\n".join(parts).rstrip() + "\n"


def _block(verb: str) -> list[str]:
    command = [sys.executable, "-m", "fewfire", *([verb] if verb else []), "--help"]
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    lines = [line.rstrip() for line in done.stdout.strip().splitlines()]
    return ["```text", f"$ fewfire {verb + ' ' if verb else ''}--help", *lines, "```", ""]


def main() -> int:
    """Status 1 if `--check` finds the page out of date."""
    text = help_text()
    if "--check" not in sys.argv:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
        sys.stderr.write("docs/help.md is out of date; run `make help`\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
