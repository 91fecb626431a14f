"""Imports go down only: the package itself, and planted violations that the check must catch."""

import ast
from pathlib import Path

import layers
import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "fewfire"


def judge(module: str, source: str) -> list[str]:
    return [message for _, message in layers.check_module(tuple(module.split(".")), ast.parse(source))]


def test_the_package_keeps_its_layers():
    assert not [str(violation) for violation in layers.find_violations(PACKAGE)]


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("config", "import fewfire.model.moe", "imports go down"),
        ("model.moe", "from fewfire.runtime.banks import StreamedExperts", "imports go down"),
        ("model.moe", "from fewfire import api", "imports go down"),
        ("model.moe", "from ..train import loop", "imports go down"),
        ("routing", "def f():\n    from fewfire import kernels", "imports go down"),
        ("train.loop", "from fewfire.trace import record", "sibling"),
        ("train", "from fewfire.evaluate.perplexity import score", "sibling"),
        ("families.llama", "from fewfire.plan import count", "sibling"),
        ("data.corpus", "import fewfire.balance", "sibling"),
        ("api", "import importlib\nimportlib.import_module('fewfire.serve.app')", "imports go down"),
        ("plan.fit", "import torch", "must not import torch"),
        ("headers", "from torch import Tensor", "must not import torch"),
        ("tokenizer", "def f():\n    import torch.nn", "must not import torch"),
        ("serve.app", "import torch", "must not import torch"),
        ("model.decoder", "import transformers", "must not import transformers"),
        ("model.moe", "from fewfire import _native", "_native"),
        ("api", "import fewfire._native", "_native"),
        ("runtime.engine", "import os\nos.environ['X']", "os.environ"),
        ("cli.main", "from os import getenv", "os.environ"),
        ("__init__", "from fewfire.config import ModelConfig", "at once"),
        ("helpers", "x = 1", "has no layer"),
    ],
)
def test_a_planted_violation_is_caught(module, source, expected):
    messages = judge(module, source)
    assert len(messages) == 1 and expected in messages[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("config", "from fewfire.errors import ConfigError\nimport os\nos.environ.get('FEWFIRE_ISA')"),
        ("plan.count", "from fewfire.families import published\nfrom fewfire.plan import shapes"),
        ("model.moe", "import torch\nfrom fewfire import kernels\nfrom fewfire.model.router import Router"),
        ("kernels.isa", "from fewfire import _native"),
        ("runtime.banks", "from fewfire import _native, kernels"),
        ("cli.plan", "from fewfire import __version__\nfrom fewfire.api import plan"),
        ("kernels.__init__", "from .isa import set_isa\nfrom ..errors import ConfigError"),
        ("__init__", "from importlib import import_module\nimport_module(name)"),
    ],
)
def test_what_the_house_allows_passes(module, source):
    assert judge(module, source) == []


def test_violations_name_file_and_line(tmp_path):
    package = tmp_path / "fewfire"
    (package / "model").mkdir(parents=True)
    (package / "model" / "moe.py").write_text("import torch\n\nfrom fewfire import cli\n")
    (found,) = layers.find_violations(package)
    assert (found.path.name, found.line) == ("moe.py", 3)
    assert "model (layer 3) must not import cli (layer 8)" in str(found)
