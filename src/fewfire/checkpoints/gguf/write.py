"""A module as a GGUF file: metadata from its config, tensors by the same table that reads them, one at a time.

What was written is opened again and compared before it gets its name: a model that GGUF cannot express is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewfire.checkpoints.atomic import refuse_occupied, replacing_file
from fewfire.checkpoints.fill import SCRATCH_BYTES
from fewfire.checkpoints.gguf.architectures import llama3_factors
from fewfire.checkpoints.gguf.layout import Part, Slot, as_stored, slots
from fewfire.checkpoints.gguf.read import open_gguf
from fewfire.checkpoints.gguf.vocabulary import vocabulary_metadata
from fewfire.config import (
    AttentionConfig,
    FeedForwardConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    check,
)
from fewfire.errors import ConfigError
from fewfire.tokenizer import Tokenizer

# family -> llama.cpp's architecture
EXPORTED = {"llama": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe", "olmoe": "olmoe"}
# our format -> (ggml type, llama.cpp's number for files that are mostly of it)
QUANTS = {"f32": ("F32", 0), "fp16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2)}
_BLOCK = 32


def save_gguf(
    module: nn.Module,
    path: str | Path,
    *,
    quant: str = "fp16",
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write `module` (with its `config`) as the GGUF file `path`, wholly or not at all. Returns notes for the user.

    `quant`: f32, fp16, bf16, q8_0 or q4_0 for all matrices but the router; norms and biases are float32. As with
    llama.cpp's own q4_0, an output head of its own is kept finer (q8_0), and rows that are no multiple of 32 are fp16.
    Raises: ConfigError where GGUF cannot express the model, BudgetError on a full disk.
    """
    config = module.config
    assert isinstance(config, ModelConfig)
    check(quant in QUANTS, f"quant {quant!r} is not known for GGUF; expected one of {', '.join(QUANTS)}")
    check(
        config.family in EXPORTED,
        f"family {config.family} is not written as GGUF; fewfire writes {', '.join(EXPORTED)}: export to hf instead",
    )
    _check_runs(config)
    if not overwrite:
        refuse_occupied(path)
    state = {name: values.detach() for name, values in module.state_dict().items()}
    words, notes = vocabulary_metadata(tokenizer, config.vocab_size)
    metadata = {**model_metadata(config), "general.file_type": QUANTS[quant][1], **words}
    with replacing_file(path) as file:
        _write(Path(file.name), config, metadata, state, quant)
        _compare(config, open_gguf(file.name).config)
    return notes


# ---------------------------------------------------------------------------------------------------------- metadata


def model_metadata(config: ModelConfig) -> dict[str, Any]:
    """llama.cpp's keys for `config`. Raises: ConfigError naming what they cannot express."""
    arch, mixer = EXPORTED[config.family], config.layers[0].mixer
    if not isinstance(mixer, AttentionConfig) or mixer.rope is None:
        raise ConfigError(f"family {config.family} without ordinary attention and rope cannot be written as GGUF")
    found: dict[str, Any] = {
        "block_count": len(config.layers),
        "context_length": config.max_context,
        "embedding_length": config.model_dim,
        "vocab_size": config.vocab_size,
        "attention.head_count": mixer.num_heads,
        "attention.head_count_kv": mixer.num_kv_heads,
        "attention.key_length": mixer.head_dim,
        "attention.value_length": mixer.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm.eps,
        "rope.dimension_count": mixer.rope.dim,
        "rope.freq_base": float(mixer.rope.theta),
        **_scaling(mixer.rope),
        **_feed_forward(config),
    }
    if mixer.clip_qkv is not None:
        found["attention.clamp_kqv"] = mixer.clip_qkv
    named = {f"{arch}.{key}": value for key, value in found.items()}
    return {"general.architecture": arch, "general.quantization_version": 2, **named}


