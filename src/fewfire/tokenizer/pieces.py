"""What each token id stands for, in bytes. Knows the decoders that tokenizer.json can name; knows no text.

Two kinds of vocabulary cover every published model that fewfire runs: byte-level BPE (a token's characters are
bytes in disguise) and SentencePiece with byte fallback (a low line block stands for a space, `<0xAB>` for a byte).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Decoding(NamedTuple):
    """How ids become bytes: the kind of vocabulary, texts replaced in it, spaces stripped from the very start."""

    kind: str  # byte_level | pieces | opaque
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_start: int = 0


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, the rest is moved above U+0100.

    Source: GPT-2 (Radford et al., 2019), section 2.2.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(moved)}


def read_decoding(decoder: dict[str, Any] | None) -> Decoding:
    """The decoder of a tokenizer.json. A chain that is not known by heart is `opaque`: left to the library."""
    if decoder is None:
        return Decoding("opaque")
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return Decoding("byte_level")
    replacements: list[tuple[str, str]] = []
    byte_fallback, strip_start = False, 0
    for step in steps:
        kind = step.get("type")
        if kind == "Replace" and "String" in step.get("pattern", {}):
            replacements.append((step["pattern"]["String"], step.get("content", "")))
        elif kind == "ByteFallback":
            byte_fallback = True
        elif kind == "Metaspace":
            replacements.append((step.get("replacement", "\u2581"), " "))
            strip_start = 0 if step.get("prepend_scheme", "always") == "never" else 1
        elif kind == "Strip" and step.get("content") == " " and not step.get("stop"):
            strip_start = int(step.get("start", 0))
        elif kind != "Fuse":
            return Decoding("opaque")
    return Decoding("pieces", tuple(replacements), byte_fallback, strip_start)


def piece_table(vocabulary: dict[str, int], added: dict[int, str], decoding: Decoding) -> list[bytes]:
    """The bytes of every id. Added tokens stand for their own text; an id without a token stands for nothing."""
    table = [b""] * (max([*vocabulary.values(), *added], default=-1) + 1)
    if decoding.kind == "byte_level":
        alphabet = byte_alphabet()
        for token, token_id in vocabulary.items():
            try:
                table[token_id] = bytes([alphabet[character] for character in token])
            except KeyError:
                table[token_id] = token.encode("utf-8")
    else:
        for token, token_id in vocabulary.items():
            table[token_id] = _piece_bytes(token, decoding)
    for token_id, text in added.items():
        table[token_id] = text.encode("utf-8")
    return table


def _piece_bytes(token: str, decoding: Decoding) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token) if decoding.byte_fallback else None
    if match is not None:
        return bytes([int(match.group(1), 16)])
    for old, new in decoding.replacements:
        token = token.replace(old, new)
    return token.encode("utf-8")


def is_control(token: dict[str, Any]) -> bool:
    """Whether an added token may steer the model, so that user text must never become it.

    The `special` flag does not tell: published tokenizers leave it off markers such as DeepSeek's `<|User|>` or
    `<think>`. Whatever is bracketed like a marker counts; added runs of spaces and plain words do not.
    """
    text = token.get("content", "").strip()
    bracketed = len(text) > 2 and (text[0], text[-1]) in {("<", ">"), ("[", "]"), ("\uff5c", "\uff5c"), ("|", "|")}
    return bool(token.get("special")) or bracketed


def without_surrogates(text: str) -> str:
    """`text` with lone surrogates (which no UTF-8 can hold) replaced by U+FFFD, and split pairs joined."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def strip_leading(text: str, num_spaces: int) -> str:
    """`text` without up to `num_spaces` leading spaces (SentencePiece writes one that the text never had)."""
    leading = len(text) - len(text.lstrip(" "))
    return text[min(num_spaces, leading) :]


def join_pieces(pieces: Iterable[bytes], strip_start: int) -> str:
    """Text of a run of pieces; bytes that are no UTF-8 become U+FFFD."""
    return strip_leading(b"".join(pieces).decode("utf-8", "replace"), strip_start)
