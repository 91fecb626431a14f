"""The planner against published systems, engines' recommendations, checkpoints on disk, and its own bounds."""

import json

import numpy as np
import pytest
import tiny_hub

from fewfire.config import ModelConfig, RoutingProfile
from fewfire.errors import ConfigError, FewfireError, FormatError
from fewfire.families import published
from fewfire.plan import plan
from fewfire.plan.fit import fit, layouts
from fewfire.plan.hardware import load_catalogue, parse_hardware
from fewfire.plan.memory import choose_formats
from fewfire.plan.speed import bytes_per_step, decode_step, prefill
from fewfire.plan.unique import Routed, marginals, unique_experts, unique_from_marginals
from fewfire.plan.workload import Assumptions, Layout, Workload

CATALOGUE = load_catalogue()


def workload(name: str, quant: str = "native", context: int = 4096, **parts: str) -> Workload:
    config = published.load(name)
    return Workload.of(config, choose_formats(config, quant, **parts), context)


def fits(name: str, quant: str, hardware: str, context: int = 4096) -> bool:
    work, system = workload(name, quant, context), parse_hardware(hardware, CATALOGUE)
    return any(fit(work, system, layout, 1).fits for layout in layouts(work, system))


# ------------------------------------------------------------------------------------------------ does it fit

# What the engines' own pages recommend: every set must fit.
RECOMMENDED = [
    ("deepseek-v3", "native", ["8xH200", "8xB200", "8xMI300X", "16xH100", "16xH800", "16xH20", "Xeon 6980P"]),
    ("deepseek-v3", "bf16", ["16xH200", "16xMI300X", "32xH100", "32xA100"]),
    ("deepseek-v3", "q8", ["16xA100", "32xL40S"]),
    ("deepseek-v3", "q4", ["8xH20", "8xH100", "4xH200", "8xA100"]),
    ("deepseek-v3", "mxfp4", ["4xMI355X", "8xMI355X", "4xB200", "8xB200"]),
    ("deepseek-v3.2", "native", ["8xH200"]),
    ("gpt-oss-120b", "native", ["H100", "A100"]),
    ("gpt-oss-20b", "native", ["laptop-16", "RTX 4090"]),
]


@pytest.mark.parametrize("name, quant, sets", RECOMMENDED)
def test_recommended_hardware_fits(name, quant, sets):
    assert [system for system in sets if not fits(name, quant, system)] == []


def test_kimi_k2_at_128k_takes_sixteen_h200():
    assert fits("kimi-k2", "native", "16xH200", 128 * 1024) and fits("kimi-k2", "native", "16xH20", 128 * 1024)
    assert not fits("kimi-k2", "native", "8xH200", 128 * 1024)


@pytest.mark.parametrize("quant", ["native", "bf16", "q8", "q4"])
@pytest.mark.parametrize("name", ["deepseek-v3", "mixtral-8x7b", "gpt-oss-120b"])
def test_no_set_below_its_weights_is_said_to_fit(name, quant):
    work = workload(name, quant, 128)
    for part in CATALOGUE.parts:
        for count in (1, 2, 4, 8, 16):
            system = parse_hardware(f"{count}x{part.name}", CATALOGUE)
            if system.usable_bytes < work.weights.total:
                assert not any(fit(work, system, layout, 1).fits for layout in layouts(work, system))


def test_active_parameters_do_not_decide_the_fit():
    assert not fits("phi-3.5-moe", "bf16", "RTX 4090")  # 6.6B active, 42B to house


# ------------------------------------------------------------------------------------------- unique experts


def test_one_token_wakes_exactly_top_k():
    for name in published.names():
        for routed, _ in Workload.of(published.load(name), choose_formats(published.load(name)), 16).routed:
            assert routed.unique(1) == pytest.approx(routed.top_k)


