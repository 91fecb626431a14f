"""Checks that AGENTS.md stays short enough to be read: at most 60 lines. Passes where there is none."""

import sys
from pathlib import Path

LIMIT = 60

path = Path(sys.argv[1])
num_lines = len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0
if num_lines > LIMIT:
    sys.exit(f"{path} has {num_lines} lines; keep it to {LIMIT}")
