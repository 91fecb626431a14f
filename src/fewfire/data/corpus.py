"""Documents out of files, folders, JSONL and Parquet. Owns what counts as one document; knows no tokens."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from fewfire.errors import ConfigError, FormatError
from fewfire.tokenizer.pieces import without_surrogates

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".tex", ".html")
LINE_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
CUT_CHARACTERS = 16384
_READ_BYTES = 1 << 20

# Folders of the standard library that hold tests or generated character tables rather than code and prose.
_LIBRARY_SKIPPED = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "encodings",
        "__pycache__",
        "__phello__",
    }
)


class Document(NamedTuple):
    """One text. `name` says where it came from; it decides nothing."""

    name: str
    text: str


def read_documents(
    paths: str | Path | Sequence[str | Path],
    *,
    suffixes: Sequence[str] | None = None,
    field: str = "text",
    cut_characters: int | Literal["auto"] | None = "auto",
) -> Iterator[Document]:
    """Documents of files and folders (recursively, sorted by path; hidden names are passed over), in a fixed order.

    A .jsonl line is a document (`field`), a Parquet row is one (column `field`), any other file is one.
    `suffixes` chooses the files of folders (default: common text suffixes, JSONL, Parquet). `cut_characters`: text
    files are cut into documents of about that length at blank lines; `auto` does so only where one text file is the
    whole corpus and no split could be made otherwise (about 64 documents, or of 16384 characters); None never.
    Empty texts are passed over. Bytes that are no UTF-8 become U+FFFD; one warning at the end counts the files.

    Raises: ConfigError for a missing path, a field that is not there, no document at all; FormatError for a JSONL
    line that is no JSON object with a text, a broken Parquet file, a binary file.
    """
    files = corpus_files(paths, suffixes=suffixes)
    if cut_characters == "auto":
        single_text = len(files) == 1 and files[0].suffix.lower() not in LINE_SUFFIXES + PARQUET_SUFFIXES
        cut_characters = min(CUT_CHARACTERS, max(256, files[0].stat().st_size // 64)) if single_text else None
    bad_files: list[str] = []
    num_documents = 0
    for file in files:
        suffix = file.suffix.lower()
        if suffix in LINE_SUFFIXES:
            documents = _read_lines(file, field)
        elif suffix in PARQUET_SUFFIXES:
            documents = _read_parquet(file, field)
        else:
            documents = _read_text(file, cut_characters, bad_files)
        for document in documents:
            if document.text:
                num_documents += 1
                yield document
    if num_documents == 0:
        raise ConfigError(f"{_shown(paths)}: the corpus holds no text - expected at least one document - add files")
    if bad_files:
        warnings.warn(
            f"{len(bad_files)} of {len(files)} files are not UTF-8 (the first: {bad_files[0]}); "
            "their bad bytes became U+FFFD; convert them to UTF-8 to keep them",
            stacklevel=2,
        )


def corpus_files(paths: str | Path | Sequence[str | Path], *, suffixes: Sequence[str] | None = None) -> list[Path]:
    """The files that `read_documents` reads, in its order. Raises ConfigError for a path or a folder without any."""
    wanted = tuple(suffix.lower() for suffix in suffixes or TEXT_SUFFIXES + LINE_SUFFIXES + PARQUET_SUFFIXES)
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not given:
        raise ConfigError("no corpus path - expected at least one file or folder - name one")
    files: list[Path] = []
    for path in map(Path, given):
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            found = _files_below(path, wanted)
            if not found:
                raise ConfigError(f"{path}: no file ends in {' '.join(wanted)}; add some, or name other suffixes")
            files += found
        else:
            raise ConfigError(f"{path}: no such file or folder; check the corpus path")
    return files


def corpus_fingerprint(
    paths: str | Path | Sequence[str | Path], *, suffixes: Sequence[str] | None = None, field: str = "text"
) -> str:
    """sha256 over the files' names, sizes and times of change: whether prepared shards still stand for them."""
    lines = [f"field {field}"]
    for file in corpus_files(paths, suffixes=suffixes):
        status = file.stat()
        lines.append(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def python_library_documents() -> Iterator[Document]:
    """This Python's own standard library: one document a source file, sorted by path. The text every machine has.

    Left out: installed packages, tests, the generated tables of `encodings`, and build configuration.
    """
    root = Path(sysconfig.get_path("stdlib"))
    num_documents = 0
    for file in _files_below(root, (".py",), skipped=_LIBRARY_SKIPPED):
        name = file.relative_to(root).as_posix()
        if name.startswith(("_sysconfigdata", "config-")):
            continue
        try:
            text = file.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a few old sources are Latin-1 on purpose
        if text.strip():
            num_documents += 1
            yield Document(name, text)
    if num_documents == 0:
        raise ConfigError(f"{root}: this Python has no library sources; use a Python that comes with its .py files")


# -------------------------------------------------------------------------------------------------- one file each


def _files_below(folder: Path, suffixes: tuple[str, ...], skipped: frozenset[str] = frozenset()) -> list[Path]:
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        found += [Path(where, name) for name in names if name.lower().endswith(suffixes) and not name.startswith(".")]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(folder).parts)