def test_measured_routing_wakes_fewer_than_uniform():
    rng = np.random.default_rng(0)
    for num_tokens in (1, 2, 8, 64, 512):
        counts = [int(value) for value in rng.zipf(1.4, 64).clip(1, 10_000)]
        measured = unique_from_marginals(marginals(counts, 8), num_tokens)
        assert measured <= unique_experts(64, 8, num_tokens) + 1e-9


def test_the_active_only_reading_is_several_times_too_fast():
    work = workload("deepseek-v3", "native")
    config = work.config
    once = bytes_per_step(work, 1) + 63 * work.cache.sequence
    assert 9 < bytes_per_step(work, 64) / once < 12  # 10.95x, the note's own count
    assert config.moe_layers


# -------------------------------------------------------------------------------------- published measurements

POINTS = [  # model, formats, context, machine, layout, batch, measured tokens/s
    ("gpt-oss-120b", "mxfp4", "q8_0", 7600, "Strix Halo", Layout(), 1, 52.0),
    ("gpt-oss-20b", "mxfp4", "q8_0", 1024, "DGX Spark", Layout(), 1, 82.74),
    ("deepseek-v3", "q4", None, 1024, "M3 Ultra", Layout(), 1, 17.5),
    ("deepseek-v3", "q4_k", None, 1024, "M3 Ultra", Layout(), 1, 17.5),
    ("qwen3-235b-a22b", "q4", None, 2048, "2xDGX Spark", Layout(2), 1, 17.0),
    ("qwen3-235b-a22b", "q4", None, 2048, "2xDGX Spark", Layout(2), 2, 24.1),
    ("qwen3-235b-a22b", "q4", None, 2048, "2xDGX Spark", Layout(2), 4, 36.4),
]


@pytest.mark.parametrize("name, quant, trunk, context, hardware, layout, batch, measured", POINTS)
def test_published_decode_points(name, quant, trunk, context, hardware, layout, batch, measured):
    work = workload(name, quant, context, **({"trunk": trunk} if trunk else {}))
    step = decode_step(work, parse_hardware(hardware, CATALOGUE), layout, batch, Assumptions())
    assert step.tokens_per_s == pytest.approx(measured, rel=0.25)


def test_deepseeks_published_decode_cluster():
    """18 nodes of 8 H800, EP144, 4,989 tokens of context, 20-22 tokens/s a user: 14.8k output tokens/s a node."""
    work, system = workload("deepseek-v3", "native", 4989), parse_hardware("144xH800", CATALOGUE)
    layout = Layout(data=144)
    batch = max(size for size in range(144, 144 * 200, 144)
                if 1 / decode_step(work, system, layout, size, Assumptions()).seconds >= 20)  # fmt: skip
    assert fit(work, system, layout, batch).fits
    step = decode_step(work, system, layout, batch, Assumptions())
    assert step.tokens_per_s / 18 == pytest.approx(14_800, rel=0.30)


def test_deepseeks_published_prefill_cluster():
    """4 nodes, EP32: 73.7k input tokens/s a node, 56.3 % of them found in a cache and not computed."""
    work, system = workload("deepseek-v3", "native", 4989), parse_hardware("32xH800", CATALOGUE)
    made = prefill(work, system, Layout(data=32), 4989, Assumptions())
    assert made.tokens_per_s / 4 / (1 - 0.563) == pytest.approx(73_700, rel=0.30)


def test_sglangs_published_cluster():
    """12 nodes of 8 H100, 2,000 tokens in: 52.3k input (4 nodes), 22.3k output tokens/s a node (9, 256 a device)."""
    work = workload("deepseek-v3", "native", 2050)
    made = prefill(work, parse_hardware("32xH100", CATALOGUE), Layout(data=32), 2000, Assumptions())
    assert made.tokens_per_s / 4 == pytest.approx(52_300, rel=0.30)
    step = decode_step(work, parse_hardware("72xH100", CATALOGUE), Layout(data=72), 256 * 72, Assumptions())
    assert step.tokens_per_s / 9 == pytest.approx(22_300, rel=0.30)


