"""Write token shards: documents are encoded in batches and streamed to disk, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fewfire.data.corpus import Document
from fewfire.data.shards import CHECK_BYTES, ShardFile, ShardIndex, TokenShards, native_dtype
from fewfire.data.split import Side, check_fraction, side_of
from fewfire.errors import ConfigError, FormatError
from fewfire.tokenizer import Tokenizer
from fewfire.tokenizer.files import write_failure

BATCH_CHARACTERS = 1 << 20
SHARD_TOKENS = 1 << 27


def write_shards(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    fingerprint: str = "",
    shard_tokens: int = SHARD_TOKENS,
) -> TokenShards:
    """Encode `documents` into `folder` and open it. Documents are streamed: memory does not grow with the corpus.

    A folder that holds shards of the same `fingerprint` (of the sources: see `corpus_fingerprint`) and tokenizer is
    opened as it is, and `documents` is not read. An interrupted write leaves the folder as it was.

    Raises: ConfigError for an empty corpus, a tokenizer without an end token, a folder that cannot be written;
    BudgetError on a full disk.
    """
    folder = Path(folder)
    found = _reusable(folder, tokenizer, fingerprint)
    if found is not None:
        return found
    with _Target(folder) as target:
        writer = _Writer(target, target.temporary, tokenizer, shard_tokens)
        for batch in _batches(documents):
            writer.add(batch)
        writer.close(fingerprint)
        if writer.num_tokens == 0:
            raise ConfigError(f"{folder}: the corpus holds no text - expected at least one document - add files")
    return TokenShards.open(folder)


def write_split(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    held_out: float,
    seed: int,
    fingerprint: str = "",
    shard_tokens: int = SHARD_TOKENS,
) -> tuple[TokenShards, TokenShards]:
    """(train, held-out) shards in `folder`/train and `folder`/held_out, in one pass over `documents`.

    Reuse, streaming and errors as in `write_shards`; ConfigError also where a side would hold no document.
    """
    folder = Path(folder)
    check_fraction(held_out)
    key = f"{fingerprint} held_out={held_out!r} seed={seed}" if fingerprint else ""
    found = [_reusable(folder / side, tokenizer, key) for side in ("train", "held_out")]
    if found[0] is not None and found[1] is not None:
        return found[0], found[1]
    with _Target(folder) as target:
        sides: tuple[Side, Side] = ("train", "held_out")
        writers = {side: _Writer(target, target.temporary / side, tokenizer, shard_tokens) for side in sides}
        for batch in _batches(documents):
            for side, writer in writers.items():
                writer.add([doc for doc in batch if side_of(doc, fraction=held_out, seed=seed) == side])
        for side, writer in writers.items():
            writer.close(key)
            if writer.num_tokens == 0:
                other = writers["train" if side == "held_out" else "held_out"].num_documents
                raise ConfigError(
                    f"no document of {other} is {side.replace('_', ' ')} at held_out = {held_out}, seed {seed}; "
                    "add documents, or change the fraction or the seed"
                )
    return TokenShards.open(folder / "train"), TokenShards.open(folder / "held_out")


def _reusable(folder: Path, tokenizer: Tokenizer, fingerprint: str) -> TokenShards | None:
    """The shards in `folder`, if they are whole and stand for this fingerprint and tokenizer."""
    if not fingerprint or not (folder / "index.json").is_file():
        return None
    try:
        index = ShardIndex.read(folder)
        if index.fingerprint != fingerprint or index.tokenizer != tokenizer.fingerprint:
            return None
        return TokenShards.open(folder)
    except FormatError:
        return None  # damaged: they are written again from their sources


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        if document.text:
            batch.append(document)
            size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Target:
    """A folder that appears under its name only when the block ends well."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.temporary = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
        self._opened: list[BinaryIO] = []

    def open(self, path: Path) -> BinaryIO:
        """A new file, closed with the target if not before."""
        self._opened.append(open(path, "wb"))
        return self._opened[-1]

    def __enter__(self) -> _Target:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.parent.glob(f".{self.folder.name}.writing-*"):
                if not _alive(stale.name.rpartition("-")[2]):
                    shutil.rmtree(stale, ignore_errors=True)
            self.temporary.mkdir()
        except OSError as error:
            raise write_failure(error, self.folder) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        for stream in self._opened:
            with contextlib.suppress(OSError):  # of a failed write, already on its way up
                stream.close()
        try:
            if error is None:
                if self.folder.exists():
                    old = self.temporary.with_name(f"{self.temporary.name}-old")
                    os.rename(self.folder, old)
                    os.rename(self.temporary, self.folder)
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    os.rename(self.temporary, self.folder)
                _sync(self.folder.parent)
        except OSError as failure:
            raise write_failure(failure, self.folder) from failure
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise write_failure(error, self.folder) from error


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True  # someone else's, and running
    except (OSError, ValueError):
        return False
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _File:
    """A file written once, front to back, with the checksum of each mebibyte."""

    def __init__(self, target: _Target, path: Path):
        self.path, self.num_bytes = path, 0
        self._stream = target.open(path)
        self._checksums: list[int] = []
        self._pending = b""

    def write(self, content: bytes) -> None:
        self._stream.write(content)
        self.num_bytes += len(content)
        self._pending += content
        whole = len(self._pending) - len(self._pending) % CHECK_BYTES
        for start in range(0, whole, CHECK_BYTES):
            self._checksums.append(zlib.crc32(self._pending[start : start + CHECK_BYTES]))
        self._pending = self._pending[whole:]

    def close(self) -> ShardFile:
        if self._pending:
            self._checksums.append(zlib.crc32(self._pending))
            self._pending = b""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return ShardFile(self.path.name, self.num_bytes, tuple(self._checksums))


