"""The demo's order of events: train three, compare at equal tokens, finish the MoE, look at what its router does.

Prints nothing: `tell` receives each finished part. Finished results are kept; a second call reads them back.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewfire import api
from fewfire.balance import LoadHealth
from fewfire.checkpoints.atomic import write_bytes
from fewfire.config import cache_folder, check
from fewfire.demo.compress import compressed_bits_per_byte
from fewfire.demo.disk import OnDisk, run_from_disk
from fewfire.demo.picture import draw
from fewfire.demo.routes import LINES, routes_of
from fewfire.demo.runs import MINUTES, DemoRuns, demo_runs
from fewfire.plan.count import count
from fewfire.train.loop import Reporter, Silent, Trainer
from fewfire.train.settings import TrainSettings

PROMPTS = ("def read_lines(path):\n    ", 'class Queue:\n    """', "import os\n\n# Return the ")


@dataclass(frozen=True)
class Row:
    """One model at one point. Bytes are of float32 weights; `max_vio_excess` is MaxVio less its noise floor, the worst
    layer's, over the held-out text (None for a dense model)."""

    name: str
    total: int
    active: int
    memory_bytes: int
    tokens: int
    tokens_per_s: float
    bits_per_byte: float
    max_vio_excess: float | None
    num_dead: int | None
    load: list[list[int]]


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo shows. `routes`: line -> (token, experts per layer); `samples`: (prompt, continuation);
    `disk`: None where the native engine cannot run."""

    key: str
    minutes: float
    seconds: float
    rows: list[Row]
    yardsticks: dict[str, float]
    routes: dict[str, list[tuple[str, list[list[int]]]]]
    samples: list[tuple[str, str]]
    model: str
    picture: str
    disk: OnDisk | None = None


ReporterFactory = Callable[[str], AbstractContextManager[Reporter]]


def run_demo(
    reporter: ReporterFactory,
    *,
    minutes: float = MINUTES,
    seed: int = 0,
    fresh: bool = False,
    threads: int = 0,
) -> tuple[DemoResult, bool]:
    """(result, whether it was kept from before). An interrupted demo goes on where it stopped.

    Raises: ConfigError for minutes that are not positive; what `Trainer` raises.
    """
    check(minutes > 0, f"minutes ({minutes}) must be positive; 6 is the default")
    home = cache_folder() / "demo"
    runs = demo_runs(home / f"{minutes:g}-minutes-seed-{seed}", minutes, seed)
    folder = Path(runs.moe.folder).parent
    kept = None if fresh else _read_result(folder, runs.key)
    if kept is not None:
        return kept, True
    _clear_stale(folder, runs.key, fresh)
    begin = time.perf_counter()
    result = _train_and_look(runs, folder, reporter, threads)
    result = dataclasses.replace(result, minutes=minutes, seconds=time.perf_counter() - begin)
    write_bytes(folder / "result.json", json.dumps(dataclasses.asdict(result), indent=1).encode())
    return result, False


def _clear_stale(folder: Path, key: str, fresh: bool) -> None:
    """Runs of other settings cannot be gone on with: they are removed."""
    mark = folder / "key"
    if folder.exists() and (fresh or not mark.exists() or mark.read_text() != key):
        shutil.rmtree(folder)
    write_bytes(mark, key.encode())


def _read_result(folder: Path, key: str) -> DemoResult | None:
    path = folder / "result.json"
    if not path.exists():
        return None
    table = json.loads(path.read_text())
    if (
        table.get("key") != key
        or "disk" not in table
        or not Path(table["picture"]).exists()
        or not Path(table["model"]).exists()
    ):
        return None
    disk = None if table["disk"] is None else OnDisk(**table["disk"])
    return DemoResult(**{**table, "rows": [Row(**row) for row in table["rows"]], "disk": disk})


def _train_and_look(runs: DemoRuns, folder: Path, reporter: ReporterFactory, threads: int) -> DemoResult:
    corpus, step = folder / "corpus", runs.compared_step
    stages = (
        ("MoE", runs.moe, step, "to the comparison"),
        ("dense twin", runs.dense, step, "to the comparison"),
        ("MoE, no balancing", runs.unbalanced, step, "to the comparison"),
        ("MoE at its end", runs.moe, runs.moe.run.steps, "on to the end"),
    )
    rows = []
    for number, (name, settings, until, what) in enumerate(stages):
        kept = folder / f"row-{number}.json"  # so that an interrupted demo does not train a stage twice
        if not kept.exists():
            with reporter(f"{name.removesuffix(' at its end')}, {what}") as live:
                row = _row(name, _train_to(_trainer(settings, live, corpus, threads), until))
            write_bytes(kept, json.dumps(dataclasses.asdict(row)).encode())
        rows.append(Row(**json.loads(kept.read_text())))
    moe = _trainer(runs.moe, Silent(), corpus, threads)
    yardsticks = compressed_bits_per_byte(runs.moe.data)
    model_folder = moe.export(cache_folder() / "demo" / "model")
    picture = folder / "demo.png"
    draw(folder, picture, {"moe": rows[3].load, "unbalanced": rows[2].load}, yardsticks)
    model = api.load(model_folder)
    return DemoResult(
        key=runs.key,
        minutes=0.0,
        seconds=0.0,
        rows=rows,
        yardsticks=yardsticks,
        routes={line: routes_of(model, line) for line in LINES},
        samples=[(prompt, _sample(model, prompt)) for prompt in PROMPTS],
        model=str(model_folder),
        picture=str(picture),
        disk=run_from_disk(model_folder, cache_folder() / "demo" / "pack", PROMPTS[0]),
    )


def _trainer(settings: TrainSettings, reporter: Reporter, corpus: Path, threads: int) -> Trainer:
    settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, threads=threads))
    return Trainer(settings, reporter, corpus_folder=corpus)


def _train_to(trainer: Trainer, step: int) -> Trainer:
    """Train up to `step` and evaluate there; steps that a resumed run already has are not repeated."""
    if trainer.step < step:
        trainer.run(until=step)
    if trainer.evaluation is None or trainer.evaluation.step != trainer.step:
        trainer.evaluation = trainer.evaluate()
    return trainer


def _sample(model: api.Model, prompt: str) -> str:
    return model.generate(prompt, max_tokens=48, temperature=0.7, top_p=0.9, seed=0).text


def _row(name: str, trainer: Trainer) -> Row:
    counts, run, report = count(trainer.config), trainer.settings.run, trainer.evaluation
    assert report is not None
    healths: tuple[LoadHealth, ...] = report.health
    tokens = report.step * run.batch_size * run.seq_len
    return Row(
        name=name,
        total=counts.total,
        active=counts.active,
        memory_bytes=4 * counts.total,
        tokens=tokens,
        tokens_per_s=tokens / max(trainer.elapsed_s, 1e-9),
        bits_per_byte=report.bits_per_byte,
        max_vio_excess=max((health.excess for health in healths), default=None),
        num_dead=sum(health.num_dead for health in healths) if healths else None,
        load=[list(health.load) for health in healths],
    )


def summary(result: DemoResult) -> dict[str, Any]:
    """The result as one JSON object."""
    return dataclasses.asdict(result)
