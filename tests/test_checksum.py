"""CRC-32C: known values, parts one after the other and side by side."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewfire import kernels
from fewfire.kernels import crc32c, join_crc32c, reference


def bytes_tensor(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def test_the_published_check_value():
    """RFC 3720, appendix B.4; and the check value of the CRC catalogue."""
    assert crc32c(bytes_tensor(b"123456789")) == 0xE3069283
    assert crc32c(bytes_tensor(bytes(32))) == 0x8A9136AA
    assert crc32c(bytes_tensor(b"\xff" * 32)) == 0x62A8AB43


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_parts_give_what_the_whole_gives(first, second):
    whole = crc32c(bytes_tensor(first + second))
    assert whole == reference.crc32c(bytes_tensor(first + second))
    assert crc32c(bytes_tensor(second), crc32c(bytes_tensor(first))) == whole
    if kernels.supported_isas() != ["reference"]:
        assert join_crc32c(crc32c(bytes_tensor(first)), crc32c(bytes_tensor(second)), len(second)) == whole


@pytest.mark.skipif(kernels.supported_isas() == ["reference"], reason="the extension is not built")
@pytest.mark.parametrize("count", (4096, 2**20 + 1, 5 * 2**20))
def test_large_parts(count):
    data = torch.randint(0, 256, (count + 77,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert join_crc32c(crc32c(data[:77]), crc32c(data[77:]), count) == crc32c(data)
