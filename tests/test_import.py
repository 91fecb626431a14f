"""`import fewfire` is quick and brings no heavy library: `fewfire plan` must answer in well under a second."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "numpy", "transformers", "matplotlib", "pyarrow", "rich"}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_takes_less_than_a_fifth_of_a_second():
    code = "import time; t = time.perf_counter(); import fewfire; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(5)) < 0.2  # typically 0.005; the best of five shrugs off a busy machine


def test_import_loads_nothing_heavy():
    assert HEAVY.isdisjoint(run("import sys, fewfire; print(*sys.modules)").split())


@pytest.mark.parametrize("module", ["config", "errors", "sizes", "routing", "plan", "families"])
def test_what_the_planner_needs_does_not_load_torch(module):
    assert "torch" not in run(f"import sys, fewfire.{module}; print(*sys.modules)").split()


def test_every_public_name_is_listed():
    import fewfire

    assert "load" in dir(fewfire) and "__version__" in dir(fewfire)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fewfire.nonsense
