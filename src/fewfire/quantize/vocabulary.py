"""A tokenizer for models that have none: every id decodes to a text of its own, and ASCII text can be encoded."""

from __future__ import annotations

import json
from itertools import count, product
from string import ascii_lowercase
from typing import Any

from fewfire.tokenizer.pieces import byte_alphabet


def plain_tokenizer(vocab_size: int) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json with exactly `vocab_size` ids: printable ASCII, the other 33 characters
    of ASCII, then words of letters after a blank. What is not ASCII is left out of prompts."""
    spelled = {byte: character for character, byte in byte_alphabet().items()}
    order = [*range(0x20, 0x7F), 0x0A, 0x09, 0x0D]
    order += [byte for byte in range(128) if byte not in set(order)]
    pieces = [spelled[byte] for byte in order][:vocab_size]
    words = (spelled[0x20] + "".join(letters) for size in count(2) for letters in product(ascii_lowercase, repeat=size))
    pieces += [next(words) for _ in range(vocab_size - len(pieces))]
    definition: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {piece: token_id for token_id, piece in enumerate(pieces)},
            "merges": [],
        },
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return {
        "tokenizer.json": json.dumps(definition, ensure_ascii=False).encode("utf-8"),
        "tokenizer_config.json": json.dumps(config, indent=2).encode("utf-8"),
    }
