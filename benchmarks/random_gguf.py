"""Random weights of a published shape as a GGUF file, written block by block: what peers run beside a random pack.

`python benchmarks/random_gguf.py olmoe-1b-7b OUT.gguf --type Q4_0 [--head Q6_K] [--layers N]`
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quant_shape_to_byte_shape

from fewfire.checkpoints.gguf.layout import Slot, slots
from fewfire.checkpoints.gguf.write import EXPORTED, model_metadata
from fewfire.families import published
from fewfire.quantize.pack import cut_layers

_DEVIATION = 0.02
_RUN = 1 << 24  # values drawn at a time
_BYTES = np.arange(256, dtype=np.uint8)
_WITHOUT_LEAST = _BYTES | np.where(_BYTES & 0x0F, 0, 0x08) | np.where(_BYTES & 0xF0, 0, 0x80)  # two codes: -8 becomes 0
_WITHOUT_LEAST = _WITHOUT_LEAST.astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="Q4_0", choices=("Q4_0", "Q8_0", "Q4_K", "Q6_K", "BF16"))
    parser.add_argument("--head", help="type of the output matrix (default: as --type)")
    parser.add_argument("--layers", type=int)
    options = parser.parse_args()
    write(options.model, options.out, options.type, options.head or options.type, options.layers)


def write(model: str, out: Path, kind: str, head: str, layers: int | None = None) -> None:
    """A file that llama.cpp loads: random blocks, norms of 1, a vocabulary of numbered words."""
    config = cut_layers(published.load(model), layers)
    writer = GGUFWriter(None, EXPORTED[config.family])
    for key, value in model_metadata(config).items():
        if key != "general.architecture":
            _add(writer, key, value)
    _add_vocabulary(writer, config.vocab_size)
    planned = []
    for slot in slots(config):
        chosen = GGMLQuantizationType[_type(slot, kind, head)]
        shape = slot.shape
        size = 4 * math.prod(shape)
        if chosen.name == "BF16":
            size //= 2
        elif chosen.name != "F32":
            size = math.prod(quant_shape_to_byte_shape(shape, chosen))
        writer.add_tensor_info(slot.name, shape, np.dtype(np.float32), size, raw_dtype=chosen)
        planned.append((slot, chosen, size))
    writer.write_header_to_file(out)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file, rng = writer.fout[0], np.random.Generator(np.random.SFC64(0))
    for slot, chosen, _ in planned:
        file.write(bytes(-file.tell() % writer.data_alignment))
        left = math.prod(slot.shape)
        while left:
            count = min(left, _RUN)
            file.write(_draw(rng, slot, chosen.name, count))
            left -= count
    file.write(bytes(-file.tell() % writer.data_alignment))
    writer.close()


def _type(slot: Slot, kind: str, head: str) -> str:
    if len(slot.shape) < 2 or "ffn_gate_inp" in slot.name:
        return "F32"
    return head if slot.name == "output.weight" else kind


def _draw(rng: np.random.Generator, slot: Slot, kind: str, count: int) -> bytes:
    """`count` random weights in ggml's blocks; scales are such that their deviation is about 0.02.

    Their mean is 0: a common offset adds up over columns, makes all hidden states alike and sends every token to the
    same experts.
    """
    if kind == "F32":
        if len(slot.shape) < 2:
            return np.ones(count, np.float32).tobytes()
        return (rng.standard_normal(count, np.float32) * _DEVIATION).tobytes()
    if kind == "BF16":
        values = rng.standard_normal(count, np.float32) * _DEVIATION
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    columns, size = {"Q4_0": (32, 18), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q6_K": (256, 210)}[kind]
    blocks = rng.integers(0, 256, (count // columns, size), np.uint8)
    half = lambda value: np.array([value], np.float16).view(np.uint8)  # noqa: E731
    if kind == "Q4_0":
        blocks = _WITHOUT_LEAST[blocks]
        blocks[:, :2] = half(_DEVIATION / 4.6)
    elif kind == "Q8_0":
        blocks[:, 2:][blocks[:, 2:] == 0x80] = 0  # -128
        blocks[:, :2] = half(_DEVIATION / 74)
    elif kind == "Q4_K":
        blocks[:, :2], blocks[:, 2:4] = half(_DEVIATION / 4.6 / 32), half(7.5 * _DEVIATION / 4.6 / 32)
        blocks[:, 4:12], blocks[:, 12:16] = 0xA0, 0
    else:
        blocks[:, 192:208:2], blocks[:, 193:208:2] = 64, 256 - 64  # codes are -32 to 31: signs take the mean away
        blocks[:, 208:] = half(_DEVIATION / 18.5 / 64)
    return blocks.tobytes()


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def _add_vocabulary(writer: GGUFWriter, size: int) -> None:
    """Byte-level BPE with one merge: 256 bytes, then what it makes, then words of their own."""
    letters = [chr(256 + index) for index in range(256)]
    tokens = [*letters, letters[0] + letters[1], *(f"w{index}" for index in range(size - 257))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * size)
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


if __name__ == "__main__":
    main()
