"""Models by hub id, through huggingface_hub: only the files that are needed, resumed where a download broke off.

What was downloaded once is found again without a network. Tokens, mirrors and offline mode are the client's own
settings (`hf auth login`, HF_ENDPOINT, HF_HUB_OFFLINE). Knows no tensor.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

from fewfire.checkpoints.atomic import write_failure
from fewfire.checkpoints.hub import COMPANIONS
from fewfire.config import check
from fewfire.errors import ConfigError, FewfireError
from fewfire.headers import INDEX_FILE, SINGLE_FILE, index_files

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:/(?P<file>[A-Za-z0-9._/-]+\.gguf))?(?:@(?P<revision>[^@\s]+))?")


class HubId:
    """`org/name`, `org/name@revision` or `org/name/file.gguf`, which names one file of a repository."""

    def __init__(self, text: str):
        match = _ID.fullmatch(text)
        check(match is not None, f"{text} is no hub id; write it as org/name, org/name@revision or org/name/file.gguf")
        assert match is not None
        self.text, self.repo, self.file = text, match["repo"], match["file"]
        self.revision = match["revision"]


def looks_like_hub_id(text: str) -> bool:
    """Whether `text` has the form of a hub id (nothing is asked of any server)."""
    return _ID.fullmatch(text) is not None


def download(hub_id: HubId, *, show_progress: bool = False) -> Path:
    """The folder of a hub id's snapshot in the client's cache (or the GGUF file it names), complete for loading.

    `show_progress`: bars on stderr. Raises: ConfigError where the id, its revision or a file is not there, is gated,
    or there is no network and no copy; BudgetError on a full disk.
    """
    from huggingface_hub import errors

    try:
        if hub_id.file is not None:
            return Path(_fetch_file(hub_id, hub_id.file, show_progress))
        small = ["config.json", *COMPANIONS, "*.tiktoken", "tiktoken.model", INDEX_FILE]
        folder = _fetch(hub_id, small, hub_id.revision, show_progress)
        check(
            (folder / "config.json").is_file(), f"{hub_id.text} holds no config.json; it is no transformers checkpoint"
        )
        weights = index_files(folder / INDEX_FILE) if (folder / INDEX_FILE).is_file() else [SINGLE_FILE]
        folder = _fetch(hub_id, weights, folder.name, show_progress)
    except FewfireError:
        raise
    except (OSError, ValueError, errors.HTTPError) as error:
        _explain(hub_id, error)
    missing = [name for name in weights if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{hub_id.text} has no {missing[0]}; fewfire reads safetensors: choose a repository that holds them, "
            "or connect to a network to finish the download"
        )
    return folder


def _fetch(hub_id: HubId, patterns: list[str], revision: str | None, show_progress: bool) -> Path:
    from huggingface_hub import snapshot_download

    bars = {} if show_progress else {"tqdm_class": _silent_bars()}
    return Path(snapshot_download(hub_id.repo, revision=revision, allow_patterns=patterns, **bars))


def _fetch_file(hub_id: HubId, name: str, show_progress: bool) -> str:
    from huggingface_hub import hf_hub_download

    bars = {} if show_progress else {"tqdm_class": _silent_bars()}
    return str(hf_hub_download(hub_id.repo, name, revision=hub_id.revision, **bars))


def _silent_bars() -> Any:
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{**options, "disable": True})

    return Silent


def _explain(hub_id: HubId, error: Exception) -> NoReturn:
    """Raise what `error` of the client means to the user, in one line."""
    from huggingface_hub import errors

    name = hub_id.text
    if isinstance(error, errors.GatedRepoError):
        message = f"{name} is gated; ask for access on its page, then `hf auth login`"
    elif isinstance(error, errors.RevisionNotFoundError):
        message = f"{name}: there is no revision {hub_id.revision}; name a branch, a tag or a commit"
    elif isinstance(error, errors.RepositoryNotFoundError):
        message = f"{name} is not on the hub, or not for you to see; check the name, or `hf auth login`"
    elif isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):  # or a part of it is not
        message = f"{name} is not downloaded and the hub cannot be reached; connect, or give a local folder"
    elif isinstance(error, errors.EntryNotFoundError):
        message = f"{name} is not in its repository; check the file's name"
    elif isinstance(error, errors.HFValidationError):
        message = f"{name} is no hub id ({_one_line(error)}); write it as org/name"
    elif isinstance(error, errors.HfHubHTTPError):
        message = f"{name} could not be downloaded ({_one_line(error)}); try again later"
    elif isinstance(error, OSError) and error.errno is not None:
        raise write_failure(error, error.filename or f"the download of {name}") from error
    else:
        message = f"{name} could not be downloaded ({_one_line(error)}); check the network and try again"
    raise ConfigError(message) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
