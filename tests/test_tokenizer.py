"""Tokenizers: round trips, control tokens in user text, streaming equal to whole decodes, files."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewfire.errors import ConfigError, FormatError
from fewfire.tokenizer import StreamDecoder, Tokenizer, train_bpe

TEXTS = [
    "def route(x, gate):\n    scores = x @ gate.T\n    return scores.topk(2)\n" * 3,
    "The router picks two experts for every token; the others stay cold.\n\nOnly a few fire.\n" * 3,
    "caf\u00e9 na\u00efve \u4f60\u597d \U0001f600 1234567\r\n\ttabs" * 3,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 400, special_tokens=("<|endoftext|>", "<|im_start|>"))


def pieces_tokenizer() -> Tokenizer:
    """A Llama-2-like vocabulary: low line blocks for spaces, byte fallback, a stripped first space."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", "ab"]
    return Tokenizer.from_json(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [
                    {
                        "id": i,
                        "content": words[i],
                        "single_word": False,
                        "lstrip": False,
                        "rstrip": False,
                        "normalized": False,
                        "special": True,
                    }
                    for i in range(3)
                ],
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [
                        {"type": "Prepend", "prepend": "\u2581"},
                        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
                    ],
                },
                "decoder": {
                    "type": "Sequence",
                    "decoders": [
                        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                        {"type": "ByteFallback"},
                        {"type": "Fuse"},
                        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                    ],
                },
                "model": {
                    "type": "BPE",
                    "unk_token": "<unk>",
                    "fuse_unk": True,
                    "byte_fallback": True,
                    "vocab": {word: i for i, word in enumerate(words)},
                    "merges": [["\u2581", "a"], ["a", "b"]],
                },
            }
        ),
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True},
    )


def unigram_tokenizer() -> Tokenizer:
    """T5-like: '</s>' is a piece with the best score of all, so plain text can become it."""
    vocabulary = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["\u2581", -2.0], *([c, -3.0] for c in "abs/>")]
    return Tokenizer.from_json(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [
                    {
                        "id": i,
                        "content": vocabulary[i][0],
                        "single_word": False,
                        "lstrip": False,
                        "rstrip": False,
                        "normalized": False,
                        "special": True,
                    }
                    for i in range(3)
                ],
                "pre_tokenizer": {
                    "type": "Metaspace",
                    "replacement": "\u2581",
                    "prepend_scheme": "always",
                    "split": True,
                },
                "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
                "model": {"type": "Unigram", "unk_id": 2, "vocab": vocabulary, "byte_fallback": False},
            }
        )
    )


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_byte_level_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_a_prepared_tokenizer_grows_no_longer() -> None:
    prepared = train_bpe(TEXTS, 400, special_tokens=("<|endoftext|>", "<|im_start|>"))
    prepared.prepare()
    tables = set(vars(prepared))
    assert prepared.decode(prepared.encode(TEXTS[2])) == TEXTS[2]
    assert prepared.eos_token_id in prepared.end_token_ids and prepared.token_to_id("<|im_start|>") is not None
    assert prepared.token_to_id("\ud800") is None, "a lone surrogate is no token's text"
    assert prepared.encode("a", add_special=True) and prepared.vocab_size > 256
    assert set(vars(prepared)) - tables <= {"vocab_size", "special_ids"}  # small: a number, the added tokens


@given(text=st.text(alphabet=st.one_of(st.sampled_from("ab \u2581<>"), st.characters(exclude_categories=["Cs"]))))
@settings(max_examples=200, deadline=None)
def test_pieces_round_trip(text: str) -> None:
    tokenizer = PIECES
    shown = text.replace("\u2581", " ")  # SentencePiece cannot tell its own mark from a space
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == shown


PIECES = pieces_tokenizer()


@given(ids=st.lists(st.integers(-2, 410)), skip=st.booleans(), kind=st.sampled_from(["byte_level", "pieces"]))
@settings(max_examples=300, deadline=None)
def test_stream_equals_whole_decode(tokenizer: Tokenizer, ids: list[int], skip: bool, kind: str) -> None:
    chosen = tokenizer if kind == "byte_level" else PIECES
    decoder = StreamDecoder(chosen, skip_special=skip)
    for _ in range(2):  # flush starts anew
        assert "".join([*map(decoder.push, ids), decoder.flush()]) == chosen.decode(ids, skip_special=skip)


@given(data=st.binary())
@settings(max_examples=200, deadline=None)
def test_stream_of_any_bytes(tokenizer: Tokenizer, data: bytes) -> None:
    by_byte = {tokenizer.id_to_bytes(i): i for i in range(2, 258)}
    decoder = StreamDecoder(tokenizer)
    out = "".join([decoder.push(by_byte[bytes([byte])]) for byte in data]) + decoder.flush()
    assert out == data.decode("utf-8", "replace")


