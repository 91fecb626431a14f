"""Training: a batch is overfitted, resuming equals going on bit for bit, kill -9 loses only steps, bad input fails."""

import dataclasses
import errno
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fewfire.checkpoints import atomic
from fewfire.errors import BudgetError, ConfigError, FormatError
from fewfire.model.decoder import Decoder
from fewfire.train.architecture import build_config
from fewfire.train.checkpoint import checkpoints, load_checkpoint
from fewfire.train.loop import Silent, Trainer
from fewfire.train.loss import head_cross_entropy
from fewfire.train.optimizer import learning_rate
from fewfire.train.settings import (
    BalanceSettings,
    ModelSettings,
    OptimizerSettings,
    TrainSettings,
    apply_override,
    read_settings,
    settings_from,
    settings_table,
)

WORDS = "the router sends every token to a few of its experts and the others rest until they are wanted again".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        line = " ".join(WORDS[(number * 7 + step * (1 + number % 5)) % len(WORDS)] for step in range(120))
        (folder / f"{number:02d}.txt").write_text(line)
    return folder


def tiny(corpus: Path, folder: Path, **changes) -> TrainSettings:
    table = {
        "folder": str(folder),
        "model": {"model_dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8,
                  "num_experts": 4, "top_k": 2, "expert_dim": 12, "dense_dim": 24},
        "data": {"paths": [str(corpus)], "vocab_size": 300, "held_out_frac": 0.2},
        "optimizer": {"warmup_steps": 2, "learning_rate": 1e-2},
        "run": {"steps": 8, "batch_size": 4, "seq_len": 16, "threads": 1, "log_every": 2, "eval_every": 4,
                "save_every": 3, "tensorboard": False},
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            table.setdefault(section, {})[name] = value
        else:
            table[section] = value
    return settings_from(table)


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]


def same_state(left: Path, right: Path) -> None:
    one, two = (
        load_checkpoint(checkpoints(left / "checkpoints")[-1]),
        load_checkpoint(checkpoints(right / "checkpoints")[-1]),
    )
    assert one["step"] == two["step"] and one["batches"] == two["batches"]
    for name, values in one["model"].items():
        assert torch.equal(values, two["model"][name]), name
    for index, slots in one["optimizer"]["state"].items():
        for name, values in slots.items():
            assert torch.equal(values, two["optimizer"]["state"][index][name]), (index, name)
    assert torch.equal(one["rng"], two["rng"])


def test_one_batch_is_overfitted(corpus, tmp_path):
    settings = tiny(corpus, tmp_path / "run", run__steps=1)
    trainer = Trainer(settings)
    tokens = torch.from_numpy(next(trainer.batches))
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=2e-2)
    for _ in range(150):
        hidden = trainer.model.hidden(tokens[:, :-1])
        loss = head_cross_entropy(hidden.flatten(0, 1), trainer.model.head.weight, tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"run__precision": "bf16", "run__accumulation": 2},
        {"model__family": "glm4_moe", "balance__method": "bias", "model__shared_dim": 12, "model__num_dense_layers": 1},
        {"model__family": "llama", "model__num_experts": 0},
        {"model__family": "olmoe", "model__tied_head": True, "balance__method": "none", "optimizer__schedule": "wsd"},
        {
            "model__family": "lstm_moe",
            "model__branches": 2,
            "model__top_k": 4,
            "model__num_layers": 3,
            "model__dropout": 0.1,
        },
    ],
    ids=["loss", "bf16", "bias", "dense", "olmoe", "lstm_moe"],
)
def test_save_and_resume_equals_uninterrupted(corpus, tmp_path, changes):
    whole = Trainer(tiny(corpus, tmp_path / "whole", **changes))
    whole.run()
    for until in (3, 5, None):
        Trainer(tiny(corpus, tmp_path / "parts", **changes)).run(until=until)
    same_state(tmp_path / "whole", tmp_path / "parts")
    assert [step for step, _ in losses(tmp_path / "parts")] == sorted({step for step, _ in losses(tmp_path / "parts")})
    assert losses(tmp_path / "whole")[-1] == losses(tmp_path / "parts")[-1]


