"""Build the content of a tokenizer.json from what other formats hold: pieces with scores, or bytes with ranks."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fewfire.errors import FormatError

SPACE = "\u2581"  # SentencePiece's mark for a space
# Kinds of a piece, numbered alike in SentencePiece models and GGUF metadata.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Piece(NamedTuple):
    """One entry of a SentencePiece vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


def merges_by_rank(ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """All ways to join two tokens into a third, the lowest-ranked result first.

    SentencePiece and tiktoken merge by the rank of what results, tokenizer.json by an ordered list of pairs: with
    every pair listed, in the order of their results, both do the same.
    """
    found = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                found.append((rank, ranks[left], ranks[right], left, right))
    found.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in found]


def added_token(token_id: int, content: str, *, special: bool) -> dict[str, Any]:
    """An entry of `added_tokens`: matched as it is written, before anything else."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, **plain, "special": special}


def byte_level_definition(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    splits: Sequence[str],
    added: Iterable[dict[str, Any]],
    *,
    whole_words: bool = False,
) -> dict[str, Any]:
    """A byte-level BPE. Tokens are spelled in the byte alphabet, `splits` is a chain of `patterns.SPLITS`.

    `whole_words`: a word that is a token is taken as it is, whatever the merges say (tiktoken's rule).
    """
    cutters: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} for pattern in splits
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": list(added),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cutters, level]},
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": whole_words,
            "vocab": dict(vocabulary),
            "merges": [list(merge) for merge in merges],
        },
    }


def pieces_definition(
    pieces: Sequence[Piece],
    *,
    unigram: bool,
    unknown_id: int,
    space_prefix: bool = True,
    collapse_spaces: bool = False,
    charsmap: bytes = b"",
    added: Mapping[int, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """A SentencePiece model: `unigram` (most likely cut) or BPE (best-scored merges first).

    `added` overrides or extends the pieces by id. `charsmap` is SentencePiece's compiled normalisation.
    Raises: FormatError where two pieces have one text, or the unknown piece is not there.
    """
    vocabulary = {piece.text: token_id for token_id, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        twice = next(piece.text for token_id, piece in enumerate(pieces) if vocabulary[piece.text] != token_id)
        raise FormatError("stands in the vocabulary twice; download the tokenizer again", record=repr(twice))
    if not 0 <= unknown_id < len(pieces):
        raise FormatError(f"the unknown piece is number {unknown_id} of {len(pieces)}; download the tokenizer again")
    own = {
        token_id: added_token(token_id, piece.text, special=piece.kind != USER_DEFINED)
        for token_id, piece in enumerate(pieces)
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
    }
    byte_fallback = any(piece.kind == BYTE for piece in pieces)
    model: dict[str, Any]
    if unigram:
        scores = [[piece.text, piece.score] for piece in pieces]
        model = {"type": "Unigram", "unk_id": unknown_id, "vocab": scores, "byte_fallback": byte_fallback}
    else:
        ranks = {piece.text: -piece.score for piece in pieces if piece.kind in (NORMAL, USER_DEFINED)}
        model = {
            "type": "BPE",
            "unk_token": pieces[unknown_id].text,
            "fuse_unk": True,
            "byte_fallback": byte_fallback,
            "vocab": vocabulary,
            "merges": [list(merge) for merge in merges_by_rank(ranks)],
        }
    spaces_inside = any(SPACE in piece.text[1:] for piece in pieces if piece.kind == NORMAL)
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space_prefix else []
    return {
        "version": "1.0",
        "added_tokens": [token for _, token in sorted({**own, **(added or {})}.items())],
        "normalizer": _normalizer(space_prefix, collapse_spaces, charsmap),
        # Where no piece reaches over a space, words are independent: cutting there changes nothing and is quicker.
        "pre_tokenizer": None
        if spaces_inside
        else {"type": "Split", "pattern": {"String": SPACE}, "behavior": "MergedWithNext", "invert": False},
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": model,
    }


def check_charsmap(charsmap: bytes, path: str | None, record: str) -> None:
    """Raise FormatError unless a compiled normalisation has its two parts, a table of stated size and text."""
    if not charsmap:
        return
    size = int.from_bytes(charsmap[:4], "little")
    try:
        whole = 4 <= len(charsmap) and size <= len(charsmap) - 4 and charsmap[4 + size :].decode("utf-8") is not None
    except UnicodeDecodeError:
        whole = False
    if not whole:
        raise FormatError("holds a damaged normalisation; download it again", path=path, record=record)


def _normalizer(space_prefix: bool, collapse_spaces: bool, charsmap: bytes) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    if collapse_spaces:
        for pattern, content in ((r"\A +| +\z", ""), (" {2,}", " ")):  # spaces only: line ends stay
            steps.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": content})
    if space_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}
