"""Token ids to text one at a time, as a terminal or a server shows it. Knows pieces only."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

from fewfire.tokenizer.pieces import strip_leading

if TYPE_CHECKING:
    from fewfire.tokenizer.tokenizer import Tokenizer


class StreamDecoder:
    """Decode ids as they come; a UTF-8 character is given out only when its last byte is there.

    The concatenation of all `push` results and `flush` equals `tokenizer.decode` of the same ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._spaces_to_strip = tokenizer.decoding.strip_start
        self._ids: list[int] = []
        self._given = ""

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; '' while a character is still incomplete."""
        if self._tokenizer.decoding.kind == "opaque":
            return self._push_opaque(token_id)
        if self._skip_special and token_id in self._tokenizer.special_ids:
            return ""
        return self._stripped(self._utf8.decode(self._tokenizer.id_to_bytes(token_id)))

    def flush(self) -> str:
        """What is left at the end: an incomplete character becomes U+FFFD. The decoder can then start anew."""
        if self._tokenizer.decoding.kind == "opaque":
            rest = self._tokenizer.decode(self._ids, skip_special=self._skip_special)[len(self._given) :]
        else:
            rest = self._stripped(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        self._spaces_to_strip = self._tokenizer.decoding.strip_start
        self._ids, self._given = [], ""
        return rest

    def _stripped(self, text: str) -> str:
        if not self._spaces_to_strip or not text:
            return text
        stripped = strip_leading(text, self._spaces_to_strip)
        removed = len(text) - len(stripped)
        self._spaces_to_strip = 0 if stripped else self._spaces_to_strip - removed
        return stripped

    def _push_opaque(self, token_id: int) -> str:
        """Whole decodes, compared: text is given out once the next id no longer changes it."""
        before = self._tokenizer.decode(self._ids, skip_special=self._skip_special)
        self._ids.append(token_id)
        after = self._tokenizer.decode(self._ids, skip_special=self._skip_special)
        stable = before if after.startswith(before) and not before.endswith("\ufffd") else self._given
        new = stable[len(self._given) :]
        self._given = stable if len(stable) > len(self._given) else self._given
        return new
