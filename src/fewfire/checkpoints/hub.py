"""Hub-layout folders: config.json and safetensors in and out, strictly and bitwise.

Owns which file holds what. Which hub tensor is which parameter comes from `families`; reading bytes is `fill`'s.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewfire import families
from fewfire.checkpoints import atomic
from fewfire.checkpoints.encodings import Stored, encoded_like, pair_parts
from fewfire.checkpoints.fill import Filler
from fewfire.checkpoints.shards import SHARD_BYTES, TORCH_DTYPES, Outgoing, write_shards
from fewfire.config import ModelConfig
from fewfire.errors import ConfigError, FormatError
from fewfire.families import HubTensor
from fewfire.files import read_regular
from fewfire.headers import read_checkpoint
from fewfire.tokenizer import Tokenizer

# What travels with the weights as it is: the text side of a model, and how it likes to be sampled.
COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_FORMAT_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class HubCheckpoint:
    """An opened folder: everything checked but the values. `ignored`: tensors of the files that nothing needs."""

    folder: Path
    config: ModelConfig
    table: tuple[HubTensor, ...]
    stored: Mapping[str, Stored]
    ignored: tuple[str, ...]

    @property
    def files(self) -> list[Path]:
        """The files that decide what it is."""
        found = {part.path for each in self.stored.values() for part in each.parts}
        return [self.folder / "config.json", *sorted(found)]

    def fill(self, module: nn.Module, *, dtype: torch.dtype | None = None, exact: bool = False) -> None:
        """Give every parameter and buffer of `module`, built on the meta device, its values: each is made once.

        `dtype` None: the checkpoint's own precision, one dtype for all that is multiplied; routers, norms and other
        small tensors keep theirs. `exact`: every tensor keeps its dtype, for writing back rather than running.
        Raises: FormatError where the files are damaged or the module and the checkpoint disagree.
        """
        Filler(self.table, self.stored, module, dtype=dtype, exact=exact).run()

    def run_bytes(self, dtype: torch.dtype | None = None) -> int:
        """What `fill` makes of it in memory, but for the small tensors that keep a wider precision of their own."""
        values = Counter[torch.dtype]()
        for each in self.stored.values():
            values[each.dtype] += math.prod(each.shape)
        return values.total() * (dtype or values.most_common(1)[0][0]).itemsize if values else 0


def open_hub(folder: str | Path, *, ignore: Iterable[str] = ()) -> HubCheckpoint:
    """Read config.json and all tensor headers of a hub-layout folder. `ignore`: config keys to leave aside.

    Raises: ConfigError as `families.read_config`; FormatError naming the first tensor that is missing, of another
    shape, stored twice, or unknown.
    """
    folder = Path(folder)
    config = read_hub_config(folder, ignore=ignore)
    stored = pair_parts(read_checkpoint(folder))
    shapes = {name: each.shape for name, each in stored.items()}
    table = families.match(config, shapes)
    ignored = _compare(folder, config, table, shapes)
    return HubCheckpoint(folder, config, tuple(table), stored, ignored)


def read_hub_config(folder: Path, *, ignore: Iterable[str] = ()) -> ModelConfig:
    """The ModelConfig of a folder's config.json. Raises ConfigError where there is none or it is not understood."""
    return families.read_config(read_object(folder / "config.json"), ignore=tuple(ignore))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ConfigError where it cannot be read, FormatError where it is none."""
    try:
        text = read_regular(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); name a folder that holds a model") from error
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        where = error.pos if isinstance(error, json.JSONDecodeError) else None
        raise FormatError("is no JSON; download it again", path=str(path), offset=where) from error
    if not isinstance(value, dict):
        raise FormatError(f"holds a {type(value).__name__}, expected a JSON object", path=str(path))
    return value


def _compare(
    folder: Path, config: ModelConfig, table: list[HubTensor], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """The tensors to ignore; FormatError at the first that does not fit."""
    path, expected = str(folder), {tensor.name for tensor in table}
    patterns = families.ignored_tensors(config)
    surplus = [name for name in shapes if name not in expected]
    ignored = [name for name in surplus if any(pattern.fullmatch(name) for pattern in patterns)]
    missing = [tensor.name for tensor in table if tensor.name not in shapes]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FormatError(
            f"is missing{more}; the config describes a model that has it: complete the download, or correct the config",
            path=path,
            record=missing[0],
        )
    unknown = sorted(set(surplus) - set(ignored))
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise FormatError(
            f"is no part of the model that config.json describes{more}; correct the config",
            path=path,
            record=unknown[0],
        )
    for tensor in table:
        if shapes[tensor.name] != tensor.shape:
            raise FormatError(
                f"has shape {list(shapes[tensor.name])}, "
                f"config.json implies {list(tensor.shape)}; correct the one that is wrong",
                path=path,
                record=tensor.name,
            )
    return tuple(ignored)


# --------------------------------------------------------------------------------------------------------- writing


def save_hub(
    module: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    companions: str | Path | None = None,
    dtype: torch.dtype | None = None,
    like: HubCheckpoint | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write `module` (with its `config`) as a hub-layout folder that transformers loads, wholly or not at all.

    `companions`: a folder whose tokenizer, template and generation files are copied as they are; `tokenizer` is
    written where that gives none. `dtype` None: every tensor as it is. Selection biases stay float32.
    `like`: the checkpoint that `module` was filled from and still equals: its layout, FP8 and MXFP4 are kept.
    Raises: ConfigError where the family cannot express the model or `folder` is taken, BudgetError on a full disk.
    """
    folder, source = Path(folder), getattr(module, "config", None)
    assert isinstance(source, ModelConfig)
    state = {name: values.detach() for name, values in module.state_dict().items()}
    encoded = like is not None and any(each.encoding != "plain" for each in like.stored.values())
    config = source if encoded else dataclasses.replace(source, native_format=_native_format(state, dtype))
    table = families.tensors(config) if like is None else like.table
    hub_config, tensors = families.write_config(config), outgoing(table, state, dtype)
    if like is not None:
        tensors = [each for plain in tensors for each in encoded_like(like.stored[plain.name], plain)]
    with atomic.replacing_folder(folder, overwrite=overwrite) as temporary:
        _write_object(temporary / "config.json", hub_config)
        _write_object(temporary / "generation_config.json", _generation_config(config))
        if companions is not None:
            for name in COMPANIONS:
                if (Path(companions) / name).is_file():
                    shutil.copyfile(Path(companions) / name, temporary / name)
        if tokenizer is not None and not (temporary / "tokenizer.json").exists():
            tokenizer.save(temporary)
        write_shards(temporary, tensors, shard_bytes)


