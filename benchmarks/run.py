"""`make bench`: every benchmark, one after the other, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = ("train_speed.py", "load_speed.py")


def main() -> int:
    """Run all; the exit status is the first failure's."""
    folder = Path(__file__).parent
    for name in BENCHMARKS:
        status = subprocess.run([sys.executable, str(folder / name)], check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
