"""Atomic writes, strict headers, and hub folders that do not fit their config: one line, never a wrong model."""

from __future__ import annotations

import errno
import json
import os
import re
import struct
from pathlib import Path

import pytest
import tiny_hub
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fewfire import api, headers
from fewfire.checkpoints import atomic, encodings, shards
from fewfire.checkpoints.hub import open_hub, save_hub
from fewfire.checkpoints.shards import Outgoing, Shards, write_safetensors
from fewfire.checkpoints.source import read_eos_ids
from fewfire.errors import BudgetError, ConfigError, FewfireError, FormatError
from fewfire.runtime.load import load_module

# ------------------------------------------------------------------------------------------------------------ atomic


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "file"
    with pytest.raises(RuntimeError):
        with atomic.replacing_file(target) as file:
            file.write(b"half")
            raise RuntimeError("interrupted")
    assert contents(tmp_path / "new") == set()
    atomic.write_bytes(target, b"whole")
    with pytest.raises(KeyboardInterrupt):
        with atomic.replacing_file(target) as file:
            file.write(b"half")
            raise KeyboardInterrupt
    assert target.read_bytes() == b"whole" and contents(tmp_path / "new") == {"file"}


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        with atomic.replacing_folder(target) as folder:
            (folder / "a").write_bytes(b"1")
            assert not target.exists()
            raise KeyboardInterrupt
    assert contents(tmp_path) == set()
    with atomic.replacing_folder(target) as folder:
        (folder / "a").write_bytes(b"1")
    with pytest.raises(ConfigError, match="not empty"):
        with atomic.replacing_folder(target):
            pytest.fail("the body must not run")
    with atomic.replacing_folder(target, overwrite=True) as folder:
        (folder / "b").write_bytes(b"2")
    assert contents(target) == {"b"} and contents(tmp_path) == {"out"}


def test_what_a_dead_process_left_is_cleared(tmp_path):
    dead, alive = 2**22 + 1, os.getppid()  # Linux gives out no higher id than 2^22
    kept = {f".out.{alive}.partial", f".other.{dead}.partial"}
    for name in {*kept, f".out.{dead}.partial", f".out.{dead}.retired"}:
        (tmp_path / name).mkdir()
    (tmp_path / f".out.{dead}.retired" / "old").write_bytes(b"moved away, never replaced")
    with pytest.raises(KeyboardInterrupt):
        with atomic.replacing_folder(tmp_path / "out", overwrite=True):
            raise KeyboardInterrupt
    assert contents(tmp_path) == kept | {"out"} and contents(tmp_path / "out") == {"old"}


@pytest.mark.parametrize(
    ("number", "kind", "status"),
    [(errno.ENOSPC, BudgetError, 1), (errno.EDQUOT, BudgetError, 1), (errno.EROFS, ConfigError, 2)]
    + [(errno.EACCES, ConfigError, 2), (errno.EIO, FewfireError, 1)],
)
def test_system_errors_become_one_line_and_leave_nothing(tmp_path, number, kind, status):
    with pytest.raises(kind) as caught:
        with atomic.replacing_file(tmp_path / "file") as file:
            file.write(b"half")
            raise OSError(number, os.strerror(number))
    assert type(caught.value) is kind and caught.value.exit_status == status
    assert "\n" not in str(caught.value) and str(tmp_path / "file") in str(caught.value)
    assert contents(tmp_path) == set()


def test_a_path_through_a_file_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be written"):
        atomic.write_bytes(tmp_path / "file" / "below", b"")
    with pytest.raises(ConfigError, match="is a file"):
        atomic.refuse_occupied(tmp_path / "file")


def test_an_error_about_another_file_is_not_blamed_on_the_target(tmp_path):
    with pytest.raises(FileNotFoundError):
        with atomic.replacing_file(tmp_path / "file"):
            (tmp_path / "absent").read_bytes()
    assert contents(tmp_path) == set()