def test_select_bias_moves_and_is_saved(corpus, tmp_path):
    settings = tiny(corpus, tmp_path / "run", model__family="glm4_moe", balance__method="bias", balance__bias_rate=0.01)
    trainer = Trainer(settings)
    trainer.run()
    bias = trainer.model.layers[0].ffn.router.select_bias
    assert bias.abs().max() > 0
    assert torch.equal(Trainer(settings).model.layers[0].ffn.router.select_bias, bias)


@pytest.mark.timeout(120)
def test_kill_9_loses_at_most_the_steps_since_the_last_checkpoint(corpus, tmp_path):
    settings = tiny(corpus, tmp_path / "killed", run__steps=400, run__save_every=5, run__eval_every=400, run__keep=3)
    script = (
        "import json, sys, torch\n"
        "from fewfire.train.loop import Trainer\n"
        "from fewfire.train.settings import settings_from\n"
        "Trainer(settings_from(json.load(open(sys.argv[1])))).run()\n"
    )
    table = tmp_path / "settings-in.json"
    table.write_text(json.dumps(settings_table(settings)))
    process = subprocess.Popen([sys.executable, "-c", script, str(table)])
    folder = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 100
    while len(checkpoints(folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = Trainer(settings)
    assert resumed.step >= 10 and resumed.step % 5 == 0
    stop_at = resumed.step + 5
    resumed.run(until=stop_at)
    straight = Trainer(dataclasses.replace(settings, folder=str(tmp_path / "straight")))
    straight.run(until=stop_at)
    same_state(tmp_path / "killed", tmp_path / "straight")
    assert not [path for path in folder.iterdir() if not path.name.startswith("step-")]


def test_a_full_disk_is_one_line_and_leaves_the_older_checkpoint(corpus, tmp_path, monkeypatch):
    settings = tiny(corpus, tmp_path / "run")
    Trainer(settings).run(until=3)
    before = checkpoints(tmp_path / "run" / "checkpoints")
    trainer = Trainer(settings)
    whole = io.BufferedWriter.write

    class Full(io.BufferedWriter):
        def write(self, content):
            if self.tell() > 4096:
                raise OSError(errno.ENOSPC, "No space left on device")
            return whole(self, content)

    monkeypatch.setattr(atomic, "open", lambda path, mode: Full(io.FileIO(path, mode)), raising=False)
    with pytest.raises(BudgetError, match="disk is full"):
        trainer.run(until=5)
    assert checkpoints(tmp_path / "run" / "checkpoints") == before
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [before[0].name]


def test_a_truncated_checkpoint_is_refused_by_name(corpus, tmp_path):
    settings = tiny(corpus, tmp_path / "run")
    Trainer(settings).run(until=3)
    path = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match="step-"):
            Trainer(settings)


def test_a_folder_keeps_to_its_run(corpus, tmp_path):
    Trainer(tiny(corpus, tmp_path / "run")).run(until=1)
    with pytest.raises(ConfigError, match=r"model\.expert_dim = 12, not 13"):
        Trainer(tiny(corpus, tmp_path / "run", model__expert_dim=13))
    Trainer(tiny(corpus, tmp_path / "run", run__eval_every=2))  # what shapes nothing may change


def test_stop_saves_and_reports(corpus, tmp_path):
    asked = iter([False, False, True])
    result = Trainer(tiny(corpus, tmp_path / "run")).run(stop=lambda: next(asked))
    assert result.interrupted and result.step == 2
    assert Trainer(tiny(corpus, tmp_path / "run")).step == 2


def test_reports_tell_of_every_layer(corpus, tmp_path):
    steps, evaluations = [], []

    class Listener(Silent):
        def stepped(self, report):
            steps.append(report)

        def evaluated(self, report):
            evaluations.append(report)

    Trainer(tiny(corpus, tmp_path / "run", run__tensorboard=True), Listener()).run()
    assert [report.step for report in steps] == [2, 4, 6, 8]
    assert [len(report.health) for report in steps] == [2] * 4
    assert all(sum(health.load) == 2 * 4 * 16 * 2 for health in steps[0].health)  # steps x batch x seq x top_k
    assert [report.step for report in evaluations] == [4, 8] and 0 < evaluations[-1].bits_per_byte < 12
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_head_cross_entropy_equals_torch():
    torch.manual_seed(0)
    for rows in (1, 7, 1025):
        hidden = torch.randn(rows, 12, requires_grad=True)
        weight = torch.randn(33, 12, requires_grad=True)
        targets = torch.randint(33, (rows,))
        want = torch.nn.functional.cross_entropy(1.7 * hidden @ weight.t(), targets)
        got = head_cross_entropy(hidden, weight, targets, scale=1.7)
        torch.testing.assert_close(got, want)
        for one, two in zip(torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, (hidden, weight))):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_schedules_by_hand():
    cosine = OptimizerSettings(learning_rate=1.0, min_rate_frac=0.1, warmup_steps=10)
    assert learning_rate(0, 110, cosine) == pytest.approx(0.1)
    assert learning_rate(10, 110, cosine) == pytest.approx(1.0)
    assert learning_rate(60, 110, cosine) == pytest.approx(0.55)
    assert learning_rate(110, 110, cosine) == pytest.approx(0.1)
    wsd = dataclasses.replace(cosine, schedule="wsd", decay_frac=0.5)
    assert learning_rate(54, 110, wsd) == 1.0
    assert learning_rate(110, 110, wsd) == pytest.approx(0.1)


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nnum_expert = 3", "model.num_expert is not a known key"),
        ('[model]\nnum_experts = "four"', "must be a whole number"),
        ('[model]\ntop_k = 9\nnum_experts = 8\n[data]\nsource = "python"', r"top_k \(9\) exceeds"),
        ('[run]\nprecision = "fp8"', "is not one of float32, bf16"),
        ("[run]\nsteps = 1.5", "must be a whole number"),
        ("[run]\nsteps = true", "must be a whole number"),
        ("run = 3", "must be a table"),
        ('[optimizer]\nlearning_rate = -1.0\n[data]\nsource = "python"', "must be positive"),
        ("= 3", "is not TOML"),
        ("[data]\nvocab_size = 300", "data.paths names no file"),
    ],
)
def test_bad_settings_name_the_key(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_settings(path)


def test_a_missing_configuration_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.toml does not exist"):
        read_settings(tmp_path / "nowhere.toml")


def test_overrides_reach_every_key():
    table: dict = {}
    for override in ("run.steps=7", 'data.paths=["a", "b"]', "folder=here/there", "data.source=python"):
        apply_override(table, override)
    settings = settings_from(table)
    assert (settings.run.steps, settings.data.paths, settings.folder) == (7, ("a", "b"), "here/there")
    with pytest.raises(ConfigError, match="is not key=value"):
        apply_override(table, "run.steps")


def test_settings_round_trip(corpus, tmp_path):
    settings = tiny(corpus, tmp_path)
    assert settings_from(json.loads(json.dumps(settings_table(settings)))) == settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__paths": ["/nowhere/at/all"]}, "/nowhere/at/all"),
        ({"run__seq_len": 100000}, "shorten seq_len"),
        ({"data__vocab_size": 100}, "vocab"),
    ],
)
def test_a_corpus_that_cannot_be_used(corpus, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(tiny(corpus, tmp_path / "run", **changes))


@pytest.mark.parametrize(
    ("model", "balance", "message"),
    [
        ({"family": "llama"}, {}, "llama has no experts"),
        ({"family": "mixtral", "num_experts": 0}, {}, 'set family = "llama"'),
        ({"family": "mixtral", "shared_dim": 8}, {}, "no shared expert"),
        ({"family": "qwen3_moe"}, {"method": "bias"}, "needs a selection bias"),
        ({"family": "glm4_moe", "num_dense_layers": 4}, {}, "leaves no MoE layer"),
        ({"family": "lstm_moe", "num_layers": 1}, {}, "between LSTMs"),
        ({"family": "qwen3_moe", "branches": 2}, {}, "are for lstm_moe"),
    ],
)
def test_a_family_that_has_no_such_part(model, balance, message):
    with pytest.raises(ConfigError, match=message):
        build_config(ModelSettings(**model), BalanceSettings(**balance), vocab_size=300, seq_len=16, eos_token_id=0)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "olmoe", "glm4_moe"])
def test_every_family_builds(family):
    settings = ModelSettings(family=family, num_experts=0 if family == "llama" else 4, model_dim=16, head_dim=8)
    config = build_config(settings, BalanceSettings(), vocab_size=300, seq_len=16, eos_token_id=0)
    assert Decoder(config)(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 300)
