"""Every kernel equals its plain reference, at every instruction set this machine runs, over odd sizes.

Runs without the rest of the package, so that `make asan` can run it alone.
"""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewfire import kernels
from fewfire.errors import ConfigError, KernelUnavailable
from fewfire.kernels import isa as isa_module
from fewfire.kernels import reference

SUPPORTED = kernels.supported_isas()
NATIVE = [name for name in ("scalar", "avx2", "avx512") if name in SUPPORTED]
NAN, INF = math.nan, math.inf


@pytest.fixture(params=["reference", "scalar", "avx2", "avx512"])
def isa(request, restore_isa):
    if request.param not in SUPPORTED:
        pytest.skip(f"LOUD: {request.param} does not run here, so it was not tested")
    kernels.set_isa(request.param)
    return request.param


def assert_same(got, expected):
    for left, right in zip(got, expected, strict=True):
        assert left.dtype == right.dtype and left.shape == right.shape
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------------------- top-k


@pytest.mark.parametrize(
    ("row", "k", "expected"),
    [
        ([1.0, 3.0, 2.0], 2, [1, 2]),
        ([5.0, 5.0, 5.0, 5.0], 3, [0, 1, 2]),  # ties: lower id
        ([0.0, -0.0, 0.0], 2, [0, 1]),  # zeros of both signs are equal
        ([NAN, 1.0, NAN, -INF], 2, [1, 3]),  # a number, however low, before NaN
        ([NAN, NAN, 1.0], 3, [2, 0, 1]),
        ([NAN] * 20 + [2.0] + [NAN] * 20 + [3.0], 3, [41, 20, 0]),
        ([7.0], 1, [0]),
    ],
)
def test_top_k_by_hand(isa, row, k, expected):
    values, ids = kernels.top_k(torch.tensor([row]), k)
    assert ids.tolist() == [expected]
    assert_same([values], [torch.tensor([row])[:, expected]])


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize(
    ("num_experts", "k"),
    [(1, 1), (2, 2), (7, 3), (16, 16), (17, 1), (33, 9), (64, 8), (70, 33), (257, 8), (257, 257), (900, 300)],
)
def test_top_k_equals_the_reference(isa, num_tokens, num_experts, k):
    generator = torch.Generator().manual_seed(num_experts)
    scores = torch.randint(-9, 9, (num_tokens, num_experts), generator=generator) / 4  # coarse, so that ties abound
    assert_same(kernels.top_k(scores, k), reference.top_k(scores, k))


score = st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0, 1.5, -2.0, 1e-42])


@given(st.lists(score, min_size=1, max_size=150), st.data())
def test_top_k_equals_the_reference_on_any_row(row, data):
    k = data.draw(st.integers(0, len(row)))
    scores = torch.tensor([row, row[::-1]])
    before = kernels.current_isa()
    for name in NATIVE:
        kernels.set_isa(name)
        assert_same(kernels.top_k(scores, k), reference.top_k(scores, k))
    kernels.set_isa(before)


def test_top_k_agrees_with_torch_where_nothing_ties(isa):
    scores = torch.rand(50, 40, generator=torch.Generator().manual_seed(1))
    assert_same(kernels.top_k(scores, 6), torch.topk(scores, 6))


def test_top_k_takes_strided_scores_and_other_dtypes(isa):
    scores = torch.rand(12, 9, generator=torch.Generator().manual_seed(2))
    assert_same(kernels.top_k(scores.t(), 3), reference.top_k(scores.t(), 3))
    assert kernels.top_k(scores.double(), 3)[0].dtype == torch.float64


def test_top_k_passes_gradients_to_the_chosen_scores(isa):
    scores = torch.tensor([[1.0, 3.0, 2.0]], requires_grad=True)
    values, ids = kernels.top_k(scores, 2)
    (values * torch.tensor([[10.0, 20.0]])).sum().backward()
    assert scores.grad.tolist() == [[0.0, 10.0, 20.0]] and not ids.requires_grad


@pytest.mark.parametrize(
    ("scores", "k"),
    [(torch.zeros(2, 3), 4), (torch.zeros(3), 1), (torch.zeros(2, 3).long(), 1), (torch.zeros(1, 1), -1)],
)
def test_top_k_refuses_what_does_not_fit(isa, scores, k):
    with pytest.raises(ConfigError):
        kernels.top_k(scores, k)


# ---------------------------------------------------------------------------------------------------- grouping


def test_group_by_expert_by_hand(isa):
    ids = torch.tensor([[2, 0], [2, 3], [0, 2]])
    order, offsets = kernels.group_by_expert(ids, 5)
    assert order.tolist() == [1, 4, 0, 2, 5, 3] and offsets.tolist() == [0, 2, 2, 5, 6, 6]
    kept = torch.tensor([[True, False], [True, True], [True, False]])
    order, offsets = kernels.group_by_expert(ids, 5, kept)
    assert order.tolist() == [4, 0, 2, 3] and offsets.tolist() == [0, 1, 1, 3, 4, 4]


