"""Tiny random models made and saved by transformers: what checkpoint tests read and compare with."""

from __future__ import annotations

import contextlib
import io
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch

VOCAB = 97
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_EXPERTS = {"num_experts_per_tok": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_SHAPE, "tie_word_embeddings": True},
    "mixtral": {**_SHAPE, **_EXPERTS, "num_local_experts": 4},
    "olmoe": {**_SHAPE, **_EXPERTS, "num_experts": 4, "clip_qkv": 0.5},
    "qwen3_moe": {**_SHAPE, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16},
    "gpt2": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def make(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A transformers model with every tensor re-drawn, so that no norm, bias or router hides at its default."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**CONFIGS[family], **changes})
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if not values.is_floating_point() or "inv_freq" in name:
                continue
            draw = torch.randn(values.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            values.copy_(1 + 0.2 * draw if values.dim() == 1 and "bias" not in name else 0.2 * draw)
    return model.to(dtype)


def save(model: Any, folder: Path, **options: Any) -> Path:
    """`save_pretrained` without its noise."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def load(folder: Path) -> Any:
    """What transformers makes of a folder; fails where it misses or ignores a tensor."""
    from transformers import AutoModelForCausalLM

    model, info = load_as(AutoModelForCausalLM, folder)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model


def load_as(kind: Any, folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """(model, what transformers says about its tensors); eager attention and experts."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"dtype": "auto", "attn_implementation": "eager", "output_loading_info": True} | options
        model, info = kind.from_pretrained(folder, **options)
        model.set_experts_implementation("eager")
    return model.eval(), info
