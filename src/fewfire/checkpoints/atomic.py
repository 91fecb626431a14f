"""Writes that happen wholly or not at all: a temporary beside the target, synced, renamed. No torch.

What a crash leaves behind is hidden, named after its process, and removed by the next write to the same target.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fewfire.errors import BudgetError, ConfigError, FewfireError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,
)


def write_failure(error: OSError, path: str | Path, kept: Path | None = None) -> FewfireError:
    """What to raise when `path` cannot be written: BudgetError (full disk), ConfigError (a path that cannot be
    written), FewfireError (the disk fails). `kept`: where what was written so far waits for the next call."""
    reason = error.strerror or type(error).__name__
    if error.errno in _FULL:
        left = "nothing was left there - free some space"
        if kept is not None:
            left = f"free some space and run the same again to go on, or remove {kept}"
        return BudgetError(f"{path}: the disk is full ({reason}); {left}")
    if error.errno in _REFUSED:
        return ConfigError(f"{path} cannot be written ({reason}); choose a folder that exists and is writable")
    return FewfireError(f"{path} could not be written ({reason}); check the disk")


@contextlib.contextmanager
def replacing_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write; it becomes `path` when the block ends without an exception, and vanishes otherwise.

    An existing `path` stays as it was until then. Missing parent folders are made.
    Raises: ConfigError, BudgetError or FewfireError as `write_failure` says.
    """
    path = Path(path)
    with _writing(path) as temporary:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_bytes(path: str | Path, content: bytes) -> None:
    """`content` becomes the whole of `path`, atomically. Errors as `replacing_file`."""
    with replacing_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder to fill; it becomes `path` when the block ends without an exception, and vanishes otherwise.

    Everything in it is synced first. A `path` that holds something is refused unless `overwrite`; the old folder is
    then moved away just before the rename and deleted after it.
    Raises: ConfigError, BudgetError or FewfireError as `write_failure` says.
    """
    path = Path(path)
    if not overwrite:
        refuse_occupied(path)
    with _writing(path) as temporary:
        temporary.mkdir()
        yield temporary
        become(temporary, path, overwrite=overwrite)


def become(temporary: Path, path: Path, *, overwrite: bool) -> None:
    """Sync all of the folder `temporary` and rename it to `path`; a folder that is there is moved away first."""
    _sync_tree(temporary)
    retired = path.with_name(f".{path.name}.{os.getpid()}.retired")
    replaced = overwrite and path.is_dir()
    if replaced:
        os.rename(path, retired)
    try:
        os.rename(temporary, path)
    except OSError:
        if replaced:
            os.rename(retired, path)
        raise
    if replaced:
        shutil.rmtree(retired, ignore_errors=True)


def refuse_occupied(path: str | Path) -> None:
    """Raise ConfigError unless `path` is free to become a folder: absent, or an empty folder."""
    path = Path(path)
    try:
        if path.is_dir() and not any(path.iterdir()):
            return
        occupied = path.exists() or path.is_symlink()
    except OSError as error:
        raise write_failure(error, path) from error
    if occupied:
        what = "a folder that is not empty" if path.is_dir() else "a file"
        raise ConfigError(f"{path} is {what}; name a new folder, or remove it first")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """The temporary beside `path`, gone whatever happens; OSErrors about it become ours; then the parent is synced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with blaming(path, temporary):
            remove(temporary)
            yield temporary
    finally:
        remove(temporary)


@contextlib.contextmanager
def blaming(path: Path, temporary: Path, *, keeps: bool = False) -> Iterator[None]:
    """Within the block `temporary` is written to become `path`. OSErrors about that become ours; then the parent, which
    is made first, is synced. `keeps`: what was written stays there when the block fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(path)
        yield
        sync_folder(path.parent)
    except OSError as error:
        if not _concerns(error, path, temporary):
            raise
        raise write_failure(error, path, temporary if keeps and temporary.is_dir() else None) from error


def _concerns(error: OSError, path: Path, temporary: Path) -> bool:
    """Whether `error` is about writing `path`, and not about a file that the caller was reading meanwhile."""
    if not isinstance(error.filename, (str, os.PathLike)):
        return True
    name = Path(error.filename)
    return name in (path, temporary, *path.parents) or temporary in name.parents


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, where the system can (not every file system can sync a folder)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            handle = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(parent))


def remove(path: Path) -> None:
    """Delete a file or a whole folder; what cannot be deleted stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _clear_stale(path: Path) -> None:
    """Remove temporaries of `path` whose process is gone; put back a folder that it had moved away and not replaced."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"(\d+)\.(partial|retired)")
    for entry in list(path.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match and not _alive(int(match.group(1))):
            if match.group(2) == "retired" and not path.exists():
                os.rename(entry, path)
            else:
                remove(entry)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