def test_a_full_disk_leaves_no_export(tmp_path, monkeypatch):
    module = load_module(tiny_hub.save(tiny_hub.make("olmoe"), tmp_path / "source"))
    calls = []

    def full_after_two(path, tensors, metadata=None):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_safetensors(path, tensors, metadata)

    monkeypatch.setattr(shards, "write_safetensors", full_after_two)
    with pytest.raises(BudgetError, match="disk is full"):
        save_hub(module, tmp_path / "out", shard_bytes=5_000)
    assert contents(tmp_path) == {"source"} and len(calls) == 3
    with pytest.raises(ConfigError, match="cannot be written"):
        save_hub(module, tmp_path / "source" / "config.json" / "below")


# ----------------------------------------------------------------------------------------------------------- headers


def write_raw(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(start: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (1,)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_every_dtype_survives_the_round_trip(tmp_path):
    values = {
        name: torch.arange(6).reshape(2, 3).to(dtype) if name != "F8_E8M0" else torch.ones(2, 3).to(dtype)
        for name, dtype in shards.TORCH_DTYPES.items()
    } | {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}
    write_safetensors(
        tmp_path / "ours.safetensors",
        [Outgoing(name, each.dtype, tuple(each.shape), lambda each=each: each) for name, each in values.items()],
    )
    theirs = load_file(tmp_path / "ours.safetensors")
    save_file(values, tmp_path / "theirs.safetensors")
    for path in (tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"):
        with Shards() as opened:
            for name, header in headers.read_safetensors(path).items():
                read = opened.read(header)
                assert read.dtype == values[name].dtype and read.shape == values[name].shape
                for other in (values[name], theirs[name]):
                    assert read.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "no JSON"),
        (b"[]", b"", "expected an object"),
        (b'{"\xff": 1}', b"", "no JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "no JSON"),
        (b"[" * 100_000, b"", "no JSON"),
        (b'{"a": 1, "a": 2}', b"", "twice"),
        ({"a": 1}, b"", "no dtype"),
        ({"a": {"dtype": "F32"}}, b"", "no dtype"),
        ({"a": entry(0, 4, dtype="F3")}, bytes(4), "'F3'"),
        ({"a": entry(0, 4, shape=(-1,))}, bytes(4), "whole numbers"),
        ({"a": entry(0, 4) | {"shape": [1.0]}}, bytes(4), "whole numbers"),
        ({"a": entry(0, 4) | {"shape": [True]}}, bytes(4), "whole numbers"),
        ({"a": entry(0, 4) | {"data_offsets": [0]}}, bytes(4), "whole numbers"),
        ({"a": entry(0, 5)}, bytes(5), "takes the bytes from 0 to 5"),
        ({"a": entry(4, 0)}, bytes(4), "takes the bytes"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4), "shares bytes"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6), "shares bytes"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12), "gap"),
        ({"a": entry(0, 4)}, bytes(3), "describes"),
        ({"a": entry(0, 4)}, bytes(5), "describes"),
        ({"a": entry(0, 4 * 2**40, shape=(2**40,))}, bytes(8), "describes"),
    ],
)
def test_lying_headers_are_refused(tmp_path, header, data, message):
    with pytest.raises(FormatError, match=message) as caught:
        headers.read_safetensors(write_raw(tmp_path / "x.safetensors", header, data))
    assert "\n" not in str(caught.value) and "x.safetensors" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 100) + b"{}", struct.pack("<Q", 2**63) + b"{}"])
