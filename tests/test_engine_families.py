"""Every kind of layer that the engine runs: against the torch forward of the same weights, and what it promises."""

import pytest
import tiny_packs
import torch

from fewfire import kernels
from fewfire.checkpoints.pack import open_pack
from fewfire.runtime.engine import NativeDecoder
from fewfire.runtime.lower import why_not_native
from fewfire.runtime.packed import load_packed_module

ISAS = [each for each in kernels.supported_isas() if each != "reference"]
if not ISAS:
    pytest.skip("the extension is not built", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packs")


def draw_ids(*shape, seed=0):
    return torch.randint(0, tiny_packs.VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def relative(ours, expected):
    return (ours - expected).norm(dim=-1) / expected.norm(dim=-1)


@pytest.mark.parametrize("name", tiny_packs.MODELS)
def test_logits_are_the_torch_forward(folder, name):
    """Weights in float32: what differs is the order of sums, and keys and values in bfloat16 (8 bits). The median over
    positions, because a router (or an indexer) may choose otherwise where two scores are nearly the same."""
    path = tiny_packs.make(folder, name)
    pack = open_pack(path)
    assert why_not_native(pack) is None
    native, torch_module = NativeDecoder(pack), load_packed_module(path)
    ids = draw_ids(2, 90)
    with torch.inference_mode():
        errors = relative(native(ids), torch_module(ids))
    assert float(errors.median()) < 1e-2 and float(errors.quantile(0.9)) < 0.1, (errors.median(), errors.max())


@pytest.mark.parametrize("name", tiny_packs.MODELS)
def test_a_token_does_not_depend_on_batch_chunks_or_decode(folder, name):
    native = NativeDecoder(open_pack(tiny_packs.make(folder, name, "q4")))
    ids = draw_ids(3, 80)
    whole = native(ids)
    assert torch.equal(native(ids[1:2])[0], whole[1]), "alone"
    cache = native.new_cache()
    parts = [native(part, cache) for part in ids.split((1, 2, 30, 1, 46), dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), whole), "in chunks"
    cache = native.new_cache()
    decoded = [native(ids[:1, t : t + 1], cache) for t in range(ids.shape[1])]
    assert torch.equal(torch.cat(decoded, dim=1), whole[:1]), "by decode"


@pytest.mark.parametrize("name", tiny_packs.MODELS)
def test_every_instruction_set_agrees(folder, name, restore_isa):
    found = []
    for each in ISAS:
        kernels.set_isa(each)
        found.append(NativeDecoder(open_pack(tiny_packs.make(folder, name, "q4")))(draw_ids(2, 70)))
    for each in found[1:]:
        assert torch.equal(each, found[0])
