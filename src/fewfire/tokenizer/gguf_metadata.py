"""A tokenizer out of a GGUF file's metadata (`tokenizer.ggml.*`). Reads a mapping, not a file.

Source: the GGUF specification of the ggml project, section 'Tokenizer'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewfire.errors import FormatError
from fewfire.tokenizer.definition import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    added_token,
    byte_level_definition,
    check_charsmap,
    merges_by_rank,
    pieces_definition,
)
from fewfire.tokenizer.patterns import GGUF_BEGINS, GGUF_PRE, GGUF_WHOLE_WORDS, SPLITS

_PREFIX = "tokenizer.ggml."
_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_ENDS = ("eos", "eot", "eom")


def read_gguf(metadata: Mapping[str, Any], path: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(definition, config) of the tokenizer in GGUF metadata: plain Python values under the file's own keys.

    Raises: FormatError for a key that is missing or of the wrong kind, or a tokenizer that fewfire does not know.
    """
    model = _get(metadata, "model", str, path)
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(_strings(metadata, "tokens", path))]
    kinds = list(metadata.get(_PREFIX + "token_type") or [NORMAL] * len(tokens))
    if len(kinds) != len(tokens):
        message = f"has {len(kinds)} entries for {len(tokens)} tokens; download the file again"
        raise FormatError(message, path=path, record=_PREFIX + "token_type")
    if model == "gpt2":
        definition, begins, ends = _byte_level(metadata, tokens, kinds, path)
    elif model in ("llama", "t5"):
        definition = _pieces(metadata, tokens, kinds, model == "t5", path)
        begins, ends = model == "llama", model == "t5"
    else:
        message = f"is '{model}'; fewfire reads gpt2, llama and t5 tokenizers"
        raise FormatError(message, path=path, record=_PREFIX + "model")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in _NAMED.items():
        token_id = _token_id(metadata, name, len(tokens), path)
        if token_id is not None:
            config[key] = tokens[token_id]
    config["add_bos_token"] = bool(metadata.get(_PREFIX + "add_bos_token", begins))
    config["add_eos_token"] = bool(metadata.get(_PREFIX + "add_eos_token", ends))
    found = {_token_id(metadata, name, len(tokens), path) for name in _ENDS} - {None}
    config["end_token_ids"] = sorted(token_id for token_id in found if token_id is not None)
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return definition, config


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], kinds: list[int], path: str | None
) -> tuple[dict[str, Any], bool, bool]:
    pre = metadata.get(_PREFIX + "pre", "default")
    if pre not in GGUF_PRE:
        message = f"is '{pre}', which fewfire does not know; it knows {', '.join(sorted(GGUF_PRE))}"
        raise FormatError(message, path=path, record=_PREFIX + "pre")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise FormatError("names a token twice; download the file again", path=path, record=_PREFIX + "tokens")
    if pre == "kimi-k2" and _PREFIX + "merges" not in metadata:
        ranks = {token: float(i) for i, token in enumerate(tokens) if kinds[i] == NORMAL}
        merges = merges_by_rank(ranks)  # a tiktoken vocabulary: ids are ranks
    else:
        merges = []
        for line in _strings(metadata, "merges", path):
            left, space, right = line[:1] + line[1:].partition(" ")[0], *line[1:].partition(" ")[1:]
            if not space or left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
                message = f"joins tokens that are not there ({line!r}); download the file again"
                raise FormatError(message, path=path, record=_PREFIX + "merges")
            merges.append((left, right))
    added = [
        added_token(token_id, tokens[token_id], special=kind != USER_DEFINED)
        for token_id, kind in enumerate(kinds)
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    whole_words = pre in GGUF_WHOLE_WORDS or pre == "kimi-k2"
    definition = byte_level_definition(vocabulary, merges, SPLITS[GGUF_PRE[pre]], added, whole_words=whole_words)
    return definition, pre in GGUF_BEGINS, False


def _pieces(
    metadata: Mapping[str, Any], tokens: list[str], kinds: list[int], unigram: bool, path: str | None
) -> dict[str, Any]:
    scores = metadata.get(_PREFIX + "scores")
    if scores is None or len(scores) != len(tokens):
        raise FormatError("is missing or too short; download the file again", path=path, record=_PREFIX + "scores")
    pieces = [Piece(token, float(score), int(kind)) for token, score, kind in zip(tokens, scores, kinds, strict=True)]
    charsmap = bytes(byte & 0xFF for byte in metadata.get(_PREFIX + "precompiled_charsmap") or ())
    check_charsmap(charsmap, path, _PREFIX + "precompiled_charsmap")
    unknown = _token_id(metadata, "unknown", len(tokens), path)
    if unknown is None:
        unknown = next((i for i, kind in enumerate(kinds) if kind == UNKNOWN), 0)
    return pieces_definition(
        pieces,
        unigram=unigram,
        unknown_id=unknown,
        space_prefix=bool(metadata.get(_PREFIX + "add_space_prefix", True)),
        collapse_spaces=bool(metadata.get(_PREFIX + "remove_extra_whitespaces", unigram)),
        charsmap=charsmap,
    )


def _get(metadata: Mapping[str, Any], key: str, kind: type, path: str | None) -> Any:
    value = metadata.get(_PREFIX + key)
    if not isinstance(value, kind):
        problem = "is missing" if value is None else f"is no {kind.__name__}"
        raise FormatError(f"{problem}; use a file with its tokenizer inside", path=path, record=_PREFIX + key)
    return value


def _strings(metadata: Mapping[str, Any], key: str, path: str | None) -> list[str]:
    values = list(_get(metadata, key, list, path))
    if not all(isinstance(value, str) for value in values):
        raise FormatError("is no list of texts; download the file again", path=path, record=_PREFIX + key)
    return values


def _token_id(metadata: Mapping[str, Any], name: str, count: int, path: str | None) -> int | None:
    key = f"{_PREFIX}{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < count:
        raise FormatError(f"is {value}, no id below {count}; download the file again", path=path, record=key)
    return value
