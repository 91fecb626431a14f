"""Chat templates: messages to the text a model was trained on, with what users wrote kept apart from the markup.

While a template runs, the characters in user text with which control tokens begin or end are replaced by private-use
characters; no control token can then arise from user text, whatever the template does with it. Afterwards they are
put back, and where they stood is known.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError

from fewfire.errors import ConfigError, FormatError
from fewfire.tokenizer.pieces import without_surrogates
from fewfire.tokenizer.sandbox import Budget, ChatEnvironment, LimitError, RefusalError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
_FAILURES = (
    TemplateError, LimitError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError,
    ValueError,
)  # fmt: skip
_OWN_TEXTS = ("content", "reasoning_content", "reasoning", "thinking")
_MARKS = 0xF0000  # private use: a marked character is this plus its place in the list of those that are marked
_ESCAPES = 0x100000  # private use: characters of the user's own that lie among the marks
_BASE_CHARACTERS = 2_000_000


class Rendered(NamedTuple):
    """`text` as the model shall see it; `marked` the same with user characters of markup still replaced, one by one."""

    text: str
    marked: str


class Marking:
    """Replaces the characters of user text that could begin or end one of `controls` by private ones, and back."""

    def __init__(self, controls: Iterable[str]):
        ends = {text[i] for text in controls if text.strip() for i in (0, -1)}
        self.characters = sorted(character for character in ends if not character.isspace())
        self._marks = {ord(character): chr(_MARKS + i) for i, character in enumerate(self.characters)}
        inside = range(_MARKS, _MARKS + len(self.characters))
        escapes = range(_ESCAPES, _ESCAPES + len(self.characters))
        self._marks |= {code: chr(_ESCAPES + i) for i, code in enumerate(inside)}
        self._marks |= dict.fromkeys(escapes, "\ufffd")
        self._texts = {ord(mark): chr(code) for code, mark in self._marks.items() if mark != "\ufffd"}
        self.marked = frozenset(map(chr, inside))

    def mark(self, text: str, keep: Sequence[str] = ()) -> str:
        """`text` with its markup characters replaced, but for occurrences of the strings in `keep`."""
        if not keep:
            return without_surrogates(text).translate(self._marks)
        first, *others = keep
        return first.join(self.mark(part, others) for part in text.split(first))

    def unmark(self, text: str) -> str:
        """The text that was marked."""
        return text.translate(self._texts)

    def mark_all(self, value: Any, keep: Sequence[str] = ()) -> Any:
        """A copy of JSON-like data with every text in it marked; keys too, unless they are names."""
        if isinstance(value, str):
            return self.mark(value, keep)
        if isinstance(value, Mapping):
            return {
                key if not isinstance(key, str) or key.isidentifier() else self.mark(key): self.mark_all(part, keep)
                for key, part in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.mark_all(part, keep) for part in value]
        return value

    def to_json(self, value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        """The `tojson` of templates: no HTML escapes, marked characters left as they are."""
        text = json.dumps(value, ensure_ascii=False, indent=min(indent, 16) if indent else indent,
                          **{key: options[key] for key in ("separators", "sort_keys") if key in options})  # fmt: skip
        if not ensure_ascii:
            return text
        return "".join(c if c.isascii() or c in self.marked else json.dumps(c)[1:-1] for c in text)


class ChatTemplate:
    """A compiled chat template for one set of control tokens.

    `controls` are the texts of the tokens that user text must not become; `assistants` those among them that the
    messages of an assistant may hold all the same (`<think>`: its own, and some templates look for them).
    Raises: FormatError where the source is no template, loads others or is too long.
    Threads: `render` may be called from several.
    """

    def __init__(self, source: str, *, controls: Iterable[str], assistants: Iterable[str] = ()):
        controls = list(controls)
        self.marking = Marking(controls)
        self._controls = controls
        self._kept = sorted(assistants, key=len, reverse=True)
        self._environment = ChatEnvironment(self.marking.to_json)
        if len(source) > 1_000_000:
            raise FormatError(f"has {len(source)} characters, at most 1000000 are read", record="chat template")
        try:
            self._template = self._environment.from_string(source)
        except TemplateSyntaxError as error:
            message = f"is no jinja2 template ({_one_line(error)}, line {error.lineno}); mend it or give another"
            raise FormatError(message, record="chat template") from error
        except (*_FAILURES, SyntaxError) as error:
            raise FormatError(f"is refused: {_one_line(error)}; give another", record="chat template") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        special_tokens: Mapping[str, str] | None = None,
        variables: Mapping[str, Any] | None = None,
        now: datetime.datetime | None = None,
    ) -> Rendered:
        """Text of a conversation. `messages`: mappings with `role` and `content` (text, or a list of parts), as in the
        chat completions API; `special_tokens`: `bos_token` and its like; `variables`: what else the template reads.

        Raises: ConfigError for messages of the wrong shape, or that the template refuses; FormatError where the
        template fails, loops for too long, or reaches for what is no data.
        """
        marked = self.marking.mark_all
        try:
            values: dict[str, Any] = {"documents": None} | marked(dict(variables or {})) | dict(special_tokens or {})
            values["messages"] = [self._message(message, number) for number, message in enumerate(messages)]
            values["tools"] = marked(list(tools)) if tools else None
            size = _count_characters(values)
        except RecursionError as error:
            raise ConfigError("the messages are nested too deeply; expected texts and lists of parts") from error
        values["add_generation_prompt"] = add_generation_prompt
        budget = Budget(_BASE_CHARACTERS + 16 * size, now or datetime.datetime.now())
        try:
            text = self._environment.run(self._template, values, budget)
        except RefusalError as error:
            raise ConfigError(f"the chat template refuses these messages: {_one_line(error)}") from error
        except _FAILURES as error:
            message = f"fails: {_one_line(error) or type(error).__name__}; mend it, or give another"
            raise FormatError(message, record="chat template") from error
        return Rendered(self.marking.unmark(text), text)

    def _message(self, message: Mapping[str, Any], number: int) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise ConfigError(
                f"message {number} is a {type(message).__name__}; expected an object with role and content"
            )
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise ConfigError(f"message {number} has no role; expected one of {', '.join(ROLES)}")
        # Templates write '<|' + role + '|>'; a role of one's own must not complete a control token.
        if role not in ROLES and any(role in text for text in self._controls):
            raise ConfigError(f"message {number} has the role '{role}'; expected one of {', '.join(ROLES)}")
        marked = self.marking.mark_all(dict(message))
        if role == "assistant":
            own = {key: self.marking.mark_all(message[key], self._kept) for key in _OWN_TEXTS if key in message}
            marked |= own
        return marked


def encode_rendered(
    rendered: Rendered,
    marking: Marking,
    spans: Callable[[str], list[tuple[int, int, int]]],
    control_texts: Mapping[int, str],
    encode_plain: Callable[[list[str]], list[list[int]]],
) -> list[int]:
    """Token ids of a rendered conversation in which only the template's own control tokens are control tokens.

    `spans` encodes with control tokens and gives (id, start, stop) of each token; `encode_plain` without.
    The whole text is encoded at once, as models were trained; only where a control token would lie on user text is
    it encoded piece by piece.
    """
    tokens = spans(rendered.text)
    if not any(_forged(token, rendered, marking, control_texts) for token in tokens):
        return [token_id for token_id, *_ in tokens]
    controls = [token for token in spans(rendered.marked) if token[0] in control_texts]
    controls = [token for token in controls if not _forged(token, rendered, marking, control_texts)]
    pieces, start = [], 0
    for _, low, high in controls:
        pieces.append(rendered.text[start:low])
        start = high
    pieces.append(rendered.text[start:])
    ids: list[int] = []
    for number, plain in enumerate(encode_plain(pieces)):
        ids += plain
        if number < len(controls):
            ids.append(controls[number][0])
    return ids


def _forged(
    token: tuple[int, int, int], rendered: Rendered, marking: Marking, control_texts: Mapping[int, str]
) -> bool:
    """Whether a control token lies, in part, on characters that a user wrote, or arose by normalisation."""
    token_id, start, stop = token
    text = control_texts.get(token_id)
    if text is None:
        return False
    at = rendered.text.find(text, start, stop)
    return at < 0 or any(character in marking.marked for character in rendered.marked[at : at + len(text)])


def _count_characters(value: Any) -> int:
    if isinstance(value, Mapping):
        return sum(len(str(key)) + _count_characters(part) + 4 for key, part in value.items())
    if isinstance(value, list):
        return sum(_count_characters(part) + 4 for part in value)
    return len(value) if isinstance(value, str) else 8


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
