"""Sampling rules by hand, cached decoding against full forwards, limits, seeds."""

from __future__ import annotations

import math

import pytest
import torch

from fewfire.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
    RouterConfig,
)
from fewfire.errors import ConfigError, FewfireError
from fewfire.model.decoder import Decoder
from fewfire.model.initialise import initialise
from fewfire.plan.limits import peak_rss_bytes
from fewfire.runtime.generate import Generation, Limits
from fewfire.runtime.sampling import (
    Sampler,
    Sampling,
    adjusted_logits,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
)

NONE = torch.tensor([], dtype=torch.int64)
VOCAB = 61


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.set_num_threads(1)
    attention = AttentionConfig(4, 2, 8, 8**-0.5, RopeConfig(1e4, 8), window=5)
    router = RouterConfig(4, 2, "softmax", renormalize=True, scale=1.0, select_bias=False)
    moe = MoEConfig(router, FeedForwardConfig(24, "silu", True))
    dense = FeedForwardConfig(48, "silu", True)
    layers = (LayerConfig(attention, moe), LayerConfig(attention, dense), LayerConfig(attention, moe))
    config = ModelConfig("fewfire", VOCAB, 32, layers, NormConfig("rms", 1e-6), False, 64)
    decoder = Decoder(config)
    initialise(decoder, 3, seed=3, std=0.3)
    return decoder.eval()


def produced(model: Decoder, prompt: list[int], **options) -> list[int]:
    sampling = Sampling(**{k: options.pop(k) for k in list(options) if k in Sampling.__dataclass_fields__})
    eos_ids = options.pop("eos_ids", ())
    return list(Generation(model, prompt, sampling=sampling, limits=Limits(**options), eos_ids=eos_ids))


# ------------------------------------------------------------------------------------------------- sampling rules


def test_rules_keep_what_they_say():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert keep_top_k(logits, 2).isfinite().tolist() == [False, True, False, True]
    assert keep_top_k(logits, 9).equal(logits)
    assert keep_top_p(logits, 0.69).isfinite().tolist() == [False, True, False, True]
    assert keep_top_p(logits, 0.71).isfinite().tolist() == [False, True, True, True]
    assert keep_top_p(logits, 1e-9).isfinite().tolist() == [False, True, False, False]
    assert keep_min_p(logits, 0.6).isfinite().tolist() == [False, True, False, True]
    assert keep_min_p(logits, 0.0).equal(logits)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once():
    logits = torch.tensor([2.0, -2.0, 3.0])
    assert penalise_repetition(logits, torch.tensor([0, 1, 1]), 2.0).tolist() == [1.0, -4.0, 3.0]
    assert logits.tolist() == [2.0, -2.0, 3.0]


def test_rules_agree_with_transformers():
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    generator = torch.Generator().manual_seed(0)
    seen = torch.tensor([[1, 5, 5, 40]])
    for temperature, top_k, top_p, min_p in [(0.7, 20, 0.9, 0.02), (1.5, 5, 0.5, 0.3), (1.0, 60, 0.99, 0.001)]:
        logits = torch.randn(VOCAB, generator=generator) * 3
        theirs = RepetitionPenaltyLogitsProcessor(1.3)(seen, logits[None].clone())
        for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)):
            theirs = warper(seen, theirs)
        theirs = torch.softmax(MinPLogitsWarper(min_p)(seen, theirs)[0], dim=-1)
        sampling = Sampling(temperature, top_k, top_p, min_p, 1.3)
        ours = torch.softmax(adjusted_logits(logits, sampling, seen[0]), dim=-1)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)  # float32 softmax, other order of sums


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    sampler = Sampler(Sampling(temperature=1.0, seed=1))
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sampler.choose(probabilities.log())] += 1
    assert counts[1] == 0
    assert (counts / 4000 - probabilities).abs().max() < 0.03  # 4 sigma of a binomial with n = 4000


def test_greedy_takes_the_lower_id_of_equals_and_tiny_temperatures_do_not_overflow():
    logits = torch.tensor([1.0, 7.0, 7.0])
    assert Sampler(Sampling()).choose(logits) == 1
    assert Sampler(Sampling(temperature=1e-30, seed=0)).choose(torch.tensor([1.0, 9.0, 7.0])) == 1


def test_broken_logits_are_an_error():
    for bad in (math.nan, math.inf):
        with pytest.raises(FewfireError, match="NaN"):
            Sampler(Sampling()).choose(torch.tensor([0.0, bad]))