@pytest.mark.parametrize("share_kept", [None, 0.0, 0.6, 1.0])
@pytest.mark.parametrize(
    ("num_tokens", "k", "num_experts"), [(0, 2, 4), (1, 1, 1), (1, 4, 4), (37, 3, 9), (300, 8, 128)]
)
def test_group_by_expert_equals_the_reference(isa, num_tokens, k, num_experts, share_kept):
    generator = torch.Generator().manual_seed(num_tokens + num_experts)
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :k]
    kept = None if share_kept is None else torch.rand(num_tokens, k, generator=generator) < share_kept
    order, offsets = kernels.group_by_expert(ids, num_experts, kept)
    assert_same((order, offsets), reference.group_by_expert(ids, num_experts, kept))
    assert offsets[-1] == order.numel() == (ids.numel() if kept is None else kept.sum())
    experts = ids.flatten()[order]
    assert bool((experts[1:] >= experts[:-1]).all())


def test_all_tokens_to_one_expert(isa):
    order, offsets = kernels.group_by_expert(torch.full((100, 1), 3), 5)
    assert order.tolist() == list(range(100)) and offsets.tolist() == [0, 0, 0, 0, 100, 100]


def test_group_by_expert_ignores_the_ids_of_what_is_dropped(isa):
    ids, kept = torch.tensor([[1, -7], [99, 0]]), torch.tensor([[True, False], [False, True]])
    order, offsets = kernels.group_by_expert(ids, 2, kept)
    assert order.tolist() == [3, 0] and offsets.tolist() == [0, 1, 2]


def test_group_by_expert_takes_strided_ids(isa):
    ids = torch.arange(12).reshape(3, 4).t() % 5
    assert_same(kernels.group_by_expert(ids, 5, ids > 1), reference.group_by_expert(ids, 5, ids > 1))


@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_group_by_expert_names_an_id_outside(isa, bad):
    with pytest.raises(ConfigError, match=rf"expert id \({bad}\) is outside the 4 experts"):
        kernels.group_by_expert(torch.tensor([[0, 1], [bad, 2]]), 4)


@pytest.mark.parametrize(
    ("ids", "num_experts", "kept"),
    [
        (torch.zeros(2, 2, dtype=torch.int32), 2, None),
        (torch.zeros(2, 2, dtype=torch.int64), 0, None),
        (torch.zeros(2, 2, dtype=torch.int64), 2, torch.ones(2, dtype=torch.bool)),
        (torch.zeros(2, 2, dtype=torch.int64), 2, torch.ones(2, 2)),
    ],
)
def test_group_by_expert_refuses_what_does_not_fit(isa, ids, num_experts, kept):
    with pytest.raises(ConfigError):
        kernels.group_by_expert(ids, num_experts, kept)


# ------------------------------------------------------------------------------------------------------ SwiGLU

# float32: e^x is good to 2 units in the last place, the rest is a handful of roundings: 1e-6 relative, and 1e-6 of the
# largest term where terms cancel. bf16: native rounds once, the reference up to four times: a few of its 2^-8 steps.
TOLERANCE = {torch.float32: dict(rtol=2e-6, atol=2e-6), torch.bfloat16: dict(rtol=3e-2, atol=3e-2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(0, 4), (1, 1), (3, 0), (2, 15), (5, 16), (3, 17), (2, 33), (7, 100)])
def test_swiglu_equals_the_reference(isa, rows, width, weighted, dtype):
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    pre = (torch.randn(rows, 2 * width, generator=generator) * 3).to(dtype)
    grad = torch.randn(rows, width, generator=generator).to(dtype)
    weights = torch.rand(rows, generator=generator) if weighted else None
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        kernels.swiglu_forward(pre, weights), reference.swiglu_forward(pre, weights), **tolerance
    )
    got = kernels.swiglu_backward(grad, pre, weights)
    for left, right in zip(got[:2], reference.swiglu_backward(grad, pre, weights)[:2]):
        torch.testing.assert_close(left, right, **tolerance)
    if weights is None:
        assert got[2] is None
    else:  # a sum of `width` terms, so compared with the float64 sum of the same inputs
        exact = reference.swiglu_backward(grad.double(), pre.double(), weights.double())[2]
        torch.testing.assert_close(got[2].double(), exact, rtol=0, atol=tolerance["atol"] * max(width, 1))


