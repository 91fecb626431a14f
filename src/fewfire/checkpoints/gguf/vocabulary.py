"""A tokenizer as GGUF metadata (`tokenizer.ggml.*`): the inverse of what `tokenizer` reads from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fewfire.errors import ConfigError
from fewfire.tokenizer import Tokenizer
from fewfire.tokenizer.definition import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from fewfire.tokenizer.patterns import GGUF_PRE, GGUF_WHOLE_WORDS, GPT2, SPLITS

_PREFIX = "tokenizer.ggml."
# The word patterns that llama.cpp knows are a closed list. This one cuts like most byte-level tokenizers of today.
_NEAREST = "smaug-bpe"
_PREFERRED = ("gpt-2", "llama-bpe", "qwen2", "gpt-4o", "tekken", "deepseek-v3", "dbrx", "smollm")


def vocabulary_metadata(tokenizer: Tokenizer | None, vocab_size: int) -> tuple[dict[str, Any], list[str]]:
    """(metadata, notes for the user) of a model with `vocab_size` rows of embeddings.

    Raises: ConfigError where the vocabulary is larger than the model, or of a kind that GGUF has not.
    """
    if tokenizer is None:
        return {_PREFIX + "model": "no_vocab"}, ["the model has no tokenizer; the file has none either"]
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
    definition, notes = tokenizer.definition, list[str]()
    model = definition["model"]
    tokens, kinds = _tokens(definition, vocab_size)
    found: dict[str, Any] = {_PREFIX + "tokens": tokens, _PREFIX + "token_type": kinds}
    if model["type"] == "BPE" and not model.get("byte_fallback"):
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        pre = _word_pattern(definition, bool(model.get("ignore_merges")))
        if pre is None:
            pre = _NEAREST
            notes.append(
                f"llama.cpp has no word pattern like this tokenizer's; with {_NEAREST}, the nearest, it may cut some "
                "texts otherwise: give it token ids where that matters"
            )
        found |= {_PREFIX + "model": "gpt2", _PREFIX + "pre": pre, _PREFIX + "merges": merges}
    elif model["type"] in ("BPE", "Unigram"):
        unigram = model["type"] == "Unigram"
        found |= {_PREFIX + "model": "t5" if unigram else "llama", _PREFIX + "scores": _scores(model, tokens, unigram)}
        found[_PREFIX + "add_space_prefix"] = "Prepend" in str(definition.get("normalizer"))
    else:
        raise ConfigError(f"GGUF has no tokenizer of kind {model['type']}; export to hf, or without the tokenizer")
    return found | _ends(tokenizer), notes


def _tokens(definition: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Texts and kinds by id; ids without a token are marked unused."""
    model = definition["model"]
    vocab = model["vocab"]
    by_text = vocab if isinstance(vocab, dict) else {text: token_id for token_id, (text, _) in enumerate(vocab)}
    tokens, kinds = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    for text, token_id in by_text.items():
        tokens[token_id] = text
        byte = model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", text)
        kinds[token_id] = BYTE if byte else NORMAL
    for token in definition["added_tokens"]:
        tokens[token["id"]] = token["content"]
        unknown = token["content"] == model.get("unk_token")
        kinds[token["id"]] = UNKNOWN if unknown else CONTROL if token["special"] else USER_DEFINED
    return tokens, kinds


def _scores(model: Mapping[str, Any], tokens: list[str], unigram: bool) -> list[float]:
    """SentencePiece's scores; a BPE's are how late its merge comes."""
    if unigram:
        scores = [float(score) for _, score in model["vocab"]]
        return scores + [0.0] * (len(tokens) - len(scores))
    order: dict[str, int] = {}
    for position, merge in enumerate(model["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        order.setdefault("".join(pair), position)
    return [float(-order[text] - 1) if text in order else 0.0 for text in tokens]


def _word_pattern(definition: Mapping[str, Any], whole_words: bool) -> str | None:
    """llama.cpp's name of how words are cut; None where it has none."""
    outer = definition.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    splits = tuple(step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split")
    if not splits and any(step.get("type") == "ByteLevel" and step.get("use_regex", True) for step in steps):
        splits = (GPT2,)
    names = [name for name, chain in GGUF_PRE.items() if SPLITS[chain] == splits]
    names = [name for name in names if (name in GGUF_WHOLE_WORDS) == whole_words]
    return next((name for name in _PREFERRED if name in names), names[0] if names else None)


def _ends(tokenizer: Tokenizer) -> dict[str, Any]:
    found: dict[str, Any] = {}
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for key, name in names.items():
        value = tokenizer.config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        token_id = tokenizer.token_to_id(text) if isinstance(text, str) else None
        if token_id is not None:
            found[f"{_PREFIX}{name}_token_id"] = token_id
    if tokenizer.eos_token_id is not None:
        found[_PREFIX + "eos_token_id"] = tokenizer.eos_token_id
    other = [each for each in sorted(tokenizer.end_token_ids) if each != tokenizer.eos_token_id]
    if other:
        found[_PREFIX + "eot_token_id"] = other[0]
    begins = tokenizer.encode("", add_special=True)
    found[_PREFIX + "add_bos_token"] = bool(begins) and begins[0] == tokenizer.bos_token_id
    if tokenizer.chat_template is not None:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found
