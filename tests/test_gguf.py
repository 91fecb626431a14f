"""GGUF in and out: files laid out as llama.cpp's converter does, against transformers' logits of the same weights."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import warnings
from pathlib import Path
from typing import Any

import gguf
import gguf_from_hub
import numpy as np
import pytest
import tiny_hub
import torch
from gguf_metadata import METADATA, common
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import grok, reference
from oracle.specs import MLA_YARN, SPECS, SWITCH_SPECS
from safetensors.torch import load_file

import fewfire
from fewfire import api
from fewfire.checkpoints.gguf import open_gguf, save_gguf
from fewfire.checkpoints.gguf.layout import slots
from fewfire.errors import BudgetError, ConfigError, FormatError
from fewfire.runtime.load import fill_module, load_module
from fewfire.tokenizer import train_bpe

TOLERANCE = 1e-4  # the contract for float32; 5e-6 is usual


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


CASES = {
    "llama": "llama", "llama-biases": "llama", "mixtral": "mixtral", "qwen2_moe": "qwen2_moe",
    "qwen3_moe": "qwen3_moe", "olmoe": "olmoe", "deepseek_v2": "deepseek_v2", "deepseek_v2-lite": "deepseek_v2",
    "deepseek_v3": "deepseek_v3", "gpt_oss": "gpt_oss", "dbrx": "dbrx", "glm4_moe": "glm4_moe",
    "granitemoe": "granitemoe", "minimax_m2": "minimax_m2", "gpt2": "gpt2",
}  # fmt: skip
CHANGES = {  # what GGUF has no place for
    "olmoe": {"clip_qkv": None},
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {"mlp_only_layers": []},
    "deepseek_v2": {"attention_bias": False, "rope_parameters": {**MLA_YARN, "mscale": 0.7}},
    "deepseek_v3": {"rope_parameters": {**MLA_YARN, "mscale": 0.7}},
    "gpt_oss": {"swiglu_limit": 7.0},
    "dbrx": {"ffn_config": {**SPECS["dbrx"].values["ffn_config"], "moe_normalize_expert_weights": 1.0}},
    "llama-biases": {"attention_bias": True},
}


def make(name: str) -> tuple[Any, str]:
    spec = SPECS[name]
    changed = dataclasses.replace(spec, values=spec.values | CHANGES.get(name, {}))
    return reference.make_model(changed), CASES[name]


def hub_tensors(theirs: Any, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    tiny_hub.save(theirs, folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def write_from_hub(name: str, folder: Path, **options: Any) -> tuple[Any, Path]:
    theirs, family = make(name)
    config, tensors = hub_tensors(theirs, folder / "hub")
    extra = {}
    if name == "llama":  # its rope scaling is a tensor
        rope = theirs.config.rope_parameters
        base = rope["rope_theta"] ** -(torch.arange(0, 8, 2).float() / 8)
        extra["rope_freqs.weight"] = base / theirs.model.rotary_emb.inv_freq
    path = folder / "model.gguf"
    metadata = METADATA[family](theirs.config)
    gguf_from_hub.write(path, family, config, tensors, metadata, extra=extra, **options)
    return theirs, path


@torch.no_grad()
def error(module: Any, theirs: Any, name: str) -> float:
    ids = reference.token_ids(16, name)
    return float((module(ids) - theirs(input_ids=ids, use_cache=False).logits).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_files_of_the_converter_give_the_logits_of_transformers(name, tmp_path):
    theirs, path = write_from_hub(name, tmp_path)
    checkpoint = open_gguf(path)
    assert error(fill_module(checkpoint), theirs, name) < TOLERANCE
    assert checkpoint.config.family == CASES[name] and checkpoint.config.native_format == "f32"


@pytest.mark.parametrize("name", ["deepseek_v2-lite", "deepseek_v3"])
def test_files_from_before_absorbed_attention(name, tmp_path):
    theirs, path = write_from_hub(name, tmp_path, old_latent=True)
    assert error(fill_module(open_gguf(path)), theirs, name) < TOLERANCE


def test_grok(tmp_path):
    oracle = grok.run(tmp_path / "hub")
    tensors = load_file(tmp_path / "hub" / "model.safetensors")
    renamed = {}
    for name, values in tensors.items():
        layer = name.split(".")[2] if ".layers." in name else None
        name = name.replace("model.embed_tokens", "transformer.in_out_embed").replace(
            "model.norm.scale", "transformer.rms_norm.weight"
        )
        name = name.replace(f"model.layers.{layer}.attn.", f"transformer.decoder_layer.{layer}.multi_head_attention.")
        for ours, theirs in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("o_proj", "linear")):
            name = name.replace(ours, theirs)
        name = name.replace(f"model.layers.{layer}.moe_block.gate", f"transformer.decoder_layer.{layer}.router")
        name = name.replace(f"model.layers.{layer}.moe_block.experts", f"transformer.decoder_layer.{layer}.moe")
        norms = {"pre_attn": "rms_norm", "post_attn": "rms_norm_1", "pre_moe": "rms_norm_2", "post_moe": "rms_norm_3"}
        for ours, theirs in norms.items():
            name = name.replace(
                f"model.layers.{layer}.{ours}_norm.scale", f"transformer.decoder_layer.{layer}.{theirs}.weight"
            )
        renamed[name] = values
    c = grok.CONFIG
    metadata = {
        "block_count": c["num_hidden_layers"],
        "context_length": 64,
        "embedding_length": c["hidden_size"],
        "feed_forward_length": c["intermediate_size"],
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": c["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
        "rope.freq_base": 10000.0,
        "expert_count": c["num_experts"],
        "expert_used_count": 2,
        "attn_logit_softcapping": c["max_attn_value"],
        "router_logit_softcapping": 30.0,
        "attention.output_scale": c["attn_output_multiplier"],
        "embedding_scale": c["embedding_multiplier_scale"],
        "logit_scale": c["output_multiplier_scale"],
    }
    gguf_from_hub.write(tmp_path / "x.gguf", "grok-1", c, renamed, metadata)
    module = fill_module(open_gguf(tmp_path / "x.gguf"))
    with torch.no_grad():
        assert float((module(oracle.ids) - oracle.prefill).abs().max()) < TOLERANCE


# --------------------------------------------------------------------------------------------------------- block types


@pytest.mark.parametrize(
    "kind", [each for each in gguf.quants._type_traits if each.name != "NVFP4"], ids=lambda k: k.name
)
def test_every_block_type_is_read_as_the_library_defines_it(kind, tmp_path):
    """Random blocks (with sane scales) in every matrix: the module holds what the library decodes."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    model = tiny_hub.make("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=1, head_dim=64)
    config, tensors = hub_tensors(model, tmp_path / "hub")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for key, value in common(model.config, feed_forward_length=512).items():
        full = key if key.startswith("tokenizer") else f"llama.{key}"
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(full, value)
    names, expected = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1), {}
    generator = np.random.default_rng(3)
    for name, values in tensors.items():
        new = names.get_name(name, (".weight",))
        if values.dim() < 2:
            writer.add_tensor(new, values.numpy())
            continue
        rows = generator.integers(0, 60, (values.shape[0], values.shape[1] // block * size), dtype=np.uint8)
        writer.add_tensor(new, rows, raw_dtype=kind)
        expected[name] = gguf.dequantize(rows, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_gguf(tmp_path / "x.gguf")
    assert checkpoint.config.native_format == kind.name.lower()
    module = fill_module(checkpoint)
    for ours, name in [
        (module.embed.weight, "model.embed_tokens.weight"),
        (module.layers[0].attention.v.weight, "model.layers.0.self_attn.v_proj.weight"),
        (module.layers[0].ffn.down.weight, "model.layers.0.mlp.down_proj.weight"),
    ]:
        found = torch.from_numpy(expected[name])
        assert ours.dtype == (torch.bfloat16 if kind.name == "BF16" else torch.float32)
        assert torch.equal(ours.float().nan_to_num(), found.nan_to_num()), name
    half = fill_module(checkpoint, dtype=torch.bfloat16)
    assert torch.equal(half.embed.weight.nan_to_num(), module.embed.weight.bfloat16().nan_to_num())


def test_own_precision_of_a_half_file(tmp_path):
    _, path = write_from_hub("qwen3_moe", tmp_path, kind="F16")
    module = fill_module(open_gguf(path))
    assert module.layers[1].ffn.experts.up.dtype == torch.float16
    assert module.layers[1].ffn.router.weight.dtype == module.norm.weight.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------ writing

WRITTEN = {
    "llama": {},
    "mixtral": {},
    "qwen3_moe": {"mlp_only_layers": []},
    "olmoe": {"clip_qkv": None, "num_key_value_heads": 4},
}


def exportable(name: str, folder: Path) -> tuple[Any, Path]:
    spec = SPECS[name]
    theirs = reference.make_model(dataclasses.replace(spec, values=spec.values | WRITTEN[name]))
    return theirs, tiny_hub.save(theirs, folder)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_reads_back(name, tmp_path):
    theirs, folder = exportable(name, tmp_path / "hub")
    module = load_module(folder)
    for quant, tolerance in (("f32", 1e-5), ("fp16", 0.02), ("bf16", 0.1)):
        path = tmp_path / f"{quant}.gguf"
        save_gguf(module, path, quant=quant)
        back = fill_module(open_gguf(path))
        assert error(back, theirs, name) < tolerance
        state = back.state_dict()
        for key, values in module.state_dict().items():
            assert torch.equal(state[key].float(), values.to(state[key].dtype).float()), key


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize(("quant", "kind"), [("q8_0", "Q8_0"), ("q4_0", "Q4_0")])
def test_quantized_matrices_hold_what_the_library_makes_of_them(name, quant, kind, tmp_path):
    _, folder = exportable(name, tmp_path / "hub")
    module = load_module(folder)
    save_gguf(module, tmp_path / "x.gguf", quant=quant)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert int(reader.get_field("general.file_type").contents()) == {"q8_0": 7, "q4_0": 2}[quant]
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.1.attn_v.weight"] == kind and types["blk.1.attn_norm.weight"] == "F32"
    assert types.get("output.weight", "Q8_0") == "Q8_0"
    if name != "llama":
        assert (
            types["blk.1.ffn_gate_inp.weight"] == "F32" and types["blk.1.ffn_down_exps.weight"] == "F16"
        )  # rows of 24
        assert types["blk.1.ffn_up_exps.weight"] == kind
    back = fill_module(open_gguf(tmp_path / "x.gguf"))
    ggml = gguf.GGMLQuantizationType[kind]
    values = module.layers[1].attention.v.weight.detach().numpy()
    expected = gguf.dequantize(gguf.quantize(values, ggml), ggml)
    assert np.array_equal(back.layers[1].attention.v.weight.detach().numpy(), expected)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])  # what transformers reads of GGUF, of what we write
def test_transformers_reads_what_is_written(name, tmp_path):
    theirs, folder = exportable(name, tmp_path / "hub")
    if name == "llama":  # transformers leaves llama3's factors in GGUF files aside
        spec = SPECS["llama"]
        plain = {k: v for k, v in spec.values.items() if k != "rope_parameters"}
        theirs = reference.make_model(dataclasses.replace(spec, values=plain))
        folder = tiny_hub.save(theirs, tmp_path / "plain")
    save_gguf(load_module(folder), tmp_path / "x.gguf", quant="f32")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = load_gguf_checkpoint(str(tmp_path / "x.gguf"), return_tensors=True, model_to_load=theirs)
    found, expected = read["tensors"], theirs.state_dict()
    assert found.keys() == expected.keys() - {"lm_head.weight"} | found.keys() & {"lm_head.weight"}
    for key, values in found.items():
        assert torch.equal(torch.as_tensor(values), expected[key]), key
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps"):
        assert read["config"][key] == pytest.approx(getattr(theirs.config, key)), key


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "not renormalised"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "dense layers"),
        ("olmoe", {"clip_qkv": 0.5}, "clipping"),
        ("olmoe", {"num_key_value_heads": 2}, "key-value"),
        ("mixtral", {"sliding_window": 4}, "window"),
        ("gpt2", {}, "llama, mixtral, qwen3_moe, olmoe"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name, changes, message, tmp_path):
    spec = SPECS[name]
    values = spec.values | WRITTEN.get(name, {}) | changes
    folder = tiny_hub.save(reference.make_model(dataclasses.replace(spec, values=values)), tmp_path / "hub")
    with pytest.raises(ConfigError, match=message):
        save_gguf(load_module(folder), tmp_path / "x.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"hub"}


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    _, folder = exportable("mixtral", tmp_path / "hub")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gguf.GGUFWriter, "write_ti_data_to_file", full)
    with pytest.raises(BudgetError, match="disk is full"):
        save_gguf(load_module(folder), tmp_path / "x.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"hub"}


# ----------------------------------------------------------------------------------------------------------- surface

TEXT = "A router sends each token to a few experts - näive, 日本語, 🙂🙃 and back.\n" * 8


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory) -> Path:
    tokenizer = train_bpe([TEXT], 300)
    model = tiny_hub.make("mixtral", vocab_size=tokenizer.vocab_size + 3, max_position_embeddings=256)
    folder = tiny_hub.save(model, tmp_path_factory.mktemp("model"))
    tokenizer.save(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    return folder


def test_a_model_goes_through_gguf_with_its_tokenizer(with_tokenizer, tmp_path):
    exported = api.export(with_tokenizer, tmp_path / "x.gguf", to="gguf", quant="f32")
    assert exported.files == ["x.gguf"] and exported.num_bytes == (tmp_path / "x.gguf").stat().st_size
    assert "word pattern" in exported.notes[0]
    hub, back = fewfire.load(with_tokenizer), fewfire.load(tmp_path / "x.gguf")
    assert back.tokenizer.decode(back.tokenizer.encode(TEXT)) == TEXT
    assert back.eos_ids == hub.eos_ids == (hub.tokenizer.eos_token_id,)
    ids = hub.tokenizer.encode("A router")
    assert back.generate(ids, max_tokens=20).token_ids == hub.generate(ids, max_tokens=20).token_ids
    api.export(tmp_path / "x.gguf", tmp_path / "back", to="hf")
    before, after = load_file(with_tokenizer / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys() and all(values.equal(after[name]) for name, values in before.items())


def test_refusals(with_tokenizer, tmp_path):
    (tmp_path / "taken.gguf").write_bytes(b"")
    for options, message in [
        ({"to": "gguf", "quant": "q9"}, "q9.*q8_0"),
        ({"to": "hf", "quant": "q4_0"}, "quant"),
        ({"to": "gguf", "dtype": "bf16"}, "dtype"),
    ]:
        with pytest.raises(ConfigError, match=message):
            api.export(with_tokenizer, tmp_path / "out", **options)
    with pytest.raises(ConfigError, match="is a file"):
        api.export(with_tokenizer, tmp_path / "taken.gguf", to="gguf")
    assert (tmp_path / "taken.gguf").read_bytes() == b""


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_from_hub("qwen3_moe", tmp_path_factory.mktemp("small"), kind="Q8_0")[1]


@given(data=st.data())
def test_a_cut_file_never_loads(small, tmp_path_factory, data):
    whole = small.read_bytes()
    path = tmp_path_factory.mktemp("cut") / "x.gguf"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 33))])  # the end may be padding
    with pytest.raises(FormatError):
        fill_module(open_gguf(path))


