"""Every family's logits against transformers on tiny random checkpoints, and the proof that each term is seen."""

import pytest
import torch
from oracle import reference, subject
from oracle.specs import SPECS, SWITCH_SPECS

TOLERANCE = 1e-4  # absolute, on float32 logits of order 1; about 5e-6 is seen
ALL = {**SPECS, **SWITCH_SPECS}
_made = {}


@pytest.fixture
def pair(request, tmp_path_factory):
    """(oracle, our model) of one spec, made once for all its tests."""
    name = request.param
    if name not in _made:
        folder = tmp_path_factory.mktemp(name)
        run = reference.run_encoder_decoder if name in SWITCH_SPECS else reference.run
        oracle = run(name, ALL[name], folder)
        _made[name] = oracle, subject.load(folder)
    return _made[name]


def error(got, want):
    assert got.shape == want.shape and got.dtype == torch.float32
    return float((got - want).abs().max())


@pytest.mark.parametrize("pair", ALL, indirect=True)
def test_prefill(pair):
    oracle, model = pair
    assert 0.3 < float(oracle.prefill.std()) < 3  # else the tolerance means nothing
    assert error(subject.prefill(model, oracle), oracle.prefill) < TOLERANCE


@pytest.mark.parametrize("pair", ALL, indirect=True)
def test_decode_with_cache(pair):
    oracle, model = pair
    assert error(subject.decode(model, oracle), oracle.decode) < TOLERANCE


@pytest.mark.parametrize("pair", ALL, indirect=True)
def test_batch_with_padding(pair):
    oracle, model = pair
    assert error(subject.padded(model, oracle), oracle.padded) < TOLERANCE