def test_ranges_hold_the_figure():
    for machine in plan("mixtral-8x7b", quant="q4", hardware="H100,8xH200,laptop-32").machines:
        assert machine.decode_range[0] < machine.decode.tokens_per_s < machine.decode_range[1]


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt2", "llama"])
def test_a_folder_is_planned_from_its_headers(family, tmp_path):
    import torch

    model = tiny_hub.make(family, torch.bfloat16)
    folder = tiny_hub.save(model, tmp_path / "checkpoint")
    made = plan(folder)
    document = made.to_json()
    numbers = sum(values.numel() for values in model.parameters())
    assert document["parameters"]["total"] == numbers
    assert document["memory"]["weights_bytes"] == 2 * numbers == document["memory"]["on_disk_bytes"]
    assert document["memory"]["stored_types"] == {"bf16": 2 * numbers}


SHAPES = {
    "token_embd": (96, 64), "output": (96, 64), "output_norm": (64,), "blk.0.attn_norm": (64,),
    "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64),
    "blk.0.attn_q_norm": (16,), "blk.0.attn_k_norm": (16,), "blk.0.ffn_norm": (64,),
    "blk.0.ffn_gate_inp": (4, 64), "blk.0.ffn_gate_exps": (4, 32, 64), "blk.0.ffn_up_exps": (4, 32, 64),
    "blk.0.ffn_down_exps": (4, 64, 32),
}  # fmt: skip
METADATA = {
    "block_count": 1, "attention.head_count": 4, "attention.head_count_kv": 2, "expert_count": 4,
    "attention.key_length": 16, "expert_used_count": 2, "context_length": 512,
}  # fmt: skip