def test_swiglu_reference_is_what_autograd_says():
    generator = torch.Generator().manual_seed(3)
    pre = torch.randn(4, 10, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, generator=generator, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    hidden = torch.nn.functional.silu(pre[:, :5]) * pre[:, 5:] * weights[:, None]
    hidden.backward(grad)
    grad_pre, again, grad_weights = reference.swiglu_backward(grad, pre.detach(), weights.detach())
    for got, expected in ((grad_pre, pre.grad), (again, hidden.detach()), (grad_weights, weights.grad)):
        torch.testing.assert_close(got, expected)


def test_swiglu_saturates_and_passes_nan(isa):
    pre = torch.tensor([[200.0, -200.0, -87.0, 0.0, NAN, 1.0, 1.0, 1.0, 1.0, 1.0]])
    hidden = kernels.swiglu_forward(pre)[0]
    assert hidden[0] == 200.0 and abs(float(hidden[1])) < 1e-30 and hidden[3] == 0.0 and bool(hidden[4].isnan())
    assert bool(kernels.swiglu_forward(pre.bfloat16())[0, 4].isnan())


def test_swiglu_bf16_is_float32_rounded_once_to_nearest_even(isa):
    if isa == "reference":
        return  # torch rounds after every operation
    generator = torch.Generator().manual_seed(5)
    pre, grad = torch.randn(9, 74, generator=generator).bfloat16(), torch.randn(9, 37, generator=generator).bfloat16()
    weights = torch.rand(9, generator=generator)
    weights[4] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # a NaN that rounding would carry away
    wide = [kernels.swiglu_forward(pre.float(), weights), *kernels.swiglu_backward(grad.float(), pre.float(), weights)]
    got = [kernels.swiglu_forward(pre, weights), *kernels.swiglu_backward(grad, pre, weights)]
    assert_same(got, [*(x.bfloat16() for x in wide[:3]), wide[3]])


def test_swiglu_takes_strided_rows_and_float64(isa):
    pre = torch.randn(8, 6, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(kernels.swiglu_forward(pre.t()), reference.swiglu_forward(pre.t()))
    assert kernels.swiglu_forward(pre.double()).dtype == torch.float64


def test_swiglu_refuses_what_does_not_fit(isa):
    with pytest.raises(ConfigError, match="even width"):
        kernels.swiglu_forward(torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="one per row"):
        kernels.swiglu_forward(torch.zeros(2, 4), torch.zeros(3))
    with pytest.raises(ConfigError, match="float32"):
        kernels.swiglu_forward(torch.zeros(2, 4), torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match="half the width"):
        kernels.swiglu_backward(torch.zeros(2, 4), torch.zeros(2, 4))


# -------------------------------------------------------------------------------------------------- the choice


def test_the_extension_is_built_and_in_use():
    assert NATIVE and kernels.current_isa() == SUPPORTED[-1]


def test_an_unknown_instruction_set_is_refused(restore_isa):
    with pytest.raises(ConfigError, match=r"isa \(sse9\) is unknown"):
        kernels.set_isa("sse9")


def test_a_missing_extension_warns_once_and_is_an_error_where_forced(restore_isa, monkeypatch):
    monkeypatch.setattr(isa_module, "_load", lambda: None)
    monkeypatch.setattr(isa_module, "_choice", isa_module._Choice())
    with pytest.warns(RuntimeWarning, match=r"fewfire\._native is missing.*fewfire\.kernels\.reference") as caught:
        kernels.top_k(torch.zeros(1, 2), 1)
        kernels.top_k(torch.zeros(1, 2), 1)
    assert len(caught) == 1 and kernels.current_isa() == "reference"
    with pytest.raises(KernelUnavailable, match="pip install"):
        kernels.set_isa("scalar")


def test_an_instruction_set_that_does_not_run_here_is_refused(restore_isa, monkeypatch):
    class ScalarOnly:
        @staticmethod
        def supported_isas():
            return ["scalar"]

    monkeypatch.setattr(isa_module, "_load", ScalarOnly)
    with pytest.raises(KernelUnavailable, match=r"isa \(avx512\) does not run here; use one of scalar"):
        kernels.set_isa("avx512")


@pytest.mark.parametrize("name", SUPPORTED)
def test_the_environment_forces_an_instruction_set(name, restore_isa, monkeypatch):
    monkeypatch.setattr(isa_module, "_choice", isa_module._Choice())
    monkeypatch.setenv("FEWFIRE_ISA", name)
    assert kernels.current_isa() == name


def test_freed_memory_stays_with_the_process_when_asked(pytestconfig):
    if pytestconfig.getoption("--native"):
        pytest.skip("LOUD: a sanitizer brings its own allocator")
    code = (
        "import platform, resource, torch; from fewfire import kernels\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "kept = kernels.keep_freed_memory()\n"
        "for _ in range(12): torch.ones(1 << 24)\n"
        "before = faults()\n"
        "for _ in range(4): torch.ones(1 << 24)\n"
        "print(kept, platform.libc_ver()[0], faults() - before)\n"
    )
    kept, library, faults = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    if library != "glibc":
        pytest.skip(f"LOUD: {library} has no such setting")
    assert kept == "True" and int(faults) < 4000  # otherwise each 64 MiB is 16,384 pages of 4 KiB, every time
