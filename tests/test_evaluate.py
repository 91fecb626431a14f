"""Perplexity, bits per byte and multiple choice against figures worked by hand, and what is said of bad data."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny_hub
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewfire
from fewfire import api, families
from fewfire.cli import main as cli
from fewfire.errors import ConfigError, FewfireError, FormatError
from fewfire.evaluate import Windowing
from fewfire.evaluate.choices import join
from fewfire.evaluate.windows import Cut, token_bytes
from fewfire.tokenizer import Tokenizer, train_bpe

TEXT = "A router sends each token to a few experts - näive, 日本語, 🙂🙃 and back.\n" * 8
TOKENIZER = train_bpe([TEXT], 300)
VOCAB = TOKENIZER.vocab_size
END = TOKENIZER.eos_token_id


class Table(torch.nn.Module):
    """Predicts by the last token alone: `logits_VV[last]`. Keeps what it was asked."""

    def __init__(self, logits_VV: torch.Tensor):
        super().__init__()
        shape = {**tiny_hub.CONFIGS["llama"], "vocab_size": len(logits_VV), "model_type": "llama", "rms_norm_eps": 1e-6}
        self.config = families.read_config(shape)
        self.logits_VV, self.asked = logits_VV, []

    def hidden(self, ids_BT, cache=None, *, observe=None):
        self.asked.append(ids_BT.tolist())
        return ids_BT[..., None]

    def logits(self, hidden):
        return self.logits_VV[hidden[..., 0]]


def table_model(logits_VV: torch.Tensor) -> api.Model:
    return api.Model(Table(logits_VV), tokenizer=TOKENIZER)


def random_table() -> torch.Tensor:
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    model = tiny_hub.make("olmoe", vocab_size=VOCAB, max_position_embeddings=64)
    folder = tiny_hub.save(model, tmp_path_factory.mktemp("model"))
    TOKENIZER.save(folder)
    return folder


@pytest.fixture
def text_file(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def write_lines(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


# ------------------------------------------------------------------------------------------------------------ figures


def test_uniform_logits_give_the_vocabulary(text_file):
    figures = table_model(torch.zeros(VOCAB, VOCAB)).evaluate(text_file, context=16)
    ids = TOKENIZER.encode(TEXT)
    assert figures.tokens == len(ids) and figures.num_bytes == len(TEXT.encode())
    assert figures.perplexity == pytest.approx(VOCAB, rel=1e-6)
    assert figures.bits_per_byte == pytest.approx(math.log2(VOCAB) * len(ids) / len(TEXT.encode()), rel=1e-6)
    assert figures.perplexity_error == pytest.approx(0, abs=0.02) and figures.accuracy is None


@pytest.mark.parametrize("options", [{}, {"context": 7}, {"context": 64, "stride": 5}, {"context": 1}])
def test_a_bigram_model_gives_the_sum_over_its_table(text_file, options):
    """Whatever the windows, each token is predicted once, and by the token before it."""
    table = random_table()
    figures = table_model(table).evaluate(text_file, **options)
    ids = [END, *TOKENIZER.encode(TEXT)]
    logs = table.double().log_softmax(-1)
    nats = [-float(logs[a, b]) for a, b in zip(ids, ids[1:])]
    mean = sum(nats) / len(nats)
    assert figures.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert figures.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / len(TEXT.encode()), rel=1e-5)
    deviation = math.sqrt(sum((each - mean) ** 2 for each in nats) / (len(nats) - 1) / len(nats))
    assert figures.perplexity_error == pytest.approx(math.exp(mean) * deviation, rel=1e-4)


def test_a_real_model_against_transformers(folder, text_file):
    """One window of the whole text: their logits, our sum."""
    figures = fewfire.load(folder).evaluate(text_file, context=64, max_tokens=60)
    ids = [END, *TOKENIZER.encode(TEXT)][:61]
    with torch.no_grad():
        logits = tiny_hub.load(folder)(torch.tensor([ids[:-1]])).logits[0]
    nats = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(ids[1:]))
    assert figures.tokens == 60
    assert figures.perplexity == pytest.approx(float(nats.exp()), rel=1e-4)  # float32 on both sides


def test_a_pack_is_evaluated_like_any_model(text_file, tmp_path):
    """The native engine's bf16 and 8-bit weights and activations cost a little; random weights hide nothing."""
    from fewfire.quantize import pack

    model = tiny_hub.make("qwen3_moe", vocab_size=VOCAB, num_attention_heads=2, num_key_value_heads=1)
    TOKENIZER.save(tiny_hub.save(model, tmp_path / "hub"))
    expected = fewfire.load(tmp_path / "hub").evaluate(text_file, context=32)
    pack(tmp_path / "hub", tmp_path / "q8", quant="q8")
    quantized = fewfire.load(tmp_path / "q8").evaluate(text_file, context=32)
    assert quantized.tokens == expected.tokens and quantized.num_bytes == expected.num_bytes
    assert quantized.perplexity == pytest.approx(expected.perplexity, rel=0.05)
    assert quantized.perplexity != expected.perplexity


