"""The demo's story on a corpus of a few lines: all parts are there, it resumes, it is kept."""

import dataclasses
from pathlib import Path

import pytest

from fewfire import api
from fewfire.data import Document
from fewfire.demo import runs as demo_runs_module
from fewfire.demo import story
from fewfire.errors import ConfigError
from fewfire.train.loop import Silent
from fewfire.train.settings import DataSettings, RunSettings


class Quiet(Silent):
    def __init__(self, title: str):
        self.title = title

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def documents():
    for number in range(30):
        lines = (f"def name_{number}_{line}(value):\n    return value + {line * number}\n" for line in range(12))
        yield Document(f"{number}.py", "\n".join(lines))


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("FEWFIRE_CACHE", str(tmp_path))
    monkeypatch.setattr("fewfire.train.corpus.python_library_documents", documents)
    monkeypatch.setattr("fewfire.demo.compress.python_library_documents", documents)
    whole = demo_runs_module.demo_runs

    def shrunk(folder, minutes, seed):
        runs = whole(folder, minutes, seed)
        tiny = {"model_dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "expert_dim": 8}
        run = RunSettings(steps=6, batch_size=2, seq_len=24, threads=1, eval_every=2, save_every=2, tensorboard=False)
        data = DataSettings(source="python", vocab_size=300, held_out_frac=0.2)

        def shrink(settings):
            model = dataclasses.replace(settings.model, **tiny, dense_dim=24)
            return dataclasses.replace(settings, model=model, run=run, data=data)

        three = {name: shrink(getattr(runs, name)) for name in ("moe", "dense", "unbalanced")}
        return demo_runs_module.DemoRuns(**three, compared_step=2)

    monkeypatch.setattr(story, "demo_runs", shrunk)
    return tmp_path


def test_all_parts_are_there_and_the_result_is_kept(small):
    titles = []

    def reporter(title):
        titles.append(title)
        return Quiet(title)

    result, kept = story.run_demo(reporter, threads=1)
    assert not kept and len(titles) == 4
    assert [row.tokens for row in result.rows] == [2 * 2 * 24] * 3 + [6 * 2 * 24]
    moe, dense, unbalanced, end = result.rows
    assert moe.total > dense.total and dense.max_vio_excess is None and unbalanced.num_dead is not None
    assert set(result.yardsticks) == {"gzip -9", "xz -9"} and all(0 < bits < 8 for bits in result.yardsticks.values())
    assert all(len(layers) == 1 and len(layers[0]) == 2 for routes in result.routes.values() for _, layers in routes)
    assert Path(result.picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert result.disk is None or (result.disk.same_tokens and result.disk.resident_tokens_per_s > 0)
    assert api.load("demo").generate("def ", max_tokens=3, seed=0).prompt_tokens > 0
    again, kept = story.run_demo(reporter, threads=1)
    assert kept and again.rows == result.rows and len(titles) == 4


def test_an_interrupted_demo_goes_on(small, monkeypatch):
    straight, _ = story.run_demo(Quiet, threads=1, seed=3)
    calls = {"left": 2}
    whole = story._train_to

    def dies(trainer, step):
        calls["left"] -= 1
        if calls["left"] < 0:
            raise KeyboardInterrupt
        return whole(trainer, step)

    monkeypatch.setattr(story, "_train_to", dies)
    with pytest.raises(KeyboardInterrupt):
        story.run_demo(Quiet, threads=1, seed=3, fresh=True)
    monkeypatch.setattr(story, "_train_to", whole)
    resumed, _ = story.run_demo(Quiet, threads=1, seed=3)
    assert [row.bits_per_byte for row in resumed.rows] == [row.bits_per_byte for row in straight.rows]


def test_minutes_must_be_positive(small):
    with pytest.raises(ConfigError, match="must be positive"):
        story.run_demo(Quiet, minutes=0)
