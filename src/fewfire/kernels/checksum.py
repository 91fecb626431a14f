"""CRC-32C of bytes, and reading a file's bytes with it: what packs are checked with. Owns no file and no format."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fewfire.errors import KernelUnavailable
from fewfire.kernels import reference
from fewfire.kernels.isa import extension


def crc32c(values: Tensor, before: int = 0) -> int:
    """CRC-32C (Castagnoli) of the bytes of a contiguous tensor, on top of `before`, that of what came earlier.

    Exactness: equal to `reference.crc32c`. Source: RFC 3720, appendix B.4.
    """
    flat = values.reshape(-1).view(torch.uint8)
    module = extension()
    if module is None:
        return reference.crc32c(flat, before)
    return module.crc32c(before, flat.data_ptr(), flat.numel())


def join_crc32c(first: int, second: int, num_bytes: int) -> int:
    """CRC-32C of two runs of bytes from those of each, `second` of `num_bytes` bytes: parts are read side by side.

    Raises: KernelUnavailable without the extension, which alone reads in parts.
    """
    module = extension()
    if module is None:
        raise KernelUnavailable(
            "checksums are joined by the native extension, which is not built; `pip install .` does"
        )
    return module.join_checksums(first, second, num_bytes)


def read_checked(file: int, offset: int, values: Tensor, before: int = 0) -> tuple[int, int]:
    """Fill the contiguous uint8 `values` from `offset` of the open file: (bytes that it had, their checksum).

    Raises: OSError as the system gives it.
    """
    assert values.dtype == torch.uint8 and values.is_contiguous()
    module = extension()
    if module is not None:
        done, error, checksum = module.read_checked(file, offset, values.numel(), values.data_ptr(), before)
        if error:
            raise OSError(error, os.strerror(error))
        return done, checksum
    view, done = values.numpy().data, 0
    while done < values.numel():
        count = os.preadv(file, [view[done : done + 2**30]], offset + done)
        if count == 0:
            break
        done += count
    return done, reference.crc32c(values[:done], before)
