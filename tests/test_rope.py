"""Rotary positions: rotations by hand, both pairings, and each scaling against its formula spelled out anew."""

import math

import pytest
import torch

from fewfire.config import RopeConfig, RopeScaling
from fewfire.errors import ConfigError
from fewfire.model.rope import cos_sin, frequencies, rotate, yarn_mscale


def turn(x, position, rope):
    cos, sin = cos_sin(rope, torch.tensor([[position]]), position + 1)
    return rotate(torch.tensor(x).view(1, 1, 1, -1), cos, sin, rope.pairing).flatten()


def test_half_pairing_by_hand():
    got = turn([1.0, 2.0, 3.0, 4.0, 9.0], 2, RopeConfig(100.0, 4))  # frequencies 1, 0.1; the fifth passes through
    a, b = 2.0, 0.2
    want = [
        math.cos(a) - 3 * math.sin(a),
        2 * math.cos(b) - 4 * math.sin(b),
        3 * math.cos(a) + math.sin(a),
        4 * math.cos(b) + 2 * math.sin(b),
        9.0,
    ]
    torch.testing.assert_close(got, torch.tensor(want))


def test_interleaved_pairing_by_hand():
    got = turn([1.0, 2.0, 3.0, 4.0], 2, RopeConfig(100.0, 4, "interleaved"))
    a, b = 2.0, 0.2
    want = [
        math.cos(a) - 2 * math.sin(a),
        2 * math.cos(a) + math.sin(a),
        3 * math.cos(b) - 4 * math.sin(b),
        4 * math.cos(b) + 3 * math.sin(b),
    ]
    torch.testing.assert_close(got, torch.tensor(want))


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_dot_products_depend_on_distance_only(pairing):
    torch.manual_seed(0)
    rope = RopeConfig(1e4, 16, pairing)
    q, k = torch.randn(16).tolist(), torch.randn(16).tolist()
    near = torch.dot(turn(q, 7, rope), turn(k, 3, rope))
    far = torch.dot(turn(q, 107, rope), turn(k, 103, rope))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)


def test_linear_and_dynamic():
    base = frequencies(RopeConfig(1e4, 8), 10)[0]
    linear = RopeConfig(1e4, 8, scaling=RopeScaling("linear", 4.0))
    torch.testing.assert_close(frequencies(linear, 10)[0], base / 4)
    dynamic = RopeConfig(1e4, 8, scaling=RopeScaling("dynamic", 2.0, original_context=16))
    torch.testing.assert_close(frequencies(dynamic, 16)[0], base)
    theta = 1e4 * (2 * 24 / 16 - 1) ** (8 / 6)
    torch.testing.assert_close(frequencies(dynamic, 24)[0], torch.tensor([theta ** (-i / 4) for i in range(4)]))


def yarn(dim=64, theta=1e4, **more):
    return RopeConfig(theta, dim, scaling=RopeScaling("yarn", 40.0, original_context=4096, **more))


def test_yarn_keeps_high_frequencies_and_divides_low_ones():
    got, factor = frequencies(yarn(), 1)
    base = frequencies(RopeConfig(1e4, 64), 1)[0]
    low = math.floor(64 * math.log(4096 / (32 * 2 * math.pi)) / (2 * math.log(1e4)))
    high = math.ceil(64 * math.log(4096 / (2 * math.pi)) / (2 * math.log(1e4)))
    assert (low, high) == (10, 23)
    torch.testing.assert_close(got[: low + 1], base[: low + 1])
    torch.testing.assert_close(got[high:], base[high:] / 40)
    middle = (16 - low) / (high - low)
    torch.testing.assert_close(got[16], base[16] / 40 * middle + base[16] * (1 - middle))
    assert factor == pytest.approx(0.1 * math.log(40) + 1)


def test_yarn_attention_factors():
    assert frequencies(yarn(attention_factor=1.5), 1)[1] == 1.5
    assert frequencies(yarn(mscale=1.0, mscale_all_dim=1.0), 1)[1] == 1.0
    ratio = (0.1 * 0.707 * math.log(40) + 1) / (0.1 * math.log(40) + 1)
    assert frequencies(yarn(mscale=0.707, mscale_all_dim=1.0), 1)[1] == pytest.approx(ratio)
    assert yarn_mscale(1.0) == 1.0


def test_yarn_without_truncation_moves_the_ramp():
    assert not torch.equal(frequencies(yarn(truncate=False), 1)[0], frequencies(yarn(), 1)[0])


def test_llama3_has_three_bands():
    scaling = RopeScaling("llama3", 8.0, original_context=8192, low_freq_factor=1.0, high_freq_factor=4.0)
    got, factor = frequencies(RopeConfig(5e5, 128, scaling=scaling), 1)
    base = frequencies(RopeConfig(5e5, 128), 1)[0]
    wavelength = 2 * math.pi / base
    short, long = wavelength < 8192 / 4, wavelength > 8192
    torch.testing.assert_close(got[short], base[short])
    torch.testing.assert_close(got[long], base[long] / 8)
    smooth = (8192 / wavelength - 1) / 3
    want = (1 - smooth) * base / 8 + smooth * base
    torch.testing.assert_close(got[~short & ~long], want[~short & ~long])
    assert (~short & ~long).any() and factor == 1.0


def test_longrope_switches_with_length():
    scaling = RopeScaling("longrope", 4.0, original_context=32, short_factor=(1.0, 2.0), long_factor=(3.0, 4.0))
    rope = RopeConfig(1e4, 4, scaling=scaling)
    base = frequencies(RopeConfig(1e4, 4), 1)[0]
    short, factor = frequencies(rope, 32)
    torch.testing.assert_close(short, base / torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(frequencies(rope, 33)[0], base / torch.tensor([3.0, 4.0]))
    assert factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(32)))
    scaled = RopeScaling(
        "longrope", 4.0, 32, short_factor=(1.0, 2.0), long_factor=(3.0, 4.0), short_mscale=1.1, long_mscale=1.3
    )
    rope = RopeConfig(1e4, 4, scaling=scaled)
    assert (frequencies(rope, 32)[1], frequencies(rope, 33)[1]) == (1.1, 1.3)


def test_unknown_scaling_is_refused():
    with pytest.raises(ConfigError, match="rope scaling \\(bent\\) is not known"):
        frequencies(RopeConfig(1e4, 4, scaling=RopeScaling("bent", 1.0)), 1)