def outgoing(table: Iterable[HubTensor], state: Mapping[str, Tensor], dtype: torch.dtype | None) -> list[Outgoing]:
    """The hub tensors of `state` (our names), each assembled when it is written."""
    result = []
    for tensor in table:
        kept = dtype is None or any(piece.ours.endswith("select_bias") for piece in tensor.pieces)
        stored = state[tensor.pieces[0].ours].dtype if kept else dtype
        assert stored is not None
        result.append(Outgoing(tensor.name, stored, tensor.shape, _maker(tensor, state)))
    return result


def _maker(tensor: HubTensor, state: Mapping[str, Tensor]) -> Any:
    def make() -> Tensor:
        first = state[tensor.pieces[0].ours]
        values = torch.empty(tensor.shape, dtype=first.dtype)
        for piece in tensor.pieces:
            ours = state[piece.ours] if piece.row is None else state[piece.ours][piece.row]
            families.part(values, tensor, piece).copy_(ours)
        return values

    return make


def _native_format(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> str:
    """The name of the dtype that most bytes have."""
    sizes: Counter[torch.dtype] = Counter()
    for values in state.values():
        sizes[values.dtype] += values.numel()
    most = dtype or sizes.most_common(1)[0][0]
    if most not in _FORMAT_NAMES:
        allowed = ", ".join(str(each).removeprefix("torch.") for each in _FORMAT_NAMES)
        raise ConfigError(f"dtype {most} has no hub spelling; use one of {allowed}")
    return _FORMAT_NAMES[most]


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    ends = config.eos_token_ids
    fields = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not ends else ends[0] if len(ends) == 1 else list(ends),
        "pad_token_id": config.pad_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _write_object(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


assert set(_FORMAT_NAMES) <= set(TORCH_DTYPES.values())
