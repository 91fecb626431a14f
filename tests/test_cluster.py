"""Routing, placement, parallel layouts, a simulated day, and what is handed to serving engines."""

import json
import time

import pytest

from fewfire.config import RoutingProfile
from fewfire.errors import ConfigError, FormatError
from fewfire.families import published
from fewfire.plan import links, plan
from fewfire.plan.calibrate import calibrate, compare, parse_measured
from fewfire.plan.fit import fit
from fewfire.plan.handover import hand_over, placement_map
from fewfire.plan.hardware import load_catalogue, parse_hardware
from fewfire.plan.memory import choose_formats
from fewfire.plan.placement import place
from fewfire.plan.profile import profile_json, read_profile
from fewfire.plan.simulate import Traffic, simulate_day
from fewfire.plan.speed import decode_step
from fewfire.plan.unique import Routed, max_active_per_device, placement_gain, uniform_max_active
from fewfire.plan.workload import Assumptions, Layout, Workload

CATALOGUE = load_catalogue()

# How often each expert of OLMoE's layer 15 was among the top 8 on code (allenai/OLMoE, commit 357454f, Apache-2.0).
GITHUB_15 = (
    30851, 83461, 5138, 16586, 4868, 33605, 37057, 4311, 117339, 31489, 2962, 27414, 23030, 2944, 186, 2993, 30959,
    114849, 27969, 34112, 10924, 5249, 17648, 4997, 35041, 437, 3254, 1957, 2757, 66115, 117729, 28240, 41667,
    42669, 13924, 36355, 96104, 33668, 2200, 1077, 22484, 24101, 14436, 35733, 82812, 300, 2673, 3230, 1880, 677,
    12956, 4555, 21447, 31223, 2354, 4102, 3224, 38399, 98591, 802, 62787, 1355, 1947, 4965,
)  # fmt: skip


def workload(name, quant="native", context=4096, profile=None):
    config = published.load(name)
    return Workload.of(config, choose_formats(config, quant), context, profile)


@pytest.fixture(scope="module")
def olmoe_profile():
    return RoutingProfile(64, 8, 208_896, {15: tuple(GITHUB_15)})


def test_measured_unique_experts_of_olmoe_on_code(olmoe_profile):
    routed = Routed.of(64, 8, olmoe_profile)
    assert Routed(64, 8).unique(32) == pytest.approx(63.1, abs=0.05)
    assert routed.unique(32) == pytest.approx(44.4, abs=0.05)
    assert routed.unique(1) == pytest.approx(8)
    assert max(olmoe_profile.counts[15]) * 64 / sum(olmoe_profile.counts[15]) == pytest.approx(4.51, abs=0.01)


def test_a_profile_makes_decode_faster_and_the_difference_is_shown(olmoe_profile):
    made = plan("olmoe-1b-7b", hardware="H100", batch=32, routing=olmoe_profile)
    plain = plan("olmoe-1b-7b", hardware="H100", batch=32)
    assert made.machines[0].decode.tokens_per_s > plain.machines[0].decode.tokens_per_s
    row = next(row for row in made.to_json()["unique_experts"] if row["batch"] == 32)
    assert row["measured"] < row["uniform"]


def test_hot_experts_cached_answer_more_than_their_share(olmoe_profile):
    routed = Routed.of(64, 8, olmoe_profile)
    assert Routed(64, 8).hit_rate(16) == 0.25
    assert routed.hit_rate(16) > 0.5 and routed.hit_rate(64) == pytest.approx(1) and routed.hit_rate(0) == 0


# --------------------------------------------------------------------------------------------------- profiles


def test_profiles_come_back_as_they_went(tmp_path, olmoe_profile):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(profile_json(olmoe_profile)))
    assert read_profile(path) == olmoe_profile


