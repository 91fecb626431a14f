"""Random packs of any published shape, written straight to disk: codes are drawn, not weights that are then quantized.

The same name, formats, seed and layers give the same bytes. Weights have mean about 0 and a deviation of 0.02, less for
what feeds the residual (GPT-2); norms are 1, biases 0.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewfire.checkpoints.pack_writer import Report, write_pack
from fewfire.checkpoints.unfinished import Say
from fewfire.config import ModelConfig
from fewfire.families import published
from fewfire.formats import Encoded, encode, ggml_tiles, sizes
from fewfire.formats.tiles import GROUP, MX_BOOK, Q4_BOOK, Q4_ZERO, Q8_OFFSET, ROWS
from fewfire.plan.memory import FORMATS, NATIVE_BLOCKS, choose_formats
from fewfire.quantize.pack import Packed, cut_layers
from fewfire.quantize.vocabulary import plain_tokenizer

Draw = Callable[[np.random.Generator, tuple[int, int], float], Encoded]  # a matrix's shape, the weights' deviation

_DEVIATION = 0.02
_STEP = 5  # every sub-scale of a random q4 is 5 or -5


def initialise(
    name: str,
    out: str | Path,
    *,
    quant: str = "q4",
    seed: int = 0,
    layers: int | None = None,
    experts: str | None = None,
    trunk: str | None = None,
    down: str | None = None,
    head: str | None = None,
    report: Report | None = None,
    say: Say = lambda line: None,
) -> Packed:
    """Write a random pack of the published model `name` (or its first `layers` layers) as the folder `out`.

    Its tokenizer has one distinct text for every id. Formats as `choose_formats`. Interrupted, it goes on with the next
    equal call.
    Raises: ConfigError for names and formats, BudgetError on a full disk.
    """
    config = cut_layers(published.load(name), layers)
    formats = choose_formats(config, quant, experts=experts, trunk=trunk, down=down, head=head)
    resumed = write_pack(
        out,
        RandomWeights(config, seed),
        formats,
        tokenizer_files=plain_tokenizer(config.vocab_size),
        origin=f"random weights of {name}, seed {seed}",
        report=report,
        identity={"names and seeds": [name, seed]},
        say=say,
    )
    num_bytes = sum(path.stat().st_size for path in Path(out).iterdir())
    return Packed(Path(out), formats, num_bytes, {}, resumed_bytes=resumed)


class RandomWeights:
    """A pack's source: every parameter drawn from its name and `seed`. Threads: `encoded` from several."""

    def __init__(self, config: ModelConfig, seed: int):
        self.config, self.seed = config, seed
        self._residual = 1 / math.sqrt(2 * len(config.layers))

    def encoded(self, name: str, expert: int | None, format_name: str, shape: tuple[int, ...]) -> Encoded:
        words = [self.seed, zlib.crc32(name.encode("utf-8")), 0 if expert is None else expert + 1]
        rng = np.random.Generator(np.random.SFC64(words))
        matrix = len(shape) > 1 or name.endswith("_bias")
        if not matrix or name.endswith(("a_log", "_bias")):
            return encode(self._vector(name, shape), format_name)
        into_residual = name.endswith((".out.weight", ".down.weight", ".experts.down"))
        deviation = _DEVIATION * (self._residual if into_residual else 1.0)
        if format_name in ("f32", "bf16") or math.prod(shape[:-2]) != 1 or shape[-1] % FORMATS[format_name].columns % 8:
            uniform = torch.from_numpy(rng.random(shape, dtype=np.float32)) - 0.5
            return encode(uniform * (deviation * math.sqrt(12)), format_name)
        return _DRAWS[format_name](rng, (shape[-2], shape[-1]), deviation)

    def _vector(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Norms 1 (0 where the model adds one), decay rates between 1 and 16, all else 0."""
        parts = name.split(".")
        if parts[-1] == "a_log":
            return torch.linspace(1, 16, math.prod(shape)).log().reshape(shape)
        if parts[-1] == "weight":
            own = len(parts) > 2 and parts[-3:-1] == ["attention", "norm"]  # a mixer's own norm has no offset
            return torch.full(shape, 0.0 if self.config.norm.offset and not own else 1.0)
        return torch.ones(shape) if parts[-1] in ("d", "dt_bias") else torch.zeros(shape)


def _bytes(rng: np.random.Generator, count: int) -> Tensor:
    return torch.from_numpy(rng.integers(0, 2**64, (count + 7) // 8, np.uint64, endpoint=False).view(np.uint8)[:count])


def _clear_padding(codes: Tensor, shape: tuple[int, int], columns_a_line: int, zero: int) -> Tensor:
    """Tiles' lines of 64 bytes, 16 rows of 4, hold `columns_a_line` columns each; what is padding becomes `zero`."""
    view = codes.view(-(-shape[0] // ROWS), -1, GROUP // columns_a_line, ROWS, 4)
    _clear_lines(view, shape, zero)
    return codes


def _clear_lines(view: Tensor, shape: tuple[int, int], zero: int) -> None:
    """The same in a view of the tiles: (blocks of rows, groups of columns, lines of a group, 16, 4)."""
    groups, lines = view.shape[1:3]
    if shape[0] % ROWS:
        view[-1, :, :, shape[0] % ROWS :] = zero
    for group in range(shape[1] // GROUP, groups):
        view[:, group, -(-max(0, shape[1] - group * GROUP) * lines // GROUP) :] = zero


def _constant_bf16(value: float, count: int) -> Tensor:
    return torch.full((count,), value, dtype=torch.bfloat16).view(torch.uint8)


def _draw_q8(rng: np.random.Generator, shape: tuple[int, int], deviation: float) -> Encoded:
    size = sizes("q8", shape)
    codes = _bytes(rng, size.codes).clamp_(min=1)
    scale = deviation / math.sqrt((255**2 - 1) / 12)
    return Encoded(_clear_padding(codes, shape, 4, Q8_OFFSET), _constant_bf16(scale, size.scales // 2))


def _draw_q4(rng: np.random.Generator, shape: tuple[int, int], deviation: float) -> Encoded:
    size = sizes("q4", shape)
    codes = _clear_padding(_bytes(rng, size.codes), shape, 8, Q4_ZERO * 17)
    tiles = size.scales // (6 * ROWS)
    power = sum(each * each for each in Q4_BOOK) / len(Q4_BOOK)
    scales = torch.empty((tiles, 6 * ROWS), dtype=torch.uint8)
    scales[:, : 2 * ROWS] = _constant_bf16(deviation / (_STEP * math.sqrt(power)), ROWS)
    signs = _bytes(rng, tiles * 4 * ROWS).reshape(tiles, 4 * ROWS) & 0x11
    scales[:, 2 * ROWS :] = 0x11 * _STEP + signs * (16 - 2 * _STEP)  # 5 or, in two's complement, -5
    return Encoded(codes, scales.reshape(-1))


def _draw_mxfp4(rng: np.random.Generator, shape: tuple[int, int], deviation: float) -> Encoded:
    size = sizes("mxfp4", shape)
    power = sum((each / 2) ** 2 for each in MX_BOOK) / len(MX_BOOK)
    exponent = 127 + round(math.log2(deviation / math.sqrt(power)))
    codes = _clear_padding(_bytes(rng, size.codes), shape, 8, 0)
    return Encoded(codes, torch.full((size.scales,), exponent, dtype=torch.uint8))


def _half(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float16).view(torch.uint8)


_SIXTEEN = math.sqrt((16**2 - 1) / 12)  # the deviation of 0..15
# Every scale and minimum of q4_k is 32: the low six bits of the first eight bytes, and 2 in the high two of each.
_K_SCALES = torch.tensor([32 | 128] * 8 + [0] * 4, dtype=torch.uint8)
# What a block holds besides its codes, for weights of a deviation: ggml_tiles.FIELDS.
_SCALES: dict[str, Callable[[float], tuple[Tensor, ...]]] = {
    "q4_0": lambda deviation: (_half(deviation / _SIXTEEN),),
    "q4_1": lambda deviation: (_half(deviation / _SIXTEEN), _half(-7.5 * deviation / _SIXTEEN)),
    "q8_0": lambda deviation: (_half(deviation / math.sqrt((256**2 - 1) / 12)),),
    "q4_k": lambda deviation: (
        _half(deviation / _SIXTEEN / 32), _half(7.5 * deviation / _SIXTEEN / 32), _K_SCALES,
    ),
    "q6_k": lambda deviation: (
        torch.full((16,), 64, dtype=torch.uint8), _half(deviation / math.sqrt((64**2 - 1) / 12) / 64),
    ),
}  # fmt: skip


def _draw_ggml(name: str) -> Draw:
    def draw(rng: np.random.Generator, shape: tuple[int, int], deviation: float) -> Encoded:
        codes = _bytes(rng, sizes(name, shape).codes)
        if name == "q8_0":
            _clear_padding(codes, shape, 4, Q8_OFFSET)
        elif name == "q6_k":
            tiles = codes.view(-(-shape[0] // ROWS), -1, GROUP // 8 + GROUP // 16, ROWS, 4)
            _clear_lines(tiles[:, :, : GROUP // 8], shape, 0)
            _clear_lines(tiles[:, :, GROUP // 8 :], shape, 0)
        else:
            _clear_padding(codes, shape, 8, 0)
        block = torch.cat(_SCALES[name](deviation))
        scales = block.expand(shape[0], -(-shape[1] // NATIVE_BLOCKS[name].columns), -1)
        return Encoded(codes, ggml_tiles.tile_scales(scales, name))

    return draw


_DRAWS: dict[str, Draw] = {
    "q8": _draw_q8,
    "q4": _draw_q4,
    "mxfp4": _draw_mxfp4,
    **{name: _draw_ggml(name) for name in _SCALES},
}