@pytest.mark.parametrize("temperature", [1e-320, 1e-300, 1e-40])
def test_a_tiny_temperature_takes_the_best(temperature):
    sampler = Sampler(Sampling(temperature=temperature, seed=1))
    assert [sampler.choose(torch.tensor([0.0, 3.0, -1e30])) for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize(
    "field, value",
    [("temperature", -1.0), ("temperature", math.nan), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.1), ("min_p", 1.0)]
    + [("min_p", -0.1), ("repetition_penalty", 0.0), ("repetition_penalty", 1e-320), ("seed", -1), ("seed", 2**63)],
)
def test_senseless_sampling_is_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        Sampling(**{field: value})


# ---------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("prompt", [[3, 14, 15, 9, 2, 6, 5], [7], [60, 1, 33], [8, 8, 8, 21, 50, 4, 4, 4, 4]], ids=len)
@pytest.mark.parametrize("prefill_chunk", [None, 1, 3, 512])
def test_greedy_equals_the_argmax_of_full_forwards(model, prefill_chunk, prompt):
    expected = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert produced(model, prompt, max_tokens=12, prefill_chunk=prefill_chunk) == expected[len(prompt) :]


def test_the_same_seed_gives_the_same_tokens(model):
    options = {"max_tokens": 20, "temperature": 1.2, "top_k": 30, "top_p": 0.95}
    first = produced(model, [1, 2], seed=5, **options)
    torch.manual_seed(99)
    assert produced(model, [1, 2], seed=5, **options) == first
    assert produced(model, [1, 2], seed=6, **options) != first


def test_an_unseeded_generation_says_its_seed(model):
    sampling = Sampling(temperature=1.0)
    generation = Generation(model, [1], sampling=sampling, limits=Limits(12))
    tokens = list(generation)
    assert produced(model, [1], max_tokens=12, temperature=1.0, seed=generation.sampler.seed) == tokens


def test_limits_and_reasons(model):
    def run(**options):
        eos_ids = options.pop("eos_ids", ())
        generation = Generation(model, [1, 2, 3], limits=Limits(**options), eos_ids=eos_ids)
        return list(generation), generation.measured

    tokens, measured = run(max_tokens=5)
    assert (len(tokens), measured.finish_reason, measured.new_tokens) == (5, "length", 5)
    assert measured.token_ids == tokens and measured.prompt_tokens == 3
    assert measured.prefill_tokens_per_s > 0 and measured.decode_tokens_per_s > 0
    assert measured.expert_calls >= 2 * (2 + 4 * 2)  # two MoE layers: prefill uses 2 or more, each decode step 2
    assert run(max_tokens=5, context=6)[0] == tokens[:3]
    assert run(max_tokens=5, context=6)[1].finish_reason == "context"
    assert run(max_tokens=0)[0] == []
    for eos_ids in ([tokens[2]], [59, tokens[2]]):
        stopped, measured = run(max_tokens=5, eos_ids=eos_ids)
        assert stopped == tokens[: tokens.index(tokens[2]) + 1] and measured.finish_reason == "stop"


@pytest.mark.parametrize(
    "prompt, limits, message",
    [
        ([], {}, "empty"),
        ([1, VOCAB], {}, "vocabulary"),
        ([1, -1], {}, "vocabulary"),
        ([1] * 9, {"context": 8}, "9 tokens"),
        ([1], {"context": 65}, "64"),
        ([1], {"context": 0}, "context"),
        ([1], {"max_tokens": -1}, "max_tokens"),
        ([1], {"prefill_chunk": 0}, "prefill_chunk"),
    ],
)
def test_impossible_requests_are_refused(model, prompt, limits, message):
    with pytest.raises(ConfigError, match=message):
        Generation(model, prompt, limits=Limits(**limits))


def test_peak_memory_is_plausible():
    assert 50 * 2**20 < peak_rss_bytes() < 2**40


def test_an_encoder_decoder_generates_as_transformers_does(tmp_path):
    import tiny_hub
    from oracle import reference
    from oracle.specs import SWITCH_SPECS

    from fewfire.runtime.load import load_module

    theirs = reference.make_model(SWITCH_SPECS["switch"])
    ours = load_module(tiny_hub.save(theirs, tmp_path / "model"))
    ids = reference.token_ids(11, "prompt")
    with torch.no_grad():
        expected = theirs.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)[0, 1:].tolist()
    generation = Generation(ours, ids[0].tolist(), limits=Limits(9))
    assert list(generation) == expected and generation.measured.prompt_tokens == 11