def test_domains_are_chosen_or_summed(tmp_path):
    path = tmp_path / "counts.json"
    domains = {"a": [[3, 1], [2, 2]], "b": [[1, 3], [4, 0]]}
    path.write_text(json.dumps({"models": {"m": {"num_experts": 2, "top_k": 1, "layers": [0, 7], "domains": domains}}}))
    assert read_profile(path, domain="a").counts == {0: (3, 1), 7: (2, 2)}
    assert read_profile(path).counts == {0: (4, 4), 7: (6, 2)}
    assert read_profile(path).num_tokens == 8
    with pytest.raises(ConfigError, match="it holds a, b"):
        read_profile(path, domain="c")
    with pytest.raises(ConfigError, match="it holds m"):
        read_profile(path, model="other")


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"num_experts": 2, "top_k": 1, "num_tokens": 4},
        {"num_experts": 2, "top_k": 1, "num_tokens": 4, "counts": {"0": [1, -1]}},
        {"num_experts": 2, "top_k": 1, "num_tokens": 4, "counts": {"0": [1, 1, 1]}},
        {"num_experts": 2, "top_k": 1, "num_tokens": 4, "counts": {"x": [1, 1]}},
        {"num_experts": True, "top_k": 1, "num_tokens": 4, "counts": {"0": [1]}},
        {"models": {}},
        {"models": {"m": {"num_experts": 2, "top_k": 1, "layers": [0], "domains": {"a": [[1, 1], [1, 1]]}}}},
    ],
)
def test_bad_profiles_name_the_record(tmp_path, document):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(document))
    with pytest.raises(FormatError, match="bad.json"):
        read_profile(path)


# -------------------------------------------------------------------------------------------------- placement


@pytest.mark.parametrize("devices, replicas", [(1, 0), (8, 0), (8, 8), (16, 16), (64, 64)])
def test_balanced_placement_holds_every_expert_in_equal_slots(olmoe_profile, devices, replicas):
    shares = Routed.of(64, 8, olmoe_profile).layers[0]
    placed = place(shares, devices, replicas=replicas)
    assert {len(device) for device in placed.devices} == {(64 + replicas) // devices}
    assert set(placed.physical_to_logical) == set(range(64))
    assert all(len(set(device)) == len(device) for device in placed.devices)
    assert placed.imbalance(shares) <= place(shares, devices, balance=False).imbalance(shares) + 1e-9


def test_copies_lower_the_busiest_device(olmoe_profile):
    gain = placement_gain(Routed.of(64, 8, olmoe_profile), 16, 64)
    assert gain.imbalance_in_order > 1.3 > 1.05 > gain.imbalance_balanced
    assert gain.awake_in_order > 0 and gain.replicas == 16


def test_slots_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="use 4 replicas"):
        place([1.0] * 60, 8)


def test_the_busiest_device_wakes_more_than_the_mean():
    mean = Routed(256, 8).unique(64) / 32
    assert mean < uniform_max_active(256, 8, 64, 32) <= 8
    assert uniform_max_active(256, 8, 64, 1) == pytest.approx(Routed(256, 8).unique(64))
    assert max_active_per_device([[0.5], [0.5]]) == pytest.approx(0.75)
    wide = [uniform_max_active(experts, 2, 256, 8) / (experts / 8) for experts in (4096, 4104, 131_072)]
    assert wide[0] == pytest.approx(wide[1], rel=0.1) and 0 < wide[2] < 0.01


# ---------------------------------------------------------------------------------------------------- layouts


def test_mla_cache_is_repeated_by_tensor_parallel_and_not_by_data_parallel():
    """DeepSeek-V3 FP8 on 8 x H200 at 4k: tensor parallel holds about 167 sequences, data-parallel attention 1,065."""
    work, system = workload("deepseek-v3"), parse_hardware("8xH200", CATALOGUE)
    assert fit(work, system, Layout(8), 1).max_batch == pytest.approx(167, rel=0.05)
    assert fit(work, system, Layout(data=8), 1).max_batch == pytest.approx(1065, rel=0.05)


def test_gqa_cache_is_split_by_at_most_its_kv_heads():
    work = workload("mixtral-8x7b")
    per_eight = fit(work, parse_hardware("8xH100", CATALOGUE), Layout(8), 1).max_batch
    per_sixteen = fit(work, parse_hardware("16xH100", CATALOGUE), Layout(16), 1).max_batch
    assert work.cache_shards == 8 and per_sixteen < per_eight * 1.2


