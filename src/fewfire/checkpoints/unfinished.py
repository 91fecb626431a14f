"""A folder that is written over as many runs as it takes: hidden beside its target until it is whole, then renamed.

A journal in it names the parts that are finished: each line is written after the data it speaks of is on the disk. It
is also the lock that keeps a second process out. Knows bytes and checksums, no model.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fewfire.checkpoints.atomic import become, blaming, refuse_occupied, remove, sync_folder
from fewfire.errors import ConfigError, FormatError
from fewfire.kernels import crc32c
from fewfire.sizes import format_bytes

JOURNAL = ".journal"
SYNC_BYTES = 64 * 2**20  # data between two waits for the disk: what a power cut costs at most
Say = Callable[[str], None]


class Parts(NamedTuple):
    """A file: `head`, then parts of (name, bytes) one after the other."""

    name: str
    head: bytes
    parts: tuple[tuple[str, int], ...]

    def end(self, count: int) -> int:
        """Where the first `count` parts end."""
        return len(self.head) + sum(size for _, size in self.parts[:count])


class Made(NamedTuple):
    """A part: its bytes (uint8), and what else of it a later run must know, as JSON."""

    values: Tensor
    remarks: Any = None


class Entry(NamedTuple):
    """A finished part, as the journal has it."""

    file: str
    part: str
    checksum: int
    remarks: Any


@contextlib.contextmanager
def unfinished_folder(
    path: str | Path,
    files: Sequence[Parts],
    identity: Mapping[str, Any] | None,
    *,
    overwrite: bool = False,
    say: Say = lambda line: None,
) -> Iterator[Unfinished]:
    """A folder to fill, which becomes `path` when the block ends without an exception.

    What an earlier run left is gone on with where its `identity` (JSON) is the same, else discarded; `say` hears which.
    When the block fails, what is finished stays, unless it never can be used: a FormatError is the source's fault, and
    nothing is known of a source without an identity.
    Raises: ConfigError where `path` is taken or another process is writing it, else as `atomic.write_failure`.
    """
    path = Path(path)
    hidden = path.with_name(f".{path.name}.unfinished")
    if not overwrite:
        refuse_occupied(path)
    with blaming(path, hidden, keeps=True), _locked(hidden, path) as journal:
        if not overwrite:
            refuse_occupied(path)  # the other process may have ended just now
        unfinished = Unfinished(hidden, journal, files, identity)
        unfinished.begin(path, say)
        try:
            yield unfinished
        except BaseException as error:
            if identity is None or isinstance(error, FormatError):
                unfinished.discard()
            raise
        become(hidden, path, overwrite=overwrite)
        (path / JOURNAL).unlink()
        sync_folder(path)


@contextlib.contextmanager
def _locked(hidden: Path, path: Path) -> Iterator[BinaryIO]:
    """The journal in `hidden`, locked for this process. The folder is made; it goes where nothing in it is finished."""
    while True:
        hidden.mkdir(exist_ok=True)
        try:
            handle = os.open(hidden / JOURNAL, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # whoever held it has ended between the two calls
            continue
        with open(handle, "r+b") as journal:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                message = f"{path} is being written by another process; wait for it, or name another folder"
                raise ConfigError(message) from error
            if not _is_at(handle, hidden / JOURNAL):
                continue
            try:
                yield journal
            finally:
                if _is_at(handle, hidden / JOURNAL) and sum(1 for _ in _lines(journal)) < 2:
                    remove(hidden)
            return


def _is_at(handle: int, path: Path) -> bool:
    """Whether `path` is the file that `handle` has open."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _lines(journal: BinaryIO) -> Iterator[tuple[int, Any]]:
    """(where it ends, content) of each sound line; what a crash cut short or left unwritten ends them."""
    journal.seek(0)
    end = 0
    for line in journal:
        end += len(line)
        text, _, checksum = line.rpartition(b"\t")
        if checksum != b"%08x\n" % zlib.crc32(text):
            return
        yield end, json.loads(text)


