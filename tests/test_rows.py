"""sum_rows: native = reference for every instruction set, over odd sizes."""

import pytest
import torch

from fewfire import kernels
from fewfire.errors import ConfigError
from fewfire.kernels import reference


@pytest.fixture(params=kernels.supported_isas())
def isa(request):
    before = kernels.current_isa()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "slots", "width"), [(0, 2, 8), (1, 1, 1), (5, 3, 17), (33, 2, 16), (700, 2, 515)])
def test_equals_the_reference(isa, tokens, slots, width, dtype):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(tokens * slots, width, generator=generator).to(dtype)
    positions = torch.randperm(tokens * slots, generator=generator).view(tokens, slots)
    positions[torch.rand(tokens, slots, generator=generator) < 0.2] = -1
    got = kernels.sum_rows(rows, positions)
    assert got.dtype == torch.float32
    # up to three float32 additions in another order
    torch.testing.assert_close(got, reference.sum_rows(rows, positions), rtol=1e-6, atol=1e-6)


def test_by_hand():
    rows = torch.tensor([[1.0, 2], [10, 20], [100, 200]])
    sums = kernels.sum_rows(rows, torch.tensor([[2, 0], [-1, 1], [-1, -1]]))
    assert sums.tolist() == [[101, 202], [10, 20], [0, 0]]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="beyond the 1 rows"):
        kernels.sum_rows(torch.zeros(1, 2), torch.tensor([[1]]))
    with pytest.raises(ConfigError, match="int64"):
        kernels.sum_rows(torch.zeros(1, 2), torch.zeros(1, 1))
