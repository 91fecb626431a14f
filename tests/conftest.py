"""What every test shares: one torch thread a worker, examples that do not depend on luck or on the machine's load."""

import importlib.util
import os
import sys

import pytest
from hypothesis import settings

# Before anything imports torch: two workers on two cores, and subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("fewfire", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("fewfire")


def pytest_addoption(parser):
    parser.addoption("--native", help="test this build of the extension instead of the installed one")


def pytest_configure(config):
    path = config.getoption("--native")
    if path:
        spec = importlib.util.spec_from_file_location("fewfire._native", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["fewfire._native"] = module


@pytest.fixture
def restore_isa():
    """Puts back the instruction set that a test forces."""
    from fewfire import kernels

    before = kernels.current_isa()
    yield
    kernels.set_isa(before)
