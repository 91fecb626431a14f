"""A hub id's config.json and index, and nothing else: no weights are fetched. The planner's only door to a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewfire.errors import ConfigError, FormatError
from fewfire.files import read_regular


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ConfigError if it cannot be read, FormatError if it is no object."""
    try:
        value = json.loads(read_regular(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a folder with a config.json") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is no JSON ({error}); download it again", path=str(path)) from error
    if not isinstance(value, dict):
        raise FormatError(f"holds a {type(value).__name__}, expected a JSON object", path=str(path))
    return value


def fetch_config(hub_id: str) -> tuple[dict[str, Any], int | None]:
    """(config.json, bytes of all weights by the index, None where there is none) of a hub id.

    Uses the hub client's cache, so a second plan needs no network. Raises ConfigError, naming what failed.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
        from huggingface_hub.utils import logging
    except ImportError as error:
        raise ConfigError(f"{hub_id} is a hub id; pip install huggingface_hub to fetch its config") from error
    logging.set_verbosity_error()  # of its attempts: what came of them is told below
    offline = f"{hub_id} could not be fetched; check the name and the network, or give a local folder"
    try:
        hub = read_json(Path(hf_hub_download(hub_id, "config.json")))
    except LocalEntryNotFoundError as error:
        raise ConfigError(offline) from error
    except EntryNotFoundError as error:
        raise ConfigError(f"{hub_id} holds no config.json; it is no transformers checkpoint") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(offline) from error
    try:
        index = read_json(Path(hf_hub_download(hub_id, "model.safetensors.index.json")))
    except (EntryNotFoundError, HfHubHTTPError, OSError):
        return hub, None  # one file, or no safetensors: the formula stands alone
    size = index.get("metadata", {}).get("total_size")
    return hub, size if isinstance(size, int) else None
