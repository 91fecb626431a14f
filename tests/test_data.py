"""Data: what is a document, the split, shards that notice damage, an order that resumes to the token."""

from __future__ import annotations

import errno
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewfire.data import (
    Batches,
    Document,
    TokenShards,
    corpus_fingerprint,
    evaluation_batches,
    evaluation_windows,
    prepare,
    python_library_documents,
    read_documents,
    select,
    side_of,
    write_shards,
    write_split,
)
from fewfire.errors import BudgetError, ConfigError, FormatError
from fewfire.tokenizer import Tokenizer, train_bpe


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the few experts that fire\n" * 4], 300)


def documents(count: int, length: int = 40) -> list[Document]:
    return [Document(str(i), f"document {i}: " + "fire " * (i % 7) + "x" * (i * 13 % length)) for i in range(count)]


@pytest.fixture
def shards(tokenizer: Tokenizer, tmp_path: Path) -> TokenShards:
    return write_shards(documents(60), tokenizer, tmp_path / "shards", shard_tokens=500)


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


# ------------------------------------------------------------------------------------------------------ corpus


def test_folder_is_recursive_sorted_and_filtered(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b/c.py", "a.txt", "skip.bin", ".hidden.txt", ".git/x.txt", "empty.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if name == "empty.txt" else name)
    assert [d.text for d in read_documents(tmp_path)] == ["a/b/c.py", "a/z.md", "a.txt", "b.txt"]
    assert [d.text for d in read_documents(tmp_path, suffixes=[".py"])] == ["a/b/c.py"]
    assert [d.text for d in read_documents([tmp_path / "b.txt", tmp_path / "a"])] == ["b.txt", "a/b/c.py", "a/z.md"]


