"""The demo's three runs: a small MoE, its dense twin of equal active FLOPs, and the MoE without balancing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from fewfire.train.settings import (
    BalanceSettings,
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    RunSettings,
    TrainSettings,
    settings_table,
)

MINUTES = 6.0  # on two cores
STEPS_PER_MINUTE = 47
COMPARED_FRAC = 0.9  # where the three are compared, of the MoE's own run

MODEL = ModelSettings(
    family="qwen3_moe",
    model_dim=192,
    num_layers=4,
    num_heads=3,
    num_kv_heads=3,
    head_dim=64,
    num_experts=16,
    top_k=2,
    expert_dim=256,
    num_dense_layers=1,  # as in DeepSeek-V3: early layers route poorly while the model is young
    dense_dim=512,
    init_std=0.05,
)
# The router's matrix costs a token as much as num_experts / 3 more units of width: the twin gets those, rounded up.
TWIN_DIM = MODEL.top_k * MODEL.expert_dim + 8


@dataclass(frozen=True)
class DemoRuns:
    """Settings of the three runs. The schedule is the same for all: only the MoE goes on after `compared_step`."""

    moe: TrainSettings
    dense: TrainSettings
    unbalanced: TrainSettings
    compared_step: int

    @property
    def key(self) -> str:
        """Changes when anything that shapes the result does."""
        tables = [settings_table(each) for each in (self.moe, self.dense, self.unbalanced)]
        for table in tables:
            table.pop("folder")
        return hashlib.sha256(json.dumps([tables, self.compared_step], sort_keys=True).encode()).hexdigest()[:16]


def demo_runs(folder: Path, minutes: float, seed: int) -> DemoRuns:
    """The three runs in `folder`, sized so that all together take about `minutes` on two cores."""
    steps = max(20, round(STEPS_PER_MINUTE * minutes))
    compared = max(10, round(steps * COMPARED_FRAC))
    base = TrainSettings(
        folder="",
        model=MODEL,
        data=DataSettings(source="python", vocab_size=2048, held_out_frac=0.05, split_seed=7),
        optimizer=OptimizerSettings(learning_rate=4e-3, warmup_steps=20, schedule="wsd", decay_frac=0.5),
        balance=BalanceSettings(method="loss", loss_weight=0.1),
        run=RunSettings(
            steps=steps,
            batch_size=12,
            seq_len=256,
            precision="bf16",
            seed=seed,
            eval_every=max(10, compared // 3),
            eval_tokens=98_304,
            save_every=max(50, steps // 8),
            keep=1,
            tensorboard=False,
        ),
    )
    twin = dataclasses.replace(MODEL, family="llama", num_experts=0, num_dense_layers=0, dense_dim=TWIN_DIM)
    return DemoRuns(
        moe=dataclasses.replace(base, folder=str(folder / "moe")),
        dense=dataclasses.replace(base, folder=str(folder / "dense"), model=twin),
        unbalanced=dataclasses.replace(
            base,
            folder=str(folder / "unbalanced"),
            balance=dataclasses.replace(base.balance, method="none"),
        ),
        compared_step=compared,
    )
