"""Checks that objects compiled for AVX export their fill_* and nothing else.

An inline function that such an object shares with others may become everyone's copy at link time, and kill an older
processor (native/include/dispatch.hpp). `python tools/symbols.py build` looks at every object below that folder.
"""

import subprocess
import sys
from pathlib import Path

objects = sorted(Path(sys.argv[1]).glob("cp*/**/native/avx*.o"))
if not objects:
    print("SKIPPED: no AVX object below", sys.argv[1])
for path in objects:
    command = ["nm", "--demangle", "--defined-only", "--extern-only", str(path)]
    names = [line.split(" ", 2)[2] for line in subprocess.check_output(command, text=True).splitlines()]
    exported = [name for name in names if name != "DW.ref.__gxx_personality_v0"]  # a pointer to the unwinder, no code
    stem = path.name.split(".")[0]
    if exported != [f"fewfire::fill_{stem}(fewfire::Table&)"]:
        sys.exit(f"{path} exports {exported}; put all but fill_{stem} into an anonymous namespace")
