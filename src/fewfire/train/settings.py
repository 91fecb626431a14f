"""What a training run is told: frozen dataclasses, one TOML table each, read strictly.

Owns names, types, defaults and limits of every key. Knows no tensor.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from fewfire.config import check
from fewfire.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class ModelSettings:
    """[model] `family`: the hub type it trains and exports as. `num_experts` 0 makes every layer dense.

    `expert_dim` is an expert's width, `dense_dim` a dense layer's, `shared_dim` the shared expert's (0: none).
    The first `num_dense_layers` layers are dense. `lstm_moe` is the 2017 design: `num_layers` LSTMs of `model_dim`
    with a noisy top-k MoE after each but the last; `branches` > 0 makes its gating hierarchical.
    """

    family: Literal["llama", "mixtral", "qwen3_moe", "olmoe", "glm4_moe", "lstm_moe"] = "qwen3_moe"
    model_dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 64
    num_experts: int = 16
    top_k: int = 2
    expert_dim: int = 256
    dense_dim: int = 1024
    shared_dim: int = 0
    num_dense_layers: int = 0
    tied_head: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    router_scale: float = 1.0
    branches: int = 0  # lstm_moe
    dropout: float = 0.0  # lstm_moe
    init_std: float = 0.02
    max_context: int = 0  # 0: the training sequence length


@dataclass(frozen=True)
class DataSettings:
    """[data] `source` python is this installation's standard library; files takes `paths` (files or folders).

    `field`: the text column of JSONL and Parquet. `tokenizer`: an existing tokenizer.json; empty trains a
    byte-level BPE of `vocab_size`. `held_out_frac` of the documents are for evaluation.
    """

    source: Literal["files", "python"] = "files"
    paths: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    field: str = "text"
    tokenizer: str = ""
    vocab_size: int = 8192
    held_out_frac: float = 0.02
    split_seed: int = 0


@dataclass(frozen=True)
class OptimizerSettings:
    """[optimizer] AdamW; matrices decay, norms, biases and embeddings do not. `schedule` after `warmup_steps`:
    cosine to `min_rate_frac`, or wsd: constant, then linear over the last `decay_frac`."""

    learning_rate: float = 3e-3
    min_rate_frac: float = 0.1
    warmup_steps: int = 50
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_frac: float = 0.2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0


@dataclass(frozen=True)
class BalanceSettings:
    """[balance] `loss`: the auxiliary loss (1 at balance) times `loss_weight`; for lstm_moe the importance and load
    losses of 2017 (0 at balance; 0.1 was theirs). `bias`: the loss-free selection bias moved by `bias_rate`; `none`.
    `z_weight` weighs the z-loss in every case."""

    method: Literal["loss", "bias", "none"] = "loss"
    loss_weight: float = 0.01
    bias_rate: float = 1e-3
    z_weight: float = 1e-3


@dataclass(frozen=True)
class RunSettings:
    """[run] A step is `batch_size` sequences of `seq_len` tokens, taken in `accumulation` equal parts.

    `eval_tokens` 0 evaluates the whole held-out text; `threads` 0 leaves torch's choice; `keep` checkpoints stay.
    """

    steps: int = 1000
    batch_size: int = 32
    seq_len: int = 256
    accumulation: int = 1
    precision: Literal["float32", "bf16"] = "float32"
    seed: int = 0
    threads: int = 0
    log_every: int = 10
    eval_every: int = 200
    eval_tokens: int = 0
    save_every: int = 200
    keep: int = 2
    tensorboard: bool = True


@dataclass(frozen=True)
class TrainSettings:
    """A whole run. `folder` holds everything it writes; `initial` is a hub-layout checkpoint to fine-tune."""

    folder: str = "runs/train"
    initial: str = ""
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    balance: BalanceSettings = field(default_factory=BalanceSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        run, model, optimizer = self.run, self.model, self.optimizer
        at_least_one = (
            "steps",
            "batch_size",
            "seq_len",
            "accumulation",
            "log_every",
            "eval_every",
            "save_every",
            "keep",
        )
        for name in at_least_one:
            check(getattr(run, name) >= 1, f"run.{name} ({getattr(run, name)}) must be at least 1")
        check(
            run.batch_size % run.accumulation == 0,
            f"run.accumulation ({run.accumulation}) must divide run.batch_size ({run.batch_size})",
        )
        for name in ("model_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "expert_dim", "dense_dim"):
            check(getattr(model, name) >= 1, f"model.{name} ({getattr(model, name)}) must be at least 1")
        if model.num_experts:
            check(
                1 <= model.top_k <= model.num_experts,
                f"model.top_k ({model.top_k}) exceeds model.num_experts ({model.num_experts}); set top_k to "
                f"{model.num_experts} or less",
            )
        check(optimizer.learning_rate > 0, f"optimizer.learning_rate ({optimizer.learning_rate}) must be positive")
        check(
            0 < self.data.held_out_frac < 1, f"data.held_out_frac ({self.data.held_out_frac}) must lie between 0 and 1"
        )
        check(
            self.data.source == "python" or bool(self.data.paths),
            'data.paths names no file or folder; set data.paths, or data.source = "python"',
        )


def read_settings(path: str | Path, overrides: tuple[str, ...] = ()) -> TrainSettings:
    """Settings from a TOML file, each `key.path=value` of `overrides` on top. Relative paths are as written.

    Raises: ConfigError naming the unknown key, the wrong type or the missing file.
    """
    try:
        with open(path, "rb") as stream:
            table = tomllib.load(stream)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the path of a training configuration (TOML)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a readable TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    for override in overrides:
        apply_override(table, override)
    return settings_from(table)


def settings_from(table: dict[str, Any]) -> TrainSettings:
    """The same from a table that is already in memory."""
    return _build(TrainSettings, table, "")


def settings_table(settings: TrainSettings) -> dict[str, Any]:
    """The plain table that `settings_from` reads back to the same settings."""
    return dataclasses.asdict(settings)


def apply_override(table: dict[str, Any], override: str) -> None:
    """Set `model.num_experts=8` in `table`: the value is TOML, or plain text where it is no TOML."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override} is not key=value; write it like --set run.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {parent} is a value, not a table")
    table[leaf] = value


def _build(kind: type[T], table: Any, prefix: str) -> T:
    if not isinstance(table, dict):
        raise ConfigError(f"{prefix.rstrip('.')} ({table!r}) must be a table of keys")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(table) - set(hints))
    if unknown:
        raise ConfigError(f"{prefix}{unknown[0]} is not a known key; known here: {', '.join(sorted(hints))}")
    values = {key: _coerce(hints[key], value, prefix + key) for key, value in table.items()}
    return kind(**values)


def _coerce(hint: Any, value: Any, name: str) -> Any:
    """`value` as `hint` wants it, or a ConfigError: no text for a number, no fraction for a count."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, name + ".")
    if typing.get_origin(hint) is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise ConfigError(f"{name} ({value}) is not one of {', '.join(map(str, allowed))}")
        return value
    if typing.get_origin(hint) is tuple:
        items = (value,) if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"{name} ({value!r}) must be a list of texts")
        return tuple(items)
    assert not isinstance(hint, types.UnionType)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        kinds = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        raise ConfigError(f"{name} ({value!r}) must be {kinds[hint]}")
    return value
