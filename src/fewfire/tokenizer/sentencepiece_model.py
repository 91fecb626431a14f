"""SentencePiece's `tokenizer.model`: a protocol buffer, read here field by field, for lack of need of more.

Source: sentencepiece_model.proto of the SentencePiece project (field numbers).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

from fewfire.errors import FormatError
from fewfire.tokenizer.definition import NORMAL, Piece, check_charsmap, pieces_definition

_UNIGRAM, _BPE = 1, 2
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _UNKNOWN_ID, _BOS_ID, _EOS_ID = 3, 40, 41, 42
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE = 2, 3, 4, 5


def read_sentencepiece(
    content: bytes, path: str, added: Mapping[int, dict[str, Any]] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(definition, config) of a SentencePiece model: the contents of a tokenizer.json and a tokenizer_config.json.

    `added` are tokens that other files put beside the model's own. A BPE model begins texts with its bos token (as
    Llama does), a unigram model without one ends them with its eos token (as T5 does); a tokenizer_config.json
    beside the file overrides that.
    Raises: FormatError where the bytes are no such model, or one of words or characters.
    """
    try:
        pieces, trainer, normalizer = _read_model(content)
    except (IndexError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise FormatError(f"is no SentencePiece model ({error}); download it again", path=path) from error
    kind = trainer.get(_MODEL_TYPE, _UNIGRAM)
    if not pieces:
        raise FormatError("is no SentencePiece model (it has no pieces); download it again", path=path)
    if kind not in (_UNIGRAM, _BPE):
        raise FormatError(f"is a SentencePiece model of type {kind}; fewfire reads unigram (1) and BPE (2)", path=path)
    check_charsmap(normalizer.get(_CHARSMAP, b""), path, "normalizer_spec")
    if normalizer.get(_ESCAPE, 1) == 0:
        raise FormatError("keeps spaces unescaped, which fewfire does not read", path=path, record="normalizer_spec")
    definition = pieces_definition(
        pieces,
        unigram=kind == _UNIGRAM,
        unknown_id=_signed(trainer.get(_UNKNOWN_ID, 0)),
        space_prefix=bool(normalizer.get(_DUMMY_PREFIX, 1)),
        collapse_spaces=bool(normalizer.get(_REMOVE_SPACES, 1)),
        charsmap=normalizer.get(_CHARSMAP, b""),
        added=added,
    )
    bos, eos = _signed(trainer.get(_BOS_ID, 1)), _signed(trainer.get(_EOS_ID, 2))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for key, token_id in (("bos_token", bos), ("eos_token", eos), ("unk_token", _signed(trainer.get(_UNKNOWN_ID, 0)))):
        if 0 <= token_id < len(pieces):
            config[key] = pieces[token_id].text
    config["add_bos_token"] = kind == _BPE and bos >= 0
    config["add_eos_token"] = kind == _UNIGRAM and bos < 0 <= eos
    return definition, config


def _read_model(content: bytes) -> tuple[list[Piece], dict[int, Any], dict[int, Any]]:
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in _fields(content):
        if not isinstance(value, bytes):
            continue
        if field == _PIECES:
            entry = dict(_fields(value))
            score = struct.unpack("<f", entry[2])[0] if 2 in entry else 0.0
            pieces.append(Piece(entry[1].decode("utf-8") if 1 in entry else "", score, entry.get(3, NORMAL)))
        elif field == _TRAINER:
            trainer = dict(_fields(value))
        elif field == _NORMALIZER:
            normalizer = dict(_fields(value))
    return pieces, trainer, normalizer


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message: int for varints, bytes for all else."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(content, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(content, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + length > len(content):
            raise ValueError(f"cut off at byte {at}")
        yield number, content[at : at + length]
        at += length


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"number too long at byte {at}")


def _signed(value: int) -> int:
    """A 32-bit number that the format stores as 64 unsigned bits; -1 stands for 'none'."""
    return value - (1 << 64) if value >= 1 << 63 else value
