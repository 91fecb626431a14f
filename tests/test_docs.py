"""Docs that state keys and defaults state the real ones."""

import dataclasses
import re
import tomllib
from pathlib import Path

from fewfire.train.settings import TrainSettings

DOCS = Path(__file__).parents[1] / "docs"


def test_train_page_lists_every_key_with_its_default():
    block = re.search(r"```toml\n(.*?)```", (DOCS / "train.md").read_text(), re.S).group(1)
    shown = tomllib.loads(block)
    for section in dataclasses.fields(TrainSettings):
        if not dataclasses.is_dataclass(section.default_factory):
            continue
        real = {field.name: field.default for field in dataclasses.fields(section.default_factory)}
        assert list(shown[section.name]) == list(real), section.name
        examples = {"paths"}  # has no default that would mean anything
        for name, default in real.items():
            if name not in examples:
                value = shown[section.name][name]
                assert (tuple(value) if isinstance(value, list) else value) == default, f"{section.name}.{name}"