def test_texts_stand_alone_and_padding_changes_nothing(folder, tmp_path):
    texts = [TEXT[:200], "short", TEXT[50:90], "é"]
    model = fewfire.load(folder)
    parts = [write_lines(tmp_path / f"{i}.jsonl", {"text": text}) for i, text in enumerate(texts[:3])]
    alone = [model.evaluate(part) for part in parts]
    together = model.evaluate(write_lines(tmp_path / "all.jsonl", *({"text": text} for text in texts[:3])))
    assert together.tokens == sum(each.tokens for each in alone) and together.texts == 3
    nats = sum(math.log(each.perplexity) * each.tokens for each in alone)
    assert math.log(together.perplexity) * together.tokens == pytest.approx(nats, rel=1e-5)
    folders = model.evaluate(tmp_path, max_tokens=together.tokens)
    assert folders.tokens == together.tokens


def test_max_tokens_is_exact_and_bytes_follow(text_file):
    model = table_model(torch.zeros(VOCAB, VOCAB))
    ids = TOKENIZER.encode(TEXT)
    for most in (1, 2, 33, len(ids), len(ids) + 5):
        figures = model.evaluate(text_file, context=8, max_tokens=most)
        assert figures.tokens == min(most, len(ids))
        assert figures.num_bytes == sum(len(TOKENIZER.id_to_bytes(each)) for each in ids[:most])


def test_llama_cpp_windows_score_their_second_half(text_file):
    table = random_table()
    model = table_model(table)
    figures = model.evaluate(text_file, context=10, like="llama.cpp")
    ids, logs = TOKENIZER.encode(TEXT), table.double().log_softmax(-1)
    nats = []
    for start in range(0, len(ids) - 9, 10):
        chunk = ids[start : start + 10]
        nats += [-float(logs[chunk[j], chunk[j + 1]]) for j in range(5, 9)]
    assert figures.tokens == len(nats) and figures.perplexity == pytest.approx(
        math.exp(sum(nats) / len(nats)), rel=1e-5
    )
    assert model.evaluate(text_file, context=10, like="llama.cpp", max_tokens=11).tokens == 8


def test_llama_cpp_windows_begin_with_the_beginning_token():
    cut = Cut(6, 0, [0])
    windows = list(Windowing(context=6, like="llama.cpp").windows(list(range(1, 15)), [1.0] * 14, cut))
    assert [list(window.ids) for window in windows] == [[0, 1, 2, 3, 4, 5], [0, 7, 8, 9, 10, 11]]
    assert all(window.scored == 2 and window.num_bytes == 2 for window in windows)


# ------------------------------------------------------------------------------------------------------------ windows


def lm_eval_windows(tokens, prefix, size):
    """The rule as lm-eval states it, written out: (inputs, targets) of disjoint predictions."""
    yield [prefix, *tokens[: size - 1]], tokens[:size]
    done = min(size, len(tokens))
    while done < len(tokens):
        count = min(len(tokens) - done, size)
        end = done + count
        yield tokens[end - size - 1 : end - 1], tokens[end - count : end]
        done = end


@given(st.integers(1, 70), st.integers(1, 12))
def test_without_a_stride_windows_are_lm_evals(length, context):
    ids = list(range(1, length + 1))
    ours = Windowing(context=context).windows(ids, [1.0] * length, Cut(context, 0, []))
    theirs = [(inputs[: len(targets)] if i == 0 else inputs, targets)
              for i, (inputs, targets) in enumerate(lm_eval_windows(ids, 0, context))]  # fmt: skip
    assert [(list(window.ids[:-1]), list(window.ids[len(window.ids) - window.scored :])) for window in ours] == theirs


