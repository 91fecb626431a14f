"""What a MODEL means and holds: a hub-layout folder or a GGUF file, opened to the same few things; its text side."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fewfire.checkpoints.download import HubId, download, looks_like_hub_id
from fewfire.checkpoints.gguf import GgufCheckpoint, open_gguf
from fewfire.checkpoints.hub import HubCheckpoint, open_hub, read_object
from fewfire.config import ModelConfig, cache_folder, check
from fewfire.errors import ConfigError, FormatError
from fewfire.families import published
from fewfire.headers import read_gguf
from fewfire.tokenizer import Tokenizer
from fewfire.tokenizer.load import find_tokenizer


def is_gguf(path: str | Path) -> bool:
    """Whether `path` is a file that calls itself GGUF, by its name or its first bytes."""
    path = Path(path)
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def open_checkpoint(path: str | Path, *, ignore: Iterable[str] = ()) -> HubCheckpoint | GgufCheckpoint:
    """A GGUF file, or else a hub-layout folder, checked but for its values. Raises as `open_gguf` and `open_hub`."""
    return open_gguf(path, ignore=ignore) if is_gguf(path) else open_hub(path, ignore=ignore)


def read_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of a folder or GGUF file; None where it has none. Raises FormatError where it is not understood."""
    path = Path(path)
    if is_gguf(path):
        metadata = read_gguf(path, long_arrays=True).metadata
        if metadata.get("tokenizer.ggml.model", "no_vocab") in ("no_vocab", "none"):
            return None
        return Tokenizer.from_gguf(metadata, source=str(path))
    try:
        find_tokenizer(path)
    except ConfigError:
        return None
    return Tokenizer.load(path)


def read_eos_ids(path: str | Path, config: ModelConfig) -> tuple[int, ...]:
    """Every token that ends a text. A folder's generation_config.json where it names some, else its config.json; a
    GGUF file's ends of sequence, turn and message.

    Raises: FormatError where generation_config.json holds something else than ids.
    """
    path = Path(path)
    if is_gguf(path):
        metadata = read_gguf(path).metadata
        found = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        return tuple(dict.fromkeys(each for each in found if type(each) is int and each < config.vocab_size))
    path = path / "generation_config.json"
    if not path.is_file():
        return config.eos_token_ids
    value = read_object(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(each) is int for each in ids):
        raise FormatError(f"{value!r} is no token id, nor a list of them", path=str(path), record="eos_token_id")
    return tuple(ids) or config.eos_token_ids


def locate(model: str | Path, *, show_progress: bool = False) -> Path:
    """The folder or GGUF file that a MODEL means: a path, `demo`, or a hub id, which is downloaded.

    A path that exists wins over a name. `show_progress`: bars on stderr while downloading.
    Raises: ConfigError, saying what to do, where it means none; as `download` for a hub id.
    """
    text, path = str(model), Path(model)
    if path.is_dir():
        trained = path / "model"  # where `fewfire train` leaves what it made
        return trained if not (path / "config.json").exists() and (trained / "config.json").exists() else path
    if path.exists():
        check(is_gguf(path), f"{text} is a file and no GGUF; name a .gguf file, or the folder that holds config.json")
        return path
    if text == "demo":
        folder = cache_folder() / "demo" / "model"
        check((folder / "config.json").is_file(), "there is no demo model yet; run `fewfire demo` to train it")
        return folder
    key = text.strip().lower()
    if key in published.names() and not isinstance(published.find(key), published.NotPublished):
        raise ConfigError(f"{text} is a shape without weights; give its folder or hub id, or `fewfire init` it")
    is_file_name = path.suffix == ".gguf" and len(path.parts) < 3  # a hub's file is org/name/file.gguf
    if isinstance(model, str) and looks_like_hub_id(text) and not is_file_name:
        return download(HubId(text), show_progress=show_progress)
    raise ConfigError(f"{text} is no folder or .gguf file here; give the path of a checkpoint, a hub id, or `demo`")
