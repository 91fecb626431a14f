"""Parameters to the integer, both conventions of 'active', FLOPs, and the sizes of bytes: the planner's arithmetic."""

import pytest

from fewfire.errors import ConfigError
from fewfire.families import published
from fewfire.plan.bare import bare_model
from fewfire.plan.count import count, decode_flops, prefill_flops
from fewfire.plan.memory import (
    bits_per_weight,
    cache_bytes,
    cache_read_bytes,
    choose_formats,
    floor_bytes,
    weight_bytes,
)
from fewfire.plan.shapes import model_tensors

# name: total, active with the input embedding, active without it (None: tied, the same)
EXACT = {
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248, 12_748_853_248),
    "mixtral-8x22b": (140_630_071_296, 39_161_468_928, 38_960_142_336),
    "deepseek-v2": (235_741_434_880, 21_375_800_320, 20_851_512_320),
    "deepseek-v2-lite": (15_706_484_224, 2_661_150_208, 2_451_435_008),
    "deepseek-v3": (671_026_419_200, 37_552_297_472, 36_625_618_432),
    "deepseek-v3.2": (671_877_944_064, 38_403_822_336, 37_477_143_296),
    "glm-4.5": (352_797_829_024, 33_632_266_144, 32_856_319_904),
    "glm-4.5-air": (106_852_251_264, 13_424_129_664, 12_803_372_672),
    "glm-5": (743_911_218_432, 41_784_728_832, 40_833_146_112),
    "dbrx": (131_596_523_520, 36_469_708_800, 35_853_146_112),
    "grok-1": (315_684_820_992, 83_756_587_008, None),
    "qwen1.5-moe-a2.7b": (14_315_784_192, None, None),
    "qwen2-57b-a14b": (57_408_658_944, None, None),
    "qwen3-30b-a3b": (30_532_122_624, None, None),
    "qwen3-235b-a22b": (235_093_634_560, None, None),
    "qwen3-next-80b-a3b": (79_674_391_296, None, None),
    "gpt-oss-20b": (20_914_757_184, None, None),
    "gpt-oss-120b": (116_829_156_672, None, None),
    "olmoe-1b-7b": (6_919_161_856, None, None),
    "llama-4-scout": (107_769_861_120, 17_172_894_720, 16_138_408_960),
    "llama-4-maverick": (400_711_848_960, 17_184_691_200, 16_150_205_440),
    "kimi-k2": (1_026_408_232_448, 32_861_500_928, 31_687_095_808),
    "minimax-m2": (228_689_764_864, 11_030_553_088, 10_415_956_480),
    "phi-3.5-moe": (41_873_153_344, 6_640_999_744, 6_509_665_600),
    "granite-3.0-1b-a400m": (1_334_628_352, 428_658_688, None),
    "llama-2-7b": (6_738_415_616, 6_738_415_616, None),
    "llama-2-13b": (13_015_864_320, 13_015_864_320, None),
    "llama-2-70b": (68_976_648_192, 68_976_648_192, 68_714_504_192),
    "gpt2": (124_439_808, 124_439_808, 124_439_808),
    "smollm2-135m": (134_515_008, 134_515_008, 134_515_008),
    "switch-base-8": (619_339_008, 222_977_280, None),
    "switch-base-128": (7_415_217_408, None, None),
    "switch-c-2048": (1_571_308_972_448, None, None),
}

# bytes a token in bf16 over layers that see everything
CACHE = {
    "mixtral-8x7b": 131_072,
    "mixtral-8x22b": 229_376,
    "deepseek-v2": 69_120,
    "deepseek-v2-lite": 31_104,
    "deepseek-v3": 70_272,
    "deepseek-v3.2": 70_272,
    "kimi-k2": 70_272,
    "glm-4.5": 376_832,
    "glm-4.5-air": 188_416,
    "glm-5": 89_856,
    "dbrx": 163_840,
    "grok-1": 262_144,
    "qwen1.5-moe-a2.7b": 196_608,
    "qwen2-57b-a14b": 57_344,
    "qwen3-30b-a3b": 98_304,
    "qwen3-235b-a22b": 192_512,
    "qwen3-next-80b-a3b": 24_576,
    "gpt-oss-20b": 24_576,
    "gpt-oss-120b": 36_864,
    "olmoe-1b-7b": 131_072,
    "llama-4-scout": 49_152,
    "llama-4-maverick": 49_152,
    "minimax-m2": 253_952,
    "phi-3.5-moe": 131_072,
    "granite-3.0-1b-a400m": 49_152,
    "llama-2-70b": 327_680,
    "gpt2": 36_864,
}


def load(name):
    return published.load(name)


