"""Packs: what is written comes back, planned bytes are the file's, and damaged bytes never become numbers."""

import json
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tiny_hub
import torch

import fewfire
from fewfire import families, formats
from fewfire.checkpoints import pack_writer
from fewfire.checkpoints.pack import (
    EXPERTS,
    MANIFEST,
    TRUNK,
    cut_record,
    is_pack,
    manifest_checksum,
    open_pack,
    verify_pack,
)
from fewfire.errors import ConfigError, FewfireError, FormatError
from fewfire.families import published
from fewfire.plan.memory import choose_formats, weight_bytes
from fewfire.quantize import initialise, pack
from fewfire.runtime.load import load_module
from fewfire.tokenizer import Tokenizer

FAMILIES = ("llama", "mixtral", "olmoe", "qwen3_moe", "gpt2")


@pytest.fixture(scope="module")
def hubs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hubs")
    return {family: tiny_hub.save(tiny_hub.make(family), folder / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def packed(hubs, tmp_path_factory):
    """An olmoe in q4, to be copied before it is damaged."""
    folder = tmp_path_factory.mktemp("packs") / "olmoe"
    pack(hubs["olmoe"], folder)
    return folder


@pytest.fixture
def copy(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "pack")


def rewrite_manifest(folder, change):
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    manifest["checksum"] = manifest_checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


# ----------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("family", FAMILIES)
def test_an_f32_pack_is_the_checkpoint_bit_for_bit(hubs, tmp_path, family):
    pack(hubs[family], tmp_path / "pack", quant="f32")
    module, packed_module = load_module(hubs[family]), load_module(tmp_path / "pack")
    for (name, ours), (other, theirs) in zip(
        module.state_dict().items(), packed_module.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(ours, theirs), name


@pytest.mark.parametrize("quant", formats.PACK_FORMATS)
def test_every_weight_of_a_pack_is_its_format_decoded(hubs, tmp_path, quant):
    result = pack(hubs["qwen3_moe"], tmp_path / "pack", quant=quant)
    original, quantized = load_module(hubs["qwen3_moe"]), load_module(tmp_path / "pack", dtype=torch.float32)
    state = quantized.state_dict()
    names = {"experts.gate": result.formats.experts, "experts.down": result.formats.down, "router": "f32"}
    names |= {"attention.q.": result.formats.trunk, "head": result.formats.head, "_norm": result.formats.small}
    if quant == "mxfp4":
        names["router"] = "bf16"
    for name, values in original.state_dict().items():
        name_format = next((each for part, each in names.items() if part in name), None)
        if name_format is None:
            continue
        rows = values if ".experts." in name else values[None]
        expected = [formats.decode(formats.encode(row, name_format), name_format, tuple(row.shape)) for row in rows]
        assert torch.equal(torch.stack(expected).reshape(values.shape), state[name]), name


def test_planned_bytes_are_file_bytes(hubs, tmp_path):
    for number, options in enumerate(({}, {"quant": "q8"}, {"quant": "mxfp4"}, {"down": "q8", "head": "bf16"})):
        for family in ("qwen3_moe", "gpt2", "olmoe"):
            folder = tmp_path / f"{family}{number}"
            pack(hubs[family], folder, **options)
            config = families.read_config(json.loads((hubs[family] / "config.json").read_text()))
            planned = weight_bytes(config, choose_formats(config, **{"quant": "q4"} | options))
            header = int.from_bytes((folder / TRUNK).read_bytes()[:8], "little") + 8
            assert planned.trunk == (folder / TRUNK).stat().st_size - header
            assert planned.experts == ((folder / EXPERTS).stat().st_size if planned.experts else 0)
            assert open_pack(folder).num_bytes == planned.total


def test_records_are_aligned_and_their_parts_in_order(packed):
    opened = open_pack(packed)
    layer = opened.layout.experts[1]
    assert layer.record_bytes % 4096 == 0 and layer.offset % 4096 == 0
    named = [(part.name, part.kind) for part in layer.parts]
    assert named == [("gate", "codes"), ("up", "codes"), ("down", "codes"),
                     ("gate", "scales"), ("up", "scales"), ("down", "scales")]  # fmt: skip
    raw = np.fromfile(packed / EXPERTS, np.uint8)
    at = layer.record_offset(2)
    record = opened.read_expert(1, 2)
    assert np.array_equal(record.numpy(), raw[at : at + layer.record_bytes])
    end = layer.parts[-1].offset + layer.parts[-1].num_bytes
    assert not record[end:].any()
    up = cut_record(layer, record, "up")
    assert up.codes.data_ptr() == record.data_ptr() + layer.parts[1].offset


def test_error_table_names_every_layer(hubs, tmp_path):
    result = pack(hubs["mixtral"], tmp_path / "pack")
    assert ("layers.1", "experts", "q4") in result.losses and ("head", "trunk", "q8") in result.losses
    assert all(0 < loss.relative < 0.2 for loss in result.losses.values())


def test_layers_are_listed_in_order(tmp_path):
    hub = tiny_hub.save(tiny_hub.make("llama", num_hidden_layers=11), tmp_path / "hub")
    places = [place for place, _, _ in pack(hub, tmp_path / "pack").losses]
    assert places == ["embed", *(f"layers.{number}" for number in range(11))]


def test_only_the_first_layers(hubs, tmp_path):
    pack(hubs["mixtral"], tmp_path / "pack", layers=1)
    assert len(open_pack(tmp_path / "pack").config.layers) == 1
    with pytest.raises(ConfigError, match="between 1 and the model's 2"):
        pack(hubs["mixtral"], tmp_path / "other", layers=3)


def test_a_pack_generates_at_once(packed):
    with pytest.warns(UserWarning, match="heads of 8 have no native step"):
        model = fewfire.load(packed)
    generated = model.generate([1, 2, 3], max_tokens=4)
    assert len(generated.token_ids) == 4 and generated.invariant is False


def test_weights_that_are_no_numbers_are_refused_by_name(hubs, tmp_path):
    model = tiny_hub.make("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = float("nan")
    folder = tiny_hub.save(model, tmp_path / "hub")
    with pytest.raises(FormatError, match=r"layers\.1\.ffn\.experts\.down\[2\]: holds nan in row 3, column 4"):
        pack(folder, tmp_path / "pack")
    assert not (tmp_path / "pack").exists() and not list(tmp_path.glob(".*"))


def test_occupied_folders_packs_and_wrong_formats_are_refused(hubs, packed, tmp_path):
    with pytest.raises(ConfigError, match="not empty"):
        pack(hubs["olmoe"], packed)
    with pytest.raises(ConfigError, match="pack already"):
        pack(packed, tmp_path / "x")
    with pytest.raises(ConfigError, match="fp16"):
        pack(hubs["olmoe"], tmp_path / "x", quant="fp16")
    with pytest.raises(ConfigError, match=r"q3\) is not a format"):
        pack(hubs["olmoe"], tmp_path / "x", head="q3")


# ------------------------------------------------------------------------------------------------------- damage


def flip(path, at, bit=3):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


def test_a_flipped_bit_is_named_with_file_record_and_offset(copy):
    layer = open_pack(copy).layout.experts[1]
    flip(copy / EXPERTS, layer.record_offset(3) + 77)
    with pytest.raises(FormatError, match=r"layers\.1\.ffn\.experts\[3\]") as caught:
        verify_pack(copy)
    assert caught.value.path == str(copy / EXPERTS) and caught.value.offset == layer.record_offset(3)
    with pytest.raises(FormatError):
        load_module(copy)


def test_every_flipped_bit_of_a_pack_is_noticed(copy):
    """Any byte of any file, sampled evenly; padding too."""
    for path in sorted(each for each in copy.iterdir() if each.is_file()):
        whole = path.read_bytes()
        for at in np.linspace(0, len(whole) - 1, 12).astype(int):
            flip(path, at, bit=int(at) % 8)
            with pytest.raises(FewfireError):
                verify_pack(copy)
            path.write_bytes(whole)
    verify_pack(copy)


@pytest.mark.parametrize("name", [EXPERTS, TRUNK, MANIFEST, "config.json"])
@pytest.mark.parametrize("cut", [0, 0.5, 0.999])
def test_truncated_files_are_refused(copy, name, cut):
    path = copy / name
    path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
    with pytest.raises(FormatError) as caught:
        open_pack(copy)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", [EXPERTS, TRUNK, "config.json"])
def test_missing_files_are_refused(copy, name):
    (copy / name).unlink()
    with pytest.raises((FormatError, ConfigError), match=name.replace(".", r"\.")):
        open_pack(copy)


def test_a_later_version_is_refused(copy):
    rewrite_manifest(copy, lambda manifest: manifest.update(pack_version=4))
    with pytest.raises(FormatError, match="is 4, this fewfire reads 3; update"):
        open_pack(copy)


HOSTILE = {
    "formats": lambda m: m["formats"].update(experts="q5"),
    "format of another type": lambda m: m["formats"].update(experts=["q4"]),
    "a role too many": lambda m: m["formats"].update(extra="q4"),
    "quantized norms": lambda m: m["formats"].update(small="q8"),
    "an override of another type": lambda m: m.update(overrides=["embed.weight"]),
    "an override's format": lambda m: m["overrides"].update({"embed.weight": "fp8"}),
    "an override's format of another type": lambda m: m["overrides"].update({"embed.weight": {}}),
    "an override of nothing": lambda m: m["overrides"].update({"layers.9.ffn.experts.up": "q8"}),
    "an override of one expert": lambda m: m["overrides"].update({"layers.0.ffn.experts.up[0]": "q8"}),
    "an override that is not so": lambda m: m["overrides"].update({"layers.0.attention.q.weight": "bf16"}),
    "a quantized norm": lambda m: m["overrides"].update({"norm.weight": "q8"}),
    "a quantized router": lambda m: m["overrides"].update({"layers.0.ffn.router.weight": "q8"}),
    "other format": lambda m: m["formats"].update(experts="q8"),
    "offset": lambda m: m["experts"]["layers"][0].update(offset=1 << 62),
    "record size": lambda m: m["experts"]["layers"][1].update(record_bytes=-4096),
    "layers": lambda m: m["experts"]["layers"].pop(),
    "checksums": lambda m: m["experts"]["layers"][0]["checksums"].pop(),
    "checksum of another type": lambda m: m["experts"]["layers"][0]["checksums"].__setitem__(0, "x"),
    "trunk": lambda m: m["trunk"]["checksums"].popitem(),
    "another trunk": lambda m: m["trunk"].update(file="/etc/passwd"),
    "bytes of experts": lambda m: m["experts"].update(bytes=-1),
    "bytes of a file": lambda m: m["files"]["config.json"].update(bytes="x"),
    "a path": lambda m: m["files"].update({"../x": {"bytes": 1, "checksum": 2}}),
    "no config": lambda m: m["files"].pop("config.json"),
    "version": lambda m: m.update(pack_version="1"),
    "null": lambda m: m.update(experts=None),
    "missing": lambda m: m.pop("trunk"),
}  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_manifest_that_lies_is_refused(copy, change):
    rewrite_manifest(copy, change)
    with pytest.raises(FormatError):
        open_pack(copy)


def test_an_interrupted_write_leaves_nothing_under_the_name(hubs, tmp_path, monkeypatch):
    def fail(self, layer, expert):
        raise KeyboardInterrupt

    monkeypatch.setattr(pack_writer._Writer, "_record", fail)
    with pytest.raises(KeyboardInterrupt):
        pack(hubs["olmoe"], tmp_path / "pack")
    assert [each.name for each in tmp_path.iterdir()] == [".pack.unfinished"]  # tests/test_resume.py goes on from there


# -------------------------------------------------------------------------------------------------- random packs


def test_random_packs_are_the_same_for_the_same_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        initialise("granite-3.0-1b-a400m", tmp_path / name, layers=1, seed=seed)
    raw = {name: zlib.crc32((tmp_path / name / EXPERTS).read_bytes()) for name in "abc"}
    assert raw["a"] == raw["b"] != raw["c"]
    config = published.load("granite-3.0-1b-a400m")
    opened = open_pack(tmp_path / "a")
    assert opened.config.layers[0] == config.layers[0] and is_pack(tmp_path / "a")
    verify_pack(tmp_path / "a")


@pytest.mark.parametrize("quant", formats.PACK_FORMATS)
def test_random_weights_have_the_usual_spread(quant):
    from fewfire.quantize.init import RandomWeights

    config = published.load("olmoe-1b-7b")
    source = RandomWeights(config, 0)
    for shape in ((200, 512), (64, 8 * 37)):
        made = source.encoded("layers.0.attention.q.weight", None, quant, shape)
        values = formats.decode(made, quant, shape)
        assert 0.014 < float(values.std()) < 0.029 and abs(float(values.mean())) < 0.003
        again = formats.encode(values, quant) if quant in ("q8", "q4", "mxfp4") else made
        assert again.codes.numel() == made.codes.numel()
    padded = formats.decode(source.encoded("x.weight", None, quant, (17, 136)), quant, (17, 136))
    assert bool((padded != 0).any(dim=1).all())


def test_padding_of_random_tiles_is_zero():
    from fewfire.quantize.init import RandomWeights

    source = RandomWeights(published.load("olmoe-1b-7b"), 0)
    for name in ("q8", "q4", "mxfp4", *formats.GGML_FORMATS):
        whole = formats.decode(source.encoded("x.weight", None, name, (20, 136)), name, (32, 256))
        end = 256 if name in ("q4_k", "q6_k") else 160 if name in formats.GGML_FORMATS else 136  # whole blocks
        assert whole[:20, :136].any() and not whole[20:].any() and not whole[:, end:].any(), name


def test_every_id_of_a_random_pack_decodes_to_its_own_text(tmp_path):
    initialise("granite-3.0-1b-a400m", tmp_path / "pack", layers=1)
    tokenizer = Tokenizer.load(tmp_path / "pack")
    assert tokenizer.vocab_size == 49155
    texts = {tokenizer.decode([each]) for each in range(tokenizer.vocab_size)}
    assert len(texts) == tokenizer.vocab_size and "" not in texts
    assert tokenizer.decode(tokenizer.encode("Hello, world\n")) == "Hello, world\n"


def test_commands_from_end_to_end(hubs, tmp_path):
    def run(*words):
        command = [sys.executable, "-m", "fewfire", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    made = run("pack", hubs["olmoe"], tmp_path / "pack", "--quant", "q8", "--experts", "q4", "--json")
    assert made.returncode == 0, made.stderr
    document = json.loads(made.stdout)
    assert document["formats"] == {"experts": "q4", "down": "q4", "trunk": "q8", "head": "q8", "router": "f32"}
    checked = run("verify", tmp_path / "pack", "--json")
    assert json.loads(checked.stdout)["intact"] is True
    flip(tmp_path / "pack" / EXPERTS, 5)
    broken = run("verify", tmp_path / "pack")
    assert broken.returncode == 2 and "experts[0]" in broken.stderr and broken.stderr.count("\n") == 1
    assert run("verify", hubs["olmoe"]).returncode == 2
