"""Grok-1 in plain numpy, float64, token by token: what the published text says, sharing nothing with fewfire.

Source: xai-org/grok-1, model.py and run.py (Apache-2.0), by its formulas: sandwich RMS norms, rotary positions,
attention logits 30 tanh(x / 30), softmax router over all experts with the two best kept as they are, tanh GELU.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from oracle.reference import VOCAB, Oracle, generator, padded_batch, token_ids

CONFIG = {
    "model_type": "grok-1",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_attn_value": 1.5,
    "attn_output_multiplier": 0.6,
    "embedding_multiplier_scale": 3.7,
    "output_multiplier_scale": 2.57,
    "rms_norm_eps": 0.05,  # the norm behind the experts hides a common factor of their weights but for its eps
    "tie_word_embeddings": True,
}


def shapes() -> dict[str, tuple[int, ...]]:
    dim, width = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    head = dim // CONFIG["num_attention_heads"]
    kv = head * CONFIG["num_key_value_heads"]
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, dim), "model.norm.scale": (dim,)}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", dim), ("k", kv), ("v", kv), ("o", dim)):
            names[f"{prefix}.attn.{name}_proj.weight"] = (rows, dim)
        names[f"{prefix}.moe_block.gate.weight"] = (CONFIG["num_experts"], dim)
        for expert in range(CONFIG["num_experts"]):
            block = f"{prefix}.moe_block.experts.{expert}"
            names[f"{block}.linear.weight"] = names[f"{block}.linear_v.weight"] = (width, dim)
            names[f"{block}.linear_1.weight"] = (dim, width)
        for norm in ("pre_attn", "post_attn", "pre_moe", "post_moe"):
            names[f"{prefix}.{norm}_norm.scale"] = (dim,)
    return names


def write(folder: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for name, shape in shapes().items():
        draw = torch.randn(shape, generator=generator(name))
        tensors[name] = 1 + 0.2 * draw if name.endswith("scale") else draw * shape[-1] ** -0.5
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return {name: values.double().numpy() for name, values in tensors.items()}


def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean() + CONFIG["rms_norm_eps"]) * scale


def rotate(x: np.ndarray, position: int) -> np.ndarray:
    half = len(x) // 2
    angles = position * 10000.0 ** (-np.arange(half) / half)
    a, b = x[:half], x[half:]
    return np.concatenate((a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def attention(x: np.ndarray, weights: dict[str, np.ndarray], prefix: str) -> np.ndarray:
    """(T, D) -> (T, D)."""
    heads, kv_heads = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
    q, k, v = ((x @ weights[f"{prefix}.{n}_proj.weight"].T).reshape(len(x), -1, 8) for n in "qkv")
    out = np.zeros((len(x), heads, 8))
    for head in range(heads):
        group = head // (heads // kv_heads)
        for t in range(len(x)):
            scores = [rotate(q[t, head], t) @ rotate(k[s, group], s) for s in range(t + 1)]
            scores = np.array(scores) * CONFIG["attn_output_multiplier"]
            scores = CONFIG["max_attn_value"] * np.tanh(scores / CONFIG["max_attn_value"])
            out[t, head] = softmax(scores) @ v[: t + 1, group]
    return out.reshape(len(x), -1) @ weights[f"{prefix}.o_proj.weight"].T


def experts(x: np.ndarray, weights: dict[str, np.ndarray], prefix: str) -> np.ndarray:
    """(D,) -> (D,): the two likeliest experts, weighted by their probabilities among all."""
    chances, out = softmax(weights[f"{prefix}.gate.weight"] @ x), np.zeros_like(x)
    for expert in np.argsort(-chances, kind="stable")[: CONFIG["num_experts_per_tok"]]:
        block = f"{prefix}.experts.{expert}"
        gate = weights[f"{block}.linear.weight"] @ x
        gate = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        hidden = gate * (weights[f"{block}.linear_v.weight"] @ x)
        out += chances[expert] * (weights[f"{block}.linear_1.weight"] @ hidden)
    return out


def logits(ids: list[int], weights: dict[str, np.ndarray]) -> torch.Tensor:
    """(T, V) float32."""
    table = weights["model.embed_tokens.weight"]
    x = table[ids] * CONFIG["embedding_multiplier_scale"]
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        scales = {n: weights[f"{prefix}.{n}_norm.scale"] for n in ("pre_attn", "post_attn", "pre_moe", "post_moe")}
        normed = np.stack([norm(row, scales["pre_attn"]) for row in x])
        added = attention(normed, weights, f"{prefix}.attn")
        x = x + np.stack([norm(row, scales["post_attn"]) for row in added])
        added = np.stack([experts(norm(row, scales["pre_moe"]), weights, f"{prefix}.moe_block") for row in x])
        x = x + np.stack([norm(row, scales["post_moe"]) for row in added])
    x = np.stack([norm(row, weights["model.norm.scale"]) for row in x])
    return torch.from_numpy(x @ table.T * CONFIG["output_multiplier_scale"]).float()


def run(folder: Path) -> Oracle:
    """As `reference.run`: decoding and padding are the prefill of the same tokens."""
    weights, ids = write(folder), token_ids(16, "grok")
    prefill = logits(ids[0].tolist(), weights)[None]
    padded_ids, mask = padded_batch("grok")
    padded = torch.cat([logits(row[real].tolist(), weights) for row, real in zip(padded_ids, mask)])
    return Oracle(folder, ids, prefill, prefill, padded_ids, mask, padded)
