"""Perplexity of one GGUF file in fewfire and in llama.cpp: the same token ids, the same windows, the same targets.

`python benchmarks/perplexity_peer.py MODEL.gguf TEXT --peer PYTHON`, where PYTHON is an interpreter with
llama-cpp-python. Exit status 1 where the two differ by more than the bar.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from machine import describe

import fewfire
from fewfire.evaluate import CONVENTIONS, Windowing
from fewfire.evaluate.perplexity import score_windows
from fewfire.evaluate.windows import Cut, Window, token_bytes

BAR = 0.005


def main() -> int:
    options = parse()
    print(describe())
    model = fewfire.load(options.model, threads=options.threads, dtype=options.dtype)
    assert model.tokenizer is not None
    text = options.text.read_text(encoding="utf-8")
    ids = model.tokenizer.encode(text)
    cut = Cut.of(model.tokenizer, options.context)
    windows = cut_windows(ids, token_bytes(model.tokenizer, text, ids), cut, options)
    begin = time.perf_counter()
    ours = torch.cat([nats for _, nats in score_windows(model.module, windows)]).numpy()
    seconds = time.perf_counter() - begin
    peer = ask_peer(options, text, windows)
    if peer["ids"] != ids:
        same = sum(1 for _ in iter_same(peer["ids"], ids))
        print(f"token ids differ: {len(ids):,} and {len(peer['ids']):,}, the same up to number {same:,}")
    else:
        print(f"token ids of the whole text are the same: {len(ids):,}")
    theirs = numpy.array(peer["nats"])
    return report(options, windows, (ours, seconds), (theirs, peer["seconds"]), peer["version"], main_dtype(model))


def parse() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--peer", type=Path, required=True, help="a Python interpreter with llama-cpp-python")
    parser.add_argument("--tokens", type=int, default=20_000, help="targets at most")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--like", choices=CONVENTIONS, default="lm-eval")
    parser.add_argument("--dtype", help="f32, bf16 or fp16 on our side (default: as fewfire loads the file)")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def cut_windows(ids: list[int], num_bytes: list[float], cut: Cut, options: Any) -> list[Window]:
    """The windows of the text, up to `--tokens` targets."""
    windowing = Windowing(context=options.context, like=options.like)
    chosen: list[Window] = []
    for window in windowing.windows(ids, num_bytes, cut):
        if sum(each.scored for each in chosen) + window.scored > options.tokens:
            break
        chosen.append(window)
    return chosen


def ask_peer(options: Any, text: str, windows: list[Window]) -> dict[str, Any]:
    """What perplexity_llama_cpp.py answers."""
    question = {
        "model": str(options.model),
        "text": text,
        "context": options.context,
        "threads": options.threads,
        "windows": [[list(window.ids), window.scored] for window in windows],
    }
    script = Path(__file__).with_name("perplexity_llama_cpp.py")
    done = subprocess.run(
        [options.peer, script], input=json.dumps(question), capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"llama.cpp's side failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def iter_same(left: list[int], right: list[int]) -> Any:
    for a, b in zip(left, right):
        if a != b:
            return
        yield a


def main_dtype(model: fewfire.Model) -> str:
    sizes: dict[str, int] = {}
    for parameter in model.module.parameters():
        name = str(parameter.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + parameter.numel()
    return max(sizes, key=lambda name: sizes[name])


def report(options: Any, windows: list[Window], ours: Any, theirs: Any, version: str, dtype: str) -> int:
    """Print both sides and their ratio with its standard error; the exit status."""
    num_bytes = sum(window.num_bytes for window in windows)
    print(f"{options.like} windows of {options.context} tokens: {len(windows)}, {len(ours[0]):,} targets")
    for name, (nats, seconds) in {f"fewfire ({dtype})": ours, f"llama.cpp (binding {version})": theirs}.items():
        bits = nats.sum() / math.log(2) / num_bytes
        print(
            f"  {name:32} perplexity {math.exp(nats.mean()):.4f}  bits per byte {bits:.4f}  "
            f"{len(nats) / seconds:,.0f} tokens/s"
        )
    difference = ours[0] - theirs[0]
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    ratio = math.expm1(difference.mean())
    print(
        f"  fewfire / llama.cpp - 1 = {100 * ratio:+.3f} % +- {100 * error:.3f} (bar {100 * BAR:.1f} %); "
        f"largest difference of one token {abs(difference).max():.3f} nats"
    )
    return int(abs(ratio) > BAR)


if __name__ == "__main__":
    sys.exit(main())
