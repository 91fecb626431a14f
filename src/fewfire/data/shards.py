"""Token shards: a corpus as token ids on disk, read through memory maps. Knows no order of training, no model.

A folder holds `tokens-00000.bin`, ... (uint16 or uint32, every document followed by the end token),
`lengths.bin` (uint16: bytes of text that each id stands for), `documents.bin` (uint64 pairs:
first token, bytes of text) and `index.json` (sizes and checksums). All numbers are little-endian.
"""

from __future__ import annotations

import json
import sys
import zlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fewfire.errors import ConfigError, FormatError
from fewfire.tokenizer.files import read_json

FORMAT, VERSION = "fewfire-shards", 1
CHECK_BYTES = 1 << 20  # one CRC-32 for each run of this many bytes
_INDEX_KEYS = {
    "format": str,
    "version": int,
    "dtype": str,
    "vocab_size": int,
    "eos_token_id": int,
    "num_tokens": int,
    "num_documents": int,
    "text_bytes": int,
    "exact_bytes": bool,
    "tokenizer": str,
    "fingerprint": str,
    "files": list,
}


@dataclass(frozen=True)
class ShardFile:
    """One file of a shard folder: its name, size, and the CRC-32 of each mebibyte."""

    name: str
    num_bytes: int
    checksums: tuple[int, ...]


