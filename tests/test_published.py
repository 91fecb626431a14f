"""The published models: exact totals from the tensor tables, quotes, and the words for what is not published.

The totals were written down from what the hub stores, not computed here: that the tensor tables of our configurations
sum to them to the integer proves configurations and tables at once.
"""

from __future__ import annotations

from math import prod

import pytest

from fewfire import families
from fewfire.config import MoEConfig
from fewfire.errors import ConfigError
from fewfire.families import published

NAMES = """
switch-base-8 switch-base-16 switch-base-32 switch-base-64 switch-base-128 switch-base-256 switch-xxl switch-c-2048
moe-lstm-2017 mixtral-8x7b mixtral-8x22b deepseek-v2 deepseek-v2-lite deepseek-v3 deepseek-v3.2 glm-4.5 glm-4.5-air
glm-5 dbrx grok-1 qwen1.5-moe-a2.7b qwen2-57b-a14b qwen3-30b-a3b qwen3-235b-a22b qwen3-next-80b-a3b gpt-oss-20b
gpt-oss-120b olmoe-1b-7b llama-4-scout llama-4-maverick kimi-k2 minimax-m2 phi-3.5-moe granite-3.0-1b-a400m llama-2-7b
llama-2-13b llama-2-70b gpt2 smollm2-135m
""".split()

TOTALS = {
    "switch-base-8": 619_339_008,
    "switch-base-128": 7_415_217_408,
    "switch-xxl": 394_675_073_024,
    "switch-c-2048": 1_571_308_972_448,
    "moe-lstm-2017": 137_577_631_744 + 2 * 793_471 * 512,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_419_200,
    "deepseek-v3.2": 671_877_944_064,
    "glm-4.5": 352_797_829_024,
    "glm-4.5-air": 106_852_251_264,
    "glm-5": 743_911_218_432,
    "dbrx": 131_596_523_520,
    "grok-1": 315_684_820_992,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen2-57b-a14b": 57_408_658_944,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-next-80b-a3b": 79_674_391_296,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "olmoe-1b-7b": 6_919_161_856,
    "llama-4-scout": 107_769_861_120,
    "llama-4-maverick": 400_711_848_960,
    "kimi-k2": 1_026_408_232_448,
    "minimax-m2": 228_689_764_864,
    "phi-3.5-moe": 41_873_153_344,
    "granite-3.0-1b-a400m": 1_334_628_352,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "gpt2": 124_439_808,
    "smollm2-135m": 134_515_008,
}

# Main model and multi-token prediction together: what the hub's parameter count says.
WITH_MTP = {
    "deepseek-v3": 684_489_845_504,
    "deepseek-v3.2": 685_355_329_792,
    "glm-4.5": 358_337_791_296,
    "glm-4.5-air": 110_468_824_832,
    "glm-5": 753_864_139_008,
}


def total(name: str) -> int:
    return sum(prod(tensor.shape) for tensor in families.tensors(published.load(name)))


def test_every_name_is_there_and_no_other():
    assert list(published.names()) == NAMES


@pytest.mark.parametrize("name", TOTALS)
def test_hub_tensors_sum_to_the_exact_total(name):
    assert total(name) == TOTALS[name]


def test_the_table_quotes_the_same_exact_totals():
    known = {name: published.find(name).exact_total for name in NAMES}
    stated = {name: count for name, count in known.items() if count is not None}
    assert stated == {name: TOTALS[name] for name in stated}
    assert set(TOTALS) - set(stated) == {"switch-xxl"}  # summed to 395B by choice of its shape, not known exactly


@pytest.mark.parametrize("name", WITH_MTP)
def test_multi_token_prediction_explains_what_the_hub_stores_besides(name):
    assert total(name) + published.load(name).mtp.parameters == WITH_MTP[name]


def test_only_the_names_above_announce_multi_token_prediction():
    assert {name for name in NAMES if published.load(name).mtp is not None} == set(WITH_MTP)


@pytest.mark.parametrize("name", NAMES)
def test_configurations_survive_writing_and_reading(name):
    config = published.load(name)
    assert families.read_config(families.write_config(config)) == config


@pytest.mark.parametrize("name", NAMES)
def test_entries_agree_with_their_configurations(name):
    entry, config = published.find(name), published.load(name)
    assert entry.name == name and entry.title and entry.vendor
    assert entry.context in (config.max_context, None)
    assert (entry.active is None) == (entry.active_counts is None)
    assert config.is_moe == ("dense" not in entry.notes)


def test_the_largest_of_2017_matches_the_paper_without_embedding_and_softmax():
    config = published.load("moe-lstm-2017")
    assert total("moe-lstm-2017") - 2 * config.vocab_size * config.model_dim == 137_577_631_744
    moe = config.layers[0].ffn
    assert isinstance(moe, MoEConfig) and moe.router.branches == 256 and not moe.expert.gated


@pytest.mark.parametrize("name", ["gpt-4", "gemini-1.5", "claude", "Claude"])
def test_what_is_not_published_has_words_and_no_numbers(name):
    entry = published.find(name)
    assert isinstance(entry, published.NotPublished)
    assert not any(letter.isdigit() for letter in entry.words)
    with pytest.raises(ConfigError, match=entry.status):
        published.load(name)


def test_status_says_what_the_makers_say():
    assert {entry.name: entry.status for entry in published.not_published()} == {
        "gpt-4": "reported",
        "gemini-1.5": "confirmed",
        "claude": "not characterised",
    }


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("mixtral-8x7", "mixtral-8x7b"),
        ("deepseek-v3.1", "deepseek-v3"),
        ("qwen3-30b", "qwen3-30b-a3b"),
        ("gpt4", "gpt-4"),
    ],
)
def test_a_near_miss_gets_suggestions(typed, meant):
    with pytest.raises(ConfigError, match=meant):
        published.load(typed)


def test_a_far_miss_points_to_the_list():
    with pytest.raises(ConfigError, match="fewfire models"):
        published.find("zzzzzzzzzz")


def test_case_does_not_matter():
    assert published.load(" Mixtral-8x7B ") is published.load("mixtral-8x7b")