@given(st.integers(0, 70), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_every_token_is_a_target_once(length, context, stride, begins):
    stride = min(stride, context)
    ids = list(range(1, length + 1))
    cut = Cut(context, 0 if begins else None, [])
    windows = list(Windowing(context=context, stride=stride).windows(ids, [2.0] * length, cut))
    targets = [each for window in windows for each in window.ids[len(window.ids) - window.scored :]]
    assert targets == (ids if begins else ids[1:])
    assert sum(window.num_bytes for window in windows) == 2 * len(targets)
    for window in windows:
        assert 2 <= len(window.ids) <= context + 1 and list(window.ids) == sorted(window.ids)
    assert all(len(window.ids) == context + 1 for window in windows[1:])
    assert all(window.scored == stride for window in windows[1:-1])


def test_bytes_of_tokens_add_up_where_the_tokenizer_adds_spaces():
    text = "näive 日本"
    ids = TOKENIZER.encode(text)
    assert token_bytes(TOKENIZER, text, ids) == [len(TOKENIZER.id_to_bytes(each)) for each in ids]
    assert sum(token_bytes(TOKENIZER, "xx" + text, ids)) == pytest.approx(len(text.encode()) + 2)
    assert token_bytes(TOKENIZER, "", []) == []


# ---------------------------------------------------------------------------------------------------- multiple choice


def question_table() -> torch.Tensor:
    """'a' follows '?' most likely; 'b' less so; anything follows 'b' nearly surely as another 'b'."""
    a, b, mark = (TOKENIZER.encode(each)[0] for each in "ab?")
    table = torch.zeros(VOCAB, VOCAB)
    table[mark, a], table[mark, b], table[b, b] = 6.0, 5.0, 12.0
    return table


QUESTION = {"question": "?", "choices": ["?a", "?bbb"], "answer": 0}


def test_multiple_choice_by_hand(tmp_path):
    """Raw: 'a' wins by one nat. Per character: 'bbb' shares its cost among more of them."""
    logs = question_table().double().log_softmax(-1)
    a, b, mark = (TOKENIZER.encode(each)[0] for each in "ab?")
    joined = TOKENIZER.encode("?\nbbb")
    assert joined[-3:] == [b, b, b]  # no merges: the sums below are over single characters
    cost_a = -float(logs[mark, a])
    cost_b = -float(logs[mark, b] + 2 * logs[b, b])
    assert cost_a < cost_b and cost_b / 3 < cost_a
    lines = [
        {"question": "x\n", "choices": ["?a", "?bbb"], "answer": 0},
        {"question": "x\n", "choices": ["?a", "?bbb"], "answer": "?bbb"},
        {"question": "x\n", "choices": ["?bbb", "?a"], "answer": "B"},
    ]
    figures = table_model(question_table()).evaluate(write_lines(tmp_path / "q.jsonl", *lines))
    assert figures.accuracy == pytest.approx(2 / 3) and figures.accuracy_normalised == pytest.approx(1 / 3)
    first = -float(logs[TOKENIZER.encode("x\n")[-1], mark])
    nats = 2 * (first + cost_a) + first + cost_b
    assert figures.tokens == 2 + 4 + 2 and figures.texts == 3
    assert figures.perplexity == pytest.approx(math.exp(nats / 8), rel=1e-5)
    assert figures.num_bytes == 8 and figures.bits_per_byte == pytest.approx(nats / math.log(2) / 8, rel=1e-5)


def test_questions_and_choices_are_joined_by_one_space():
    assert join("What?", "This") == "What? This"
    assert join("What?\n", "This") == "What?\nThis" and join("What?", " This") == "What? This" and join("", "x") == "x"


def test_long_questions_lose_their_beginning(folder, tmp_path):
    model = fewfire.load(folder)
    lines = [{"question": TEXT, "choices": ["one of", "two"], "answer": 1}]
    figures = model.evaluate(write_lines(tmp_path / "q.jsonl", *lines))
    assert figures.accuracy in (0.0, 1.0) and figures.texts == 1
    with pytest.raises(ConfigError, match="context"):
        model.evaluate(tmp_path / "q.jsonl", context=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 2}, "place from 0 to 1"),
        ({"answer": True}, "place from 0 to 1"),
        ({"answer": "C"}, "letter"),
        ({"answer": None}, "answer"),
        ({"choices": ["one"]}, "two or more"),
        ({"choices": ["one", 2]}, "two or more"),
        ({"choices": ["one", ""]}, "empty"),
        ({"question": 3}, "no text under"),
        ({"prompt": "x"}, "both"),
    ],
)
def test_questions_that_are_none(change, message, tmp_path):
    path = write_lines(tmp_path / "q.jsonl", QUESTION, {**QUESTION, **change})
    with pytest.raises(FormatError, match=message) as caught:
        table_model(question_table()).evaluate(path)
    assert caught.value.record == "line 2" and caught.value.offset > 10


def test_questions_and_texts_are_not_mixed(tmp_path):
    write_lines(tmp_path / "a.jsonl", QUESTION)
    write_lines(tmp_path / "b.jsonl", {"text": "x y"})
    model = table_model(question_table())
    with pytest.raises(ConfigError, match="one by one"):
        model.evaluate(tmp_path)
    for options in ({"stride": 2}, {"like": "llama.cpp"}):
        with pytest.raises(ConfigError, match="leave"):
            model.evaluate(tmp_path / "a.jsonl", **options)
    with pytest.raises(ConfigError, match="no question"):
        model.evaluate(tmp_path / "a.jsonl", max_tokens=1)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_models_that_cannot_be_asked(text_file):
    with pytest.raises(ConfigError, match="tokenizer"):
        api.Model(Table(random_table())).evaluate(text_file)
    small = api.Model(Table(random_table()[:99, :99]), tokenizer=TOKENIZER)
    with pytest.raises(ConfigError, match="vocabulary of 99"):
        small.evaluate(text_file)
    broken = table_model(torch.full((VOCAB, VOCAB), math.nan))
    with pytest.raises(FewfireError, match="NaN"):
        broken.evaluate(text_file)
    impossible = torch.zeros(VOCAB, VOCAB)
    impossible[:, TOKENIZER.encode(TEXT)[1]] = -math.inf
    assert table_model(impossible).evaluate(text_file).perplexity == math.inf