def test_links_between_nodes_cost_more_than_inside():
    work, assume = workload("deepseek-v3"), Assumptions()
    inside = links.all_to_all_seconds(work, parse_hardware("8xH100", CATALOGUE), Layout(data=8), 64, assume)
    across = links.all_to_all_seconds(work, parse_hardware("16xH100", CATALOGUE), Layout(data=16), 64, assume)
    assert across > 3 * inside
    assert links.all_to_all_seconds(work, parse_hardware("H100", CATALOGUE), Layout(), 64, assume) == 0


def test_the_verdict_says_one_node_or_several():
    assert plan("deepseek-v3", hardware="8xH200").verdict.startswith("single node")
    several = plan("deepseek-v3", hardware="8xH100")
    assert several.verdict.startswith("multi-node: 2 nodes")
    assert several.to_json()["hardware"][0]["devices"] == 16


# ---------------------------------------------------------------------------------------------------- the day


def test_ten_thousand_requests_on_a_thousand_devices_take_seconds():
    work, system = workload("deepseek-v3"), parse_hardware("1000xH200", CATALOGUE)
    start = time.process_time()
    day = simulate_day(work, system, Layout(8), 125, Traffic(10_000))
    assert time.process_time() - start < 10
    assert day.devices == 1000 and day.replicas == 125
    assert day.first_token_s["p50"] <= day.first_token_s["p90"] <= day.first_token_s["p99"]


def test_a_lone_request_takes_its_prefill_and_its_steps():
    work, system = workload("mixtral-8x7b"), parse_hardware("2xH100", CATALOGUE)
    day = simulate_day(work, system, Layout(2), 1, Traffic(1, prompt_tokens=1000, answer_tokens=100, sigma=0.0))
    step = decode_step(work.at(1050), system, Layout(2), 1, Assumptions())
    assert day.token_s["p50"] == pytest.approx(step.seconds, rel=0.01)
    assert day.total_s["p50"] == pytest.approx(day.first_token_s["p50"] + 99 * step.seconds, rel=0.01)


def test_more_load_waits_longer_and_every_token_is_made():
    work, system = workload("mixtral-8x7b"), parse_hardware("2xH100", CATALOGUE)
    traffic = [Traffic(requests, peak=1.0) for requests in (100, 100_000)]
    calm, busy = (simulate_day(work, system, Layout(2), 1, each) for each in traffic)
    assert busy.total_s["p50"] > calm.total_s["p50"] and busy.busy_frac > calm.busy_frac
    asked = sum(answer for _, _, answer in traffic[1].draw())
    assert busy.output_tokens_per_s * busy.makespan_s == pytest.approx(asked)


def test_the_same_seed_gives_the_same_day():
    work, system = workload("olmoe-1b-7b"), parse_hardware("H100", CATALOGUE)
    days = [simulate_day(work, system, Layout(), 2, Traffic(500, seed=3)) for _ in range(2)]
    assert days[0] == days[1]


def test_a_copy_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="cannot hold a copy"):
        simulate_day(workload("deepseek-v3"), parse_hardware("8xH100", CATALOGUE), Layout(8), 1, Traffic(10))


# ------------------------------------------------------------------------------------------------ calibration


def test_two_points_calibrate_the_third():
    """Qwen3-235B in 4 bits on 2 x DGX Spark: batch 1 and 4 fix time and share, batch 2 follows within 10 %."""
    work, system, layout = (
        workload("qwen3-235b-a22b", "q4_0", 2048),
        parse_hardware("2xDGX Spark", CATALOGUE),
        Layout(2),
    )
    fitted = calibrate(work, system, layout, {1: 17.0, 4: 36.4}, Assumptions())
    for point in compare(work, system, layout, {1: 17.0, 2: 24.1, 4: 36.4}, fitted):
        assert point.predicted == pytest.approx(point.measured, rel=0.10)


def test_one_point_calibrates_itself():
    work, system = workload("gpt-oss-120b", "mxfp4", 7600), parse_hardware("Strix Halo", CATALOGUE)
    fitted = calibrate(work, system, Layout(), {1: 30.0}, Assumptions())
    assert compare(work, system, Layout(), {1: 30.0}, fitted)[0].predicted == pytest.approx(30.0, rel=0.01)


