"""Opening files that come from outside: regular ones only, and no larger than they can be."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MOST_SMALL_BYTES = 256 * 2**20  # of a JSON file or a vocabulary: the largest published ones have 35 MB


def open_regular(path: str | Path) -> BinaryIO:
    """`path` for reading. A pipe would be waited for without end, and a device read without end.

    Raises: OSError, also where it is no regular file.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return open(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: str | Path, *, most: int = MOST_SMALL_BYTES) -> bytes:
    """All of `path`. Raises: OSError as above, and where it has more than `most` bytes, before anything is read."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"its {size} bytes are more than such a file can have", str(path))
        return file.read(most)
