"""Reading hub configs strictly: aliases, both rope spellings, errors that name the key; layouts and quantized forms."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_families import MLA, SIZES, fill

from fewfire import families
from fewfire.config import FeedForwardConfig, MoEConfig
from fewfire.errors import ConfigError
from fewfire.families.parameters import parameters


def tiny(name: str) -> dict:
    """A hub config as a file would hold it, without transformers."""
    base = dict(SIZES, num_key_value_heads=2, head_dim=16, rope_theta=1e4, rms_norm_eps=1e-5, torch_dtype="bfloat16")
    moe = dict(num_experts=4, num_experts_per_tok=2, intermediate_size=24)
    return {
        "llama": dict(base, model_type="llama", intermediate_size=48),
        "gpt2": dict(model_type="gpt2", vocab_size=96, n_positions=64, n_ctx=64, n_embd=32, n_layer=3, n_head=4),
        "mixtral": dict(base, model_type="mixtral", **moe),
        "olmoe": dict(base, model_type="olmoe", **moe),
        "gpt_oss": dict(base, model_type="gpt_oss", sliding_window=8, **moe),
        "deepseek_v3": dict(
            SIZES, **MLA, model_type="deepseek_v3", n_group=2, topk_group=1, num_nextn_predict_layers=1
        ),
        "qwen3_vl_moe": dict(
            model_type="qwen3_vl_moe",
            text_config=dict(base, model_type="qwen3_vl_moe_text", moe_intermediate_size=24, **moe),
            vision_config={"depth": 2},
        ),
    }[name]


# ----------------------------------------------------------------------------------------- layouts and stored forms


def test_hub_files_of_qwen3_vl_are_read_in_both_layouts():
    config = families.read_config(tiny("qwen3_vl_moe"))
    tables = {layout: families.tensors(config, layout) for layout in families.layouts(config)}
    rng = np.random.default_rng(0)
    module = {each.name: rng.standard_normal(each.shape, np.float32) for each in tables["module"]}
    transposed = {name: value.swapaxes(1, 2).copy() if value.ndim == 3 else value for name, value in module.items()}
    want = fill(config, tables["module"], module)
    table = families.match(config, {name: value.shape for name, value in transposed.items()})
    got = fill(config, table, transposed)
    assert all(np.array_equal(got[name], want[name]) for name in want)


def test_gpt2_files_are_read_with_and_without_prefix():
    config = families.read_config(tiny("gpt2"))
    bare = {each.name.removeprefix("transformer."): each.shape for each in families.tensors(config)}
    assert {each.name: each.shape for each in families.match(config, bare)} == bare
    masks = ("h.0.attn.bias", "transformer.h.11.attn.masked_bias", "lm_head.weight")
    patterns = families.ignored_tensors(config)
    assert all(any(p.fullmatch(name) for p in patterns) for name in masks)
    assert not any(p.fullmatch("h.0.attn.c_attn.bias") for p in patterns)


def test_mxfp4_blocks_decode_to_rows_of_our_parameters():
    hub = tiny("gpt_oss") | {"hidden_size": 64, "intermediate_size": 32}
    config = families.read_config(hub)
    plain = {each.name: each for each in families.tensors(config)}
    fused = plain["model.layers.1.mlp.experts.gate_up_proj"]
    (form,) = families.stored_forms(config, fused)
    names = "model.layers.1.mlp.experts.gate_up_proj"
    assert form.parts[0] == (f"{names}_blocks", (4, 64, 2, 16), "U8")
    assert form.parts[1] == (f"{names}_scales", (4, 64, 2), "U8")
    values = np.arange(np.prod(fused.shape), dtype=np.float32).reshape(fused.shape)
    decoded = values.swapaxes(1, 2).copy()
    for ours, stored in zip(fused.pieces, form.decoded.pieces):
        want = families.part(values, fused, ours)
        assert np.array_equal(families.part(decoded, form.decoded, stored), want)
    assert np.array_equal(families.part(decoded, form.decoded, form.decoded.pieces[0]), decoded[:, 0::2])  # gate first


def test_fp8_weights_come_with_a_scale_per_block():
    config = families.read_config(tiny("deepseek_v3") | {"intermediate_size": 300})
    plain = {each.name: each for each in families.tensors(config)}
    (form,) = families.stored_forms(config, plain["model.layers.0.mlp.gate_proj.weight"])
    assert form.parts[1] == ("model.layers.0.mlp.gate_proj.weight_scale_inv", (3, 1), "F32")
    assert families.stored_forms(config, plain["model.layers.0.input_layernorm.weight"]) == ()


# ---------------------------------------------------------------------------------------------------------- strictness


def test_an_unknown_key_is_named_with_the_way_out():
    hub = tiny("mixtral") | {"expert_dropout_kind": "soft"}
    with pytest.raises(ConfigError, match="expert_dropout_kind.*--ignore-key expert_dropout_kind"):
        families.read_config(hub)
    config = families.read_config(hub, ignore=("expert_dropout_kind",))
    assert config.ignored == ("expert_dropout_kind",)
    assert replace(config, ignored=()) == families.read_config(tiny("mixtral"))


def test_a_nested_unknown_key_is_named_by_its_path():
    hub = tiny("llama") | {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "wobble": 1}}
    with pytest.raises(ConfigError, match=r"rope_scaling\.wobble"):
        families.read_config(hub)
    assert families.read_config(hub, ignore=["rope_scaling.wobble"]).layers[0].mixer.rope.scaling.factor == 2.0


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num_experts", "4", "whole number"),
        ("num_experts", 4.5, "whole number"),
        ("num_experts", True, "whole number"),
        ("vocab_size", 0, "at least 1"),
        ("rms_norm_eps", "1e-5", "finite number"),
        ("rms_norm_eps", math.inf, "finite number"),
        ("tie_word_embeddings", "false", "true or false"),
        ("hidden_act", "gelu_fastest", "silu"),
        ("rope_scaling", [2.0], "object"),
        ("rope_scaling", {"rope_type": "spiral", "factor": 2.0}, "yarn"),
        ("rope_scaling", {"rope_type": "yarn"}, "factor"),
        ("eos_token_id", ["a"], "whole numbers"),
        ("torch_dtype", "int3", "float32"),
        ("quantization_config", {"quant_method": "gptq"}, "fp8"),
        ("num_experts_per_tok", 9, "num_experts"),
        ("num_key_value_heads", 3, "num_heads"),
        ("num_hidden_layers", 10**12, "at most"),
        ("num_experts", None, "lacks num_experts"),
        ("rms_norm_eps", 1e300, "finite number"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_expected(key, value, expected):
    with pytest.raises(ConfigError) as error:
        families.read_config(tiny("mixtral") | {key: value})
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_aliases_are_one_key():
    hub = tiny("mixtral")
    renamed = {("num_local_experts" if key == "num_experts" else key): value for key, value in hub.items()}
    assert families.read_config(renamed) == families.read_config(hub)
    with pytest.raises(ConfigError, match="contradicts itself"):
        families.read_config(renamed | {"num_experts": 5})


def test_both_rope_spellings_are_one():
    hub = tiny("llama")
    old = hub | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5}
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    new = {key: value for key, value in hub.items() if key != "rope_theta"} | {"rope_parameters": rope}
    assert families.read_config(new) == families.read_config(old)
    assert families.read_config(old).layers[0].mixer.rope.dim == 8
    with pytest.raises(ConfigError, match="rope_theta"):
        families.read_config(new | {"rope_theta": 1e4})


def test_an_unknown_family_lists_the_known():
    with pytest.raises(ConfigError, match="mixtral.*did you mean mixtral"):
        families.read_config({"model_type": "mixtrall"})
    with pytest.raises(ConfigError, match="model_type"):
        families.read_config({})
    with pytest.raises(ConfigError, match="JSON object"):
        families.read_config([1])


def test_a_family_says_which_field_it_cannot_express():
    config = families.read_config(tiny("mixtral"))
    layer = config.layers[1]
    odd = replace(layer, ffn=MoEConfig(replace(layer.ffn.router, scale=2.0), layer.ffn.expert))
    with pytest.raises(ConfigError, match=r"mixtral cannot express layers\[1\]\.ffn\.router\.scale = 2\.0"):
        families.write_config(replace(config, layers=(config.layers[0], odd, config.layers[2])))
    with pytest.raises(ConfigError, match="embed_scale"):
        families.write_config(replace(config, embed_scale=2.0))
    dense = replace(layer, ffn=FeedForwardConfig(24, "silu", gated=True))
    with pytest.raises(ConfigError, match="MoEConfig"):
        families.write_config(replace(config, layers=(dense,)))


def test_what_no_family_expresses_is_written_in_our_own_form():
    config = replace(families.read_config(tiny("deepseek_v3")), family="fewfire", embed_scale=3.0)
    hub = json.loads(json.dumps(families.write_config(config)))
    assert families.read_config(hub) == config
    assert {each.name: each.shape for each in families.tensors(config)} == parameters(config)
    hub["model"]["layers"][0]["mixer"]["num_haeds"] = 3
    with pytest.raises(ConfigError, match=r"model\.layers\[0\]\.mixer\.num_haeds"):
        families.read_config(hub)
    del hub["model"]["layers"][0]["mixer"]["num_haeds"]
    hub["model"]["layers"][0]["mixer"]["num_heads"] = "3"
    with pytest.raises(ConfigError, match=r"num_heads is '3'"):
        families.read_config(hub)


def test_mtp_layers_are_counted_apart_and_ignored_by_name():
    config = families.read_config(tiny("deepseek_v3"))
    assert config.mtp is not None and config.mtp.num_layers == 1
    patterns = families.ignored_tensors(config)
    assert any(p.fullmatch("model.layers.3.eh_proj.weight") for p in patterns)
    assert not any(p.fullmatch("model.layers.2.mlp.gate.weight") for p in patterns)
    assert not any(p.fullmatch("model.layers.30.mlp.gate.weight") for p in patterns)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.lists(st.integers(-2, 70), max_size=4),
    st.dictionaries(st.sampled_from(["rope_type", "factor", "x"]), st.integers()),
)  # fmt: skip


@given(name=st.sampled_from(["llama", "gpt2", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_vl_moe"]), data=st.data())
def test_junk_is_refused_in_one_line_or_read(name, data):
    hub = tiny(name)
    for _ in range(data.draw(st.integers(1, 3))):
        nested = isinstance(hub.get("text_config"), dict) and data.draw(st.booleans())
        place = hub["text_config"] if nested else hub
        place[data.draw(st.sampled_from([*place, "rope_scaling", "layer_types", "n_group", "head_dim"]))] = data.draw(
            JUNK
        )
    try:
        families.write_config(families.read_config(hub))
    except ConfigError as error:
        assert "\n" not in str(error)