@given(position=st.integers(0, 2**20), value=st.integers(0, 255))
@example(position=282, value=11)  # a key's length, so that the key holds line ends
def test_a_changed_header_is_refused_or_harmless(small, tmp_path_factory, position, value):
    header = min(tensor.offset for tensor in open_gguf(small).header.tensors.values())
    damaged = bytearray(small.read_bytes())
    damaged[position % header] = value
    path = tmp_path_factory.mktemp("damaged") / "x.gguf"
    path.write_bytes(damaged)
    try:
        module = fill_module(open_gguf(path))
    except (ConfigError, FormatError) as problem:
        assert str(problem).isprintable()
        return
    for values in module.state_dict().values():
        assert not values.is_meta


def test_what_is_missing_or_surplus_is_named(small, tmp_path):
    checkpoint = open_gguf(small)
    names = {slot.name for slot in slots(checkpoint.config)}
    assert names == set(checkpoint.header.tensors)
    for found, renamed, message in [
        (b"blk.1.ffn_up_exps.weight", b"blk.1.ffn_xx_exps.weight", "blk.1.ffn_up_exps.weight: is missing"),
        (b"qwen3moe.expert_used_count", b"qwen3moe.expert_used_xxxxx", "expert_used_count"),
        (b"general.architecture", b"general.architectuxx", "architecture"),
        (
            b"\x08\x00\x00\x00\x00\x00\x00\x00qwen3moe",
            b"\x08\x00\x00\x00\x00\x00\x00\x00qwen9moe",
            "qwen9moe.*mixtral|known",
        ),
    ]:
        path = tmp_path / "x.gguf"
        content = small.read_bytes()
        assert found in content
        path.write_bytes(content.replace(found, renamed))
        with pytest.raises((FormatError, ConfigError), match=message):
            open_gguf(path)


def test_an_unknown_key_is_an_error_that_can_be_set_aside(tmp_path):
    theirs, _ = make("mixtral")
    config, tensors = hub_tensors(theirs, tmp_path / "hub")
    metadata = METADATA["mixtral"](theirs.config) | {"attention.surprise": 3}
    gguf_from_hub.write(tmp_path / "x.gguf", "mixtral", config, tensors, metadata)
    with pytest.raises(FormatError, match="llama.attention.surprise"):
        open_gguf(tmp_path / "x.gguf")
    assert fewfire.load(tmp_path / "x.gguf", ignore_keys=["llama.attention.surprise"]).config.family == "mixtral"


assert not SWITCH_SPECS.keys() & CASES.keys()