@dataclass(frozen=True)
class ShardIndex:
    """What index.json says. `tokenizer` and `fingerprint` tell whether the shards still stand for their sources.

    `exact_bytes`: in every document the lengths of its tokens add up to the bytes of its text. `files`: the tokens'
    files in order, then lengths.bin, then documents.bin.
    """

    dtype: str
    vocab_size: int
    eos_token_id: int
    num_tokens: int
    num_documents: int
    text_bytes: int
    exact_bytes: bool
    tokenizer: str
    fingerprint: str
    files: tuple[ShardFile, ...]

    def to_json(self) -> dict[str, Any]:
        """The content of index.json."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def read(cls, folder: Path) -> ShardIndex:
        """Read and check index.json. Raises ConfigError where it is missing, FormatError where it is malformed."""
        path = folder / "index.json"
        if not path.is_file():
            raise ConfigError(f"{folder}: no token shards there (index.json is missing); prepare the corpus first")
        value = read_json(path)
        for key, kind in _INDEX_KEYS.items():
            if not isinstance(value.get(key), kind):
                raise FormatError(f"is missing or no {kind.__name__}; prepare again", path=str(path), record=key)
        if value["format"] != FORMAT or value["version"] != VERSION:
            raise FormatError(f"is no {FORMAT} version {VERSION}; prepare the corpus again", path=str(path))
        if value["dtype"] not in ("uint16", "uint32"):
            raise FormatError(f"is {value['dtype']}, not uint16 or uint32", path=str(path), record="dtype")
        try:
            files = tuple(
                ShardFile(str(Path(file["name"]).name), int(file["num_bytes"]), tuple(map(int, file["checksums"])))
                for file in value["files"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError("is malformed; prepare the corpus again", path=str(path), record="files") from error
        plain = {key: value[key] for key in _INDEX_KEYS if key not in ("format", "version", "files")}
        index = cls(**plain, files=files)
        sizes = [0, 0, *(file.num_bytes for file in files)]
        expected = [index.num_tokens * index.token_bytes, index.vocab_size * 2, index.num_documents * 16]
        if [sum(sizes[:-2]), *sizes[-2:]] != expected or len(files) < 3:
            raise FormatError("disagree with the sizes of the files; prepare again", path=str(path), record="counts")
        return index

    @property
    def token_bytes(self) -> int:
        """Bytes of one token on disk."""
        return 2 if self.dtype == "uint16" else 4


class TokenShards:
    """An opened shard folder: a run of `num_tokens` ids, mapped, never wholly in memory."""

    def __init__(self, folder: Path, index: ShardIndex):
        self.folder, self.index = folder, index
        self.num_tokens, self.num_documents = index.num_tokens, index.num_documents
        self.text_bytes, self.vocab_size, self.eos_token_id = index.text_bytes, index.vocab_size, index.eos_token_id
        dtype = np.dtype(index.dtype).newbyteorder("<")
        self._maps: list[np.ndarray] = [_map(folder / file.name, dtype) for file in index.files[:-2]]
        self._starts = np.cumsum([0, *(len(tokens) for tokens in self._maps)])
        self._lengths = _map(folder / index.files[-2].name, np.dtype("<u2")).astype(np.int64)
        documents = _map(folder / index.files[-1].name, np.dtype("<u8")).reshape(-1, 2)
        self.document_starts = documents[:, 0].astype(np.int64)
        self._document_bytes = np.concatenate([[0], np.cumsum(documents[:, 1].astype(np.int64))])

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> TokenShards:
        """Open a shard folder. `verify` reads every byte once and compares checksums; sizes are always compared.

        Raises: ConfigError where there are no shards, FormatError (file, offset) where one is truncated or corrupted.
        """
        folder = Path(folder)
        index = ShardIndex.read(folder)
        for file in index.files:
            check_file(folder, file, verify=verify)
        return cls(folder, index)

    @cached_property
    def checksum(self) -> str:
        """Names the content: equal where the tokens are equal, wherever and whenever they were written."""
        sums = [file.checksums for file in self.index.files]
        return f"{zlib.crc32(json.dumps([self.index.dtype, self.num_tokens, sums]).encode()):08x}"

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64; across files where they meet. Raises IndexError outside the run."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens}")
        out = np.empty(stop - start, dtype=np.int64)
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        while done < len(out):
            offset = start + done - int(self._starts[number])
            part = self._maps[number][offset : offset + len(out) - done]
            out[done : done + len(part)] = part
            done, number = done + len(part), number + 1
        return out

    def count_bytes(self, start: int, stop: int) -> int:
        """Bytes of text that tokens [start, stop) stand for; they add up to `text_bytes`. End tokens stand for none.

        Where a tokenizer's pieces do not add up to the text (`exact_bytes` False: it normalises, or adds spaces), a
        part of a document counts in proportion to its tokens.
        """
        if self.index.exact_bytes:
            return int(self._lengths[self.read(start, stop)].sum())
        return self._bytes_before(stop) - self._bytes_before(start)

    def _bytes_before(self, token: int) -> int:
        if token >= self.num_tokens:
            return self.text_bytes
        document = int(np.searchsorted(self.document_starts, token, side="right")) - 1
        start = int(self.document_starts[document])
        is_last = document + 1 == self.num_documents
        stop = self.num_tokens if is_last else int(self.document_starts[document + 1])
        low, high = int(self._document_bytes[document]), int(self._document_bytes[document + 1])
        return low + (high - low) * (token - start) // (stop - start)


def check_file(folder: Path, file: ShardFile, *, verify: bool) -> None:
    """Raise FormatError unless the file has its size and, with `verify`, its checksums."""
    path = folder / file.name
    if not path.is_file():
        raise FormatError("is missing; prepare the corpus again", path=str(path))
    size = path.stat().st_size
    if size != file.num_bytes:
        message = f"has {size} bytes, expected {file.num_bytes}; prepare the corpus again"
        raise FormatError(message, path=str(path), offset=min(size, file.num_bytes))
    if not verify:
        return
    with open(path, "rb") as stream:
        for number, expected in enumerate(file.checksums):
            if zlib.crc32(stream.read(CHECK_BYTES)) != expected:
                message = f"is corrupted in the {CHECK_BYTES} bytes from here; prepare the corpus again"
                raise FormatError(message, path=str(path), offset=number * CHECK_BYTES)
    if len(file.checksums) != -(-size // CHECK_BYTES):
        raise FormatError("has too few checksums in index.json; prepare the corpus again", path=str(path))


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def native_dtype(vocab_size: int) -> str:
    """The smallest type that holds every id below `vocab_size`."""
    assert sys.maxsize > 2**32  # uint32 ids and byte offsets need a 64-bit Python
    return "uint16" if vocab_size <= 1 << 16 else "uint32"
