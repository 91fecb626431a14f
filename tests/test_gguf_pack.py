"""GGUF files packed: what the file's blocks stand for is in the pack bit for bit, and the native engine runs them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import gguf_from_hub
import numpy as np
import pytest
import tiny_hub
import torch
from gguf_metadata import METADATA
from oracle import reference
from oracle.specs import MLA_YARN, SPECS
from safetensors.torch import load_file

import fewfire
from fewfire import families, formats, kernels
from fewfire.checkpoints.gguf import open_gguf
from fewfire.checkpoints.pack import MANIFEST, Pack, open_pack, verify_pack
from fewfire.errors import FormatError
from fewfire.formats import ggml
from fewfire.plan.memory import NATIVE_BLOCKS, decode_trunk_bytes, weight_bytes
from fewfire.plan.shapes import model_tensors
from fewfire.quantize import pack
from fewfire.runtime.banks import StreamedExperts, Streaming
from fewfire.runtime.engine import NativeDecoder
from fewfire.runtime.load import fill_module
from fewfire.runtime.lower import why_not_native
from fewfire.runtime.packed import load_packed_module

WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


def q4_k_m(name: str) -> str:
    """As llama.cpp mixes them: some matrices finer, some layers finer than others."""
    finer = ("attn_v", "output.weight", "blk.0.ffn_down", "attn_kv_a")
    return "Q6_K" if any(part in name for part in finer) else "Q4_K"


def tied(name: str) -> str:
    """The table is the head, and finer than the rest."""
    return "Q6_K" if "token_embd" in name else "Q4_K"


def small_blocks(name: str) -> str:
    for part, kind in {"attn_q": "Q4_0", "attn_k": "Q4_1", "ffn_down": "Q5_0", "ffn_up": "Q8_0"}.items():
        if part in name:
            return kind
    return "Q5_K" if "attn_output" in name else "BF16" if "token_embd" in name else "Q4_0"


def gpt_oss(name: str) -> str:
    return "MXFP4" if "_exps" in name else "Q8_0"


# A family, changes of its shape, and the type of each matrix.
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "mixtral-q4_k_m": ("mixtral", {**WIDE, "intermediate_size": 256}, q4_k_m),
    "qwen3_moe-mixed": (
        "qwen3_moe",
        {**WIDE, "moe_intermediate_size": 96, "intermediate_size": 160, "mlp_only_layers": []},
        small_blocks,
    ),
    "mixtral-tied": ("mixtral", {**WIDE, "intermediate_size": 256, "tie_word_embeddings": True}, tied),
    "llama-q8_0": ("llama-biases", {**WIDE, "intermediate_size": 160}, lambda name: "Q8_0"),
    "llama-f16": ("llama-biases", {**WIDE, "intermediate_size": 160}, lambda name: "F16"),
    "gpt_oss-mxfp4": ("gpt_oss", {**WIDE, "intermediate_size": 64, "swiglu_limit": 7.0}, gpt_oss),
    "deepseek_v2-q4_k_m": (
        "deepseek_v2-lite",
        {
            "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "kv_lora_rank": 256,
            "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 64,
            "rope_parameters": {**MLA_YARN, "mscale": 0.7},
        },
        q4_k_m,
    ),
    "dbrx-fused": (
        "dbrx",
        {
            "d_model": 128,
            "ffn_config": {
                "ffn_hidden_size": 64, "moe_num_experts": 6, "moe_top_k": 3, "hidden_size": 128,
                "moe_normalize_expert_weights": 1.0,
            },
        },
        lambda name: "Q8_0",
    ),
}  # fmt: skip


def quantize(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The library's, but for K formats, which it only reads: ours, or for Q5_K random blocks with small scales."""
    name = kind.name.lower()
    if name in ("q4_k", "q6_k"):
        rows = ggml.encode(torch.from_numpy(values).reshape(-1, values.shape[-1]), name)
        return rows.reshape(*values.shape[:-1], -1).numpy()
    if name != "q5_k":
        return gguf.quantize(values, kind)
    columns, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(1).integers(0, 256, (*values.shape[:-1], values.shape[-1] // columns, size), np.uint8)
    raw[..., :4] = np.array([1.2e-4, 1.8e-3], np.float16).view(np.uint8)
    return raw.reshape(*values.shape[:-1], -1)


def write(name: str, folder: Path) -> Path:
    spec_name, changes, kind = CASES[name]
    spec = SPECS[spec_name]
    theirs = reference.make_model(dataclasses.replace(spec, values=spec.values | changes))
    tiny_hub.save(theirs, folder / "hub")
    config = json.loads((folder / "hub" / "config.json").read_text())
    family = spec_name.split("-")[0]
    tensors = {key: values * 0.5 for key, values in load_file(folder / "hub" / "model.safetensors").items()}
    metadata = METADATA[family](theirs.config)
    path = folder / "model.gguf"
    gguf_from_hub.write(path, family, config, tensors, metadata, kind=kind, quantize=quantize)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Each file is made once, when it is first asked for."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="module")
def packs(files, tmp_path_factory):
    made: dict[str, Any] = {}

    def get(name: str) -> tuple[Any, Pack]:
        if name not in made:
            folder = tmp_path_factory.mktemp("packs") / name
            made[name] = (pack(files(name), folder), open_pack(folder))
        return made[name]

    return get


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.equal(ours.float().contiguous().view(torch.int32), theirs.float().contiguous().view(torch.int32))


@pytest.mark.parametrize("name", CASES)
def test_a_pack_holds_the_values_of_the_file_bit_for_bit(files, packs, name):
    result, opened = packs(name)
    state = fill_module(open_gguf(files(name)), exact=True).state_dict()
    rounded = {key for key in state if key.endswith("kv_up.weight")} if "deepseek" in name else set()
    lossy = {key for key in state if name == "qwen3_moe-mixed" and key.endswith(("attention.out.weight", ".down"))}
    assert bool(rounded | lossy) == any(not kept.exact for kept in result.kept)
    for key, expert, values in opened.parameters():
        expected = state[key] if expert is None else state[key][expert]
        if key in rounded:
            assert same_bits(values, expected.bfloat16()), key
        elif key in lossy:
            assert 0 < float((values - expected).norm() / expected.norm()) < 0.1, key
        else:
            assert same_bits(values, expected), key
    verify_pack(opened.folder)


@pytest.mark.parametrize("name", CASES)
def test_blocks_stay_in_their_formats(files, packs, name):
    _, opened = packs(name)
    tensors = open_gguf(files(name)).header.tensors
    specs = {spec.name: opened.formats.of(spec) for spec in model_tensors(opened.config)}
    expected = {
        "mixtral-q4_k_m": {"layers.0.ffn.experts.down": "q6_k", "layers.1.ffn.experts.down": "q4_k",
                           "layers.0.attention.q.weight": "q4_k", "layers.1.attention.v.weight": "q6_k",
                           "head.weight": "q6_k", "embed.weight": "q4_k", "layers.0.ffn.router.weight": "f32"},
        "qwen3_moe-mixed": {"layers.0.attention.q.weight": "q4_0", "layers.0.attention.k.weight": "q4_1",
                            "layers.0.attention.out.weight": "q8", "layers.1.ffn.experts.down": "q8",
                            "layers.1.ffn.experts.up": "q8_0", "embed.weight": "bf16"},
        "mixtral-tied": {"embed.weight": "q6_k", "layers.1.attention.out.weight": "q4_k"},
        "llama-q8_0": {"embed.weight": "q8_0", "layers.1.ffn.down.weight": "q8_0", "norm.weight": "f32"},
        "llama-f16": {"embed.weight": "f32", "layers.1.attention.q.weight": "f32"},
        "gpt_oss-mxfp4": {"layers.0.ffn.experts.gate": "mxfp4", "layers.0.ffn.experts.gate_bias": "f32",
                          "layers.0.attention.q.weight": "q8_0"},
        "deepseek_v2-q4_k_m": {"layers.1.attention.kv_up.weight": "bf16", "layers.1.attention.kv_down.weight": "q6_k"},
        "dbrx-fused": {"layers.0.attention.k.weight": "q8_0"},
    }[name]  # fmt: skip
    assert {key: specs[key] for key in expected} == expected
    assert tensors.keys()
    for key, name_of in opened.formats.overrides.items():
        assert specs[key] == name_of


@pytest.mark.parametrize("name", CASES)
def test_the_native_engine_runs_them(packs, name, restore_isa):
    """int8 activations: near the torch forward of the same weights. Equal on every instruction set, alone and in a
    batch."""
    _, opened = packs(name)
    assert why_not_native(opened) is None
    ids = torch.randint(0, reference.VOCAB, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = load_packed_module(opened.folder, dtype=torch.float32)(ids)
    found = []
    for isa in (each for each in kernels.supported_isas() if each != "reference"):
        kernels.set_isa(isa)
        native = NativeDecoder(opened)
        found.append(native(ids))
        assert torch.equal(native(ids[1:])[0], found[0][1])
    assert found and all(torch.equal(each, found[0]) for each in found)
    errors = (found[0] - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.median()) < 3e-2, errors.median()


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("llama")])
def test_experts_on_disk_give_the_same_bits(packs, name):
    """Records of layers differ in size and formats; a slot holds any of them."""
    _, opened = packs(name)
    ids = torch.randint(0, reference.VOCAB, (2, 48), generator=torch.Generator().manual_seed(1))
    expected, decoder = NativeDecoder(opened)(ids), NativeDecoder(opened)
    for slots, lookahead in ((2, False), (5, True)):
        experts = StreamedExperts(
            opened, slots * max(each.record_bytes for each in opened.layout.experts), Streaming(lookahead=lookahead)
        )
        decoder.use(experts)
        decoder.account.experts = None  # so many slots, whatever the budget
        assert torch.equal(decoder(ids), expected), slots
        assert experts.counts().total.misses > slots and experts.slots <= slots


def test_a_tied_table_is_stored_once_and_is_the_head(files, packs):
    result, opened = packs("mixtral-tied")
    assert opened.config.tied_head and opened.formats.head == "q6_k"
    assert "output.weight" not in open_gguf(files("mixtral-tied")).header.tensors
    assert not any(each.name.startswith("head") for each in opened.layout.trunk)
    assert any((each.part, each.stored, each.format) == ("head", "q6_k", "q6_k") for each in result.kept)


@pytest.mark.parametrize("name", CASES)
def test_planned_bytes_are_the_files(packs, name):
    _, opened = packs(name)
    planned = weight_bytes(opened.config, opened.formats)
    assert (planned.trunk, planned.experts) == (opened.layout.trunk_bytes, opened.layout.expert_bytes)
    assert planned.per_expert == max((layer.record_bytes for layer in opened.layout.experts), default=0)
    assert 0 < decode_trunk_bytes(opened.config, opened.formats) <= planned.trunk


def test_records_of_layers_differ_where_their_formats_do(packs):
    first, second = packs("mixtral-q4_k_m")[1].layout.experts
    assert [each.format for each in first.matrices] == ["q4_k", "q4_k", "q6_k"]
    assert [each.format for each in second.matrices] == ["q4_k", "q4_k", "q4_k"]
    assert first.record_bytes > second.record_bytes and second.offset == 4 * first.record_bytes


def test_parts_that_are_asked_for_are_requantized_and_the_rest_is_not(files, tmp_path):
    path = files("mixtral-q4_k_m")
    result = pack(path, tmp_path / "pack", experts="q8")
    kept = {(each.part, each.stored, each.format, each.exact) for each in result.kept}
    assert {("experts", "q4_k", "q8", False), ("down", "q6_k", "q8", False), ("trunk", "q4_k", "q4_k", True)} <= kept
    assert {part for _, part, _ in result.losses} == {"experts"}
    assert all(0 < loss.relative < 0.012 for loss in result.losses.values())


def test_a_format_for_all_requantizes_all_but_what_has_it_already(files, tmp_path):
    result = pack(files("mixtral-q4_k_m"), tmp_path / "pack", quant="q4_k")
    for each in result.kept:
        assert each.format == ("f32" if each.part in ("small", "router") else "q4_k")
        assert each.exact == (each.stored in ("f32", "q4_k"))
    assert not open_pack(tmp_path / "pack").formats.overrides


def test_only_the_first_layers(files, tmp_path):
    pack(files("mixtral-q4_k_m"), tmp_path / "pack", layers=1)
    opened = open_pack(tmp_path / "pack")
    assert len(opened.config.layers) == 1 and opened.formats.down == "q6_k"


def test_the_config_comes_back(files, packs):
    for name in CASES:
        ours = dataclasses.replace(open_gguf(files(name)).config, native_format="bf16")
        assert packs(name)[1].config == ours
        assert families.read_config(json.loads((packs(name)[1].folder / "config.json").read_text())) == ours


def test_text_side_and_ends_come_along(tmp_path):
    from fewfire import api
    from fewfire.tokenizer import train_bpe

    text = "A router sends each token to a few experts.\n" * 8
    tokenizer = train_bpe([text], 300)
    model = tiny_hub.make("mixtral", vocab_size=tokenizer.vocab_size, head_dim=16)
    folder = tiny_hub.save(model, tmp_path / "hub")
    tokenizer.save(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    api.export(folder, tmp_path / "x.gguf", to="gguf", quant="q8_0")
    pack(tmp_path / "x.gguf", tmp_path / "pack")
    from_file, packed = fewfire.load(tmp_path / "x.gguf"), fewfire.load(tmp_path / "pack")
    assert packed.tokenizer.encode(text) == from_file.tokenizer.encode(text)
    assert packed.eos_ids == from_file.eos_ids == (tokenizer.eos_token_id,)
    assert isinstance(packed.module, NativeDecoder) and len(packed.generate("A router", max_tokens=3).token_ids) <= 3


@pytest.mark.parametrize(("name", "tensor", "block", "bad", "message"), [
    ("llama-q8_0", "blk.1.attn_v.weight", 1, b"\xff\x7e", r"layers\.1\.attention\.v\.weight: holds nan .*column 32"),
    ("mixtral-q4_k_m", "blk.1.ffn_up_exps.weight", 0, b"\xff\x7e", r"layers\.1\.ffn\.experts\.up\[0\]: .*column 0"),
    ("gpt_oss-mxfp4", "blk.0.ffn_up_exps.weight", 1, b"\xff", r"layers\.0\.ffn\.experts\.up\[0\]: .*column 32"),
])  # fmt: skip
def test_blocks_that_are_no_numbers_are_refused_by_name_and_place(files, tmp_path, name, tensor, block, bad, message):
    raw, found = bytearray(files(name).read_bytes()), open_gguf(files(name)).header.tensors[tensor]
    size = NATIVE_BLOCKS[found.type]
    at = found.offset + (3 * found.shape[-1] // size.columns + block) * size.num_bytes
    raw[at : at + len(bad)] = bad
    (tmp_path / "x.gguf").write_bytes(raw)
    with pytest.raises(FormatError, match=message) as caught:
        pack(tmp_path / "x.gguf", tmp_path / "pack")
    assert "in row 3," in str(caught.value)
    assert {each.name for each in tmp_path.iterdir()} == {"x.gguf"}


def test_plain_tensors_that_are_no_numbers_are_refused_by_name_and_place(files, tmp_path):
    for name, tensor, bad in [
        ("llama-f16", "blk.1.attn_v.weight", b"\x00\x7c"),
        ("llama-f16", "blk.0.attn_norm.weight", b"\x00\x00\xc0\x7f"),
        ("mixtral-q4_k_m", "blk.1.ffn_gate_inp.weight", b"\x00\x00\x80\xff"),
    ]:
        found, raw = open_gguf(files(name)).header.tensors[tensor], bytearray(files(name).read_bytes())
        at = found.offset + 5 * len(bad)
        raw[at : at + len(bad)] = bad
        (tmp_path / "x.gguf").write_bytes(raw)
        layer = tensor.split(".")[1]
        message = (
            rf"x\.gguf: layers\.{layer}\..*weight: holds -?(inf|nan) in row 0, column 5; a weight must be a number"
        )
        with pytest.raises(FormatError, match=message):
            pack(tmp_path / "x.gguf", tmp_path / "pack")
    assert {each.name for each in tmp_path.iterdir()} == {"x.gguf"}


def test_the_command_says_what_became_of_each_type(files, tmp_path):
    def run(*words):
        command = [sys.executable, "-m", "fewfire", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    path = files("qwen3_moe-mixed")
    made = run("pack", path, tmp_path / "pack")
    assert made.returncode == 0 and not made.stdout, made.stderr
    rows = [line.split() for line in made.stderr.splitlines()]
    assert any(row[:3] == ["experts", "q8_0", "q8_0"] and row[-3:] == ["as", "it", "is"] for row in rows), made.stderr
    assert any(row[:3] == ["down", "q5_0", "q8"] and row[-1] == "requantized" for row in rows)
    document = json.loads(run("pack", path, tmp_path / "other", "--json").stdout)
    assert document["formats"]["experts"] == "q8_0" and document["overrides"] > 0
    row = next(each for each in document["kept"] if each["stored"] == "q5_k")
    assert row == {"part": "trunk", "stored": "q5_k", "format": "q8", "values": row["values"], "exact": False}
    manifest = json.loads((tmp_path / "pack" / MANIFEST).read_text())
    assert manifest["overrides"]["layers.0.attention.k.weight"] == "q4_1"


assert set(formats.GGML_FORMATS) == {"q4_0", "q4_1", "q8_0", "q4_k", "q6_k"}
