"""The native engine: against the torch forward of the same weights, and the invariance it promises, bit for bit."""

import os
from itertools import product

import pytest
import tiny_hub
import torch

import fewfire
from fewfire import kernels
from fewfire.checkpoints.pack import EXPERTS, open_pack
from fewfire.errors import ConfigError, FormatError
from fewfire.formats import GGML_FORMATS
from fewfire.quantize import pack
from fewfire.runtime.engine import NativeDecoder
from fewfire.runtime.lower import why_not_native
from fewfire.runtime.packed import load_pack, load_packed_module

ISAS = [each for each in kernels.supported_isas() if each != "reference"]
if not ISAS:
    pytest.skip("the extension is not built", allow_module_level=True)

# Families, and changes that reach other steps: one key-value head for all, heads of their own width, a window.
SHAPES = {
    "olmoe": ("olmoe", {}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "mixtral": ("mixtral", {"sliding_window": 7, "head_dim": 16}),
    "llama": ("llama", {"head_dim": 16, "num_key_value_heads": 1}),
    "odd": ("qwen3_moe", {"hidden_size": 40, "moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 3}),
}
SHAPES["olmoe"] = ("olmoe", {"num_attention_heads": 2})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("engine"), {}
    for name, (family, changes) in SHAPES.items():
        hub = tiny_hub.save(tiny_hub.make(family, max_position_embeddings=128, **changes), folder / f"{name}-hub")
        for quant in ("f32", "q8", "q4", *(GGML_FORMATS if name in ("llama", "qwen3_moe") else ())):
            made[name, quant] = folder / f"{name}-{quant}"
            pack(hub, made[name, quant], quant=quant)
    return made


def draw_ids(*shape, seed=0):
    return torch.randint(0, tiny_hub.VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=ISAS)
def isa(request, restore_isa):
    kernels.set_isa(request.param)
    return request.param


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_the_torch_forward(folders, isa, name):
    """Weights in float32: what differs is the order of sums, and keys and values in bfloat16 (8 bits)."""
    native, torch_module = load_pack(folders[name, "f32"]), load_packed_module(folders[name, "f32"])
    assert isinstance(native, NativeDecoder)
    ids = draw_ids(2, 33)
    with torch.inference_mode():
        ours, expected = native(ids), torch_module(ids)
    assert float((ours - expected).norm() / expected.norm()) < 1.5e-2


@pytest.mark.parametrize("quant", ["q8", *GGML_FORMATS])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_quantized_logits_stay_near_those_of_the_same_weights(folders, name, quant):
    """int8 activations (q8 is at 0.025); median over positions, since a router may choose otherwise at a few."""
    native, torch_module = load_pack(folders[name, quant]), load_packed_module(folders[name, quant])
    ids = draw_ids(2, 48)
    with torch.inference_mode():
        ours, expected = native(ids), torch_module(ids)
    errors = (ours - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.median()) < 4e-2


@pytest.mark.parametrize(
    ("name", "quant"),
    [*product(SHAPES, ("f32", "q8", "q4")), ("qwen3_moe", "q4_k"), ("qwen3_moe", "q6_k"), ("llama", "q4_1")],
)
def test_a_token_does_not_depend_on_batch_chunks_decode_or_threads(folders, name, quant, restore_isa):
    model = load_pack(folders[name, quant])
    ids, before = draw_ids(5, 100), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = model(ids)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for row in (0, 3):
                assert torch.equal(model(ids[row : row + 1])[0], whole[row]), "alone"
            cache = model.new_cache()
            parts = [model(part, cache) for part in ids.split((1, 1, 17, 76, 5), dim=1)]
            assert torch.equal(torch.cat(parts, dim=1), whole), "in chunks"
            cache = model.new_cache()
            decoded = [model(ids[:2, t : t + 1], cache) for t in range(ids.shape[1])]
            assert torch.equal(torch.cat(decoded, dim=1), whole[:2]), "by decode"
    finally:
        torch.set_num_threads(before)


def test_every_instruction_set_gives_the_same_logits(folders, restore_isa):
    found = []
    for each in ISAS:
        kernels.set_isa(each)
        found.append(load_pack(folders["olmoe", "q4"])(draw_ids(2, 20)))
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-5, atol=1e-5)


def test_observers_see_what_torch_routes(folders):
    native, torch_module = load_pack(folders["qwen3_moe", "f32"]), load_packed_module(folders["qwen3_moe", "f32"])
    ids, seen = draw_ids(1, 12), {"native": [], "torch": []}
    with torch.inference_mode():
        native.hidden(ids, observe=lambda layer, routing: seen["native"].append((layer, routing)))
        torch_module.hidden(ids, observe=lambda layer, routing: seen["torch"].append((layer, routing)))
    for (layer, ours), (other, theirs) in zip(seen["native"], seen["torch"], strict=True):
        assert layer == other
        torch.testing.assert_close(ours.logits_TE, theirs.logits_TE, rtol=0.05, atol=0.05)
        torch.testing.assert_close(ours.scores_TE, torch.softmax(ours.logits_TE, dim=-1))
        same = (ours.ids_TK == theirs.ids_TK).all(dim=1)
        assert float(same.float().mean()) > 0.8
        torch.testing.assert_close(ours.weights_TK[same], theirs.weights_TK[same], rtol=0.05, atol=0.02)


def test_load_runs_packs_natively_and_says_so(folders):
    model = fewfire.load(folders["olmoe", "q4"])
    assert isinstance(model.module, NativeDecoder)
    generated = model.generate([1, 2, 3], max_tokens=6)
    assert generated.invariant and generated.invariant_reason is None and len(generated.token_ids) == 6
    assert generated.experts.budget_bytes == open_pack(folders["olmoe", "q4"]).layout.expert_bytes
    chunked = model.generate([1, 2, 3], max_tokens=6, prefill_chunk=1)
    assert chunked.token_ids == generated.token_ids


def test_what_has_no_native_step_runs_on_torch_with_a_reason(tmp_path):
    hub = tiny_hub.save(tiny_hub.make("gpt2"), tmp_path / "hub")
    pack(hub, tmp_path / "pack", quant="q8")
    assert "heads of 8" in why_not_native(open_pack(tmp_path / "pack"))
    with pytest.warns(UserWarning, match="runs on torch, dequantized"):
        module = load_pack(tmp_path / "pack")
    assert not isinstance(module, NativeDecoder)


def test_damaged_records_are_refused_before_they_are_used(tmp_path):
    hub = tiny_hub.save(tiny_hub.make("olmoe", num_attention_heads=2), tmp_path / "hub")
    pack(hub, tmp_path / "pack")
    raw = bytearray((tmp_path / "pack" / EXPERTS).read_bytes())
    raw[open_pack(tmp_path / "pack").layout.experts[0].record_offset(1) + 9] ^= 1
    (tmp_path / "pack" / EXPERTS).write_bytes(raw)
    model = load_pack(tmp_path / "pack")
    for damaged in (model.experts.verify, lambda: model(draw_ids(1, 60))):
        with pytest.raises(FormatError, match=r"experts.bin: layers.0.ffn.experts\[1\]: byte \d+: is not what was"):
            damaged()


def test_more_than_the_context_is_refused(folders):
    model = load_pack(folders["llama", "q8"])
    with pytest.raises(ConfigError, match="129 tokens exceed the 128"):
        model(draw_ids(1, 129))
    with pytest.raises(ConfigError, match="holds 2 sequences"):
        cache = model.new_cache()
        model(draw_ids(2, 3), cache)
        model(draw_ids(1, 3), cache)


def test_no_tokens_and_no_sequences(folders):
    model = load_pack(folders["olmoe", "q4"])
    assert model(torch.empty((1, 0), dtype=torch.int64)).shape == (1, 0, tiny_hub.VOCAB)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not say")
def test_a_step_gives_the_caller_its_cores_back(folders):
    before = os.sched_getaffinity(0)
    load_pack(folders["olmoe", "q4"])(draw_ids(1, 9))
    assert os.sched_getaffinity(0) == before
