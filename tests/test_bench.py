"""Measurements: what `bench` counts, what the planner says beside it, kernels alone, the sweep."""

import json

import pytest
import tiny_packs
import torch

from fewfire import kernels
from fewfire.bench import bench, bench_kernels, sweep
from fewfire.bench.routing import Uniform
from fewfire.bench.sweep import sweep_config
from fewfire.checkpoints.pack import open_pack
from fewfire.checkpoints.pack_writer import write_pack
from fewfire.cli.main import main
from fewfire.config import RoutingProfile
from fewfire.errors import ConfigError
from fewfire.plan.limits import rss_bytes
from fewfire.plan.memory import choose_formats, floor_bytes
from fewfire.plan.rates import KernelRates
from fewfire.quantize import RandomWeights
from fewfire.runtime.banks import StreamedExperts
from fewfire.runtime.engine import NativeDecoder
from fewfire.runtime.packed import load_pack
from fewfire.runtime.predict import predict
from fewfire.runtime.probe import probe_part

if kernels.supported_isas() == ["reference"]:
    pytest.skip("the extension is not built", allow_module_level=True)

CONTRACT = {
    "prefill_tokens_per_s", "decode_tokens_per_s", "bytes_per_token", "bandwidth_share", "compute_share",
    "peak_rss_bytes", "load_s",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packs")


@pytest.fixture(scope="module")
def large(folder):
    """A pack whose experts (24 MB) are worth a budget."""
    path, config = folder / "large", sweep_config(32, 2, model_dim=512, expert_dim=512, layers=2)
    write_pack(path, RandomWeights(config, 0), choose_formats(config, "q4"))
    return path


def tight_budget(path, context):
    """Enough for all but most of the experts."""
    pack = open_pack(path)
    floor = floor_bytes(pack.config, pack.formats, context, threads=torch.get_num_threads()).table
    return sum({**floor, "process": max(floor["process"], rss_bytes())}.values()) + 20 * 2**20


def test_bench_counts_what_it_says(folder):
    path = tiny_packs.make(folder, "olmoe", "q4")
    made = bench(path, prompt_tokens=20, new_tokens=4, context=3, batch=2).to_json()
    assert made.keys() >= CONTRACT
    assert made["invariant"] and 0 < made["bandwidth_share"] < 1.5 and 0 < made["compute_share"] < 1
    assert made["predicted_decode_tokens_per_s"] > 0 and made["predicted_prefill_tokens_per_s"] > 0
    assert made["phases"]["decode_step"].keys() >= {"attend", "route", "experts", "head"}
    assert 0 < made["router_share"]["decode"] < 1 and 0 < made["router_share"]["prefill"] < 1
    assert made["experts"]["decode"]["hit_rate"] == 1 and made["experts"]["decode"]["disk_share"] is None
    assert made["access"] == "resident" and made["predicted_at_hit_rate"] is None
    with pytest.raises(ConfigError, match="exceed the model's context of 256"):
        bench(path, prompt_tokens=257)
    with pytest.raises(ConfigError, match="is no pack"):
        bench("nowhere")
    with pytest.raises(ConfigError, match="not one of own, uniform"):
        bench(path, routing="fair")


def test_what_torch_runs_is_measured_without_a_prediction(folder):
    with pytest.warns(UserWarning, match="runs on torch"):
        made = bench(tiny_packs.make(folder, "jamba", "q4"), prompt_tokens=8, new_tokens=2)
    assert made.decode_tokens_per_s > 0 and made.predicted_decode_tokens_per_s is None and not made.invariant
    with pytest.warns(UserWarning, match="runs on torch"), pytest.raises(ConfigError, match="leave --routing out"):
        bench(tiny_packs.make(folder, "jamba", "q4"), prompt_tokens=8, new_tokens=2, routing="uniform")


def test_a_streamed_run_says_where_experts_came_from(large):
    said = []
    made = bench(
        large,
        prompt_tokens=16,
        new_tokens=16,
        memory=tight_budget(large, 17),
        cache="q8",
        routing="uniform",
        say=said.append,
    )
    reads = made.experts["decode"]
    assert made.access != "resident" and made.disk_read_bytes_per_s > 0 and "filling" in said[0]
    assert reads.hits + reads.misses == 16 * 2 * 2 and 0 < reads.hit_rate < 1
    assert reads.expected_hit_rate == pytest.approx(reads.hit_rate, abs=0.35)
    assert reads.bytes_read > 0 and reads.disk_share > 0
    assert made.predicted_at_hit_rate["decode_tokens_per_s"] > 0
    assert made.peak_rss_bytes > made.expert_bytes and made.kv_cache == "q8"


def test_a_prediction_falls_with_the_hit_rate_and_knows_a_profile(large):
    module = load_pack(large, context=17)
    assert isinstance(module, NativeDecoder)
    pack = module.pack
    slots = 16 * pack.layout.experts[0].record_bytes
    module.use(StreamedExperts(pack, slots))
    part = probe_part(module)
    speeds = [predict(module, part, context=8, hit_rate=rate).decode_tokens_per_s for rate in (0.0, 0.5, 1.0)]
    assert speeds == sorted(speeds) and speeds[0] < speeds[2]
    assert predict(module, part, context=8).hit_rate == pytest.approx(16 / 64)
    skewed = RoutingProfile(32, 2, 100, {0: (100,) + (3,) * 30 + (10,)})
    assert predict(module, part, context=8, profile=skewed).hit_rate > 0.5
    assert predict(module, part, context=8, prefill_hit_rate=1.0).prefill_hit_rate == 1.0


def test_uniform_routing_is_distinct_and_reaches_every_expert(large):
    source = Uniform(load_pack(large), seed=3)
    replay = source.take(200)
    assert replay.ids_LNK.shape == (2, 200, 2) and replay.ids_LNK.dtype == torch.int32
    assert (replay.ids_LNK[..., 0] != replay.ids_LNK[..., 1]).all()
    assert replay.ids_LNK[0].unique().numel() == 32
    assert source.take(0) is None


def test_products_between_measured_points_are_interpolated():
    rates = KernelRates({"bf16": ((1, 10.0),), "q4": ((1, 100.0), (4, 200.0))}, float_ops_per_s=1e9, fork_join_s=1e-6)
    one, four = rates.product_s("q4", 1.0, 1), rates.product_s("q4", 1.0, 4)
    assert four == pytest.approx(2 * one)  # four times the work at twice the rate
    assert one < rates.product_s("q4", 1.0, 2.5) == pytest.approx((one + four) / 2)
    assert rates.product_s("q4", 1.0, 8) == pytest.approx(2 * four)
    assert rates.product_s("fp8", 1.0, 1) == rates.product_s("bf16", 1.0, 1)
    assert KernelRates.from_json(json.loads(json.dumps(rates.to_json()))) == rates


def test_kernels_alone(large, capsys):
    made = bench_kernels(large, prompt_tokens=32, context=32, seconds=0.02)
    assert {(each.name, each.tokens) for each in made} >= {("experts", 1), ("experts", 32), ("attention", 1)}
    assert all(each.ops_per_s > 0 and 0 < each.compute_share < 2 for each in made)
    assert all(each.bandwidth_share is None or each.bandwidth_share > 0 for each in made)


def test_the_sweep_moves_one_figure_at_a_time():
    swept = sweep(model_dim=128, expert_dim=128, layers=1, experts=(4, 8), top_ks=(1, 2), prompt_tokens=8, new_tokens=2)
    one, two = swept.by_active
    assert one.total == two.total and one.active < two.active and one.bytes_per_token < two.bytes_per_token
    few, many = swept.by_total
    assert few.total < many.total and few.pack_bytes < many.pack_bytes
    assert few.active == pytest.approx(many.active, rel=0.05)  # the router's columns
    json.dumps(swept.to_json())


@pytest.mark.parametrize(
    "options, words",
    [
        (["--sweep", "here"], "makes its own packs"),
        ([], "needs the folder of a pack"),
        (["nowhere", "--memory", "much"], "--memory"),
    ],
)
def test_bad_options_are_one_line(options, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", *options])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and words in error and error.strip().count("\n") == 0


def test_the_command_prints_one_object(folder, capsys):
    path = tiny_packs.make(folder, "qwen3_moe", "q4")
    with pytest.raises(SystemExit) as ended:
        main(["bench", str(path), "--prompt-tokens", "8", "--new-tokens", "2", "--kv-cache", "q8", "--json"])
    assert not ended.value.code and json.loads(capsys.readouterr().out).keys() >= CONTRACT