def test_an_encoder_decoder_is_refused(text_file):
    from fewfire.model.build import build_model

    config = families.read_config(
        {
            "model_type": "switch_transformers", "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48,
            "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2, "num_experts": 4, "expert_capacity": 8,
            "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "decoder_start_token_id": 0,
        }
    )  # fmt: skip
    with torch.device("meta"):
        module = build_model(config)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        api.Model(module, tokenizer=TOKENIZER).evaluate(text_file)


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(word) for word in words])
    return caught.value.code


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (None, "missing.txt", ()),
        (b"", "empty.txt", ()),
        (b"a", "letter.txt", ()),
        (b"\0\1\2 binary", "binary.txt", ()),
        (b'{"body": "text"}\n', "field.jsonl", ()),
        (b'{"text": "fine"}\n{"text": 3}\n', "number.jsonl", ()),
        (b'{"text": "fine"}\nnot json\n', "broken.jsonl", ()),
        (b"\xff\xfe\n", "bytes.jsonl", ()),
        (b"[1]\n", "list.jsonl", ()),
        (b"", "empty.jsonl", ()),
        (TEXT.encode(), "text.txt", ("--context", 0)),
        (TEXT.encode(), "text.txt", ("--context", 10**6)),
        (TEXT.encode(), "text.txt", ("--stride", 65)),
        (TEXT.encode(), "text.txt", ("--stride", 0)),
        (TEXT.encode(), "text.txt", ("--max-tokens", 0)),
        (TEXT.encode(), "text.txt", ("--like", "gpt")),
        (TEXT.encode(), "text.txt", ("--like", "llama.cpp", "--stride", 4)),
        (TEXT.encode(), "text.txt", ("--like", "llama.cpp", "--max-tokens", 3)),
        (b"few words here", "short.txt", ("--like", "llama.cpp", "--context", 60)),
        (TEXT.encode(), "text.txt", ("--threads", 0)),
    ],
)
def test_mistakes_are_one_line_and_status_2(content, name, words, folder, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run("eval", folder, tmp_path / name, *words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_eval_prints_one_json_object(folder, text_file, tmp_path, capsys):
    assert run("eval", folder, text_file, "--context", 32, "--stride", 16, "--json") == 0
    out = json.loads(capsys.readouterr().out)
    expected = fewfire.load(folder).evaluate(text_file, context=32, stride=16)
    assert out["perplexity"] == pytest.approx(expected.perplexity) and out["tokens"] == expected.tokens
    assert out["bits_per_byte"] == pytest.approx(expected.bits_per_byte) and out["accuracy"] is None
    bits = math.log2(out["perplexity"]) * out["tokens"] / out["bytes"]
    assert out["bits_per_byte"] == pytest.approx(bits) and (out["context"], out["stride"]) == (32, 16)
    lines = write_lines(tmp_path / "q.jsonl", QUESTION, {**QUESTION, "answer": 1})
    assert run("eval", folder, lines, "--json") == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 0.5


def test_eval_prints_figures_for_people(folder, text_file, tmp_path, capsys, monkeypatch):
    from fewfire.cli import progress

    monkeypatch.setattr(progress.time, "perf_counter", iter(range(0, 10**6, 30)).__next__)
    assert run("eval", folder, text_file, "--max-tokens", 50, "--context", 16) == 0
    captured = capsys.readouterr()
    assert "perplexity " in captured.out and "bits per byte" in captured.out and "tokens         50" in captured.out
    assert "tokens/s" in captured.err and "perplexity" in captured.err
    assert run("eval", folder, write_lines(tmp_path / "q.jsonl", QUESTION)) == 0
    assert "accuracy" in capsys.readouterr().out


def test_a_tokenizer_without_beginning_or_end_skips_the_first_token(text_file):
    bare = Tokenizer.from_json(json.dumps(TOKENIZER.definition), {"eos_token": None, "bos_token": None})
    figures = api.Model(Table(torch.zeros(VOCAB, VOCAB)), tokenizer=bare).evaluate(text_file)
    ids = TOKENIZER.encode(TEXT)
    assert figures.tokens == len(ids) - 1
    assert figures.num_bytes == len(TEXT.encode()) - len(TOKENIZER.id_to_bytes(ids[0]))