class Unfinished:
    """What `unfinished_folder` gives. `folder` may be filled with small files, too; `resumed_bytes` were there."""

    def __init__(
        self, folder: Path, journal: BinaryIO, files: Sequence[Parts], identity: Mapping[str, Any] | None
    ) -> None:
        self.folder, self.files, self.identity = folder, files, identity
        self.entries: list[Entry] = []
        self.resumed_bytes = 0
        self._journal = journal
        self._waiting: list[Entry] = []  # written, and perhaps not on the disk yet
        self._waiting_bytes = 0

    # -------------------------------------------------------------------------------------------------- beginning

    def begin(self, path: Path, say: Say) -> None:
        """Read the journal; take over what is finished, or empty the folder. One line is said of either."""
        lines = list(_lines(self._journal))
        why = self._take_over([content for _, content in lines]) if lines else ""
        if why is not None:
            if why:
                say(f"{path}: an earlier write that was not finished is discarded: {why}")
            self.discard()
            self._append([{"identity": self.identity}])
            sync_folder(self.folder)
            return
        self._journal.truncate(lines[-1][0])
        kept = {JOURNAL, *(each.name for each in self.files)}
        for each in list(self.folder.iterdir()):
            if each.name not in kept:  # small files are written anew
                remove(each)
        for file in self.files:
            self._cut(file)
        if self.entries:
            say(f"{path}: goes on where an earlier write stopped; {format_bytes(self.resumed_bytes)} are there")

    def discard(self) -> None:
        """Empty the folder and the journal."""
        self.entries, self.resumed_bytes = [], 0
        self._journal.truncate(0)
        for each in list(self.folder.iterdir()):
            if each.name != JOURNAL:
                remove(each)

    def _take_over(self, lines: list[Any]) -> str | None:
        """Believe the journal's `lines` after a look at the data; else say why not."""
        found = lines[0].get("identity") if isinstance(lines[0], dict) else None
        if self.identity is None or not isinstance(found, dict):
            return "nothing is known of its source"
        ours = json.loads(json.dumps(self.identity))
        other = next((key for key in sorted({*ours, *found}) if ours.get(key) != found.get(key)), None)
        if other is not None:
            return f"its {other} differ"
        self.entries = [Entry(*line) for line in lines[1:]]
        for each in self.files:
            why = self._why_not(each)
            if why is not None:
                return why
            self.resumed_bytes += each.end(len(self.finished(each))) - len(each.head)
        return None

    def _cut(self, file: Parts) -> None:
        """Give the disk back what was written after the last part that the journal names."""
        count, path = len(self.finished(file)), self.folder / file.name
        if count:
            os.truncate(path, file.end(count))
        else:
            remove(path)

    def finished(self, file: Parts) -> list[Entry]:
        """The parts of `file` that an earlier run wrote: the first ones."""
        return [entry for entry in self.entries if entry.file == file.name]

    def _why_not(self, file: Parts) -> str | None:
        """Why a file is not what the journal says of it: its parts, its size, its head, or its last finished part."""
        finished = self.finished(file)
        if not finished:
            return None
        count = len(finished)
        if [entry.part for entry in finished] != [name for name, _ in file.parts[:count]]:
            return f"its {file.name} has other parts"
        try:
            with open(self.folder / file.name, "rb") as stored:
                head = stored.read(len(file.head))
                stored.seek(file.end(count - 1))
                last = stored.read(file.parts[count - 1][1])
        except FileNotFoundError:
            return f"its {file.name} is gone"
        if head != file.head or _checksum(last) != finished[-1].checksum or len(last) != file.parts[count - 1][1]:
            return f"its {file.name} is not what its journal says"
        return None

    # ---------------------------------------------------------------------------------------------------- writing

    def write(self, file: Parts, make: Callable[[int], Generator[Made, None, None]]) -> list[int]:
        """Write what of `file` is not there yet; `make(n)` gives its parts from the n-th on. The checksums of all."""
        finished = self.finished(file)
        checksums = [entry.checksum for entry in finished]
        parts = contextlib.closing(make(len(finished)))  # what makes them has ended before the block does
        with open(self.folder / file.name, "r+b" if finished else "wb") as out, parts as coming:
            out.truncate(out.seek(file.end(len(finished)) if finished else 0))
            if not finished:
                out.write(file.head)
            try:
                for (name, size), made in zip(file.parts[len(finished) :], coming, strict=True):
                    assert made.values.dtype == torch.uint8 and made.values.numel() == size, name
                    if size:
                        out.write(made.values.numpy().data)
                    checksums.append(crc32c(made.values))
                    self._note(out, Entry(file.name, name, checksums[-1], made.remarks), size)
            except BaseException:
                with contextlib.suppress(OSError):  # what went wrong first is what to tell
                    self._sync(out)
                raise
            self._sync(out)
        return checksums

    def _note(self, out: BinaryIO, entry: Entry, size: int) -> None:
        self._waiting.append(entry)
        self._waiting_bytes += size
        if self._waiting_bytes >= SYNC_BYTES:
            self._sync(out)

    def _sync(self, out: BinaryIO) -> None:
        """Data first, then the lines about it."""
        out.flush()
        os.fsync(out.fileno())
        self._append(self._waiting)
        self._waiting, self._waiting_bytes = [], 0

    def _append(self, lines: Sequence[Any]) -> None:
        self._journal.seek(0, os.SEEK_END)
        for each in lines:
            text = json.dumps(each).encode("utf-8")
            self._journal.write(text + b"\t%08x\n" % zlib.crc32(text))
        self._journal.flush()
        os.fsync(self._journal.fileno())


def _checksum(content: bytes) -> int:
    return crc32c(torch.frombuffer(bytearray(content), dtype=torch.uint8)) if content else 0
