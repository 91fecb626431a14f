"""`Tokenizer`: one class for every vocabulary. Text that users write never becomes a control token by accident."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewfire.errors import ConfigError, FormatError
from fewfire.tokenizer.files import json_bytes, write_file
from fewfire.tokenizer.gguf_metadata import read_gguf
from fewfire.tokenizer.load import read_tokenizer
from fewfire.tokenizer.pieces import Decoding, is_control, join_pieces, piece_table, read_decoding, without_surrogates

if TYPE_CHECKING:
    from fewfire.tokenizer.chat import ChatTemplate

# Names that end a text, for a bare tokenizer.json that does not say which of its tokens does.
_USUAL_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]")
# Ends of a turn, where nothing follows in any published template ("<|end|>" is none: gpt-oss goes on after it).
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|return|>", "<|call|>", "<end_of_turn>")
# Markers of reasoning and tool calls inside an assistant's turn, if not flagged special: none that ends the turn.
_MARKER = re.compile(r"</?[\w:-]+>")


class Tokenizer:
    """Text to token ids and back.

    `encode` reads special tokens inside the text as plain text unless `allow_special`; `decode` of what `encode`
    gave returns the text exactly where the vocabulary is byte-level. Ids without a token decode to ''.
    Threads: all methods may be called from several.
    """

    def __init__(self, definition: dict[str, Any], config: dict[str, Any], *, source: str | None = None):
        """`definition` is the content of a tokenizer.json, `config` that of a tokenizer_config.json (may be empty)."""
        from tokenizers import Tokenizer as Backend

        self.config = config
        self._added = {
            int(token["id"]): token for token in definition.get("added_tokens") or () if isinstance(token, dict)
        }
        # The library skips, on request, the tokens marked special. Marking every control token makes that complete;
        # the file's own marks stay in self._added and are restored by `definition`.
        marked = dict(definition)
        marked["added_tokens"] = [token | {"special": is_control(token)} for token in self._added.values()]
        marked["truncation"] = marked["padding"] = None
        self._source = source
        with self._guarded():
            self._backend = Backend.from_str(json.dumps(marked))
        self._lock = threading.Lock()
        self._compiled: dict[str, ChatTemplate] = {}
        self.decoding: Decoding = read_decoding(definition.get("decoder"))
        model = definition.get("model") or {}
        unknown = model.get("unk_id") if model.get("type") == "Unigram" else model.get("unk_token")
        self._unknown_id = self._backend.token_to_id(unknown) if isinstance(unknown, str) else unknown

    # ------------------------------------------------------------------------------------------ files

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a file, or a folder that holds one: tokenizer.json, a SentencePiece or tiktoken model, vocab.json with
        merges.txt; with the tokenizer_config.json and chat template beside it.

        Raises: ConfigError where there is none, FormatError where it cannot be understood.
        """
        definition, config, file = read_tokenizer(Path(path))
        return cls._checked(definition, config, str(file))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, source: str | None = None) -> Tokenizer:
        """From the metadata of a GGUF file, as plain Python values under the file's keys; `source` names it in errors.

        Raises: FormatError where keys are missing or the kind of tokenizer is not known.
        """
        definition, config = read_gguf(metadata, source)
        return cls._checked(definition, config, source)

    @classmethod
    def from_json(cls, text: str, config: dict[str, Any] | None = None) -> Tokenizer:
        """From the text of a tokenizer.json. Raises FormatError where it cannot be understood."""
        try:
            definition = json.loads(text)
        except json.JSONDecodeError as error:
            raise FormatError(f"the tokenizer is not JSON ({error.msg})", offset=error.pos) from error
        return cls._checked(definition, config or {}, None)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turns what the library raises, a bare Exception or a panic (no Exception at all), into FormatError."""
        try:
            yield
        except BaseException as error:
            if type(error) is Exception or type(error).__name__ == "PanicException":
                message = f"is no sound tokenizer definition ({_one_line(error)}); download it again"
                raise FormatError(message, path=self._source) from error
            raise

    @classmethod
    def _checked(cls, definition: Any, config: dict[str, Any], source: str | None) -> Tokenizer:
        try:
            return cls(definition, config, source=source)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"is no tokenizer definition ({_one_line(error)})", path=source) from error

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json in hub form, each atomically.

        Raises: ConfigError where the folder cannot be written, BudgetError where the disk is full.
        """
        for name, content in self.files().items():
            write_file(Path(folder) / name, content)

    def files(self) -> dict[str, bytes]:
        """What `save` writes, by name."""
        return {"tokenizer.json": json_bytes(self.definition), "tokenizer_config.json": json_bytes(self.config)}

    @property
    def definition(self) -> dict[str, Any]:
        """The content of tokenizer.json, with the marks that it came with."""
        definition = json.loads(self._backend.to_str())
        definition["added_tokens"] = list(self._added.values())
        return definition

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what decides encoding: two tokenizers with the same one give the same ids."""
        return hashlib.sha256(json.dumps(self.definition, sort_keys=True).encode("utf-8")).hexdigest()

    def prepare(self) -> None:
        """Make now what is otherwise made when it is first needed (tens of MB for a large vocabulary): afterwards the
        memory of the tokenizer no longer grows."""
        self._pieces, self.vocab_size, self.end_token_ids  # noqa: B018
        self.encode("a", add_special=True)

    # ------------------------------------------------------------------------------------- vocabulary

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        vocabulary = self._backend.get_vocab(with_added_tokens=True)  # large, and not kept
        return max([*vocabulary.values(), *self._added], default=-1) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that the file marks special: `decode(skip_special=True)` leaves them out."""
        return frozenset(token_id for token_id, token in self._added.items() if token.get("special"))

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids that text never becomes unless `allow_special`: the special ones and every bracketed marker."""
        return frozenset(token_id for token_id, token in self._added.items() if is_control(token))

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text; None where neither the files nor a usual name tell."""
        named = self._named_id("eos_token")
        if named is not None or "eos_token" in self.config:
            return named
        return next((found for found in map(self.token_to_id, _USUAL_ENDS) if found is not None), None)

    @cached_property
    def end_token_ids(self) -> frozenset[int]:
        """Every id after which a model has said what it had to say: the end of text, of a turn, of a message."""
        usual = map(self.token_to_id, (*_USUAL_ENDS, *_TURN_ENDS))
        found = {self.eos_token_id, *self.config.get("end_token_ids", ()), *(i for i in usual if i in self.control_ids)}
        return frozenset(token_id for token_id in found if token_id is not None)

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, where the files name one."""
        return self._named_id("bos_token")

    def _named_id(self, key: str) -> int | None:
        value = self.config.get(key)
        name = value.get("content") if isinstance(value, dict) else value
        return self.token_to_id(name) if isinstance(name, str) else None

    def token_to_id(self, token: str) -> int | None:
        """Id of a token as the vocabulary spells it; None where it has none."""
        try:
            return self._backend.token_to_id(token)
        except UnicodeEncodeError:  # a lone surrogate: no vocabulary spells one
            return None

    # -------------------------------------------------------------------------------- encode, decode

    def encode(self, text: str, *, allow_special: bool = False, add_special: bool = False) -> list[int]:
        """Token ids of a text.

        `allow_special`: special tokens written in the text become control tokens (for trusted text only).
        `add_special`: put around it what the tokenizer's own rules say (a beginning-of-text token, mostly).
        Lone surrogates become U+FFFD.
        """
        return self.encode_batch([text], allow_special=allow_special, add_special=add_special)[0]

    def encode_batch(
        self, texts: Sequence[str], *, allow_special: bool = False, add_special: bool = False
    ) -> list[list[int]]:
        """`encode` of many texts at once, on all cores."""
        valid = [without_surrogates(text) for text in texts]
        with self._lock, self._guarded():
            self._backend.encode_special_tokens = not allow_special
            batch = [encoding.ids for encoding in self._backend.encode_batch_fast(valid, add_special_tokens=False)]
        if not allow_special:
            batch = [ids if self._forbidden.isdisjoint(ids) else self._spelled_out(ids) for ids in batch]
        before, after = self._frame if add_special else ([], [])
        return [before + ids + after for ids in batch]

    @cached_property
    def _forbidden(self) -> frozenset[int]:
        """Control ids that a model may still make of plain text (Unigram holds '</s>' as a piece like any other)."""
        return self.control_ids - {self._unknown_id}

    def _spelled_out(self, ids: list[int]) -> list[int]:
        """`ids` with every control token replaced by the tokens of its characters, one by one."""
        spelled: list[int] = []
        for token_id in ids:
            if token_id in self._forbidden:
                characters = self._added[token_id]["content"]
                ids_of = [token.id for character in characters for token in self._backend.model.tokenize(character)]
                # Unigram, which alone comes here, makes one unknown token of neighbouring unknown characters.
                spelled += [i for at, i in enumerate(ids_of) if i != self._unknown_id or ids_of[at - 1 : at] != [i]]
            else:
                spelled.append(token_id)
        return spelled

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer's own rules put before and after a text."""
        with self._lock, self._guarded():
            inner = self._backend.encode("a", add_special_tokens=False).ids
            framed = self._backend.encode("a", add_special_tokens=True).ids
        start = next((i for i in range(len(framed)) if framed[i : i + len(inner)] == inner), 0)
        before, after = framed[:start], framed[start + len(inner) :]
        bos, eos = self.bos_token_id, self.eos_token_id
        if bos is not None and self.config.get("add_bos_token") is True and bos not in before:
            before = [bos, *before]
        if eos is not None and self.config.get("add_eos_token") is True and eos not in after:
            after = [*after, eos]
        return before, after

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation by the chat template: its control tokens are control tokens, those written in
        messages are plain text. Arguments and errors as `render_chat`.
        """
        from fewfire.tokenizer.chat import encode_rendered  # jinja2 is loaded when a template is

        template = self._template(options.pop("template", None), options.get("tools"))
        rendered = template.render(messages, special_tokens=self._special_tokens, **options)
        return encode_rendered(rendered, template.marking, self._spans, self._control_texts, self.encode_batch)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Text of a conversation by the chat template.

        `messages` as in the chat completions API. Options: `tools`, `add_generation_prompt` (True), `variables` (what
        else the template reads), `template` (the source of another one), `now`.
        Raises: ConfigError where there is no template, or it refuses the messages; FormatError where it fails.
        """
        template = self._template(options.pop("template", None), options.get("tools"))
        return template.render(messages, special_tokens=self._special_tokens, **options).text

    @property
    def chat_template(self) -> str | None:
        """Source of the default chat template; None where the tokenizer comes without."""
        return self._templates.get("default")

    @cached_property
    def _templates(self) -> dict[str, str]:
        value = self.config.get("chat_template")
        if isinstance(value, list):
            value = {part.get("name"): part.get("template") for part in value if isinstance(part, dict)}
        if not isinstance(value, dict):
            value = {"default": value}
        return {name: source for name, source in value.items() if isinstance(source, str)}

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token and their like, as templates read them."""
        found = {}
        for key, value in self.config.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                found[key] = text
        return found

    @cached_property
    def _control_texts(self) -> dict[int, str]:
        return {token_id: self._added[token_id]["content"] for token_id in self.control_ids}

    def _template(self, source: str | None, tools: object) -> ChatTemplate:
        from fewfire.tokenizer.chat import ChatTemplate

        chosen = source or (self._templates.get("tool_use") if tools else None) or self.chat_template
        if chosen is None:
            raise ConfigError("the tokenizer has no chat template - give one as template, or prompt with plain text")
        if chosen not in self._compiled:
            markers = [
                text
                for token_id, text in self._control_texts.items()
                if token_id not in self.special_ids and _MARKER.fullmatch(text)
            ]
            self._compiled[chosen] = ChatTemplate(chosen, controls=self._control_texts.values(), assistants=markers)
        return self._compiled[chosen]

    def _spans(self, text: str) -> list[tuple[int, int, int]]:
        """(id, start, stop) of every token of a text in which control tokens count as such."""
        with self._lock, self._guarded():
            self._backend.encode_special_tokens = False
            encoding = self._backend.encode(text, add_special_tokens=False)
        return [(token_id, start, stop) for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of token ids. Bytes that are no UTF-8 become U+FFFD; `skip_special` leaves special tokens out."""
        kept = [int(i) for i in ids if not (skip_special and int(i) in self.special_ids)]
        if self.decoding.kind == "opaque":
            size = self.vocab_size
            return self._backend.decode([i for i in kept if 0 <= i < size], skip_special_tokens=False)
        return join_pieces((self.id_to_bytes(i) for i in kept), self.decoding.strip_start)

    def id_to_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for; b'' for an id without a token."""
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else b""

    @cached_property
    def _pieces(self) -> list[bytes]:
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        return piece_table(vocabulary, {i: token["content"] for i, token in self._added.items()}, self.decoding)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
