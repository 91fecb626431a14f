"""A checkpoint becomes a pack, tensor by tensor, with the error that each layer takes."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from fewfire.checkpoints.gguf import GgufCheckpoint, GgufValues
from fewfire.checkpoints.pack import is_pack
from fewfire.checkpoints.pack_source import HubValues
from fewfire.checkpoints.pack_writer import Report, write_pack
from fewfire.checkpoints.source import open_checkpoint, read_eos_ids, read_tokenizer
from fewfire.config import ModelConfig, check
from fewfire.errors import FormatError
from fewfire.formats import Encoded, decode, encode, transcode
from fewfire.plan.memory import UNQUANTIZED, Formats, choose_formats
from fewfire.quantize.carry import Kept, carry_over, describe

_LAYER = re.compile(r"^(?:encoder\.)?layers\.\d+")


@dataclass
class Loss:
    """What quantizing cost one part: `relative` is the norm of the difference over the norm of the weights."""

    squared_error: float = 0.0
    squared_weights: float = 0.0
    values: int = 0

    @property
    def relative(self) -> float:
        return (self.squared_error / self.squared_weights) ** 0.5 if self.squared_weights else 0.0


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote. `losses`: (layer or outer part, experts|trunk, format) -> what quantizing cost there.

    `kept`: what became of the tensors of a GGUF file.
    """

    path: Path
    formats: Formats
    num_bytes: int
    losses: dict[tuple[str, str, str], Loss]
    kept: tuple[Kept, ...] = ()


class Quantizer:
    """A pack's source: values of a checkpoint, encoded; `losses` as `Packed`. Threads: `encoded` from several."""

    def __init__(self, values: HubValues | GgufValues, config: ModelConfig):
        self.values, self.config = values, config
        self.losses: dict[tuple[str, str, str], Loss] = {}
        self._lock = threading.Lock()

    def encoded(self, name: str, expert: int | None, format_name: str, shape: tuple[int, ...]) -> Encoded:
        record = name if expert is None else f"{name}[{expert}]"
        if isinstance(self.values, GgufValues) and format_name not in UNQUANTIZED:
            if self.values.home(name) == format_name:
                return transcode(self.values.read_blocks(name, expert), format_name, record=record)
        values = self.values.read(name, expert).reshape(shape)
        made = encode(values, format_name, record=record)
        if format_name not in UNQUANTIZED:
            self._count(name, format_name, values.float(), decode(made, format_name, shape))
        return made

    def _count(self, name: str, format_name: str, values: torch.Tensor, back: torch.Tensor) -> None:
        layer = _LAYER.match(name)
        place = layer.group() if layer else name.split(".")[0]
        error, power = (
            float((back - values).square().sum(dtype=torch.float64)),
            float(values.square().sum(dtype=torch.float64)),
        )
        with self._lock:
            loss = self.losses.setdefault((place, "experts" if ".experts." in name else "trunk", format_name), Loss())
            loss.squared_error += error
            loss.squared_weights += power
            loss.values += values.numel()


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
) -> Packed:
    """Write a hub-layout folder or a GGUF file as the pack `out`. `layers`: only the first N.

    Formats as `choose_formats`. `quant` None is q4; of a GGUF file what no option names is carried over (`carry_over`).
    Reads and writes one tensor (or a few experts) at a time.
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
    try:
        write_pack(
            out,
            source,
            formats,
            companions=path if path.is_dir() else None,
            tokenizer_files={} if path.is_dir() else _text_side(path, config),
            origin=path.resolve().name,
            report=report,
        )
    except FormatError as error:
        if error.path is None:
            raise FormatError(str(error), path=str(path)) from error
        raise
    finally:
        values.close()
    num_bytes = sum(each.stat().st_size for each in Path(out).iterdir())
    return Packed(Path(out), formats, num_bytes, dict(sorted(source.losses.items())), kept)


def _text_side(path: Path, config: ModelConfig) -> dict[str, bytes]:
    """The tokenizer of a GGUF file as a folder has it, and the tokens that end a text."""
    tokenizer, ends = read_tokenizer(path), read_eos_ids(path, config)
    files = {} if tokenizer is None else tokenizer.files()
    return (
        files | {"generation_config.json": json.dumps({"eos_token_id": list(ends)}).encode("utf-8")} if ends else files
    )


def cut_layers(config: ModelConfig, layers: int | None) -> ModelConfig:
    """`config` with its first `layers` layers. Raises ConfigError for a number that it does not have."""
    if layers is None:
        return config
    most = len(config.layers)
    check(0 < layers <= most, f"layers ({layers}) must be between 1 and the model's {most}")
    return dataclasses.replace(config, layers=config.layers[:layers], mtp=None)