def _check_runs(config: ModelConfig) -> None:
    """Raise ConfigError where llama.cpp would compute something else: its rules are fixed by the architecture."""
    mixer, family = config.layers[0].mixer, config.family
    assert isinstance(mixer, AttentionConfig)
    renormalized = {layer.router.renormalize for _, _, layer in config.moe_layers}
    dense = any(isinstance(layer.ffn, FeedForwardConfig) for layer in config.layers)
    biased = mixer.qkv_bias or mixer.out_bias
    wrong = {
        "qwen3_moe": [
            (False in renormalized, "routing weights that are not renormalised"),
            (dense, "dense layers"),
            (biased, "biases in attention"),
        ],
        "olmoe": [
            (True in renormalized, "renormalised routing weights"),
            (mixer.clip_qkv is not None, "clipping of queries, keys and values"),
            (mixer.num_kv_heads != mixer.num_heads, "fewer key-value heads than heads"),
            (config.tied_head, "a tied head"),
            (biased, "biases in attention"),
        ],
    }
    for applies, what in wrong.get(family, []):
        check(not applies, f"llama.cpp runs no {family} with {what}; export to hf instead")


def _feed_forward(config: ModelConfig) -> dict[str, Any]:
    widths = [layer.ffn.hidden_dim for layer in config.layers if isinstance(layer.ffn, FeedForwardConfig)]
    moe = next((layer.ffn for layer in config.layers if isinstance(layer.ffn, MoEConfig)), None)
    if moe is None:
        return {"feed_forward_length": widths[0]}
    found = {
        "feed_forward_length": widths[0] if widths else moe.expert.hidden_dim,
        "expert_count": moe.router.num_experts,
        "expert_used_count": moe.router.top_k,
        "expert_feed_forward_length": moe.expert.hidden_dim,
    }
    return found if config.family == "mixtral" else found | {"expert_weights_norm": moe.router.renormalize}


def _scaling(rope: RopeConfig) -> dict[str, Any]:
    scaling = rope.scaling
    if scaling is None or scaling.kind == "llama3":  # llama3 is the tensor rope_freqs
        return {}
    if scaling.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    if scaling.kind != "yarn":
        raise ConfigError(f"rope scaling {scaling.kind} cannot be written as GGUF; export to hf instead")
    found: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(scaling.factor),
        "rope.scaling.original_context_length": scaling.original_context,
        "rope.scaling.yarn_beta_fast": float(scaling.beta_fast or 32),
        "rope.scaling.yarn_beta_slow": float(scaling.beta_slow or 1),
    }
    if scaling.attention_factor is not None:
        found["rope.scaling.yarn_attn_factor"] = float(scaling.attention_factor)
    return found


def _compare(meant: ModelConfig, written: ModelConfig) -> None:
    """Raise ConfigError where the file would be read as another model."""
    told = ("native_format", "bos_token_id", "eos_token_ids", "pad_token_id", "ignored", "mtp", "vision")
    same = {name: getattr(meant, name) for name in told}
    if _rope_factors(meant) is not None:  # the file holds what divides each frequency, and no name of the rule
        meant, written = _without_scaling(meant), _without_scaling(written)
    path = _difference(meant, dataclasses.replace(written, **same), "")
    if path is not None:
        raise ConfigError(f"GGUF cannot express {path} of this {meant.family} model; export to hf instead")


def _without_scaling(config: ModelConfig) -> ModelConfig:
    layers = []
    for layer in config.layers:
        mixer = layer.mixer
        assert isinstance(mixer, AttentionConfig) and mixer.rope is not None
        plain = dataclasses.replace(mixer, rope=dataclasses.replace(mixer.rope, scaling=None))
        layers.append(dataclasses.replace(layer, mixer=plain))
    return dataclasses.replace(config, layers=tuple(layers))


