"""Multiple choice: which of the given answers the model finds most likely after the question."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from torch import nn

from fewfire.config import ModelConfig, check
from fewfire.errors import ConfigError
from fewfire.evaluate.perplexity import Progress, Tally, score_windows
from fewfire.evaluate.questions import Question
from fewfire.evaluate.windows import Cut, Window, check_vocabulary, token_bytes
from fewfire.tokenizer import Tokenizer


@dataclass
class Chosen:
    """How many questions were answered rightly: by the nats of a choice, and by its nats per character."""

    questions: int = 0
    right: int = 0
    right_normalised: int = 0
    answers: Tally = field(default_factory=Tally)  # of the right choices, whatever the model would choose


def answer_questions(
    model: nn.Module,
    tokenizer: Tokenizer,
    questions: Iterable[Question],
    cut: Cut,
    *,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Chosen:
    """Ask all questions; no more are asked where the right answers' tokens would exceed `max_tokens`.

    Ties go to the earlier choice. Raises: ConfigError for a choice that exceeds the context, or no question asked.
    """
    chosen = Chosen()
    if progress is not None:
        progress(0, 0.0)
    config = model.config
    assert isinstance(config, ModelConfig)
    for question in questions:
        windows = list(_windows(tokenizer, question, cut, config.vocab_size))
        right = windows[question.answer]
        if max_tokens is not None and chosen.answers.tokens + right.scored > max_tokens:
            break
        nats = [each for _, each in score_windows(model, windows)]
        sums = [float(each.sum()) for each in nats]
        rates = [each / len(choice) for each, choice in zip(sums, question.choices, strict=True)]
        chosen.questions += 1
        chosen.right += sums.index(min(sums)) == question.answer
        chosen.right_normalised += rates.index(min(rates)) == question.answer
        chosen.answers.add(nats[question.answer], right.num_bytes)
        if progress is not None:
            progress(chosen.answers.tokens, chosen.answers.nats)
    check(chosen.questions > 0, "no question was asked; give one at least, and max_tokens for its right answer")
    return chosen


def _windows(tokenizer: Tokenizer, question: Question, cut: Cut, vocab_size: int) -> Iterator[Window]:
    """One window a choice: the question, cut at its beginning where the context is too small, and the choice."""
    before = tokenizer.encode(question.prompt)
    start = cut.frame or ([] if before or cut.prefix is None else [cut.prefix])
    for choice in question.choices:
        text = join(question.prompt, choice)
        ids = tokenizer.encode(text)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, ids)))
        scored = len(ids) - common
        check_vocabulary(ids, vocab_size)
        if scored > cut.context or common + len(start) == 0 or scored == 0:
            problem = "nothing stands before a choice" if scored <= cut.context else f"a choice has {scored} tokens"
            raise ConfigError(f"{question.name}: {problem}; give a question, and a context of {scored} tokens or more")
        num_bytes = sum(token_bytes(tokenizer, text, ids)[common:])
        yield Window([*start, *ids][-(cut.context + 1) :], scored, num_bytes)


def join(prompt: str, choice: str) -> str:
    """Question and choice with one space between them, unless either brings whitespace of its own."""
    glued = not prompt or prompt[-1].isspace() or choice[0].isspace()
    return prompt + choice if glued else f"{prompt} {choice}"
