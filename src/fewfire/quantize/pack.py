"""A checkpoint becomes a pack, tensor by tensor: formats are chosen, values quantized or carried over."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewfire.checkpoints.gguf import GgufCheckpoint, GgufValues
from fewfire.checkpoints.pack import is_pack
from fewfire.checkpoints.pack_source import HubValues
from fewfire.checkpoints.pack_writer import Report, write_pack
from fewfire.checkpoints.source import open_checkpoint, read_eos_ids, read_tokenizer
from fewfire.checkpoints.unfinished import Say
from fewfire.config import ModelConfig, check
from fewfire.errors import FormatError
from fewfire.plan.memory import Formats, choose_formats
from fewfire.quantize.carry import Kept, carry_over, describe
from fewfire.quantize.quantizer import Loss, Place, Quantizer


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote. `losses`: what quantizing cost. `kept`: what became of the tensors of a GGUF file.

    `resumed_bytes` of the weights were there from an earlier call that was interrupted.
    """

    path: Path
    formats: Formats
    num_bytes: int
    losses: dict[Place, Loss]
    kept: tuple[Kept, ...] = ()
    resumed_bytes: int = 0


def pack(
    model: str | Path,
    out: str | Path,
    *,
    quant: str | None = None,
    experts: str | None = None,
    trunk: str | None = None,
    down: str | None = None,
    head: str | None = None,
    layers: int | None = None,
    ignore: tuple[str, ...] = (),
    report: Report | None = None,
    say: Say = lambda line: None,
) -> Packed:
    """Write a hub-layout folder or a GGUF file as the pack `out`. `layers`: only the first N.

    Formats as `choose_formats`. `quant` None is q4; of a GGUF file what no option names is carried over (`carry_over`).
    Reads and writes one tensor (or a few experts) at a time. Interrupted, it goes on with the next equal call.
    Raises: ConfigError for formats and names, FormatError for damaged files and weights that are no numbers.
    """
    path = Path(model)
    check(not is_pack(path), f"{path} is a pack already; name the checkpoint it was made from")
    checkpoint = open_checkpoint(path, ignore=ignore)
    config = cut_layers(checkpoint.config, layers)
    formats = choose_formats(config, quant or "q4", experts=experts, trunk=trunk, down=down, head=head)
    kept: tuple[Kept, ...] = ()
    values: HubValues | GgufValues
    if isinstance(checkpoint, GgufCheckpoint):
        values = GgufValues(checkpoint)
        if quant is None:
            named = {"experts": experts, "down": down or experts, "trunk": trunk, "embedding": trunk}
            named["head"] = head or trunk
            formats = carry_over(values, config, formats, frozenset(part for part, name in named.items() if name))
        kept = describe(values, config, formats)
    else:
        values = HubValues(checkpoint)
    source = Quantizer(values, config)
    with contextlib.closing(values), _naming(path):
        resumed = write_pack(
            out,
            source,
            formats,
            companions=path if path.is_dir() else None,
            tokenizer_files={} if path.is_dir() else _text_side(path, config),
            origin=path.resolve().name,
            report=report,
            identity={"source files": identify(checkpoint.files)},
            ledger=source,
            say=say,
        )
    num_bytes = sum(each.stat().st_size for each in Path(out).iterdir())
    return Packed(
        Path(out), formats, num_bytes, dict(sorted(source.losses.items(), key=_layers_in_order)), kept, resumed
    )


def _layers_in_order(item: tuple[Place, Loss]) -> list[Any]:
    """Layer 10 comes after layer 9."""
    words = re.split(r"(\d+)", item[0][0])
    return [*(word.zfill(9) if word.isdigit() else word for word in words), *item[0][1:]]


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors about a tensor that name no file are about `path`."""
    try:
        yield
    except FormatError as error:
        if error.path is None:
            raise FormatError(str(error), path=str(path)) from error
        raise


def _text_side(path: Path, config: ModelConfig) -> dict[str, bytes]:
    """The tokenizer of a GGUF file as a folder has it, and the tokens that end a text."""
    tokenizer, ends = read_tokenizer(path), read_eos_ids(path, config)
    files = {} if tokenizer is None else tokenizer.files()
    if ends:
        files["generation_config.json"] = json.dumps({"eos_token_id": list(ends)}).encode("utf-8")
    return files


def identify(files: Iterable[Path]) -> list[list[Any]]:
    """What tells that files were not written since: path, bytes, and nanoseconds of the last change of each."""
    found = [(each.resolve(), each.stat()) for each in files]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in found]


def cut_layers(config: ModelConfig, layers: int | None) -> ModelConfig:
    """`config` with its first `layers` layers. Raises ConfigError for a number that it does not have."""
    if layers is None:
        return config
    most = len(config.layers)
    check(0 < layers <= most, f"layers ({layers}) must be between 1 and the model's {most}")
    return dataclasses.replace(config, layers=config.layers[:layers], mtp=None)
