"""Kimi-K2: DeepSeek-V3's architecture under a model_type of its own (transformers 5.23 has none; it runs as V3)."""

from __future__ import annotations

from typing import Any

from fewfire.config import ModelConfig
from fewfire.families import deepseek_v3, latent
from fewfire.families.reader import Reader

tensors = latent.tensors
ignored_tensors = latent.ignored_tensors


def read(hub: Reader) -> ModelConfig:
    return deepseek_v3.read(hub, "kimi_k2")


def write(config: ModelConfig) -> dict[str, Any]:
    return deepseek_v3.write(config)
