"""A hub model of transformers as a GGUF file, laid out as llama.cpp's converter does it: what reading is tested with.

Shares no code with the package: names come from the gguf library's own table, rearrangements are spelled out here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

ARCH = {
    "llama": "LLAMA",
    "mixtral": "LLAMA",
    "qwen2_moe": "QWEN2MOE",
    "qwen3_moe": "QWEN3MOE",
    "olmoe": "OLMOE",
    "deepseek_v2": "DEEPSEEK2",
    "deepseek_v3": "DEEPSEEK2",
    "gpt_oss": "GPT_OSS",
    "dbrx": "DBRX",
    "glm4_moe": "GLM4_MOE",
    "granitemoe": "GRANITE_MOE",
    "minimax_m2": "MINIMAXM2",
    "gpt2": "GPT2",
    "grok-1": "GROK",
}
PERMUTED = ("llama", "mixtral", "granitemoe")
KEEP_F32 = ("ffn_gate_inp", "norm", "rope_freqs", "exp_probs", "sinks", "bias", "position")


def permute(weight: Tensor, heads: int) -> Tensor:
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def stack_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tensor for each matrix of all experts of a layer."""
    found: dict[str, Any] = {}
    for name, values in tensors.items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", name) or re.fullmatch(r"(.*\.moe)\.(\d+)\.(.*)", name)
        if match:
            found.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = values
        else:
            found[name] = values
    return {k: torch.stack([v[e] for e in sorted(v)]) if isinstance(v, dict) else v for k, v in found.items()}


def rearrange(
    family: str, config: dict[str, Any], tensors: dict[str, Tensor], *, old_latent: bool
) -> dict[str, Tensor]:
    heads = config.get("num_attention_heads") or config.get("n_heads") or config.get("n_head")
    kv_heads = config.get("num_key_value_heads") or heads
    found: dict[str, Tensor] = {}
    for name, values in stack_experts(tensors).items():
        if family in PERMUTED and re.search(r"q_proj\.(weight|bias)$", name):
            values = permute(values, heads)
        if family in PERMUTED and re.search(r"k_proj\.(weight|bias)$", name):
            values = permute(values, kv_heads)
        if name.endswith("kv_b_proj.weight") and not old_latent:
            nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
            keys, vals = values.view(heads, nope + value, -1).split([nope, value], dim=1)
            found[name.replace("kv_b_proj", "k_b_proj")] = keys.transpose(1, 2)
            found[name.replace("kv_b_proj", "v_b_proj")] = vals
            continue
        if family == "gpt2" and re.search(r"(c_attn|c_proj|c_fc)\.weight$", name):
            values = values.T
        if family == "dbrx" and ".ffn.experts.mlp." in name:
            ffn = config["ffn_config"]
            values = values.view(ffn["moe_num_experts"], ffn["ffn_hidden_size"], -1)
            values = values.transpose(1, 2) if name.endswith("w2") else values
            name += ".weight"
        if family == "gpt_oss" and "experts.gate_up_proj" in name:
            kind = "bias" if name.endswith("_bias") else "weight"
            values = values if kind == "bias" else values.transpose(1, 2)
            for part, each in (("gate_proj", values[:, 0::2]), ("up_proj", values[:, 1::2])):
                found[re.sub(r"gate_up_proj(_bias)?$", f"{part}.{kind}", name)] = each
            continue
        if family == "gpt_oss" and "experts.down_proj" in name:
            kind = "bias" if name.endswith("_bias") else "weight"
            values = values if kind == "bias" else values.transpose(1, 2)
            name = re.sub(r"down_proj(_bias)?$", f"down_proj.{kind}", name)
        if name.endswith("sinks"):
            name += ".weight"
        if family == "granitemoe" and name.endswith("input_linear.weight"):
            gate, up = values.chunk(2, dim=1)
            base = name.removesuffix("block_sparse_moe.input_linear.weight")
            found[f"{base}GATE"], found[f"{base}UP"] = gate, up
            continue
        found[name] = values
    return found


def write(
    path: Path,
    family: str,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    metadata: dict[str, Any],
    *,
    kind: str | Callable[[str], str] = "F32",
    old_latent: bool = False,
    extra: dict[str, Tensor] | None = None,
    quantize: Callable[[np.ndarray, gguf.GGMLQuantizationType], np.ndarray] = gguf.quantize,
) -> None:
    """`kind`: the type of every large matrix, or of each by its name. `quantize` makes its blocks."""
    arch = getattr(gguf.MODEL_ARCH, ARCH[family])
    layers = metadata["block_count"]
    names = gguf.get_tensor_name_map(arch, layers)
    prefix = gguf.MODEL_ARCH_NAMES[arch]
    writer = gguf.GGUFWriter(path, prefix)
    for key, value in metadata.items():
        full = key if key.startswith(("tokenizer.", "general.")) else f"{prefix}.{key}"
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(full, value)
    for name, values in rearrange(family, config, tensors, old_latent=old_latent).items():
        special = re.fullmatch(r"model\.layers\.(\d+)\.(GATE|UP)", name)
        new = f"blk.{special[1]}.ffn_{special[2].lower()}_exps.weight" if special else None
        new = new or names.get_name(
            name.replace("e_score_correction_bias", "e_score_correction.bias"), (".weight", ".bias")
        )
        new = new or names.get_name(name, (".weight", ".bias"))
        assert new is not None, name
        chosen = kind if isinstance(kind, str) else kind(new)
        add_tensor(writer, new, values.squeeze() if "shared_expert_gate" in name else values, chosen, quantize)
    for name, values in (extra or {}).items():
        add_tensor(writer, name, values, "F32", quantize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensor(writer: Any, name: str, values: Tensor, kind: str, quantize: Callable[..., np.ndarray]) -> None:
    data = values.float().contiguous().numpy()
    small = values.dim() < 2 or any(part in name for part in KEEP_F32)
    block = 1 if kind in ("F16", "BF16", "F32") else gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    if small or kind == "F32" or data.shape[-1] % block:
        writer.add_tensor(name, data)
    elif kind == "F16":
        writer.add_tensor(name, data.astype(np.float16))
    else:
        ggml = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, quantize(data, ggml), raw_dtype=ggml)