class _Writer:
    """Appends encoded documents to a folder of shards; `close` writes the index."""

    def __init__(self, target: _Target, folder: Path, tokenizer: Tokenizer, shard_tokens: int):
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer names no eos_token, which documents end with; add it to its config")
        folder.mkdir(exist_ok=True)
        self._target, self._folder = target, folder
        self._tokenizer, self._shard_tokens = tokenizer, shard_tokens
        self._eos = tokenizer.eos_token_id
        self._dtype = native_dtype(tokenizer.vocab_size)
        lengths = [min(len(tokenizer.id_to_bytes(i)), 65535) for i in range(tokenizer.vocab_size)]
        self._lengths = np.array(lengths, dtype="<u2")
        self._lengths[self._eos] = 0
        self._exact_bytes = True
        self._documents = _File(target, folder / "documents.bin")
        self._shard = _File(target, folder / "tokens-00000.bin")
        self._files: list[ShardFile] = []
        self.num_tokens = self.num_documents = self.text_bytes = 0

    def add(self, documents: list[Document]) -> None:
        """Encode and append documents, each followed by the end token."""
        width = np.dtype(self._dtype).itemsize
        for document, ids in zip(documents, self._tokenizer.encode_batch([d.text for d in documents]), strict=True):
            num_bytes = len(document.text.encode("utf-8", "replace"))
            self._documents.write(np.array([self.num_tokens, num_bytes], dtype="<u8").tobytes())
            ids.append(self._eos)
            array = np.array(ids, dtype=np.dtype(self._dtype).newbyteorder("<"))
            self._exact_bytes &= int(self._lengths[array].sum(dtype=np.int64)) == num_bytes
            tokens = array.tobytes()
            while tokens:
                room = self._shard_tokens * width - self._shard.num_bytes
                if room == 0:
                    self._files.append(self._shard.close())
                    self._shard = _File(self._target, self._folder / f"tokens-{len(self._files):05d}.bin")
                    continue
                self._shard.write(tokens[:room])
                tokens = tokens[room:]
            self.num_tokens += len(ids)
            self.num_documents += 1
            self.text_bytes += num_bytes

    def close(self, fingerprint: str) -> None:
        """Sync all files and write index.json."""
        lengths = _File(self._target, self._folder / "lengths.bin")
        lengths.write(self._lengths.tobytes())
        files = (*self._files, self._shard.close(), lengths.close(), self._documents.close())
        index = ShardIndex(
            self._dtype,
            self._tokenizer.vocab_size,
            self._eos,
            self.num_tokens,
            self.num_documents,
            self.text_bytes,
            self._exact_bytes,
            self._tokenizer.fingerprint,
            fingerprint,
            files,
        )
        file = _File(self._target, self._folder / "index.json")
        file.write(json.dumps(index.to_json()).encode())
        file.close()
        _sync(self._folder)
