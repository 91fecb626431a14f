"""The training loop: batches in, a better model out, and reports on the way. Prints nothing, knows no terminal."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fewfire import families, kernels
from fewfire.balance import (
    LoadHealth,
    LoadMonitor,
    SelectBiasUpdate,
    cv_squared,
    importance_loss,
    load_balancing_loss,
    mean_over_layers,
    z_loss,
)
from fewfire.checkpoints.atomic import write_bytes
from fewfire.checkpoints.hub import save_hub
from fewfire.config import ModelConfig
from fewfire.data import Batches
from fewfire.errors import ConfigError
from fewfire.model.decoder import Decoder
from fewfire.model.initialise import initialise
from fewfire.model.moe import MoELayer
from fewfire.model.recurrent import Recurrent
from fewfire.model.router import Router
from fewfire.routing import Routing
from fewfire.runtime.load import load_module
from fewfire.runtime.score import score_batches
from fewfire.runtime.threads import use_threads
from fewfire.tokenizer import Tokenizer
from fewfire.train.architecture import build_config
from fewfire.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from fewfire.train.corpus import held_out_batches, prepare_corpus
from fewfire.train.loss import head_cross_entropy
from fewfire.train.metrics import MetricsLog
from fewfire.train.optimizer import learning_rate, make_optimizer
from fewfire.train.settings import TrainSettings, settings_table


@dataclass(frozen=True)
class StepReport:
    """One logged step, averaged since the last report. Losses in nats per token; `health` one entry a MoE layer."""

    step: int
    total_steps: int
    loss: float
    balance_loss: float
    z_loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_s: float
    seconds_left: float
    health: tuple[LoadHealth, ...]


@dataclass(frozen=True)
class EvalReport:
    """Held-out figures at one step; `health` is the balance over the held-out text."""

    step: int
    tokens: int
    nats_per_token: float
    bits_per_byte: float
    health: tuple[LoadHealth, ...]


class Reporter(Protocol):
    """Who is told how it goes."""

    def started(self, trainer: Trainer) -> None: ...
    def stepped(self, report: StepReport) -> None: ...
    def evaluated(self, report: EvalReport) -> None: ...
    def saved(self, path: Path) -> None: ...


class Silent:
    """The reporter that says nothing."""

    def started(self, trainer: Trainer) -> None: ...
    def stepped(self, report: StepReport) -> None: ...
    def evaluated(self, report: EvalReport) -> None: ...
    def saved(self, path: Path) -> None: ...


@dataclass(frozen=True)
class TrainResult:
    """How a call of `run` ended. `interrupted`: `stop` asked for it, or `until` came before the last step."""

    step: int
    interrupted: bool
    evaluation: EvalReport | None
    tokens_per_s: float


class Trainer:
    """One run in one folder. Constructing it prepares data and model and picks up the newest checkpoint.

    Raises: ConfigError for settings that do not fit together or differ from those of the folder's run;
    FormatError for a damaged checkpoint.
    """

    def __init__(self, settings: TrainSettings, reporter: Reporter | None = None, corpus_folder: Path | None = None):
        self.settings, self.reporter = settings, reporter or Silent()
        self.folder = Path(settings.folder)
        if settings.run.threads:
            use_threads(settings.run.threads)
        self._check_settings()
        kernels.keep_freed_memory()
        tokenizer = Tokenizer.load(settings.initial) if settings.initial else None
        self.corpus = prepare_corpus(settings.data, corpus_folder or self.folder, tokenizer)
        self.config, self.model = self._build_model()
        self.optimizer = make_optimizer(self.model, settings.optimizer)
        self.batches = Batches(
            self.corpus.train, seq_len=settings.run.seq_len, batch_size=settings.run.batch_size, seed=settings.run.seed
        )
        self.step, self.elapsed_s = 0, 0.0
        self.evaluation: EvalReport | None = None
        torch.manual_seed(settings.run.seed)
        self._biases = _select_biases(self.model)
        self._bias_update = SelectBiasUpdate(settings.balance.bias_rate) if settings.balance.method == "bias" else None
        self._autocast = torch.bfloat16 if settings.run.precision == "bf16" else None
        self._held_out: tuple | None = None
        saved = checkpoints(self.folder / "checkpoints")
        if saved:
            self._restore(load_checkpoint(saved[-1]), saved[-1])
        write_bytes(self.folder / "settings.json", json.dumps(settings_table(settings), indent=1).encode())

    # ------------------------------------------------------------------------------------------------ setting up

    def _check_settings(self) -> None:
        """A folder holds one run: what shapes the model, the data or the order must not change under it."""
        path = self.folder / "settings.json"
        if not path.exists():
            return
        before, now = json.loads(path.read_text()), json.loads(json.dumps(settings_table(self.settings)))
        free = {"steps", "eval_every", "save_every", "log_every", "keep", "threads", "tensorboard", "eval_tokens"}
        before["run"] = {k: v for k, v in before.get("run", {}).items() if k not in free}
        now["run"] = {k: v for k, v in now["run"].items() if k not in free}
        before.pop("folder", None), now.pop("folder", None)
        for table in now:
            if before.get(table) != now[table]:
                old, new = before.get(table), now[table]
                pairs = [(table, old, new)]
                if isinstance(old, dict) and isinstance(new, dict):
                    pairs = [(f"{table}.{key}", old.get(key), new[key]) for key in new if old.get(key) != new[key]]
                key, was, wants = pairs[0]
                raise ConfigError(
                    f"{self.folder} holds a run with {key} = {was!r}, not {wants!r}; "
                    "use another folder, or the same value"
                )

    def _build_model(self) -> tuple[ModelConfig, Decoder | Recurrent]:
        settings, tokenizer = self.settings, self.corpus.tokenizer
        if settings.initial:
            model = load_module(settings.initial, dtype=torch.float32)
            if not isinstance(model, (Decoder, Recurrent)):
                raise ConfigError(f"{settings.initial} has an encoder; only decoder-only models can be fine-tuned")
            config = model.config
            if tokenizer.vocab_size > config.vocab_size:
                raise ConfigError(
                    f"{settings.initial} has {config.vocab_size} embeddings for {tokenizer.vocab_size} tokens; "
                    "use the tokenizer it was trained with"
                )
            return config, model
        config = build_config(
            settings.model,
            settings.balance,
            vocab_size=tokenizer.vocab_size,
            seq_len=settings.run.seq_len,
            eos_token_id=tokenizer.eos_token_id,
        )
        families.write_config(config)  # an architecture that could not be exported is refused before it is trained
        model = Recurrent(config, settings.model.dropout) if settings.model.family == "lstm_moe" else Decoder(config)
        initialise(model, len(config.layers), settings.run.seed, settings.model.init_std)
        return config, model

    # ------------------------------------------------------------------------------------------------- the loop

    def run(self, until: int | None = None, stop: Callable[[], bool] = lambda: False) -> TrainResult:
        """Train up to step `until` (default: all of run.steps), or until `stop()` after a step; then save."""
        run = self.settings.run
        last = run.steps if until is None else min(until, run.steps)
        log = MetricsLog(self.folder, self.step, run.tensorboard)
        self.reporter.started(self)
        window = _Window(self.step)
        trained_tokens, trained_s = 0, 0.0
        try:
            while self.step < last and not stop():
                begin = time.perf_counter()
                window.add(self._train_step(window))
                duration = time.perf_counter() - begin
                self.step += 1
                self.elapsed_s += duration
                tokens = run.batch_size * run.seq_len
                window.seconds += duration
                window.tokens += tokens
                trained_tokens, trained_s = trained_tokens + tokens, trained_s + duration
                if self.step % run.log_every == 0 or self.step == last:
                    self._report(window, log)
                    window = _Window(self.step)
                if self.step % run.eval_every == 0 or self.step == run.steps:
                    self._evaluate(log)
                if self.step % run.save_every == 0 and self.step < last:
                    self.save()
        finally:
            log.close()
        if last or self.step:
            self.save()
        return TrainResult(self.step, self.step < run.steps, self.evaluation, trained_tokens / max(trained_s, 1e-9))

    def _train_step(self, window: _Window) -> dict[str, float]:
        run, balance = self.settings.run, self.settings.balance
        rate = learning_rate(self.step, run.steps, self.settings.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = torch.from_numpy(next(self.batches))
        sums = {"loss": 0.0, "balance_loss": 0.0, "z_loss": 0.0}
        for part in tokens.chunk(run.accumulation):
            loss, balance_term, z_term = self._forward(part, window)
            total = loss + balance.z_weight * z_term
            if balance.method == "loss":
                total = total + balance.loss_weight * balance_term
            (total / run.accumulation).backward()
            for name, value in (("loss", loss), ("balance_loss", balance_term), ("z_loss", z_term)):
                sums[name] += float(value.detach()) / run.accumulation
        if not math.isfinite(sums["loss"]):
            raise ConfigError(
                f"the loss is {sums['loss']} at step {self.step + 1}; lower optimizer.learning_rate or raise "
                f"balance.z_weight, and go on from the last checkpoint in {self.folder}"
            )
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.optimizer.clip_norm)
        self.optimizer.step()
        if self._bias_update is not None:
            self._bias_update.apply(self._biases)
        return {**sums, "gradient_norm": float(norm), "learning_rate": rate}

    def _forward(self, tokens_BL: torch.Tensor, window: _Window) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(mean nats, balance loss, z-loss) of one part of a batch, with gradients."""
        balance_terms, z_terms = [], []

        def observe(layer: int, routing: Routing) -> None:
            window.monitor.observe(layer, routing)
            balance_terms.append(_balance_loss(routing))
            z_terms.append(z_loss(routing))
            if self._bias_update is not None:
                self._bias_update.observe(layer, routing)

        with nullcontext() if self._autocast is None else torch.autocast("cpu", self._autocast):
            hidden = self.model.hidden(tokens_BL[:, :-1], observe=observe)
        loss = self._loss(hidden.flatten(0, 1), tokens_BL[:, 1:].flatten())
        return loss, mean_over_layers(balance_terms), mean_over_layers(z_terms)

    def _loss(self, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """Mean nats per token; a head with a bias takes the plain way."""
        if self.config.head_bias:
            return torch.nn.functional.cross_entropy(self.model.logits(hidden_ND), targets_N)
        head = self.model.embed if self.model.head is None else self.model.head
        assert isinstance(head, (torch.nn.Linear, torch.nn.Embedding))
        dtype = self._autocast or torch.float32
        return head_cross_entropy(hidden_ND, head.weight, targets_N, scale=self.config.logit_scale, dtype=dtype)

    def _report(self, window: _Window, log: MetricsLog) -> None:
        run, speed = self.settings.run, window.tokens / max(window.seconds, 1e-9)
        means = window.means()
        report = StepReport(
            step=self.step,
            total_steps=run.steps,
            tokens=self.step * run.batch_size * run.seq_len,
            tokens_per_s=speed,
            seconds_left=(run.steps - self.step) * run.batch_size * run.seq_len / speed,
            health=tuple(window.monitor.health()),
            **means,
        )
        log.write("train", self.step, {**means, "tokens_per_s": speed, "router": _health_rows(report.health)})
        self.reporter.stepped(report)

    def evaluate(self) -> EvalReport:
        """Held-out nats per token and bits per byte of the model as it stands."""
        run = self.settings.run
        if self._held_out is None:
            self._held_out = held_out_batches(
                self.corpus.held_out, seq_len=run.seq_len, batch_size=run.batch_size, max_tokens=run.eval_tokens
            )
        batches, num_bytes = self._held_out
        score = score_batches(self.model, batches, autocast=self._autocast)
        bits_per_byte = score.nats / math.log(2) / max(1, num_bytes)
        return EvalReport(self.step, score.tokens, score.nats_per_token, bits_per_byte, score.health)

    def _evaluate(self, log: MetricsLog) -> None:
        self.evaluation = report = self.evaluate()
        values = {"nats_per_token": report.nats_per_token, "bits_per_byte": report.bits_per_byte}
        log.write("eval", self.step, {**values, "tokens": report.tokens, "router": _health_rows(report.health)})
        self.reporter.evaluated(report)

    # ------------------------------------------------------------------------------------------ save and restore

    def save(self) -> Path:
        """A checkpoint of this very moment."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "rng": torch.get_rng_state(),
            "elapsed_s": self.elapsed_s,
        }
        path = save_checkpoint(self.folder / "checkpoints", self.step, state, self.settings.run.keep)
        self.reporter.saved(path)
        return path

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ConfigError(f"{path} does not fit the configured model; use another folder") from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.load_state_dict(state["batches"])
        torch.set_rng_state(state["rng"])
        self.step, self.elapsed_s = int(state["step"]), float(state["elapsed_s"])

    def export(self, folder: Path | None = None) -> Path:
        """The model in hub layout with its tokenizer, in `folder` (default: `model` inside the run's folder)."""
        target = folder or self.folder / "model"
        save_hub(self.model, target, tokenizer=self.corpus.tokenizer, overwrite=True)
        return target


def _balance_loss(routing: Routing) -> torch.Tensor:
    """One layer's balance loss: for noisy gates importance plus load (0 at balance), else load balancing (1)."""
    if routing.load_TE is None:
        return load_balancing_loss(routing)
    gates_TE = torch.zeros_like(routing.logits_TE).scatter(1, routing.ids_TK, routing.weights_TK)
    return importance_loss(gates_TE) + cv_squared(routing.load_TE.sum(dim=0))


def _select_biases(model: Decoder | Recurrent) -> dict[int, torch.Tensor]:
    """Layer index -> its router's selection bias, where it has one."""
    moes = [module for module in model.modules() if isinstance(module, MoELayer)]
    routers = {moe.layer: moe.router for moe in moes if isinstance(moe.router, Router)}
    return {layer: router.select_bias for layer, router in routers.items() if router.select_bias is not None}


class _Window:
    """Sums between two reports."""

    def __init__(self, start: int) -> None:
        self.start, self.count, self.seconds, self.tokens = start, 0, 0.0, 0
        self.monitor, self.sums = LoadMonitor(), dict[str, float]()

    def add(self, values: dict[str, float]) -> None:
        self.count += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        return {name: value / max(1, self.count) for name, value in self.sums.items()}


def _health_rows(healths: tuple[LoadHealth, ...]) -> list[dict[str, Any]]:
    return [{**dataclasses.asdict(health), "excess": health.excess} for health in healths]
