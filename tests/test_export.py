"""Hub to ours to hub: bitwise, and transformers computes the same logits from what was written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny_hub
import torch
from oracle import reference
from oracle.specs import SPECS, SWITCH_SPECS
from safetensors.torch import load_file

from fewfire import api
from fewfire.checkpoints.hub import save_hub
from fewfire.errors import ConfigError
from fewfire.model.initialise import initialise
from fewfire.runtime.load import load_module

FAMILIES = sorted(tiny_hub.CONFIGS)
IDS = torch.randint(0, tiny_hub.VOCAB, (2, 19), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = tensors_of(a), tensors_of(b)
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert values.dtype == second[name].dtype and values.equal(second[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_hub_to_ours_to_hub_is_bitwise(family, dtype, tmp_path):
    source = tiny_hub.save(tiny_hub.make(family, dtype), tmp_path / "source")
    api.export(source, tmp_path / "out")
    assert_same_tensors(source, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers_both_ways(family, tmp_path):
    theirs = tiny_hub.make(family)
    ours = api.load(tiny_hub.save(theirs, tmp_path / "source"))
    api.export(tmp_path / "source", tmp_path / "out")
    with torch.no_grad():
        expected, back = theirs(IDS).logits, tiny_hub.load(tmp_path / "out")(IDS).logits
    torch.testing.assert_close(ours.logits(IDS), expected, atol=1e-4, rtol=0)  # the contract; 5e-6 is usual
    assert back.equal(expected)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral", "llama"])
def test_what_was_initialised_here_loads_there(family, tmp_path):
    module = load_module(tiny_hub.save(tiny_hub.make(family), tmp_path / "source"))
    initialise(module, 2, seed=11, std=0.2)
    save_hub(module, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(tiny_hub.load(tmp_path / "out")(IDS).logits, module(IDS), atol=1e-4, rtol=0)


def test_shards_and_their_index(tmp_path):
    source = tiny_hub.save(tiny_hub.make("mixtral"), tmp_path / "source")
    module = load_module(source)
    save_hub(module, tmp_path / "sharded", shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert_same_tensors(source, tmp_path / "sharded")
    again = load_module(tmp_path / "sharded")
    assert all(a.equal(b) for a, b in zip(module.state_dict().values(), again.state_dict().values(), strict=True))
    tiny_hub.load(tmp_path / "sharded")
    theirs = tiny_hub.save(tiny_hub.make("mixtral"), tmp_path / "theirs", max_shard_size="20KB")
    assert len(list(theirs.glob("*.safetensors"))) > 3
    assert load_module(theirs).state_dict().keys() == module.state_dict().keys()


def test_a_dtype_converts_all_but_the_selection_bias(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "deepseek_v3", vocab_size=97, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2,
        n_group=4, topk_group=2, first_k_dense_replace=1, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=12, max_position_embeddings=64,
    )  # fmt: skip
    source = tiny_hub.save(AutoModelForCausalLM.from_config(config), tmp_path / "source")
    api.export(source, tmp_path / "out", dtype="bf16")
    kinds = {name: values.dtype for name, values in tensors_of(tmp_path / "out").items()}
    assert kinds.pop("model.layers.1.mlp.gate.e_score_correction_bias") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
    assert load_module(tmp_path / "out").embed.weight.dtype == torch.bfloat16


def test_companions_travel_along(tmp_path):
    source = tiny_hub.save(tiny_hub.make("llama"), tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": [3, 5], "temperature": 0.6}')
    (source / "tokenizer.model").write_bytes(b"\0kept as it is")
    (source / "pytorch_model.bin").write_bytes(b"not a companion")
    exported = api.export(source, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.model").read_bytes() == b"\0kept as it is"
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["temperature"] == 0.6
    assert exported.files == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.model"]
    assert exported.num_bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


def test_refusals(tmp_path):
    source = tiny_hub.save(tiny_hub.make("llama"), tmp_path / "source")
    with pytest.raises(ConfigError, match="not empty"):
        api.export(source, source)
    with pytest.raises(ConfigError, match="expected one of hf"):
        api.export(source, tmp_path / "out", to="onnx")
    with pytest.raises(ConfigError, match="f32, bf16, fp16"):
        api.export(source, tmp_path / "out", dtype="q4")
    (tmp_path / "empty").mkdir()
    api.export(source, tmp_path / "empty")
    assert (tmp_path / "empty/model.safetensors").exists()


# ------------------------------------------------------------------------------------------------------ every family

EVERY = {**SPECS, **SWITCH_SPECS}
# What our folders leave out: tables that the config determines, the tower that only images need.
LEFT_OUT = {
    "minimax": r".*self_attn\.(diagonal_decay|key_decay|query_decay|slope_rate)",
    "qwen3_vl_moe": r"model\.visual\..*",
}
NOT_IN_TRANSFORMERS = ("kimi_k2",)  # by this model type, that is


@torch.no_grad()
def logits_of(model, name: str) -> torch.Tensor:
    options = {"decoder_input_ids": reference.token_ids(9, name)} if name in SWITCH_SPECS else {}
    return model(input_ids=reference.token_ids(EVERY[name].length, name), use_cache=False, **options).logits


@pytest.mark.parametrize("name", EVERY)
def test_every_family_goes_out_as_it_came_in_and_loads_in_transformers(name, tmp_path):
    theirs = reference.make_model(EVERY[name])
    source = tiny_hub.save(theirs, tmp_path / "source")
    if EVERY[name].rewrite is not None:
        EVERY[name].rewrite(source)
    api.export(source, tmp_path / "out")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    left_out = {key for key in before if re.fullmatch(LEFT_OUT.get(name.split("-")[0], "$^"), key)}
    assert before.keys() - after.keys() == left_out and not after.keys() - before.keys()
    for key, values in after.items():
        assert values.dtype == before[key].dtype and values.equal(before[key]), key
    if name in NOT_IN_TRANSFORMERS:
        return
    back, info = tiny_hub.load_as(type(theirs), tmp_path / "out")
    assert set(info["missing_keys"]) <= left_out and not info["unexpected_keys"] and not info["mismatched_keys"]
    # equal weights; float32 sums may be ordered otherwise where the memory is aligned otherwise
    torch.testing.assert_close(logits_of(back, name), logits_of(theirs, name), atol=1e-5, rtol=0)