def test_jsonl_and_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "tw\\ud83do", "id": 2}\n')
    table = pyarrow.table({"text": ["three", None, "four"], "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    assert [d.text for d in read_documents(tmp_path)] == ["one", "tw\ufffdo", "three", "four"]
    for field, message in (("body", "no column 'body'"), ("n", "holds no text in row 1")):
        with pytest.raises(ConfigError, match=message):
            list(read_documents(tmp_path / "b.parquet", field=field))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(FormatError, match="b.parquet: is no readable Parquet") as caught:
        list(read_documents(tmp_path / "b.parquet"))
    one_line(caught.value)


@pytest.mark.parametrize(
    ("line", "message", "offset"),
    [
        ("{nope}", "is not JSON", 17),
        ("[1]", "is no JSON object", 16),
        ('{"body": 1}', "no text under 'text'", 16),
        ('{"text": 1}', "no text under 'text'", 16),
        ("[" * 100000, "is not JSON", None),
    ],
)
def test_bad_jsonl_names_line_and_byte(tmp_path: Path, line: str, message: str, offset: int | None) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' + line + "\n")
    with pytest.raises(FormatError, match=message) as caught:
        list(read_documents(path))
    assert "line 2" in one_line(caught.value) and str(path) in str(caught.value)
    assert offset is None or caught.value.offset == offset


def test_missing_and_empty_corpora(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    for paths, message in (
        ([], "no corpus path"),
        (tmp_path / "no", "no such file or folder"),
        (tmp_path / "empty.txt", "holds no text"),
    ):
        with pytest.raises(ConfigError, match=message):
            list(read_documents(paths))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="no file ends in"):
        list(read_documents(tmp_path / "folder"))


def test_bad_bytes_are_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 and \xff")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbffine")
    with pytest.warns(UserWarning, match="1 of 2 files are not UTF-8 .*a.txt"):
        assert [d.text for d in read_documents(tmp_path)] == ["caf\ufffd and \ufffd", "fine"]
    (tmp_path / "c.txt").write_bytes(b"x\0y")
    with pytest.raises(FormatError, match="c.txt: byte 1: is binary"):
        list(read_documents(tmp_path / "c.txt"))


@pytest.mark.parametrize("read_bytes", [7, 64, 1 << 20])
def test_a_single_file_is_cut_at_blank_lines(tmp_path: Path, monkeypatch, read_bytes: int) -> None:
    text = "".join(f"paragraph {i} \u00e9\n" + "line\n" * (i % 5) + "\n" for i in range(400)) + "x" * 3000
    path = tmp_path / "all.txt"
    path.write_text(text, encoding="utf-8")
    whole = [d.text for d in read_documents(path, cut_characters=None)]
    assert whole == [text]
    reference = [d.text for d in read_documents(path)]
    monkeypatch.setattr("fewfire.data.corpus._READ_BYTES", read_bytes)
    assert [d.text for d in read_documents(path)] == reference
    assert len(reference) > 20 and "".join(reference) == text
    assert all(part.endswith("\n\n") for part in reference[:-12])


def test_python_library_is_the_same_twice_and_holds_no_tests() -> None:
    names = [d.name for d in python_library_documents()]
    assert names == [d.name for d in python_library_documents()]
    assert len(names) > 200 and "argparse.py" in names
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {"test", "tests", "site-packages", "idle_test"}


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = corpus_fingerprint(tmp_path)
    assert corpus_fingerprint(tmp_path) == before != corpus_fingerprint(tmp_path, field="body")
    (tmp_path / "a.txt").write_text("other")
    assert corpus_fingerprint(tmp_path) != before


# ------------------------------------------------------------------------------------------------------- split


@given(texts=st.lists(st.text(), max_size=50), seed=st.integers(0, 2**64), fraction=st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_split_is_a_partition_by_content(texts: list[str], seed: int, fraction: float) -> None:
    docs = [Document(str(i), text) for i, text in enumerate(texts + texts)]
    train = list(select(docs, "train", fraction=fraction, seed=seed))
    held_out = list(select(docs, "held_out", fraction=fraction, seed=seed))
    assert sorted(train + held_out) == sorted(docs)
    assert not {d.text for d in train} & {d.text for d in held_out}


def test_split_takes_its_fraction_and_follows_the_seed() -> None:
    docs = [Document("", str(i)) for i in range(4000)]
    sides = [[side_of(d, fraction=0.25, seed=seed) for d in docs] for seed in (0, 1)]
    for side in sides:
        assert abs(side.count("held_out") / 4000 - 0.25) < 0.03  # 4 standard deviations
    assert sides[0] != sides[1]
    with pytest.raises(ConfigError, match="no fraction"):
        select(docs, "train", fraction=1.5, seed=0)


def test_split_never_changes() -> None:
    held_out = [i for i in range(100) if side_of(Document("", f"text {i}"), fraction=0.1, seed=7) == "held_out"]
    assert held_out == GOLDEN_HELD_OUT


GOLDEN_HELD_OUT = [29, 30, 33, 36, 60, 61, 66, 74, 78, 87, 88]


# ------------------------------------------------------------------------------------------------------ shards


def test_shards_hold_every_document(tokenizer: Tokenizer, tmp_path: Path, shards: TokenShards) -> None:
    docs = documents(60)
    expected = [i for d in docs for i in [*tokenizer.encode(d.text), tokenizer.eos_token_id]]
    assert len(shards.index.files) > 3 and shards.index.dtype == "uint16"
    assert shards.read(0, shards.num_tokens).tolist() == expected
    assert shards.read(499, 1001).tolist() == expected[499:1001]
    assert shards.text_bytes == sum(len(d.text.encode()) for d in docs) and shards.num_documents == 60
    assert [expected[i - 1] for i in shards.document_starts[1:]] == [tokenizer.eos_token_id] * 59
    ends = [*shards.document_starts.tolist()[1:], shards.num_tokens]
    until = [sum(len(d.text.encode()) for d in docs[: i + 1]) for i in range(60)]
    assert [shards.count_bytes(0, end) for end in ends] == until
    with pytest.raises(IndexError):
        shards.read(0, shards.num_tokens + 1)
    assert shards.index.exact_bytes
    whole = write_shards(docs, tokenizer, tmp_path / "whole")
    assert whole.read(0, whole.num_tokens).tolist() == expected


def test_bytes_where_pieces_do_not_add_up(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lossy = Tokenizer.from_json(json.dumps(tokenizer.definition | {"normalizer": {"type": "NFC"}}), tokenizer.config)
    docs = [Document(str(i), "e\u0301x" * (i + 1)) for i in range(20)]  # four bytes, of which NFC leaves three
    shards = write_shards(docs, lossy, tmp_path / "shards")
    assert not shards.index.exact_bytes and shards.text_bytes == 4 * 210
    ends = [*shards.document_starts.tolist()[1:], shards.num_tokens]
    assert [shards.count_bytes(0, end) for end in ends] == [2 * (i + 1) * (i + 2) for i in range(20)]
    assert sum(window.num_bytes for window in evaluation_windows(shards, 7)) == shards.text_bytes


def test_same_fingerprint_is_reused_and_another_replaces(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards(documents(5), tokenizer, folder, fingerprint="one")

    def unread():
        raise AssertionError("the corpus was read")
        yield

    assert write_shards(unread(), tokenizer, folder, fingerprint="one").num_documents == 5
    assert write_shards(documents(6), tokenizer, folder, fingerprint="two").num_documents == 6
    other = train_bpe(["quite another corpus, quite another"], 290)
    assert write_shards(documents(7), other, folder, fingerprint="two").num_documents == 7
    (folder / "tokens-00000.bin").write_bytes(b"damaged")
    assert write_shards(documents(8), other, folder, fingerprint="two").num_documents == 8
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


@pytest.mark.parametrize("name", ["tokens-00001.bin", "documents.bin", "index.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "extend"])
def test_damage_is_noticed(shards: TokenShards, name: str, damage: str) -> None:
    path = shards.folder / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[:-3])
    elif damage == "extend":
        path.write_bytes(content + b"{")
    else:
        position = content.index(b"uint16") if name == "index.json" else len(content) // 2
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    with pytest.raises((FormatError, ConfigError)) as caught:
        TokenShards.open(shards.folder)
    assert name in one_line(caught.value)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_lying_index_is_a_format_error(data: st.DataObject, lying_folder: Path) -> None:
    index = json.loads((lying_folder / "index.good").read_text())
    key = data.draw(st.sampled_from(sorted(index)))
    index[key] = data.draw(
        st.one_of(st.none(), st.integers(-3, 10), st.text(max_size=4), st.lists(st.none(), max_size=2), st.just({}))
    )
    (lying_folder / "index.json").write_text(json.dumps(index))
    try:
        TokenShards.open(lying_folder)
    except FormatError as error:
        one_line(error)
    else:  # what was drawn may be as good as what was there
        assert key in ("fingerprint", "tokenizer", "vocab_size", "eos_token_id", "text_bytes", "version")


@pytest.fixture(scope="module")
def lying_folder(tokenizer: Tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lying") / "shards"
    write_shards(documents(20), tokenizer, folder)
    shutil.copy(folder / "index.json", folder / "index.good")
    return folder


def test_split_shards(tokenizer: Tokenizer, tmp_path: Path) -> None:
    docs = documents(80)
    train, held_out = write_split(docs, tokenizer, tmp_path / "s", held_out=0.2, seed=3, fingerprint="f")
    assert train.num_documents + held_out.num_documents == 80 and 5 < held_out.num_documents < 30
    again = write_split([], tokenizer, tmp_path / "s", held_out=0.2, seed=3, fingerprint="f")
    assert [s.checksum for s in again] == [train.checksum, held_out.checksum]
    with pytest.raises(ConfigError, match="no document of 1 is (held out|train)"):
        write_split(docs[:1], tokenizer, tmp_path / "t", held_out=0.2, seed=3)
    with pytest.raises(ConfigError, match="holds no text"):
        write_shards([], tokenizer, tmp_path / "t")
    assert not (tmp_path / "t").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, BudgetError), (errno.EACCES, ConfigError)])
def test_an_interrupted_write_leaves_what_was_there(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch, number: int, kind: type[Exception]
) -> None:
    folder = tmp_path / "shards"
    before = write_shards(documents(5), tokenizer, folder).checksum

    def fail(descriptor: int) -> None:
        raise OSError(number, "injected")

    monkeypatch.setattr(prepare.os, "fsync", fail)
    with pytest.raises(kind) as caught:
        write_shards(documents(9), tokenizer, folder)
    assert str(folder) in one_line(caught.value)
    assert TokenShards.open(folder).checksum == before and [p.name for p in tmp_path.iterdir()] == ["shards"]


# ----------------------------------------------------------------------------------------------------- sampler


def take(batches: Batches, count: int) -> np.ndarray:
    return np.stack(list(itertools.islice(batches, count)))


@pytest.mark.parametrize("seq_len", [1, 7, 32])
def test_an_epoch_has_every_window_once(shards: TokenShards, seq_len: int) -> None:
    batches = Batches(shards, seq_len=seq_len, batch_size=1, seed=5)
    tokens = shards.read(0, shards.num_tokens)
    phases = set()
    for epoch in range(3):
        count = batches.epoch_tokens // seq_len
        phase, order = batches._phase, batches._order
        assert sorted(order) == list(range(count)) and (order[:-1] > order[1:]).any()
        windows = take(batches, count)[:, 0]
        assert batches.epoch == epoch
        starts = phase + order * seq_len
        assert (windows == np.stack([tokens[s : s + seq_len + 1] for s in starts])).all()
        assert shards.num_tokens - 1 - count * seq_len - phase < seq_len
        phases.add(phase)
        next(batches)
        batches = Batches(shards, seq_len=seq_len, batch_size=1, seed=5)
        batches.load_state_dict(batches.state_dict() | {"epoch": epoch + 1, "index": 0})
    assert seq_len == 1 or len(phases) > 1


def test_the_seed_fixes_the_order(shards: TokenShards) -> None:
    one, two, other = (take(Batches(shards, seq_len=16, batch_size=4, seed=seed), 90) for seed in (1, 1, 2))
    assert (one == two).all() and (one != other).any()


@given(before=st.integers(0, 40), batch_size=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_resume_equals_uninterrupted(resume_shards: TokenShards, before: int, batch_size: int) -> None:
    batches = Batches(resume_shards, seq_len=11, batch_size=batch_size, seed=9)
    take(batches, before) if before else None
    state = json.loads(json.dumps(batches.state_dict()))
    resumed = Batches(resume_shards, seq_len=11, batch_size=batch_size, seed=9)
    resumed.load_state_dict(state)
    assert (take(batches, 40) == take(resumed, 40)).all()
    assert batches.state_dict() == resumed.state_dict()


@pytest.fixture(scope="module")
def resume_shards(tokenizer: Tokenizer, tmp_path_factory) -> TokenShards:
    return write_shards(documents(30), tokenizer, tmp_path_factory.mktemp("resume") / "shards")


def test_batch_size_and_ranks_do_not_change_the_order(shards: TokenShards) -> None:
    single = take(Batches(shards, seq_len=8, batch_size=1, seed=4), 300)[:, 0]
    wide = take(Batches(shards, seq_len=8, batch_size=6, seed=4), 50).reshape(300, 9)
    ranks = [Batches(shards, seq_len=8, batch_size=3, seed=4, rank=rank, num_ranks=2) for rank in range(2)]
    joined = np.concatenate([take(rank, 50) for rank in ranks], axis=1).reshape(300, 9)
    assert (single == wide).all() and (single == joined).all()
    assert ranks[0].state_dict() == ranks[1].state_dict()


def test_what_cannot_be_sampled(shards: TokenShards) -> None:
    size = shards.num_tokens
    assert next(Batches(shards, seq_len=size - 1, batch_size=2, seed=0)).shape == (2, size)
    with pytest.raises(ConfigError, match=f"has {size} tokens, one sequence needs {size + 1}"):
        Batches(shards, seq_len=size, batch_size=1, seed=0)
    with pytest.raises(ConfigError, match="batch_size .0. must be at least 1"):
        Batches(shards, seq_len=8, batch_size=0, seed=0)
    batches = Batches(shards, seq_len=8, batch_size=1, seed=0)
    for key, value in (("seed", 1), ("seq_len", 9), ("checksum", "00"), ("index", 10**6)):
        with pytest.raises(ConfigError, match="saved data position"):
            batches.load_state_dict(batches.state_dict() | {key: value})
    with pytest.raises(ConfigError, match="lacks epoch"):
        batches.load_state_dict({})


@pytest.mark.parametrize("seq_len", [1, 10, 10_000])
def test_evaluation_predicts_each_token_once(shards: TokenShards, seq_len: int) -> None:
    tokens = shards.read(0, shards.num_tokens)
    windows = list(evaluation_windows(shards, seq_len))
    assert np.concatenate([w.tokens_L1[1:] for w in windows]).tolist() == tokens.tolist()
    inputs = np.concatenate([w.tokens_L1[:-1] for w in windows])
    assert inputs.tolist() == [shards.eos_token_id, *tokens[:-1]]
    assert sum(w.num_bytes for w in windows) == shards.text_bytes and min(w.num_bytes for w in windows) >= 0
    batches = list(evaluation_batches(shards, seq_len=seq_len, batch_size=4))
    targets = np.concatenate([b.tokens_BL[:, 1:][b.mask_BL] for b in batches])
    assert targets.tolist() == tokens.tolist()
    assert sum(b.num_bytes for b in batches) == shards.text_bytes
