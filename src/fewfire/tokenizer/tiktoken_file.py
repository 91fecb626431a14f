"""tiktoken's rank files (a base64 token and its rank a line) and GPT-2's vocab.json + merges.txt."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewfire.errors import FormatError
from fewfire.tokenizer.definition import added_token, byte_level_definition, merges_by_rank
from fewfire.tokenizer.files import read_bytes
from fewfire.tokenizer.patterns import SPLITS
from fewfire.tokenizer.pieces import byte_alphabet

# A rank file does not say how to cut words; the number of its ranks tells whose it is.
_SPLITS_BY_RANKS = {
    50256: "gpt2",
    50257: "gpt2",
    100256: "llama3",
    128000: "llama3",
    151643: "qwen2",
    163584: "kimi",
    199998: "o200k",
    200000: "o200k",
}
# Control tokens of files that come without a tokenizer_config.json, from the first id after the ranks.
_LLAMA3_CONTROLS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
_CONTROLS_BY_RANKS: dict[int, dict[int, str]] = {
    50256: {0: "<|endoftext|>"},
    100256: {1: "<|endoftext|>", 2: "<|fim_prefix|>", 3: "<|fim_middle|>", 4: "<|fim_suffix|>", 20: "<|endofprompt|>"},
    128000: {i: _LLAMA3_CONTROLS.get(i, f"<|reserved_special_token_{i}|>") for i in range(256)},
    151643: {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>"},
    199998: {1: "<|endoftext|>", 20: "<|endofprompt|>"},
}
_ENDS = ("<|end_of_text|>", "<|endoftext|>", "[EOS]")


def is_tiktoken(content: bytes) -> bool:
    """Whether a file starts like a rank file: printable base64, a space, a number."""
    first = content[:200].split(b"\n", 1)[0].split()
    if len(first) != 2 or not first[1].isdigit():
        return False
    try:
        return len(base64.b64decode(first[0], validate=True)) > 0
    except binascii.Error:
        return False


def read_tiktoken(
    content: bytes, path: str, added: Mapping[int, dict[str, Any]] | None = None, *, splits: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(definition, config) of a rank file. `added` are the tokens beside the ranks, from a tokenizer_config.json.

    `splits` names a chain of `patterns.SPLITS`; None tells it from the number of ranks.
    Raises: FormatError for a malformed line, a rank or token given twice, bytes without a token, unknown splits.
    """
    ranks = _read_ranks(content, path)
    splits = splits or _SPLITS_BY_RANKS.get(len(ranks))
    if splits not in SPLITS:
        known = ", ".join(map(str, _SPLITS_BY_RANKS))
        raise FormatError(f"has {len(ranks)} ranks, which fits no known vocabulary ({known})", path=path)
    own = _CONTROLS_BY_RANKS.get(len(ranks), {})
    tokens = {len(ranks) + i: added_token(len(ranks) + i, content, special=True) for i, content in own.items()}
    if added:
        tokens = dict(added)
    definition = byte_level_definition(
        {token: int(rank) for token, rank in ranks.items()},
        merges_by_rank(ranks),
        SPLITS[splits],
        [token for _, token in sorted(tokens.items())],
        whole_words=True,
    )
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    names = {token["content"] for token in tokens.values()}
    ends = [end for end in _ENDS if end in names]
    if ends:
        config["eos_token"] = ends[0]
    if "<|begin_of_text|>" in names:
        config |= {"bos_token": "<|begin_of_text|>", "add_bos_token": True}
    return definition, config


def _read_ranks(content: bytes, path: str) -> dict[str, float]:
    spelled = {byte: character for character, byte in byte_alphabet().items()}
    ranks: dict[str, float] = {}
    offset = 0
    for line in content.split(b"\n"):
        parts = line.split()
        if parts:
            try:
                token, rank = base64.b64decode(parts[0], validate=True), int(parts[1])
            except (binascii.Error, IndexError, ValueError) as error:
                message = "is no line of a base64 token and its rank; download the file again"
                raise FormatError(message, path=path, offset=offset) from error
            name = "".join(spelled[byte] for byte in token)
            if not name or name in ranks:
                raise FormatError("repeats a token, or has an empty one", path=path, offset=offset)
            ranks[name] = rank
        offset += len(line) + 1
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise FormatError("has ranks with gaps or repetitions; download the file again", path=path)
    missing = [byte for byte, character in spelled.items() if character not in ranks]
    if missing:
        raise FormatError(f"has no token for byte {missing[0]}; download the file again", path=path)
    return ranks


def read_vocabulary_and_merges(
    vocabulary_file: Path, merges_file: Path, added: Mapping[int, dict[str, Any]] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(definition, config) of GPT-2's pair of files. Raises FormatError where either is malformed."""
    try:
        vocabulary = json.loads(read_bytes(vocabulary_file))
        lines = read_bytes(merges_file).decode("utf-8").split("\n")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError("is neither JSON nor text in UTF-8; download it again", path=str(vocabulary_file)) from error
    if not isinstance(vocabulary, dict) or not all(isinstance(token_id, int) for token_id in vocabulary.values()):
        raise FormatError("does not map tokens to ids; download it again", path=str(vocabulary_file))
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if any(len(merge) != 2 for merge in merges):
        raise FormatError("has a line that is not two tokens; download it again", path=str(merges_file))
    end = vocabulary.get("<|endoftext|>")
    tokens = {end: added_token(end, "<|endoftext|>", special=True)} if end is not None else {}
    tokens |= added or {}
    definition = byte_level_definition(
        vocabulary, [(left, right) for left, right in merges], SPLITS["gpt2"], list(tokens.values())
    )
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if end is not None:
        config |= {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return definition, config
