"""Text in, text out: streams that add up, stop strings, the two verbs, and what they say when something is wrong."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_hub
import torch

import fewfire
from fewfire import api
from fewfire.cli import main as cli
from fewfire.errors import ConfigError
from fewfire.tokenizer import train_bpe

TEXT = "A router sends each token to a few experts - näive, 日本語, 🙂🙃 and back.\n" * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    tokenizer = train_bpe([TEXT], 300)
    model = tiny_hub.make("olmoe", vocab_size=tokenizer.vocab_size, max_position_embeddings=256)
    folder = tiny_hub.save(model, tmp_path_factory.mktemp("model"))
    tokenizer.save(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_token_id]}))
    return folder


@pytest.fixture(scope="module")
def model(folder) -> api.Model:
    return fewfire.load(folder)


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(word) for word in words])
    return caught.value.code


# --------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("seed", range(6))
def test_streamed_pieces_add_up_and_break_no_character(model, seed):
    options = {"max_tokens": 60, "temperature": 1.5, "seed": seed}
    whole = model.generate("A router", **options)
    stream = model.stream("A router", **options)
    pieces = list(stream)
    assert "".join(pieces) == whole.text == model.tokenizer.decode(whole.token_ids)
    assert stream.result().token_ids == whole.token_ids and all(pieces) and len(pieces) > 5
    assert len(whole.token_ids) == 60 or whole.token_ids[-1] in model.eos_ids
    valid = [piece for piece in pieces if "\ufffd" not in piece]
    assert all(piece.encode() for piece in valid)


class Script:
    """Stands in for a generation: gives the tokens of a text, whatever the model thinks."""

    def __init__(self, model, text):
        self.tokens, self.eos_ids, self.stopped = iter(model.tokenizer.encode(text)), frozenset(), False

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.tokens)

    def stop(self):
        self.stopped = True
        self.tokens = iter(())


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (("experts",), "A router sends each token to a few "),
        (("few experts - n", "zzz"), "A router sends each token to a "),
        (("each", "sends"), "A router "),
        (("日本",), "A router sends each token to a few experts - näive, "),
        (("A",), ""),
        (("few expects", "backs"), TEXT),
        (("\n",), TEXT[: TEXT.index("\n")]),
        ((TEXT + "x",), TEXT),
    ],
)
def test_stop_strings_span_tokens_and_stay_out_of_the_text(model, stops, expected):
    stream = api.Stream(model, Script(model, TEXT), stops)
    pieces = list(stream)
    assert "".join(pieces) == stream.text == expected
    assert stream.generation.stopped == (expected != TEXT)
    for stop in stops:
        assert stop not in stream.text


def test_a_stop_string_ends_a_real_generation(model):
    text = model.generate("A router", max_tokens=30).text
    stop = text[8:11]
    stopped = model.generate("A router", max_tokens=30, stop=stop)
    assert stopped.text == text[: text.index(stop)] and stopped.finish_reason == "stop"
    assert len(stopped.token_ids) < 30


def test_every_end_token_ends_the_text(folder, model):
    free = model.generate("A router", max_tokens=12)
    for end in free.token_ids[3], free.token_ids[5]:
        ending = api.Model(model.module, tokenizer=model.tokenizer, eos_ids=(290, end))
        ended = ending.generate("A router", max_tokens=12)
        assert ended.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
        assert ended.finish_reason == "stop" and ended.text == model.tokenizer.decode(ended.token_ids[:-1])


def test_control_tokens_in_a_prompt_stay_text(model):
    assert model.tokenizer.eos_token_id not in model.encode("a <|endoftext|> b")
    assert model.encode([1, 2]) == [1, 2]


def test_logits_and_their_refusals(model):
    ids = [[1, 2, 3], [4, 5, 6]]
    logits = model.logits(ids)
    assert logits.dtype == torch.float32 and logits.shape == (2, 3, model.config.vocab_size)
    for bad, message in [([1, 2], "shape"), ([[1], [2, 3]], "rectangle"), ([["a"]], "rectangle"), ([[-1]], "from -1")]:
        with pytest.raises(ConfigError, match=message):
            model.logits(bad)
    with pytest.raises(ConfigError, match="encoder-decoder only"):
        model.logits(ids, decoder_ids_BT=ids)


def test_a_model_without_tokenizer_takes_ids(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    bare = fewfire.load(tmp_path)
    assert bare.tokenizer is None and bare.eos_ids == bare.config.eos_token_ids
    assert len(bare.generate([1, 2], max_tokens=4).token_ids) == 4
    for options in ({"prompt": "text"}, {"prompt": [1], "stop": "x"}):
        with pytest.raises(ConfigError, match="tokenizer"):
            bare.generate(**options)


def test_senseless_options_are_refused(model):
    for options, message in [
        ({"temperture": 1}, "temperture.*temperature"),
        ({"stop": ["a", ""]}, "empty"),
        ({"context": 5}, "tokens, the context holds 5"),
        ({"memory": "8GiB"}, "memory"),
    ]:
        with pytest.raises(ConfigError, match=message):
            model.generate(TEXT[:60], **options)
    with pytest.raises(TypeError):
        fewfire.load("x", memories="8GiB")


def test_names_that_are_no_model(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    for name, message in [
        (tmp_path / "absent", "no folder"),
        (tmp_path / "file", "is a file"),
        (tmp_path, "config.json"),
    ]:
        with pytest.raises(ConfigError, match=message):
            fewfire.load(name)
    with pytest.raises(ConfigError, match="threads"):
        fewfire.load(tmp_path, threads=0)
    with pytest.raises(ConfigError, match="expected one of f32, bf16, fp16"):
        fewfire.load(tmp_path, dtype="q9")


def test_the_folder_of_a_training_run_is_a_model(folder, tmp_path):
    (tmp_path / "model").symlink_to(folder)
    assert api.locate(tmp_path) == tmp_path / "model"


# ------------------------------------------------------------------------------------------------------ command line


def test_generate_prints_one_json_object(folder, model, capsys):
    assert run("generate", folder, "--prompt", "A router", "--max-tokens", 9, "--json") == 0
    out = json.loads(capsys.readouterr().out)
    expected = model.generate("A router", max_tokens=9)
    assert out["text"] == expected.text and out["token_ids"] == expected.token_ids
    assert out["prompt_tokens"] == expected.prompt_tokens and out["finish_reason"] == expected.finish_reason
    assert out["invariant"] is False and out["invariant_reason"]
    assert out["prefill_tokens_per_s"] > 0 and out["decode_tokens_per_s"] > 0
    assert isinstance(out["peak_rss_bytes"], int) and "predicted_decode_tokens_per_s" in out
    moe_layers, top_k = 2, 2
    assert {
        key: out["experts"][key] for key in ("budget_bytes", "hit_rate", "hits", "misses", "bytes_read", "stall_s")
    } == {
        "budget_bytes": 2 * 4 * 3 * 32 * 48 * 4,
        "hit_rate": 1.0,
        "hits": expected.experts.hits,
        "misses": 0,
        "bytes_read": 0,
        "stall_s": 0.0,
    }
    assert expected.experts.hits >= moe_layers * top_k * 9


def test_generate_streams_text_to_stdout_and_speeds_to_stderr(folder, model, capsys):
    words = ("--max-tokens", 20, "--temperature", 0.9, "--seed", 4, "--top-k", 40, "--top-p", 0.9, "--min-p", 0.01)
    assert run("generate", folder, "--prompt", "A router", "--repetition-penalty", 1.1, *words) == 0
    captured = capsys.readouterr()
    expected = model.generate(
        "A router", max_tokens=20, temperature=0.9, seed=4, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.1
    )
    assert captured.out == expected.text + "\n"
    assert "prompt tokens at" in captured.err and "seed 4" in captured.err and captured.err.count("\n") == 1


def test_a_prompt_from_stdin(folder, model, capsys, monkeypatch):
    for content, status in [(b"A router", 0), (b"\xff", 2)]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert run("generate", folder, "--prompt", "-", "--max-tokens", 3) == status
    assert model.generate("A router", max_tokens=3).text in capsys.readouterr().out


def test_an_interrupt_ends_the_line_and_says_so(folder, capsys, monkeypatch):
    push, calls = api.StreamDecoder.push, []

    def interrupted(self, token):
        calls.append(token)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return push(self, token)

    monkeypatch.setattr(api.StreamDecoder, "push", interrupted)
    assert run("generate", folder, "--prompt", "A router", "--max-tokens", 30) == 130
    captured = capsys.readouterr()
    assert captured.out.endswith("\n") and "interrupted" in captured.err


def test_export_verb(folder, tmp_path, capsys):
    assert run("export", folder, tmp_path / "out", "--to", "hf", "--dtype", "bf16", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert "model.safetensors" in said["files"] and "tokenizer.json" in said["files"]
    assert said["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert fewfire.load(tmp_path / "out").generate("A", max_tokens=2).token_ids
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.encode(TEXT) == fewfire.load(folder).tokenizer.encode(TEXT)


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "nowhere", "--prompt", "x"),
        ("generate", "FOLDER"),
        ("generate", "FOLDER", "--prompt", ""),
        ("generate", "FOLDER", "--prompt", "x", "--temperature", "-1"),
        ("generate", "FOLDER", "--prompt", "x", "--top-k", "0"),
        ("generate", "FOLDER", "--prompt", "x", "--top-p", "2"),
        ("generate", "FOLDER", "--prompt", "x", "--min-p", "1"),
        ("generate", "FOLDER", "--prompt", "x", "--seed", "-4"),
        ("generate", "FOLDER", "--prompt", "x", "--context", "100000"),
        ("generate", "FOLDER", "--prompt", "x", "--max-tokens", "-1"),
        ("generate", "FOLDER", "--prompt", "x", "--stop", ""),
        ("generate", "FOLDER", "--prompt", "x", "--threads", "0"),
        ("generate", "FOLDER", "--prompt", "x", "--memory-limit", "1"),
        ("export", "FOLDER", "FOLDER", "--to", "hf"),
        ("export", "FOLDER", "OUT", "--to", "zip"),
        ("export", "FOLDER", "OUT"),
        ("export", "FOLDER", "OUT", "--to", "hf", "--dtype", "int9"),
    ],
)
def test_mistakes_are_one_line_and_status_2(words, folder, tmp_path, capsys):
    replaced = [str({"FOLDER": folder, "OUT": tmp_path / "out"}.get(word, word)) for word in words]
    assert run(*replaced) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_asking_for_help_does_not_load_torch():
    code = "import sys\nfrom fewfire.cli.main import main\ntry: main(['generate', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--max-tokens" in done.stdout, done.stderr


def test_several_texts_are_no_prompt(model):
    with pytest.raises(ConfigError, match="not a list of str"):
        model.generate(["one", "two"])
