"""Weight formats: sizes, the meaning of every byte against a second reading of docs/formats.md, and the error."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewfire import formats
from fewfire.errors import ConfigError, FormatError
from fewfire.formats import Encoded, ggml, ggml_tiles
from fewfire.headers.gguf import GGML_BLOCKS
from fewfire.plan.memory import FORMATS, NATIVE_BLOCKS, bits_per_weight

TILED = ("q8", "q4", "mxfp4")
GGML = ("q4_0", "q4_1", "q8_0", "q4_k", "q6_k")
# Relative error of a normal distribution, measured, plus a tenth: a worse search or a wrong bit shows.
WORST = {"q8": 0.0072, "q4": 0.0815, "mxfp4": 0.1228, "q4_0": 0.0896, "q4_1": 0.0812, "q8_0": 0.0059,
         "q4_k": 0.0817, "q6_k": 0.0196, "bf16": 0.0019, "f32": 0.0}  # fmt: skip


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def bf16(raw):
    return struct.unpack("<f", b"\0\0" + bytes(raw))[0]


def read_q8(codes, scales, row, column, groups):
    """docs/formats.md, read a second time, one value at a time."""
    tile = row // 16 * groups + column // 128
    at = tile * 2048 + column % 128 // 4 * 64 + row % 16 * 4 + column % 4
    scale = tile * 32 + row % 16 * 2
    return (codes[at] - 128) * bf16(scales[scale : scale + 2])


BOOK = [-18, -15, -12, -10, -8, -6, -4, -2, 0, 2, 4, 6, 8, 11, 13, 16]


def read_q4(codes, scales, row, column, groups):
    tile = row // 16 * groups + column // 128
    byte = codes[tile * 1024 + column % 128 // 8 * 64 + row % 16 * 4 + column % 4]
    code = byte >> 4 if column % 8 >= 4 else byte & 15
    scale = bf16(scales[tile * 96 + row % 16 * 2 : tile * 96 + row % 16 * 2 + 2])
    (word,) = struct.unpack_from("<I", bytes(scales), tile * 96 + 32 + row % 16 * 4)
    step = word >> 4 * (column % 128 // 16) & 15
    return BOOK[code] * (step - 16 if step > 7 else step) * scale


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def read_mxfp4(codes, scales, row, column, groups):
    tile = row // 16 * groups + column // 128
    byte = codes[tile * 1024 + column % 128 // 8 * 64 + row % 16 * 4 + column % 4]
    code = byte >> 4 if column % 8 >= 4 else byte & 15
    exponent = scales[tile * 64 + column % 128 // 32 * 16 + row % 16]
    return E2M1[code & 7] * (-1 if code > 7 else 1) * 2.0 ** (exponent - 127)


def half(raw, at):
    return struct.unpack_from("<e", bytes(raw), at)[0]


def nibble(codes, row, column, groups, tile_bytes=1024):
    tile = row // 16 * groups + column // 128
    byte = codes[tile * tile_bytes + column % 128 // 8 * 64 + row % 16 * 4 + column % 4]
    return byte >> 4 if column % 8 >= 4 else byte & 15


def read_q4_0(codes, scales, row, column, groups):
    at = (row // 16 * groups + column // 128) * 128 + (column % 128 // 32 * 16 + row % 16) * 2
    return (nibble(codes, row, column, groups) - 8) * half(scales, at)


def read_q4_1(codes, scales, row, column, groups):
    at = (row // 16 * groups + column // 128) * 256 + (column % 128 // 32 * 16 + row % 16) * 2
    return nibble(codes, row, column, groups) * half(scales, at) + half(scales, at + 128)


def read_q8_0(codes, scales, row, column, groups):
    tile = row // 16 * groups + column // 128
    at = tile * 2048 + column % 128 // 4 * 64 + row % 16 * 4 + column % 4
    return (codes[at] - 128) * half(scales, tile * 128 + (column % 128 // 32 * 16 + row % 16) * 2)


def read_q4_k(codes, scales, row, column, groups):
    groups += groups % 2
    piece = (row // 16 * groups + column // 128) // 2 * 256
    words = struct.unpack_from("<48I", bytes(scales), piece + 64)
    own, low, third = (words[16 * word + row % 16] for word in range(3))
    j = column % 256 // 32
    if j < 4:
        scale, minimum = own >> 8 * j & 63, low >> 8 * j & 63
    else:
        scale = (third >> 8 * (j - 4) & 15) + 16 * (own >> 8 * (j - 4) + 6 & 3)
        minimum = (third >> 8 * (j - 4) + 4 & 15) + 16 * (low >> 8 * (j - 4) + 6 & 3)
    d, dmin = half(scales, piece + row % 16 * 2), half(scales, piece + 32 + row % 16 * 2)
    return np.float32(d * scale) * nibble(codes, row, column, groups) - np.float32(dmin * minimum)


def read_q6_k(codes, scales, row, column, groups):
    groups += groups % 2
    tile = row // 16 * groups + column // 128
    low = nibble(codes, row, column, groups, 1536)
    top = codes[tile * 1536 + 1024 + column % 128 // 16 * 64 + row % 16 * 4 + column % 4] >> column % 16 // 4 * 2 & 3
    at = tile // 2 * 288
    scale = struct.unpack_from("<b", bytes(scales), at + 32 + column % 256 // 16 * 16 + row % 16)[0]
    return np.float32(half(scales, at + row % 16 * 2) * scale) * (low + 16 * top - 32)


READERS = {"q8": read_q8, "q4": read_q4, "mxfp4": read_mxfp4, "q4_0": read_q4_0, "q4_1": read_q4_1,
           "q8_0": read_q8_0, "q4_k": read_q4_k, "q6_k": read_q6_k}  # fmt: skip


@pytest.mark.parametrize("name", (*TILED, *GGML))
def test_decode_is_what_the_document_says_byte_by_byte(name):
    shape, rng = (33, 200), np.random.default_rng(3)
    size = formats.sizes(name, shape)
    codes, scales = rng.integers(0, 256, size.codes, np.uint8), rng.integers(60, 68, size.scales, np.uint8)
    values = formats.decode(Encoded(torch.from_numpy(codes), torch.from_numpy(scales)), name, shape)
    codes, scales = codes.tolist(), scales.tolist()
    for row, column in [(0, 0), (0, 5), (15, 127), (16, 128), (32, 199), (7, 77), (31, 131), (20, 60), (9, 190)]:
        assert values[row, column] == np.float32(READERS[name](codes, scales, row, column, 2)), (row, column)


def draw_rows(name, rows, blocks, seed=1):
    """Rows of ggml blocks as GGUF files hold them: random bits, scales that are numbers."""
    block, rng = NATIVE_BLOCKS[name], np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks, block.num_bytes), np.uint8)
    if name == "mxfp4":
        raw[..., 0] = rng.integers(100, 150, (rows, blocks))
    for at in {"q4_1": (0, 2), "q4_k": (0, 2), "q6_k": (208,), "mxfp4": ()}.get(name, (0,)):
        raw[..., at : at + 2] = rng.normal(size=(rows, blocks, 1)).astype(np.float16).view(np.uint8)
    return torch.from_numpy(raw.reshape(rows, -1))


@pytest.mark.parametrize("name", (*GGML, "mxfp4"))
@pytest.mark.parametrize("rows", [1, 16, 21, 40])
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_ggml_blocks_decode_as_the_gguf_library_does(name, rows, blocks):
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    raw = draw_rows(name, rows, blocks)
    expected = torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType[name.upper()]))
    made = formats.transcode(raw, name)
    assert (made.codes.numel(), made.scales.numel()) == formats.sizes(name, expected.shape)
    ours = formats.decode(made, name, tuple(expected.shape))
    assert torch.equal(ours.view(torch.int32), expected.view(torch.int32))  # zeros with their signs


@pytest.mark.parametrize("name", GGML)
def test_tiles_lose_no_bit_of_ggml_blocks(name):
    raw = draw_rows(name, 37, 3)
    shape = (37, 3 * NATIVE_BLOCKS[name].columns)
    assert torch.equal(ggml_tiles.from_tiles(formats.transcode(raw, name), name, shape), raw)
    assert torch.equal(ggml.join(ggml.split(raw, name), name), raw)


def test_rows_are_transcoded_in_chunks_as_at_once():
    raw = draw_rows("q6_k", 700, 2)
    chunked, whole = formats.transcode(raw, "q6_k"), ggml_tiles.to_tiles(raw, "q6_k")
    assert torch.equal(chunked.codes, whole.codes) and torch.equal(chunked.scales, whole.scales)


def test_sizes_of_ggml_blocks_are_those_of_the_gguf_header():
    by_name = {name: (columns, num_bytes) for name, columns, num_bytes in GGML_BLOCKS.values()}
    for name, block in NATIVE_BLOCKS.items():
        assert by_name[name] == (block.columns, block.num_bytes) and block.rows == 1
    for name in GGML:  # tiles take not a bit more
        assert bits_per_weight(name) == 8 * NATIVE_BLOCKS[name].num_bytes / NATIVE_BLOCKS[name].columns


@pytest.mark.parametrize("name", formats.PACK_FORMATS)
def test_error_of_a_normal_distribution(name):
    values = draw(96, 1024)
    back = formats.decode(formats.encode(values, name), name, (96, 1024))
    assert float((back - values).norm() / values.norm()) <= WORST[name]


def test_q4_beats_equal_steps_at_fewer_bits():
    """Why it is what it is: less error than q4_0 (4.5 bits) on normal and on heavy-tailed weights, at 4.375."""
    for tail in (draw(64, 1024), draw(64, 1024) * torch.exp(0.5 * draw(1, 1024, seed=1))):
        error = {
            n: float((formats.decode(formats.encode(tail, n), n, (64, 1024)) - tail).norm()) for n in ("q4", "q4_0")
        }
        assert error["q4"] < 0.93 * error["q4_0"]


@given(
    name=st.sampled_from(formats.PACK_FORMATS),
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    power=st.sampled_from([-60, -20, 0, 20, 60]),
)
def test_any_shape_and_size_comes_back_with_the_planned_bytes(name, rows, columns, power):
    if name in GGML:
        power = max(-8, min(8, power))  # 16-bit scales reach no further
    values = draw(rows, columns, seed=rows, scale=2.0**power)
    encoded, size = formats.encode(values, name), formats.sizes(name, (rows, columns))
    assert (encoded.codes.numel(), encoded.scales.numel()) == size
    back = formats.decode(encoded, name, (rows, columns))
    assert back.shape == (rows, columns) and bool(torch.isfinite(back).all())
    # a group of few numbers may lie badly; no value is off by more than a third of the largest
    assert float((back - values).abs().max()) <= 0.34 * float(values.abs().max())
    block = FORMATS[name]
    assert size.total == -(-rows // block.rows) * -(-columns // block.columns) * block.num_bytes


@pytest.mark.parametrize("name", formats.PACK_FORMATS)
def test_zeros_stay_zero_and_nothing_overflows(name):
    values = torch.zeros(17, 260)
    assert not formats.decode(formats.encode(values, name), name, (17, 260)).any()
    values[3, 5] = 60000.0 if name in GGML else 2.55e38
    back = formats.decode(formats.encode(values, name), name, (17, 260))
    assert bool(torch.isfinite(back).all()) and float(back[3, 5]) == pytest.approx(float(values[3, 5]), rel=0.02)
    assert not back[4:].any()


def test_mxfp4_comes_back_exactly():
    rng = np.random.default_rng(5)
    size = formats.sizes("mxfp4", (32, 256))
    codes = torch.from_numpy(rng.integers(0, 256, size.codes, np.uint8))
    scales = torch.from_numpy(rng.integers(100, 150, size.scales, np.uint8))
    values = formats.decode(Encoded(codes, scales), "mxfp4", (32, 256))
    assert torch.equal(formats.decode(formats.encode(values, "mxfp4"), "mxfp4", (32, 256)), values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", formats.PACK_FORMATS)
def test_what_is_no_number_is_refused_by_name_and_place(name, bad):
    values = draw(20, 64)
    values[17, 3] = bad
    with pytest.raises(FormatError, match=r"layers\.3\.ffn\.up: holds .*(nan|inf).* in row 17, column 3"):
        formats.encode(values, name, record="layers.3.ffn.up")


def test_rows_can_be_decoded_apart():
    values = draw(50, 130)
    for name in formats.PACK_FORMATS:
        encoded = formats.encode(values, name)
        whole = formats.decode(encoded, name, (50, 130))
        assert torch.equal(formats.decode_rows(encoded, name, (50, 130), 16, 48), whole[16:48])
        assert torch.equal(formats.decode_rows(encoded, name, (50, 130), 32, 50), whole[32:])


def test_encoding_does_not_depend_on_how_rows_are_cut():
    values = draw(3000, 128)
    for name in (*TILED, *GGML):
        whole, part = formats.encode(values, name), formats.encode(values[2048:2064], name)
        size = formats.sizes(name, (2048, 128))
        assert torch.equal(whole.codes[size.codes : size.codes + part.codes.numel()], part.codes)
        assert torch.equal(whole.scales[size.scales : size.scales + part.scales.numel()], part.scales)


def test_wrong_byte_counts_and_names_are_refused():
    encoded = formats.encode(draw(16, 128), "q4")
    with pytest.raises(FormatError, match="expected 1024 and 96"):
        formats.decode(Encoded(encoded.codes[:-1], encoded.scales), "q4", (16, 128))
    with pytest.raises(ConfigError, match="fp8"):
        formats.encode(draw(16, 128), "fp8")
