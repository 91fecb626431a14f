"""Multiple-choice questions out of JSONL. Owns what a question is; knows no tokens."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fewfire.data import corpus_files
from fewfire.errors import ConfigError, FormatError

_LINES = (".jsonl", ".ndjson")
_PROMPTS = ("question", "prompt")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Question(NamedTuple):
    """`answer` is the place of the right one among `choices`, from 0. `name`: file and line."""

    name: str
    prompt: str
    choices: tuple[str, ...]
    answer: int


class _Line(NamedTuple):
    file: Path
    number: int
    offset: int
    value: dict[str, Any]

    def fail(self, message: str) -> FormatError:
        return FormatError(message, path=str(self.file), record=f"line {self.number}", offset=self.offset)


def holds_questions(paths: str | Path | Sequence[str | Path]) -> bool:
    """Whether the first line of each JSONL file has `choices`.

    Raises: ConfigError where some files hold questions and others texts; FormatError for a first line without sense.
    """
    files = corpus_files(paths)
    kinds = {file: file.suffix.lower() in _LINES and _has_choices(file) for file in files}
    if len(set(kinds.values())) > 1:
        texts = next(file for file, kind in kinds.items() if not kind)
        questions = next(file for file, kind in kinds.items() if kind)
        raise ConfigError(f"{questions} holds questions with choices, {texts} texts; evaluate them one by one")
    return all(kinds.values())


def _has_choices(file: Path) -> bool:
    return next(("choices" in line.value for line in _read_lines(file)), False)


def read_questions(paths: str | Path | Sequence[str | Path]) -> Iterator[Question]:
    """The questions of JSONL files, in order: `question` (or `prompt`), `choices` (texts), `answer`.

    An answer is the place of the right choice from 0, its text, or its letter from A.
    Raises: FormatError naming the line that is no such question.
    """
    for file in corpus_files(paths):
        for line in _read_lines(file):
            yield _question(line)


def _question(line: _Line) -> Question:
    keys = [key for key in _PROMPTS if isinstance(line.value.get(key), str)]
    if len(keys) != 1:
        problem = "has no text under" if not keys else "has both"
        raise line.fail(f"{problem} 'question' {'or' if not keys else 'and'} 'prompt'; give one of them")
    choices = line.value.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(each, str) for each in choices):
        raise line.fail("has no list of two or more texts under 'choices'; every line must be a question")
    if not all(choices):
        raise line.fail(f"choice {choices.index('')} is empty; expected a text to score")
    return Question(f"{line.file}:{line.number}", line.value[keys[0]], tuple(choices), _answer(line, choices))


def _answer(line: _Line, choices: list[str]) -> int:
    answer = line.value.get("answer")
    if type(answer) is int and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        if answer and answer in _LETTERS[: len(choices)]:
            return _LETTERS.index(answer)
    raise line.fail(
        f"its 'answer' is {json.dumps(answer)[:60]}; expected a place from 0 to {len(choices) - 1}, "
        "or the text or letter of a choice"
    )


def _read_lines(file: Path) -> Iterator[_Line]:
    offset = 0
    try:
        with open(file, "rb") as stream:
            for number, content in enumerate(stream, start=1):
                text = content.removeprefix(codecs.BOM_UTF8) if number == 1 else content
                if text.strip():
                    yield _parse(text, file, number, offset)
                offset += len(content)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror or error}); check the path") from error


def _parse(content: bytes, file: Path, number: int, offset: int) -> _Line:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        message = f"is no JSON in UTF-8 ({getattr(error, 'msg', type(error).__name__)}); one object a line"
        raise FormatError(message, path=str(file), record=f"line {number}", offset=offset) from error
    line = _Line(file, number, offset, value)
    if not isinstance(value, dict):
        raise line.fail(f"is a {type(value).__name__}; expected a JSON object on each line")
    return line