def _difference(ours: Any, theirs: Any, path: str) -> str | None:
    """The first place where two configs differ by more than float32 can tell."""
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        names = [each.name for each in dataclasses.fields(ours)]
        pairs = [(f"{path}.{name}", getattr(ours, name), getattr(theirs, name)) for name in names]
    elif isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        pairs = [(f"{path}[{index}]", a, b) for index, (a, b) in enumerate(zip(ours, theirs))]
    elif isinstance(ours, float) and isinstance(theirs, (int, float)):
        return None if math.isclose(ours, theirs, rel_tol=1e-6) else path.lstrip(".")
    else:
        return None if ours == theirs else path.lstrip(".")
    return next((found for name, a, b in pairs if (found := _difference(a, b, name)) is not None), None)


# ----------------------------------------------------------------------------------------------------------- tensors


def _write(
    path: Path, config: ModelConfig, metadata: Mapping[str, Any], state: Mapping[str, Tensor], quant: str
) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    planned: list[tuple[Slot, GGMLQuantizationType]] = []
    writer = GGUFWriter(None, str(metadata["general.architecture"]))
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    factors = _rope_factors(config)
    for slot in ([factors[0]] if factors else []) + slots(config):
        kind = GGMLQuantizationType[ggml_type(slot, quant)]
        planned.append((slot, kind))
        writer.add_tensor_info(
            slot.name, slot.shape, np.dtype(np.float32), _num_bytes(slot.shape, kind), raw_dtype=kind
        )
    values = {**state, factors[0].parts[0].ours: factors[1]} if factors else state
    writer.write_header_to_file(path)
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        out = writer.fout[0]
        for slot, kind in planned:
            out.write(bytes(-out.tell() % writer.data_alignment))
            for block in _encoded(slot, values, kind):
                out.write(block)
        out.write(bytes(-out.tell() % writer.data_alignment))
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def ggml_type(slot: Slot, quant: str) -> str:
    """The ggml type of a tensor in a file of `quant`, as llama.cpp's converter chooses it."""
    kind = QUANTS[quant][0]
    if len(slot.shape) < 2 or "ffn_gate_inp" in slot.name:
        return "F32"
    if kind == "Q4_0" and slot.name == "output.weight":
        kind = "Q8_0"
    return "F16" if kind.startswith("Q") and slot.shape[-1] % _BLOCK else kind


def _num_bytes(shape: tuple[int, ...], kind: Any) -> int:
    from gguf import quant_shape_to_byte_shape

    values_bytes = {"F32": 4, "F16": 2, "BF16": 2}
    if kind.name in values_bytes:
        return math.prod(shape) * values_bytes[kind.name]
    return math.prod(quant_shape_to_byte_shape(shape, kind))


def _encoded(slot: Slot, state: Mapping[str, Tensor], kind: Any) -> Iterator[bytes]:
    """The bytes of a tensor, in runs of rows that fit the scratch."""
    from gguf import quantize

    for part in slot.parts:
        values = as_stored(state[part.ours], part)
        rows = max(1, SCRATCH_BYTES // max(4 * math.prod(values.shape[1:]), 1))
        for run in values.split(rows):
            if kind.name == "F16":
                yield run.half().contiguous().numpy().tobytes()
            elif kind.name == "BF16":
                yield run.bfloat16().contiguous().view(torch.int16).numpy().tobytes()
            else:
                flat = run.float().reshape(-1, slot.shape[-1])
                yield (flat.numpy() if kind.name == "F32" else quantize(flat.numpy(), kind)).tobytes()


def _rope_factors(config: ModelConfig) -> tuple[Slot, Tensor] | None:
    """Llama 3's rope scaling, which GGUF holds as what divides each frequency."""
    mixer = config.layers[0].mixer
    rope = mixer.rope if isinstance(mixer, AttentionConfig) else None
    if rope is None or rope.scaling is None or rope.scaling.kind != "llama3":
        return None
    scaling = rope.scaling
    assert scaling.low_freq_factor and scaling.high_freq_factor and scaling.original_context
    factors = llama3_factors(
        rope.theta,
        rope.dim,
        scaling.factor,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_context,
    )
    return Slot("rope_freqs.weight", (len(factors),), (Part("rope_freqs"),)), torch.tensor(factors)