@pytest.mark.parametrize("name", EXACT)
def test_counts_equal_the_published_integers(name):
    total, active, excluding = EXACT[name]
    counts = count(load(name))
    assert counts.total == total
    assert counts.total == counts.experts + counts.trunk == sum(counts.by_class.values())
    assert published.find(name).exact_total in (None, total)
    if active is not None:
        assert counts.active == active
    if excluding is not None:
        assert counts.active_excluding_embedding == excluding


@pytest.mark.parametrize("name", ["deepseek-v3", "mixtral-8x7b", "gpt2"])
def test_layers_counted_once_equal_every_tensor_summed(name):
    config = load(name)
    assert sum(spec.size for spec in model_tensors(config)) == count(config).total


@pytest.mark.parametrize("name", CACHE)
def test_cache_bytes_per_token(name):
    config = load(name)
    assert cache_bytes(config, 4096).per_token == CACHE[name]


def test_windowed_layers_stop_growing_and_full_ones_do_not():
    config = load("gpt-oss-120b")
    near, far = cache_bytes(config, 1024), cache_bytes(config, 2048)
    assert far.windowed == near.windowed == 18 * 2 * 8 * 64 * 2 * 128
    assert far.sequence - near.sequence == 36_864 * 1024


def test_linear_state_is_a_constant_per_sequence():
    config = load("qwen3-next-80b-a3b")
    assert cache_bytes(config, 1).state == cache_bytes(config, 99_999).state == 75_497_472


def test_indexer_keys_are_cached_and_cap_what_is_read():
    config = load("deepseek-v3.2")
    assert cache_bytes(config, 4096).index_per_token == 61 * 132
    assert cache_read_bytes(config, 32_768) == 61 * (576 * 2 * 2048 + 132 * 32_768)


def test_weight_bytes_of_published_checkpoints():
    mixtral = load("mixtral-8x7b")
    size = weight_bytes(mixtral, choose_formats(mixtral, "fp16")).total
    assert round(size / 1e9, 1) == 93.4 and round(size / 2**30, 1) == 87.0
    deepseek = load("deepseek-v3")
    native = weight_bytes(deepseek, choose_formats(deepseek)).total
    assert 672e9 < native < 675e9  # 688 GB on disk less 13.5 B of multi-token prediction


@pytest.mark.parametrize("name, gib", [("gpt-oss-120b", 60.77), ("gpt-oss-20b", 12.82)])
def test_mxfp4_is_on_experts_only(name, gib):
    config = load(name)
    assert weight_bytes(config, choose_formats(config)).total / 2**30 == pytest.approx(gib, abs=0.01)


def test_q4_is_the_default_pack():
    config = load("mixtral-8x7b")
    formats = choose_formats(config, "q4")
    assert (formats.experts, formats.trunk, formats.head, formats.router) == ("q4", "q8", "q8", "f32")
    assert bits_per_weight("q4") == 4.375 and bits_per_weight("q8") == 8.125 and bits_per_weight("mxfp4") == 4.25
    assert choose_formats(config, "q4", head="bf16", down="q8").down == "q8"


def test_unknown_format_is_refused_with_the_names():
    with pytest.raises(ConfigError, match=r"q3\) is not a format.*q4_k"):
        choose_formats(load("mixtral-8x7b"), "q3")


def test_decode_flops_are_twice_the_matmul_parameters_plus_attention():
    config = load("mixtral-8x7b")
    flops = decode_flops(config, 4096)
    norms = 65 * 4096
    assert flops.matmul == 2 * (count(config).active_excluding_embedding - norms)
    assert flops.attention == 32 * 4 * 32 * 128 * 4096
    assert flops.router / flops.total < 1e-4


def test_prefill_runs_the_head_once():
    config = load("mixtral-8x7b")
    one, two = prefill_flops(config, 1000), prefill_flops(config, 2000)
    head = 2 * 32_000 * 4096
    assert two - one > one - head  # attention grows with the square


def test_floor_holds_trunk_cache_and_two_layers_of_experts():
    config = load("mixtral-8x7b")
    formats = choose_formats(config, "q4")
    floor = floor_bytes(config, formats, 2048)
    weights = weight_bytes(config, formats)
    assert floor.table["trunk"] == weights.trunk
    assert floor.table["experts in flight"] == 4 * weights.per_expert
    assert floor.total < weights.total / 4


@pytest.mark.parametrize(
    "name, total, active", [("400b-a30b", 400e9, 30e9), ("30B", 30e9, 30e9), ("1t-a32b", 1e12, 32e9)]
)
def test_bare_sizes_are_taken_at_their_word(name, total, active):
    config, counts = bare_model(name)
    assert (counts.total, counts.active) == (total, active)
    assert counts.experts + counts.trunk == counts.total == sum(counts.by_class.values())
    assert count(config).total == pytest.approx(total, rel=0.01)
    assert count(config).active == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize("name", ["30b-a400b", "5k", "2000t"])
def test_absurd_bare_sizes_are_refused(name):
    with pytest.raises(ConfigError):
        bare_model(name)