def _read_text(file: Path, cut_characters: int | None, bad_files: list[str]) -> Iterator[Document]:
    """One document, or several of about `cut_characters`; the cuts depend on the text alone."""
    texts = _decoded_blocks(file, bad_files)
    if cut_characters is None:
        yield Document(str(file), "".join(texts))
        return
    number, rest = 1, ""
    for text in texts:
        rest += text
        start = 0
        while len(rest) - start > 2 * cut_characters:
            end = _cut(rest, start, cut_characters)
            yield Document(f"{file}#{number}", rest[start:end])
            number, start = number + 1, end
        rest = rest[start:]
    yield Document(f"{file}#{number}", rest)


def _cut(text: str, start: int, length: int) -> int:
    """Where the document from `start` ends: after a blank line, else a line, in its second half; else anywhere."""
    low, high = start + length, start + 2 * length
    for separator in ("\n\n", "\n"):
        found = text.find(separator, low, high)
        if found >= 0:
            return found + len(separator)
    return high


def _decoded_blocks(file: Path, bad_files: list[str]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    offset = 0
    try:
        with open(file, "rb") as stream:
            while True:
                block = stream.read(_READ_BYTES)
                if offset == 0:
                    if b"\0" in block[:8192]:
                        at = block.index(b"\0")
                        raise FormatError("is binary, not UTF-8 text; leave it out", path=str(file), offset=at)
                    block = block.removeprefix(codecs.BOM_UTF8)
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError:
                    bad_files.append(str(file))
                    state = decoder.getstate()
                    decoder = codecs.getincrementaldecoder("utf-8")("replace")
                    decoder.setstate(state)
                    text = decoder.decode(block, final=not block)
                offset += len(block)
                if text:
                    yield text
                if not block:
                    return
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror or error}); check the corpus path") from error


def _read_lines(file: Path, field: str) -> Iterator[Document]:
    offset = 0
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    text = _line_text(line.removeprefix(codecs.BOM_UTF8), file, number, offset, field)
                    yield Document(f"{file}:{number}", text)
                offset += len(line)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror or error}); check the corpus path") from error


def _line_text(line: bytes, file: Path, number: int, offset: int, field: str) -> str:
    where = {"path": str(file), "record": f"line {number}"}
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        message = f"is not JSON ({error.msg}); one object a line"
        raise FormatError(message, offset=offset + error.pos, **where) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise FormatError("is not JSON in UTF-8; one object a line", offset=offset, **where) from error
    if not isinstance(value, dict):
        raise FormatError("is no JSON object - expected one a line", offset=offset, **where)
    if not isinstance(value.get(field), str):
        has = ", ".join(sorted(value)[:8]) or "nothing"
        raise FormatError(f"has no text under '{field}' (it has: {has}); name the field", offset=offset, **where)
    return without_surrogates(value[field])


def _read_parquet(file: Path, field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{file}: Parquet needs pyarrow, which is not installed; pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if field not in table.schema_arrow.names:
                has = ", ".join(table.schema_arrow.names[:8])
                raise ConfigError(f"{file}: no column '{field}' (it has: {has}); name the field")
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    if isinstance(value, str):
                        yield Document(f"{file}:{row}", value)
                    elif value is not None:
                        raise ConfigError(f"{file}: column '{field}' holds no text in row {row}; name another field")
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0][:160]
        raise FormatError(f"is no readable Parquet file ({reason})", path=str(file)) from error


def _shown(paths: str | Path | Sequence[str | Path]) -> str:
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    return f"{given[0]}" + (f" and {len(given) - 1} more" if len(given) > 1 else "")
