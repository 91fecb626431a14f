"""Find a tokenizer in a folder and read it, whichever of the published formats it is in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewfire.errors import ConfigError, FormatError
from fewfire.tokenizer.definition import added_token
from fewfire.tokenizer.files import read_bytes, read_json
from fewfire.tokenizer.sentencepiece_model import read_sentencepiece
from fewfire.tokenizer.tiktoken_file import is_tiktoken, read_tiktoken, read_vocabulary_and_merges

_NAMES = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "spiece.model")


def find_tokenizer(path: Path) -> Path:
    """The file that defines the tokenizer at `path`: itself, or the first known name in a folder.

    Raises: ConfigError where there is none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise ConfigError(f"{path}: no such file or folder; name a tokenizer file, or the folder that holds it")
    candidates = [*(path / name for name in _NAMES), *sorted(path.glob("*.tiktoken")), path / "vocab.json"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ConfigError(
        f"{path}: no tokenizer.json there, nor {', '.join(_NAMES[1:])}, *.tiktoken or vocab.json; add one"
    )


def read_tokenizer(path: Path) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """(definition, config, file) of the tokenizer at `path`; config is what tokenizer_config.json beside it says,
    over what the file itself tells. Raises ConfigError, FormatError.
    """
    file = find_tokenizer(path)
    beside = _read_beside(file)
    if file.suffix == ".gguf":
        raise ConfigError(f"{file}: a GGUF file's tokenizer is in its metadata; read it with Tokenizer.from_gguf")
    if file.name == "vocab.json":
        definition, config = read_vocabulary_and_merges(file, file.with_name("merges.txt"), _added_tokens(beside, file))
    elif file.suffix == ".json":
        definition, config = read_json(file), {}
    else:
        content = read_bytes(file)
        added = _added_tokens(beside, file)
        read = read_tiktoken if is_tiktoken(content) else read_sentencepiece
        definition, config = read(content, str(file), added)
    return definition, config | beside, file


def _read_beside(file: Path) -> dict[str, Any]:
    """tokenizer_config.json, chat_template.jinja and special_tokens_map.json beside a tokenizer, as one config."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = file.with_name(name)
        if path.is_file():
            config |= read_json(path)
    template = file.with_name("chat_template.jinja")
    if template.is_file():
        config["chat_template"] = read_bytes(template).decode("utf-8", "replace")
    return config


def _added_tokens(config: Mapping[str, Any], file: Path) -> dict[int, dict[str, Any]] | None:
    """Tokens that tokenizer_config.json adds to a vocabulary, by id; None where it adds none."""
    entries = config.get("added_tokens_decoder")
    if not entries:
        return None
    try:
        return {
            int(token_id): added_token(int(token_id), entry["content"], special=bool(entry.get("special", False)))
            | {key: bool(entry[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in entry}
            for token_id, entry in entries.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        path = str(file.with_name("tokenizer_config.json"))
        raise FormatError("is malformed; download it again", path=path, record="added_tokens_decoder") from error
