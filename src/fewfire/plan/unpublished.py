"""Models whose makers publish no shape: what is known, in words. Computes nothing.

Status words: `confirmed` by the maker, `reported` by others, `not characterised`: nothing said.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Unpublished:
    """A model that is known by name only."""

    name: str
    status: str
    words: str


UNPUBLISHED = (
    Unpublished(
        "gpt-4",
        "reported",
        "GPT-4: widely reported to be a mixture of experts; OpenAI has published no sizes. Nothing is computed.",
    ),
    Unpublished(
        "gemini-1.5",
        "confirmed",
        "Gemini 1.5: Google confirms a sparse mixture of experts; it has published no sizes. Nothing is computed.",
    ),
    Unpublished(
        "claude",
        "not characterised",
        "Claude: Anthropic has not characterised the architecture and has published no sizes. Nothing is computed.",
    ),
)

_PATTERNS = (
    (re.compile(r"(openai/)?(chat)?gpt-?(4|5)(?!-oss).*"), UNPUBLISHED[0]),
    (re.compile(r"(google/)?gemini.*"), UNPUBLISHED[1]),
    (re.compile(r"(anthropic/)?claude.*"), UNPUBLISHED[2]),
)


def find_unpublished(name: str) -> Unpublished | None:
    """The entry that `name` belongs to (gpt-4o counts as GPT-4), or None."""
    wanted = name.strip().lower().replace(" ", "-")
    return next((entry for pattern, entry in _PATTERNS if pattern.fullmatch(wanted)), None)