def test_files_too_short_for_their_header_are_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError):
        headers.read_safetensors(path)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "x.safetensors"
    save_file({"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}, path)
    return path.read_bytes()


@given(data=st.data())
def test_any_damage_is_seen_or_harmless(small_file, tmp_path_factory, data):
    """Cut anywhere: refused. A byte changed anywhere: refused, or the same tensors are described."""
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    cut = data.draw(st.integers(0, len(small_file) - 1))
    path.write_bytes(small_file[:cut])
    with pytest.raises(FormatError):
        headers.read_safetensors(path)
    damaged = bytearray(small_file)
    damaged[data.draw(st.integers(0, len(small_file) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        found = headers.read_safetensors(path)
    except FormatError as error:
        assert "\n" not in str(error)
        return
    for header in found.values():
        assert 0 <= header.offset <= header.offset + header.num_bytes <= len(damaged)


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path, small_file):
    path = tmp_path / "x.safetensors"
    path.write_bytes(small_file)
    found = headers.read_safetensors(path)
    path.write_bytes(small_file[:-3])
    with Shards() as opened, pytest.raises(FormatError, match="ends inside"):
        for header in found.values():
            opened.read(header)


# -------------------------------------------------------------------------------------------------------- hub folders


@pytest.fixture
def folder(tmp_path) -> Path:
    return tiny_hub.save(tiny_hub.make("qwen3_moe"), tmp_path / "model")


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    found = load_file(path)
    change(found)
    save_file(found, path)


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERT), f"{re.escape(EXPERT)}: is missing"),
        (lambda t: [t.pop(name) for name in list(t) if "layers.1" in name], "is missing and 2. more"),
        (lambda t: t.update({"model.surprise": torch.ones(1)}), "model.surprise: is no part"),
        (lambda t: t.update({EXPERT: t[EXPERT][:-1].clone()}), r"shape \[23, 32\], config.json implies \[24, 32\]"),
        (lambda t: t.update({EXPERT: t[EXPERT].to(torch.int8)}), "I8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(FormatError, match=message):
        load_module(folder)


def test_old_buffers_are_ignored_and_listed(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(folder, lambda t: t.update({name: torch.ones(4)}))
    assert open_hub(folder).ignored == (name,)
    load_module(folder)


def test_a_config_that_disagrees_with_the_tensors(folder):
    config = json.loads((folder / "config.json").read_text())
    for key, value in (("num_hidden_layers", 3), ("num_hidden_layers", 1), ("hidden_size", 64), ("head_dim", 8)):
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(FormatError):
            load_module(folder)


def test_broken_indexes(tmp_path):
    folder = tiny_hub.save(tiny_hub.make("llama"), tmp_path / "model", max_shard_size="20KB")
    index_path = folder / headers.INDEX_FILE
    index = json.loads(index_path.read_text())
    name, file = next(iter(index["weight_map"].items()))
    other = next(each for each in index["weight_map"].values() if each != file)
    for weight_map, message in [
        ({**index["weight_map"], name: "absent.safetensors"}, "absent.safetensors, which is not there"),
        ({**index["weight_map"], name: "../model.safetensors"}, "plain file name"),
        ({**index["weight_map"], name: other}, "lies in"),
        ({**index["weight_map"], "surprise": file}, "does not hold it"),
        ([], "no weight_map"),
        ({"a": 1}, "no weight_map"),
    ]:
        index_path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(FormatError, match=message):
            load_module(folder)
    index_path.write_text(json.dumps(index))
    first = folder / file
    save_file(load_file(first) | load_file(folder / other), folder / other)
    with pytest.raises(FormatError, match="is also in"):
        load_module(folder)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(ConfigError, match="config.json cannot be read"):
        load_module(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match="no JSON"):
        load_module(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(ConfigError, match="unheard_of.*mixtral"):
        load_module(tmp_path)
    tiny_hub.save(tiny_hub.make("llama"), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="only PyTorch .bin files"):
        load_module(tmp_path)


@given(data=st.data())
def test_a_cut_checkpoint_never_loads(tmp_path_factory, data):
    global _WHOLE
    if _WHOLE is None:
        folder = tiny_hub.save(tiny_hub.make("olmoe"), tmp_path_factory.mktemp("whole"))
        _WHOLE = (folder, (folder / "model.safetensors").read_bytes())
    folder, whole = _WHOLE
    (folder / "model.safetensors").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(FormatError):
        load_module(folder)


_WHOLE: tuple[Path, bytes] | None = None


def test_nothing_is_left_uninitialised(folder, monkeypatch):
    """Memory is handed out full of NaN: whatever is not read stays one."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    module = load_module(folder)
    for name, values in [*module.named_parameters(), *module.named_buffers()]:
        assert bool(values.isfinite().all()), name


def test_precision_of_a_mixed_checkpoint(folder):
    def mix(tensors):
        for name in tensors:
            kept = "norm" in name or "mlp.gate" in name
            tensors[name] = tensors[name].to(torch.float32 if kept else torch.bfloat16)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].float()

    change_weights(folder, mix)
    module = load_module(folder)
    assert module.layers[0].attention.q.weight.dtype == module.head.weight.dtype == torch.bfloat16
    assert module.layers[0].ffn.router.weight.dtype == module.norm.weight.dtype == torch.float32
    assert load_module(folder, exact=True).head.weight.dtype == torch.float32
    assert {p.dtype for p in load_module(folder, dtype=torch.float16).parameters()} == {torch.float16}
    module(torch.tensor([[1, 2, 3]]))


def test_end_tokens_come_from_the_generation_config_first(folder):
    config = open_hub(folder).config
    (folder / "generation_config.json").unlink()
    assert read_eos_ids(folder, config) == config.eos_token_ids
    for text, expected in [
        ('{"eos_token_id": [7, 9]}', (7, 9)),
        ('{"eos_token_id": 4}', (4,)),
        ("{}", config.eos_token_ids),
        ('{"eos_token_id": null}', config.eos_token_ids),
    ]:
        (folder / "generation_config.json").write_text(text)
        assert read_eos_ids(folder, config) == expected
    (folder / "generation_config.json").write_text('{"eos_token_id": ["7"]}')
    with pytest.raises(FormatError, match="eos_token_id"):
        read_eos_ids(folder, config)


# ----------------------------------------------------------------------------------------------------- FP8 and MXFP4


def to_fp8(folder: Path, scale_dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Rewrite a folder as DeepSeek stores it: matrices as e4m3 with a scale for every 128 x 128. Returns the values."""
    tensors, values = load_file(folder / "model.safetensors"), {}
    for name, value in list(tensors.items()):
        if value.dim() != 2 or any(part in name for part in ("embed", "lm_head", "mlp.gate.", "norm")):
            tensors[name] = value if "correction_bias" in name else value.bfloat16()
            continue
        grid = tuple(-(-extent // 128) for extent in value.shape)
        scales = torch.zeros(grid)
        for i in range(grid[0]):
            for j in range(grid[1]):
                block = value[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
                scales[i, j] = block.abs().max() / 448 * (1 + 0.1 * (i + j))  # the largest code is not always used
        scales = scales.to(scale_dtype)
        spread = scales.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[: value.shape[0], : value.shape[1]]
        tensors[name] = (value / spread).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
        values[name] = tensors[name].float() * spread
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    config |= {"quantization_config": quantization, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return values


@pytest.fixture
def wide_deepseek(tmp_path) -> Path:
    """Matrices of more than one block, and none a multiple of it."""
    from oracle.reference import make_model
    from oracle.specs import SPECS

    spec = SPECS["deepseek_v3"]
    wide = {"hidden_size": 160, "moe_intermediate_size": 136, "intermediate_size": 300, "q_lora_rank": 130}
    return tiny_hub.save(make_model(spec.__class__(spec.model, spec.config, spec.values | wide)), tmp_path / "fp8")


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_block_fp8_reads_as_value_times_scale(wide_deepseek, scale_dtype):
    values = to_fp8(wide_deepseek, scale_dtype)
    for dtype in (None, torch.float32):
        module = load_module(wide_deepseek, dtype=dtype)
        last = len(module.layers) - 1
        attention, experts = module.layers[last].attention, module.layers[last].ffn.experts
        prefix = f"model.layers.{last}."
        for ours, name in [
            (attention.q_up.weight, "self_attn.q_b_proj.weight"),
            (attention.kv_down.weight, "self_attn.kv_a_proj_with_mqa.weight"),
            (experts.up[3], "mlp.experts.3.up_proj.weight"),
            (experts.down[7], "mlp.experts.7.down_proj.weight"),
        ]:
            assert ours.dtype == (dtype or torch.bfloat16)
            assert ours.equal(values[prefix + name].to(ours.dtype)), name
    assert load_module(wide_deepseek)(torch.tensor([[1, 2, 3]])).isfinite().all()


def test_block_fp8_goes_out_as_it_came_in(wide_deepseek, tmp_path):
    to_fp8(wide_deepseek)
    api.export(wide_deepseek, tmp_path / "out")
    before, after = load_file(wide_deepseek / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype and value.view(torch.uint8).equal(after[name].view(torch.uint8)), name
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    api.export(wide_deepseek, tmp_path / "plain", dtype="bf16")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    kinds = {value.dtype for value in load_file(tmp_path / "plain/model.safetensors").values()}
    assert kinds == {torch.bfloat16, torch.float32}  # float32: the selection bias


@given(codes=st.lists(st.integers(0, 255), min_size=1, max_size=40), scale=st.floats(2.0**-40, 2.0**40))
def test_every_fp8_code_survives_bf16(codes, scale):
    stored = torch.tensor([codes], dtype=torch.uint8)
    stored = torch.where(stored & 0x7F == 0x7F, torch.zeros_like(stored), stored)  # no NaN
    scales = torch.tensor([[scale]])
    values = encodings.decode_fp8(stored.view(torch.float8_e4m3fn), scales)
    assert encodings.encode_fp8(values.bfloat16(), scales).view(torch.uint8).equal(stored)


def to_mxfp4(folder: Path) -> None:
    """Rewrite a gpt-oss folder with random MXFP4 blocks and scales, as the published checkpoints have them."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(7)
    for name, value in list(tensors.items()):
        tensors[name] = value.bfloat16()
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, into, out = tensors.pop(name).shape
            shape = (experts, out, into // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(118, 128, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))


@pytest.fixture
def gpt_oss(tmp_path) -> Path:
    from oracle.reference import make_model
    from oracle.specs import SPECS

    spec = SPECS["gpt_oss"]
    wide = {"hidden_size": 64, "intermediate_size": 96}
    folder = tiny_hub.save(make_model(spec.__class__(spec.model, spec.config, spec.values | wide)), tmp_path / "mxfp4")
    to_mxfp4(folder)
    return folder


def test_mxfp4_reads_as_transformers_reads_it(gpt_oss):
    from transformers import AutoModelForCausalLM, Mxfp4Config

    theirs, info = tiny_hub.load_as(
        AutoModelForCausalLM, gpt_oss, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    module = load_module(gpt_oss)
    for ours, other in zip(module.layers, theirs.model.layers, strict=True):
        fused = other.mlp.experts.gate_up_proj.transpose(1, 2)
        assert ours.ffn.experts.gate.dtype == torch.bfloat16
        assert ours.ffn.experts.gate.equal(fused[:, 0::2]) and ours.ffn.experts.up.equal(fused[:, 1::2])
        assert ours.ffn.experts.down.equal(other.mlp.experts.down_proj.transpose(1, 2))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(
            load_module(gpt_oss, dtype=torch.float32)(ids), theirs.float()(ids).logits, atol=1e-4, rtol=0
        )


def test_mxfp4_goes_out_as_it_came_in(gpt_oss, tmp_path):
    api.export(gpt_oss, tmp_path / "out")
    before, after = load_file(gpt_oss / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype and value.equal(after[name]), name
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"


def test_values_and_scales_that_do_not_fit(gpt_oss, wide_deepseek):
    to_fp8(wide_deepseek)
    name = "model.layers.0.self_attn.o_proj.weight"
    blocks = "model.layers.0.mlp.experts.down_proj"
    for folder, change, message in [
        (wide_deepseek, lambda t: t.pop(f"{name}_scale_inv"), "has no .*_scale_inv"),
        (wide_deepseek, lambda t: t.update({f"{name}_scale_inv": torch.ones(9, 9)}), r"shape \[9, 9\]"),
        (wide_deepseek, lambda t: t.update({f"{name}_scale_inv": torch.ones(2, 1).int()}), "I32"),
        (gpt_oss, lambda t: t.pop(f"{blocks}_scales"), "has no .*_scales"),
        (gpt_oss, lambda t: t.update({f"{blocks}_scales": t[f"{blocks}_scales"][1:].clone()}), "has shape"),
        (gpt_oss, lambda t: t.update({f"{blocks}_blocks": t[f"{blocks}_blocks"][..., :8].clone()}), "16 bytes"),
        (gpt_oss, lambda t: t.pop(f"{blocks}_blocks"), "is missing|no part"),
    ]:
        whole = (folder / "model.safetensors").read_bytes()
        change_weights(folder, change)
        with pytest.raises(FormatError, match=message):
            load_module(folder)
        (folder / "model.safetensors").write_bytes(whole)
        load_module(folder)
