"""Quantized products against their plain reference, on every instruction set, over odd sizes; and what must not matter:
the batch, the threads, the instruction set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewfire import formats, kernels
from fewfire.errors import ConfigError
from fewfire.kernels import reference
from fewfire.kernels.isa import native
from fewfire.kernels.linear import NATIVE_FORMATS

ISAS = [each for each in kernels.supported_isas() if each != "reference"]
QUANTIZED = ("q8", "q4", "mxfp4", *formats.GGML_FORMATS)
if not ISAS:
    pytest.skip("the extension is not built", allow_module_level=True)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=ISAS)
def isa(request, restore_isa):
    kernels.set_isa(request.param)
    return request.param


@pytest.mark.parametrize("columns", [1, 127, 128, 129, 640])
def test_activations_are_quantized_as_the_reference_does(isa, columns):
    x = draw(5, columns)
    x[1] = 0
    x[2] *= 1e-33
    x[3] *= 1e30
    x[4, columns // 2] = 127 * x[4].abs().max()
    made, sums = kernels.quantize_activations(x)
    for ours, expected in zip(made, reference.quantize_activations(x), strict=True):
        assert torch.equal(ours, expected)
    groups = made.scales_TG.shape[1]
    for part, run in zip(sums.split((groups, 4 * groups, 8 * groups), dim=1), (128, 32, 16), strict=True):
        assert torch.equal(part, made.codes_TGk.flatten(1).int().unflatten(1, (-1, run)).sum(dim=-1, dtype=torch.int32))


def draw_outliers(tokens, columns, seed=0):
    """Numbers of which a few exceed the others by any factor, alone or in company."""
    x, rng = draw(tokens, columns, seed=seed), torch.Generator().manual_seed(seed)
    factors = torch.tensor((2.0, 10.0, 200.0, 1e4, 1e-3))[torch.randint(0, 5, x.shape, generator=rng)]
    return torch.where(torch.rand(x.shape, generator=rng) < 0.02, x * factors, x)


@pytest.mark.parametrize("columns", [1, 3, 130, 1000])
def test_outliers_have_codes_of_fifteen_bits(isa, columns):
    x = draw_outliers(9, columns)
    x[0, 0], x[1, columns // 2], x[2, -1] = -400, 1e9, 3
    made, _ = kernels.quantize_activations(x)
    expected = reference.quantize_activations(x)
    assert all(torch.equal(*pair) for pair in zip(made, expected, strict=True))
    assert bool(made.high_TGk.any()) and int(made.high_TGk.int().abs().max()) <= 126
    integers = made.codes_TGk.int() + 128 * made.high_TGk.int()
    values = (integers * made.scales_TG[..., None]).flatten(1)[:, :columns]
    steps = made.scales_TG.repeat_interleave(128, dim=1)[:, :columns]
    assert bool(((values - x).abs() <= 0.51 * steps).all()), "half a step at most, outliers too"


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("tokens", [1, 3, 7, 20])
def test_products_of_outliers_are_the_reference_bit_for_bit(isa, name, tokens):
    for rows, columns in ((1, 1), (17, 130), (81, 700), (70, 2000)):
        weight, x = formats.encode(draw(rows, columns, seed=rows), name), draw_outliers(tokens, columns, seed=tokens)
        ours = kernels.linear(x, weight, name, (rows, columns))
        assert torch.equal(ours, reference.linear(x, weight, name, (rows, columns))), (rows, columns)


def test_what_is_no_number_stays_none(isa):
    x = draw(3, 200)
    x[0, 5], x[1, 150] = float("nan"), float("inf")
    weight = formats.encode(draw(16, 200), "q8")
    y = kernels.linear(x, weight, "q8", (16, 200))
    assert bool(torch.isnan(y[:2]).all()) and bool(torch.isfinite(y[2]).all())


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("tokens", [0, 1, 2, 4, 5, 12, 13, 31])
def test_quantized_products_are_the_reference_bit_for_bit(isa, name, tokens):
    for rows, columns in ((1, 1), (16, 128), (17, 130), (40, 384), (81, 700)):
        weight = formats.encode(draw(rows, columns, seed=rows), name)
        x = draw(tokens, columns, seed=tokens)
        ours = kernels.linear(x, weight, name, (rows, columns))
        assert torch.equal(ours, reference.linear(x, weight, name, (rows, columns))), (rows, columns)


def draw_bytes(name, shape, seed=0):
    """Every bit drawn but those of float scales, which are small: codes and sub-scales that no encoder writes."""
    size, rng = formats.sizes(name, shape), torch.Generator().manual_seed(seed)
    codes, scales = (torch.randint(0, 256, (count,), dtype=torch.uint8, generator=rng) for count in size)
    floats, piece = {"q4_0": (64, 128), "q4_1": (128, 256), "q8_0": (64, 128), "q4_k": (32, 256), "q6_k": (16, 288)}[
        name
    ]
    pieces = scales.reshape(-1, piece)
    pieces[:, : 2 * floats] = (0.01 * torch.randn(pieces.shape[0], floats, generator=rng)).half().view(torch.uint8)
    return formats.Encoded(codes, scales)


@pytest.mark.parametrize("name", formats.GGML_FORMATS)
def test_any_bits_of_ggml_blocks_give_the_reference(isa, name):
    for rows, columns, tokens in ((33, 520, 1), (70, 640, 3), (70, 640, 9), (16, 256, 40)):
        weight, x = draw_bytes(name, (rows, columns), rows), draw(tokens, columns, seed=tokens)
        ours = kernels.linear(x, weight, name, (rows, columns))
        assert torch.equal(ours, reference.linear(x, weight, name, (rows, columns))), (rows, columns, tokens)


@pytest.mark.parametrize("name", NATIVE_FORMATS)
def test_a_row_that_is_read_is_the_row_decoded(isa, name):
    for shape in ((1, 1), (33, 200), (50, 700)):
        weight = draw_bytes(name, shape) if name in formats.GGML_FORMATS else formats.encode(draw(*shape), name)
        values, row = formats.decode(weight, name, shape), torch.empty(shape[1])
        for index in {0, shape[0] // 2, shape[0] - 1}:
            addresses = weight.codes.data_ptr(), weight.scales.data_ptr()
            native().read_row(NATIVE_FORMATS[name], *addresses, *shape, index, row.data_ptr())
            assert torch.equal(row, values[index]), (shape, index)


@pytest.mark.parametrize("name", QUANTIZED)
def test_extreme_codes_do_not_overflow(isa, name):
    """All codes at their limits: what sums of 16 bits would not hold."""
    size = formats.sizes(name, (16, 256))
    x = torch.cat((torch.ones(1, 256), -torch.ones(1, 256), torch.ones(5, 256)))
    for code in (0x00, 0x01, 0x77, 0xFF):
        scales = torch.full((size.scales,), 0x77 if name == "q4" else 0x40, dtype=torch.uint8)
        codes = torch.full((size.codes,), max(code, 1) if name == "q8" else code, dtype=torch.uint8)
        weight = formats.Encoded(codes, scales)
        for count in (1, 7):
            ours = kernels.linear(x[:count], weight, name, (16, 256))
            assert torch.equal(ours, reference.linear(x[:count], weight, name, (16, 256))), (code, count)


@settings(max_examples=50)
@given(
    name=st.sampled_from(tuple(NATIVE_FORMATS)),
    rows=st.integers(1, 70),
    columns=st.integers(1, 400),
    tokens=st.integers(1, 20),
    pick=st.integers(0, 19),
)
def test_a_token_alone_is_the_token_in_a_batch(name, rows, columns, tokens, pick):
    weight, x = formats.encode(draw(rows, columns), name), draw(tokens, columns, seed=1)
    whole = kernels.linear(x, weight, name, (rows, columns), threads=2)
    alone = kernels.linear(x[pick % tokens][None], weight, name, (rows, columns), threads=1)
    assert torch.equal(whole[pick % tokens], alone[0])


@pytest.mark.parametrize("name", NATIVE_FORMATS)
def test_every_instruction_set_gives_the_same_bits(name, restore_isa):
    weight, x, found = formats.encode(draw(50, 300), name), draw(9, 300), []
    for each in ISAS:
        kernels.set_isa(each)
        found.append(kernels.linear(x, weight, name, (50, 300)))
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("name", ["bf16", "f32"])
@pytest.mark.parametrize("columns", [1, 15, 64, 100, 333])
def test_plain_weights_give_the_product(isa, name, columns):
    values, x = draw(33, columns), draw(6, columns, seed=2)
    weight = formats.encode(values, name)
    expected = x.double() @ formats.decode(weight, name, (33, columns)).double().t()
    # a sum of `columns` products of float32 in any order
    torch.testing.assert_close(kernels.linear(x, weight, name, (33, columns)).double(), expected, rtol=1e-5, atol=1e-4)


def test_error_of_a_product_is_that_of_the_formats():
    values, x = draw(256, 1024), draw(16, 1024, seed=1)
    exact = x @ values.t()
    for name, most in (("q8", 0.013), ("q4", 0.082), ("q4_k", 0.082), ("q6_k", 0.022), ("f32", 1e-5)):
        ours = kernels.linear(x, formats.encode(values, name), name, (256, 1024))
        assert float((ours - exact).norm() / exact.norm()) < most, name


def test_what_does_not_fit_is_refused():
    weight = formats.encode(draw(16, 128), "q4")
    with pytest.raises(ConfigError, match="takes rows of 128"):
        kernels.linear(draw(2, 64), weight, "q4", (16, 128))
    with pytest.raises(ConfigError, match="1024"):
        kernels.linear(draw(2, 128), formats.Encoded(weight.codes[:-1], weight.scales), "q4", (16, 128))
    with pytest.raises(ConfigError, match="float32"):
        kernels.linear(draw(2, 128).double(), weight, "q4", (16, 128))


def test_many_small_calls_from_several_threads_agree():
    """The pool is one for all: calls wait for one another, none is lost."""
    from concurrent.futures import ThreadPoolExecutor

    weight, x = formats.encode(draw(64, 256), "q4"), draw(3, 256)
    expected = kernels.linear(x, weight, "q4", (64, 256), threads=1)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: kernels.linear(x, weight, "q4", (64, 256), threads=2), range(200)))
    assert all(torch.equal(each, expected) for each in results)
