"""Checkpoints in MXFP4 (gpt-oss) and block FP8 (DeepSeek-V3), encoded and decoded here by their definition.

A tensor becomes what the file holds, and the exact values that this stands for: those are what transformers runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


class Encoded(NamedTuple):
    stored: dict[str, Tensor]
    values: Tensor


def mxfp4(name: str, values: Tensor) -> Encoded | None:
    """Experts of gpt-oss: per output row, blocks of 32 inputs share a power of two; low nibble first."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return None
    blocks = values.transpose(1, 2).unflatten(-1, (-1, 32))  # (E, out, in / 32, 32)
    exponents = torch.floor(torch.log2(blocks.abs().amax(dim=-1) / 6))
    scaled = blocks / 2.0 ** exponents[..., None]
    codes = (scaled.abs()[..., None] - LEVELS).abs().argmin(dim=-1)
    signs = (scaled < 0).long()
    decoded = LEVELS[codes] * (1 - 2 * signs) * 2.0 ** exponents[..., None]
    nibbles = (codes + 8 * signs).to(torch.uint8)
    packed = nibbles[..., 0::2] + nibbles[..., 1::2] * 16
    stored = {f"{name}_blocks": packed, f"{name}_scales": (exponents + 127).to(torch.uint8)}
    return Encoded(stored, decoded.flatten(2).transpose(1, 2).contiguous())


def fp8(name: str, values: Tensor) -> Encoded | None:
    """Linear weights of DeepSeek-V3: e4m3 times a float32 scale for each 128 x 128 block, the last ones cut short."""
    if values.dim() != 2 or any(part in name for part in ("embed_tokens", "lm_head", "mlp.gate.weight")):
        return None
    rows, columns = values.shape
    stored = torch.empty(values.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    decoded = torch.empty_like(values)
    for i in range(0, rows, 128):
        for j in range(0, columns, 128):
            block = values[i : i + 128, j : j + 128]
            scales[i // 128, j // 128] = block.abs().max() / 448
            stored[i : i + 128, j : j + 128] = (block / scales[i // 128, j // 128]).to(torch.float8_e4m3fn)
            read = stored[i : i + 128, j : j + 128].float()
            decoded[i : i + 128, j : j + 128] = read * scales[i // 128, j // 128]
    return Encoded({name: stored, f"{name}_scale_inv": scales}, decoded)


QUANTIZATION: dict[str, tuple[Callable[[str, Tensor], Encoded | None], dict[str, Any]]] = {
    "mxfp4": (mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}),
    "fp8": (fp8, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}),
}


def quantize(folder: Path, method: str, plain: Path) -> None:
    """Encode the checkpoint in `folder`; `plain` becomes the same model in the exact values that were encoded."""
    encode, description = QUANTIZATION[method]
    tensors = load_file(folder / "model.safetensors")
    stored, values = {}, {}
    for name, tensor in tensors.items():
        encoded = encode(name, tensor)
        stored |= {name: tensor} if encoded is None else encoded.stored
        values[name] = tensor if encoded is None else encoded.values
    assert stored.keys() != values.keys()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    save_file(values, plain / "model.safetensors", {"format": "pt"})
    config = (folder / "config.json").read_text()
    (plain / "config.json").write_text(config)
    (folder / "config.json").write_text(json.dumps({**json.loads(config), "quantization_config": description}))
