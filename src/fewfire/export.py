"""A model leaves fewfire in a form that others load: hub layout for transformers and servers, GGUF for llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fewfire.checkpoints.atomic import refuse_occupied
from fewfire.checkpoints.gguf import save_gguf
from fewfire.checkpoints.hub import HubCheckpoint, save_hub
from fewfire.checkpoints.pack import is_pack
from fewfire.checkpoints.source import locate, open_checkpoint, read_tokenizer
from fewfire.config import check
from fewfire.runtime.load import fill_module, load_module

FORMS = ("hf", "gguf")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """What an export wrote: `path` with `files`. `notes`: what the user should know, a line each."""

    path: Path
    files: list[str]
    num_bytes: int
    notes: tuple[str, ...] = ()


def torch_dtype(name: str | None) -> torch.dtype | None:
    """torch's dtype by our name. Raises ConfigError, listing what is allowed."""
    if name is None:
        return None
    check(name in DTYPES, f"dtype {name!r} is not known; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def export(
    model: str | Path,
    out: str | Path,
    *,
    to: str = "hf",
    dtype: str | None = None,
    quant: str | None = None,
    ignore_keys: Sequence[str] = (),
    show_progress: bool = False,
) -> Exported:
    """Write a model as `out`, wholly or not at all, with its tokenizer.

    `to` hf: a new folder; `dtype` None keeps every tensor as it is, so that hub to hub is bitwise. `to` gguf: a file;
    `quant` as `save_gguf` (default fp16). `ignore_keys`, `show_progress`: as `load`.
    Raises: ConfigError where the form cannot express the model or `out` is taken, BudgetError on a full disk.
    """
    check(to in FORMS, f"export to {to!r} is not known; expected one of {', '.join(FORMS)}")
    check(to == "gguf" or quant is None, "quant is for gguf; for hf give a dtype, or leave it out")
    check(to == "hf" or dtype is None, "dtype is for hf; for gguf give a quant, or leave it out")
    wanted = torch_dtype(dtype)
    refuse_occupied(out)
    path = locate(model, show_progress=show_progress)
    if to == "hf":
        return _to_hub(path, Path(out), wanted, ignore_keys)
    return _to_gguf(path, Path(out), quant or "fp16", ignore_keys)


def _to_hub(path: Path, out: Path, dtype: torch.dtype | None, ignore: Sequence[str]) -> Exported:
    if is_pack(path):
        save_hub(load_module(path), out, companions=path, dtype=dtype)
    else:
        checkpoint = open_checkpoint(path, ignore=ignore)
        module = fill_module(checkpoint, exact=True)
        if isinstance(checkpoint, HubCheckpoint):
            save_hub(module, out, companions=path, dtype=dtype, like=checkpoint if dtype is None else None)
        else:
            save_hub(module, out, tokenizer=read_tokenizer(path), dtype=dtype)
    files = sorted(each for each in out.iterdir() if each.is_file())
    return Exported(out, [each.name for each in files], sum(each.stat().st_size for each in files))


def _to_gguf(path: Path, out: Path, quant: str, ignore: Sequence[str]) -> Exported:
    notes = save_gguf(load_module(path, ignore=ignore), out, quant=quant, tokenizer=read_tokenizer(path))
    return Exported(out, [out.name], out.stat().st_size, tuple(notes))