def write_gguf(path, metadata=METADATA, shapes=SHAPES):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for key, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        (writer.add_array if isinstance(value, list) else add)(f"qwen3moe.{key}", value)
    for name, shape in shapes.items():
        if "exps" in name:
            values = np.zeros((*shape[:-1], shape[-1] // 32 * 18), np.uint8)
            writer.add_tensor(f"{name}.weight", values, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_is_planned_from_its_header(tmp_path):
    made = plan(write_gguf(tmp_path / "tiny.gguf"))
    total = sum(int(np.prod(shape)) for shape in SHAPES.values())
    experts = 3 * 4 * 32 * 64
    assert (made.counts.total, made.counts.experts) == (total, experts)
    assert made.weights.total == experts // 32 * 18 + 4 * (total - experts)
    assert made.cache.per_token == 2 * 2 * 16 * 2
    assert made.subject.explained == ()


@pytest.mark.parametrize("key", METADATA)
@pytest.mark.parametrize("value", [0, 3, 2**32 - 1, "four", [], [0], ["x"]])
def test_a_hostile_gguf_is_one_line(tmp_path, key, value):
    path = write_gguf(tmp_path / "bad.gguf", {**METADATA, key: value})
    try:
        plan(path)
    except FewfireError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", SHAPES)
def test_a_gguf_without_a_tensor_is_explained_or_refused(tmp_path, name):
    path = write_gguf(tmp_path / "bad.gguf", shapes={key: shape for key, shape in SHAPES.items() if key != name})
    try:
        assert plan(path).counts.total > 0
    except FewfireError as error:
        assert "\n" not in str(error)


def test_a_pack_is_planned_from_its_own_bytes(tmp_path):
    from safetensors.numpy import save_file

    (tmp_path / "config.json").write_text(json.dumps(published.hub_config("olmoe-1b-7b")))
    parts = {
        "experts": "q4",
        "down": "q4",
        "trunk": "q8",
        "head": "q8",
        "router": "f32",
        "embedding": "q8",
        "small": "f32",
    }
    (tmp_path / "fewfire.json").write_text(json.dumps({"formats": parts, "overrides": {}}))
    (tmp_path / "experts.bin").write_bytes(b"\0" * 4096 * 64 * 16)
    save_file({"embed.weight": np.zeros(1000, np.uint8), "norm.weight": np.zeros(24, np.float32)},
              tmp_path / "trunk.safetensors")  # fmt: skip
    made = plan(tmp_path)
    assert (made.weights.experts, made.weights.trunk, made.weights.per_expert) == (4096 * 64 * 16, 1096, 4096)
    assert made.floor.table["experts in flight"] == 2 * 8 * 4096 and made.counts.total == 6_919_161_856
    assert (made.formats.experts, made.formats.trunk) == ("q4", "q8")  # whose kernels are counted with
    (tmp_path / "fewfire.json").write_text('{"formats": {"experts": "q3"}}')
    with pytest.raises(FormatError, match="q3 is no format"):
        plan(tmp_path)


def test_what_a_checkpoint_holds_besides_is_named(tmp_path):
    from safetensors.numpy import save_file

    from fewfire.plan.checkpoint import explain_gap, read_stored
    from fewfire.plan.count import count

    config = published.load("deepseek-v3")
    tensors = {
        "model.layers.61.embed_tokens.weight": np.zeros((4, 4), np.float16),
        "model.layers.3.mlp.experts.0.up_proj.weight": np.zeros((8, 4), np.float16),
        "model.layers.3.mlp.experts.0.up_proj.weight_scale_inv": np.zeros((1, 2), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(5, np.float32),
        "vision_model.patch.weight": np.zeros((3, 3), np.float16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    stored = read_stored(tmp_path, config)
    assert stored.parameters_of == {
        "experts": 32, "trunk": 0, "embedding": 0, "mtp": 16, "vision": 9, "buffers": 5, "scales": 2,
    }  # fmt: skip
    lines = " ".join(explain_gap(stored, count(config)))
    assert "multi-token" in lines and "vision" in lines and "scales" in lines and "buffers" in lines


@pytest.mark.parametrize(
    "text, error, words",
    [
        ("{", FormatError, "no JSON"),
        ("[]", FormatError, "JSON object"),
        ("{}", ConfigError, "model_type"),
        ('{"model_type": "mixtral"}', ConfigError, "config.json|key|expected"),
        ('{"model_type": "nonsense"}', ConfigError, "nonsense"),
    ],
)
def test_bad_configs_are_one_line(tmp_path, text, error, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=words) as caught:
        plan(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_hub_id_of_a_published_model_needs_no_network():
    assert plan("mistralai/Mixtral-8x7B-v0.1").subject.name == "mixtral-8x7b"


def test_a_hub_id_reads_config_and_index_only(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repo, name):
        asked.append(name)
        path = tmp_path / name
        if name == "config.json":
            path.write_text(json.dumps(published.hub_config("mixtral-8x7b")))
        else:
            path.write_text(json.dumps({"metadata": {"total_size": 93_405_585_408}}))
        return str(path)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    made = plan("somebody/my-mixtral")
    assert asked == ["config.json", "model.safetensors.index.json"]
    assert made.counts.total == 46_702_792_704
    assert made.to_json()["memory"]["on_disk_bytes"] == 93_405_585_408


def test_a_hub_id_without_a_network_is_one_line(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")

    def download(repo, name):
        raise errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(ConfigError, match="could not be fetched"):
        plan("somebody/my-mixtral")


def test_a_config_object_is_a_model():
    config = published.load("olmoe-1b-7b")
    assert isinstance(config, ModelConfig) and plan(config).counts.total == 6_919_161_856


def test_a_profile_of_another_model_is_refused():
    profile = RoutingProfile(8, 2, 100, {0: (25,) * 8})
    with pytest.raises(ConfigError, match="8 experts"):
        plan("olmoe-1b-7b", routing=profile)
    assert Routed.of(8, 2, profile).unique(1) == pytest.approx(2)
