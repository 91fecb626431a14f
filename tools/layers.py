"""Checks the house of imports: down only, no siblings but those shown, and each heavy thing behind its one door.

`python tools/layers.py src/fewfire` lists violations as file:line and exits with 1 if there are any.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "fewfire"

# Lower numbers know nothing of higher ones.
LAYERS: dict[str, float] = {
    **dict.fromkeys(("config", "errors", "files", "sizes"), 0),
    **dict.fromkeys(("plan", "families", "headers", "tokenizer"), 1),
    **dict.fromkeys(("routing", "formats"), 2),
    **dict.fromkeys(("checkpoints", "kernels", "balance", "data", "_native"), 2.5),
    "model": 3,
    "runtime": 4,
    **dict.fromkeys(("train", "trace", "quantize", "evaluate", "bench", "export"), 5),
    **dict.fromkeys(("api", "demo"), 6),
    "serve": 7,
    **dict.fromkeys(("cli", "__main__"), 8),
}

# Siblings that may import one another, in this direction.
SIBLINGS = {
    ("config", "errors"),
    ("sizes", "errors"),
    ("demo", "api"),
    ("bench", "quantize"),  # random packs to sweep over
    ("plan", "families"),
    ("plan", "headers"),
    ("kernels", "_native"),
    ("checkpoints", "kernels"),  # checksums
    ("__main__", "cli"),
}

# Who may import what comes from outside: module -> the parts of fewfire that must not.
FORBIDDEN = {
    "torch": {"config", "errors", "files", "sizes", "plan", "families", "headers", "tokenizer", "serve"},
    "transformers": set(LAYERS),
}
NATIVE_DOORS = {"kernels", "runtime"}
ENVIRONMENT_NAMES = {"environ", "environb", "getenv", "putenv", "unsetenv"}


class Violation(NamedTuple):
    path: Path
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


def find_violations(root: Path) -> list[Violation]:
    """All violations under `root`, the folder of the package `fewfire`, by file and line."""
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        found += [Violation(path, line, message) for line, message in check_module(parts, tree)]
    return found


def check_module(parts: tuple[str, ...], tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, message) for one module; `parts` are its names below the package, ('plan', 'cost') or ('__init__',)."""
    owner = parts[0]
    if owner not in LAYERS and owner != "__init__":
        yield 1, f"{owner} has no layer; give it one in tools/layers.py and in the design"
        return
    for node in ast.walk(tree):
        for name in imported_names(node, parts):
            message = judge_import(owner, name)
            if message:
                yield node.lineno, message
        if owner != "config" and reads_environment(node):
            yield node.lineno, "os.environ is read in config.py only; call config.environment"


def imported_names(node: ast.AST, parts: tuple[str, ...]) -> Iterator[str]:
    """Absolute dotted names that a statement imports, `from a import b` as a.b; import_module("a") counts too."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = (PACKAGE, *parts)[: len(parts) + 1 - node.level]
            base = ".".join((*package, base) if base else package)
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            yield node.args[0].value


def judge_import(owner: str, name: str) -> str | None:
    """What is wrong with `owner` importing `name`, or None."""
    top, _, rest = name.partition(".")
    if top != PACKAGE:
        if owner in FORBIDDEN.get(top, ()):
            return f"{owner} must not import {top}"
        return None
    target = rest.split(".")[0]
    if target not in LAYERS or target == owner:
        return None
    if owner == "__init__":
        return f"the package itself must import nothing at once, not {target}; list the name in _PUBLIC"
    if target == "_native" and owner not in NATIVE_DOORS:
        return f"{owner} must not import _native; fewfire.kernels is its door"
    if LAYERS[target] > LAYERS[owner]:
        return f"{owner} (layer {LAYERS[owner]:g}) must not import {target} (layer {LAYERS[target]:g}): imports go down"
    if LAYERS[target] == LAYERS[owner] and (owner, target) not in SIBLINGS:
        return f"{owner} must not import its sibling {target} (layer {LAYERS[owner]:g})"
    return None


def reads_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name) and node.value.id == "os" and node.attr in ENVIRONMENT_NAMES
    return (
        isinstance(node, ast.ImportFrom)
        and node.module == "os"
        and any(alias.name in ENVIRONMENT_NAMES for alias in node.names)
    )


def main() -> int:
    violations = find_violations(Path(sys.argv[1]))
    for violation in violations:
        print(violation)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
