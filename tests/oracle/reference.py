"""One tiny random checkpoint of a family and what transformers computes from it: prefill, cached decode, padded batch.

Every tensor is drawn anew from a seed made of the seed and its name, so that no bias or norm hides at its default.
"""

from __future__ import annotations

import copy
import json
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from oracle.quantized import quantize

VOCAB = 96
PREFILL = 5  # tokens of the first call of a cached decode; the rest come one by one
LENGTHS = (16, 11)  # real tokens of each row of the padded batch


@dataclass(frozen=True)
class Spec:
    """How to build one oracle.

    `config`: transformers' class and its arguments. `padding` "alone": transformers lets padding change results
    (named in `note`), so each row is compared with itself alone. `capacity`: decoding with a cache is another model.
    """

    model: str
    config: str
    values: dict[str, Any]
    padding: str = "batch"
    length: int = 16
    note: str = ""
    explicit_positions: bool = True
    rewrite: Callable[[Path], None] | None = None  # what is done to the saved folder before it is loaded
    quantization: str | None = None  # a key of quantized.QUANTIZATION


@dataclass
class Oracle:
    """Token ids and float32 logits. `padded` are those of the real tokens of two left-padded rows, row after row."""

    folder: Path
    ids: Tensor
    prefill: Tensor
    decode: Tensor
    padded_ids: Tensor
    mask: Tensor
    padded: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)


def generator(name: str, seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))


@torch.no_grad()
def redraw(model: nn.Module, seed: int = 0) -> None:
    """New values for every parameter and selection bias, by what its name says it is."""
    for name, values in [*model.named_parameters(), *model.named_buffers()]:
        draw = torch.randn(values.shape, generator=generator(name, seed))
        if "e_score_correction_bias" in name:
            values.copy_(0.3 * draw)
        elif name not in dict(model.named_parameters()):
            continue  # decay tables and rotary frequencies follow from the config
        elif name.endswith("A_log"):
            values.copy_(1 + 0.5 * draw)  # transformers' own start is random
        elif is_norm(name) or name.endswith("dt_bias"):
            values.add_(0.2 * draw)
        elif values.dim() < 2 or name.endswith(("_bias", ".bias")):
            values.copy_(0.3 * draw)
        else:
            values.copy_(draw * fan_in(name, values, model.config) ** -0.5)


def is_norm(name: str) -> bool:
    owner = name.split(".")[-2:-1]
    return any("norm" in part or "ln_" in part for part in owner)


def fan_in(name: str, values: Tensor, config: Any) -> int:
    """What keeps activations and logits of order 1: a table that is the head too is drawn as a head."""
    table = any(part in name for part in ("embed_tokens", "wte", "wpe"))
    if name == "shared.weight" or (table and not getattr(config, "tie_word_embeddings", False)):
        return 1  # T5 scales its tied head
    return values.shape[-1]


def token_ids(length: int, name: str, rows: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=generator(f"ids of {name}"))


def padded_batch(name: str) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (2, 16): the second row has five columns of padding on its left."""
    ids, mask = token_ids(LENGTHS[0], f"padded {name}", 2), torch.ones(2, LENGTHS[0], dtype=torch.bool)
    mask[1, : LENGTHS[0] - LENGTHS[1]] = False
    return torch.where(mask, ids, 0), mask


def make_model(spec: Spec, seed: int = 0) -> Any:
    """transformers' model with redrawn weights, plain implementations chosen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        vocab = {} if "text_config" in spec.values else {"vocab_size": VOCAB}
        config = getattr(transformers, spec.config)(**vocab, **copy.deepcopy(spec.values))  # it writes into dicts
        config._attn_implementation = "eager"
        for nested in ("text_config", "vision_config"):
            if getattr(config, nested, None) is not None:
                getattr(config, nested)._attn_implementation = "eager"
        model = getattr(transformers, spec.model)(config).eval().float()
        model.set_experts_implementation("eager")
    redraw(model, seed)
    return model


def transpose_experts(folder: Path) -> None:
    """Experts as (E, in, out), the way in which Qwen3-VL's published files hold them."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    turned = {
        name: values.transpose(1, 2).contiguous() if ".mlp.experts." in name else values
        for name, values in tensors.items()
    }
    save_file(turned, folder / "model.safetensors", {"format": "pt"})


def call_it_kimi(folder: Path) -> None:
    """Kimi-K2 is DeepSeek-V3 under another model_type."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}))


@torch.no_grad()
def run(name: str, spec: Spec, folder: Path) -> Oracle:
    """Build, save in hub layout, compute."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make_model(spec)
        model.save_pretrained(folder)
        if spec.rewrite is not None:
            spec.rewrite(folder)
        if spec.quantization is not None:
            with TemporaryDirectory() as plain:
                quantize(folder, spec.quantization, Path(plain))
                model = type(model).from_pretrained(plain, attn_implementation="eager").eval()
        ids = token_ids(spec.length, name)
        prefill = model(ids, use_cache=False).logits
        decode = cached(model, ids, spec)
        padded_ids, mask = padded_batch(name)
        if spec.padding == "alone":
            rows = [model(row[real][None], use_cache=False).logits[0] for row, real in zip(padded_ids, mask)]
            padded = torch.cat(rows)
        else:
            positions = {"position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)} if spec.explicit_positions else {}
            padded = model(padded_ids, attention_mask=mask.long(), use_cache=False, **positions).logits[mask]
    return Oracle(folder, ids, prefill.float(), decode.float(), padded_ids, mask, padded.float())


def cached(model: Any, ids: Tensor, spec: Spec) -> Tensor:
    """Logits of `ids`, the first tokens at once, then one by one with transformers' cache."""
    cache, pieces, start = None, [], 0
    for part in ids.split([PREFILL] + [1] * (ids.shape[1] - PREFILL), dim=1):
        end = start + part.shape[1]
        positions = {"position_ids": torch.arange(start, end)[None]} if spec.explicit_positions else {}
        out = model(part, past_key_values=cache, use_cache=True, **positions)
        cache, start = out.past_key_values, end
        pieces.append(out.logits)
    return torch.cat(pieces, dim=1)


@torch.no_grad()
def run_encoder_decoder(name: str, spec: Spec, folder: Path) -> Oracle:
    """The same for an encoder-decoder: `extra` holds the encoder's ids. Padding is on the right, as in T5."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.modeling_outputs import MoEModelOutput

        model = make_model(spec)
        model.save_pretrained(folder)
        source, ids = token_ids(spec.length, f"source of {name}"), token_ids(9, name)
        prefill = model(input_ids=source, decoder_input_ids=ids, use_cache=False).logits
        memory = model.encoder(input_ids=source).last_hidden_state
        cache, pieces = None, []
        for part in ids.split(1, dim=1):
            states = MoEModelOutput(last_hidden_state=memory)
            out = model(encoder_outputs=states, decoder_input_ids=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
        padded_ids, mask = padded_batch(name)
        padded_ids, mask = padded_ids.flip(1), mask.flip(1)
        pair = token_ids(7, f"pair {name}", 2)
        padded = model(input_ids=padded_ids, attention_mask=mask.long(), decoder_input_ids=pair, use_cache=False).logits
    extra = {"source": source, "pair": pair}
    return Oracle(folder, ids, prefill.float(), torch.cat(pieces, 1).float(), padded_ids, mask, padded.float(), extra)