def test_stream_never_breaks_a_character(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(i) for i in tokenizer.encode("\U0001f409\u00e9x")]
    assert "\ufffd" not in "".join(parts) and "".join(parts) + decoder.flush() == "\U0001f409\u00e9x"
    assert len(parts) > 3


def test_opaque_decoder_streams_like_whole() -> None:
    definition = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"[UNK]": 0, "fire": 1, "##s": 2, ".": 3},
        },
    }
    tokenizer = Tokenizer.from_json(json.dumps(definition))
    ids = tokenizer.encode("fires . fire .")
    decoder = StreamDecoder(tokenizer)
    assert "".join([*map(decoder.push, ids), decoder.flush()]) == tokenizer.decode(ids) == "fires. fire."


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|im_start|>b", "<|im_start|><|endoftext|>"])
def test_special_tokens_in_text_stay_text(tokenizer: Tokenizer, text: str) -> None:
    plain, trusted = tokenizer.encode(text), tokenizer.encode(text, allow_special=True)
    assert not tokenizer.control_ids & set(plain)
    assert tokenizer.control_ids & set(trusted)
    assert tokenizer.decode(plain) == text
    without = Tokenizer.from_json(json.dumps(tokenizer.definition | {"added_tokens": []}))
    assert without.encode(text) == plain  # cut and merged like any other text
    assert tokenizer.encode(text) == plain  # the switch of one call does not leak into the next


def test_markers_that_are_not_flagged_special_stay_text_too() -> None:
    definition = train_bpe(TEXTS, 300).definition
    for number, content in enumerate(["<\uff5cUser\uff5c>", "<think>", "    "]):
        definition["added_tokens"].append(
            {
                "id": 300 + number,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": False,
            }
        )
    tokenizer = Tokenizer.from_json(json.dumps(definition))
    user, think, spaces = (tokenizer.token_to_id(text) for text in ["<\uff5cUser\uff5c>", "<think>", "    "])
    assert tokenizer.encode("<\uff5cUser\uff5c><think>") == train_bpe(TEXTS, 300).encode("<\uff5cUser\uff5c><think>")
    assert tokenizer.encode("<\uff5cUser\uff5c><think>", allow_special=True) == [user, think]
    assert spaces in tokenizer.encode("a    b")  # runs of spaces are text, as the model learnt them
    assert tokenizer.decode([user, think]) == "<\uff5cUser\uff5c><think>"  # and only flagged tokens are skipped
    assert [token["special"] for token in tokenizer.definition["added_tokens"]] == [True, False, False, False]


def test_unigram_cannot_make_a_control_token_of_text() -> None:
    tokenizer = unigram_tokenizer()
    assert tokenizer.encode("a</s>", allow_special=True)[-1] == 1
    plain = tokenizer.encode("a</s>b")
    assert 1 not in plain and plain[-1] == tokenizer.token_to_id("b")


def test_framing_is_asked_for() -> None:
    assert PIECES.encode("a") == [PIECES.token_to_id("\u2581a")]
    assert PIECES.encode("a", add_special=True) == [1, PIECES.token_to_id("\u2581a")]
    assert (PIECES.bos_token_id, PIECES.eos_token_id) == (1, 2)


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    script = (
        "from fewfire.tokenizer import train_bpe; import json, sys;"
        "print(train_bpe(json.loads(sys.argv[1]), 400, special_tokens=('<|endoftext|>', '<|im_start|>')).fingerprint)"
    )
    command = [sys.executable, "-c", script, json.dumps(TEXTS)]
    prints = {subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for _ in range(2)}
    assert prints == {tokenizer.fingerprint}
    assert tokenizer.eos_token_id == 0 and tokenizer.vocab_size <= 400


def test_training_bounds() -> None:
    assert train_bpe(["x"], 257).vocab_size == 257
    with pytest.raises(ConfigError, match="vocab_size .256. cannot hold .* 257 or more"):
        train_bpe(["x"], 256)
    with pytest.raises(ConfigError, match="no text"):
        train_bpe([""], 300)


def test_save_and_load(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "new" / "folder")
    for path in (tmp_path / "new" / "folder", tmp_path / "new" / "folder" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint and loaded.config == tokenizer.config
        assert loaded.eos_token_id == 0
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json"]


def test_saved_form_loads_in_transformers(tokenizer: Tokenizer, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"model": 1}',
        b'{"added_tokens": [1], "model": {}}',
        b'{"added_tokens": [{"id": 0}]}',
        b"\xff\xfe",
        b'{"model": {"type": "BPE"}}',
    ],
)
def test_a_broken_file_is_a_format_error(tmp_path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(FormatError) as caught:
        Tokenizer.load(tmp_path)
    assert "tokenizer.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_a_config_error(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer.json there"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ConfigError, match="no such file or folder"):
        Tokenizer.load(tmp_path / "no")


def test_lone_surrogates_do_not_raise(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "\U0001f600"