def test_a_point_above_its_roof_is_flagged_not_fitted():
    """gpt-oss-120b on DGX Spark, 57-60 tokens/s published for bf16 attention, whose roof is 54.6."""
    work, system = workload("gpt-oss-120b", context=1024), parse_hardware("DGX Spark", CATALOGUE)
    assert compare(work, system, Layout(), {1: 58.0}, Assumptions())[0].above_roof
    with pytest.raises(ConfigError, match="above its roof"):
        plan("gpt-oss-120b", context=1024, hardware="DGX Spark", measured="58")


@pytest.mark.parametrize("text", ["", "fast", "1=x", "a=3"])
def test_bad_measurements_are_refused(text):
    with pytest.raises(ConfigError, match="measured"):
        parse_measured(text)


# --------------------------------------------------------------------------------------------------- hand-over


def test_launch_commands_of_one_node():
    handed = plan("mixtral-8x7b", hardware="2xH100", context=8192).hand_over()
    assert handed.vllm[0].startswith("vllm serve mistralai/Mixtral-8x7B-v0.1 --max-model-len 8192")
    assert len(handed.vllm) == len(handed.sglang) == 1 and handed.placement is None


def test_launch_commands_of_several_nodes_and_the_placement(olmoe_profile):
    config, system = published.load("olmoe-1b-7b"), parse_hardware("16xH100", CATALOGUE)
    handed = hand_over(
        "m", config, system, Layout(data=16), quant="native", context=4096, max_sequences=64, profile=olmoe_profile
    )
    assert len(handed.vllm) == len(handed.sglang) == 2
    assert "--enable-expert-parallel" in handed.vllm[0] and "num_redundant_experts" in handed.vllm[0]
    assert "--headless" in handed.vllm[1] and "--node-rank 1" in handed.sglang[1]
    assert "--init-expert-location expert_location.json" in handed.sglang[0]
    rows = handed.placement["physical_to_logical_map"]
    assert len(rows) == 16 and {len(row) for row in rows} == {80}
    assert all(set(row) == set(range(64)) for row in rows)


def test_layers_without_counts_keep_their_order_and_are_told(olmoe_profile):
    placement, missing = placement_map(published.load("olmoe-1b-7b"), olmoe_profile, 8, 8)
    assert missing == tuple(range(15))
    assert placement["physical_to_logical_map"][0] == [slot % 64 for slot in range(72)]
    assert placement["physical_to_logical_map"][15] != placement["physical_to_logical_map"][0]


# -------------------------------------------------------------------------------------------------- streaming


def test_a_budget_streams_experts_from_disk():
    """Qwen3-30B in 4 bits within 8 GiB: about 0.55 GB a token from disk with uniform routing."""
    made = plan("qwen3-30b-a3b", quant="q4", hardware="laptop-32", memory="8GiB", context=512)
    stream = made.budget_streaming
    assert stream.shares[-1] * stream.expert_bytes == pytest.approx(0.55e9, rel=0.15)
    assert 0 < stream.tokens_per_s < made.machines[0].decode.tokens_per_s


def test_a_budget_below_the_floor_does_not_stream():
    made = plan("mixtral-8x7b", quant="q4", hardware="laptop-16", memory="1GiB")
    assert made.to_json()["memory"]["budget_suffices"] is False and made.budget_streaming is None


def test_a_laptop_that_cannot_hold_it_streams_and_a_card_uses_its_hosts_memory():
    laptop, card = plan("mixtral-8x7b", quant="q4", hardware="laptop-16,RTX 4090").machines
    assert not laptop.fits and laptop.streaming.tiers[-1].name == "disk" and laptop.streaming.hit_rate < 1
    assert [tier.name for tier in card.streaming.tiers] == ["memory", "host RAM", "disk"]
    assert card.streaming.hit_rate == pytest.approx(1)


def test_a_profile_raises_the_hit_rate(olmoe_profile):
    plain = plan("olmoe-1b-7b", quant="q4", hardware="laptop-16", memory="2GiB")
    measured = plan("olmoe-1b-7b", quant="q4", hardware="laptop-16", memory="2GiB", routing=olmoe_profile)
    assert measured.budget_streaming.hit_rate > plain.budget_streaming.hit_rate
    assert measured.budget_streaming.uniform_shares == pytest.approx(plain.budget_streaming.shares)
