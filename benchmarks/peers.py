"""The same random shape on fewfire, llama.cpp and transformers, interleaved, with memory bandwidth probed in between.

`python benchmarks/peers.py olmoe-1b-7b FOLDER [--layers N] [--llama-bench PATH] [--llama-cpp-python] [--transformers]`
Makes NAME as a pack (experts q4, trunk q4, head q8) and as a GGUF (Q4_0, head Q6_K as llama.cpp's own files have it)
unless they are there already. A round whose probes differ by more than 10 % is repeated, up to twice. Prints medians,
their spread, and ratios to fewfire; `--json OUT` keeps all. Needs `gguf`; peers are optional.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import random_gguf
from machine import describe

from fewfire.bench import DRIFT
from fewfire.checkpoints.pack import is_pack
from fewfire.families import published
from fewfire.kernels.probe import read_bytes_per_s
from fewfire.quantize import initialise

Speeds = dict[str, float]  # prefill, decode, in tokens/s, and what else a peer says
WAIT_S = 1800


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--type", default="Q4_0", help="of the GGUF's matrices")
    parser.add_argument("--head", default="Q6_K", help="of its output matrix")
    parser.add_argument("--trunk", default="q4", help="of the pack; the default pack has q8")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-bench", action="append", default=[], metavar="PATH", help="a binary; may be repeated")
    parser.add_argument("--llama-bench-options", default="", help="passed on to it, as one word")
    parser.add_argument("--llama-cpp-python", action="store_true", help="the installed package llama_cpp")
    parser.add_argument("--transformers", action="store_true", help="in bf16, eager, random weights in memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(WORKERS[options.worker](options)))
        return
    print(describe(), flush=True)
    pack, gguf = make_models(options)
    runners = {"fewfire": lambda: run_fewfire(pack, options)}
    for number, binary in enumerate(options.llama_bench):
        label = "llama-bench" if number == 0 else f"llama-bench {number + 1}"
        runners[label] = lambda binary=binary: run_llama_bench(binary, gguf, options)
    if options.llama_cpp_python:
        runners["llama-cpp-python"] = lambda: run_worker("llama_cpp", options)
    if options.transformers:
        runners["transformers"] = lambda: run_worker("transformers", options)
    rounds = [run_round(runners, number, options) for number in range(options.rounds)]
    result = {"machine": describe(), "name": options.name, "layers": options.layers, "rounds": rounds}
    result["pack_bytes"] = sum(path.stat().st_size for path in pack.iterdir())
    result["gguf_bytes"] = gguf.stat().st_size if gguf.exists() else None
    result["summary"] = summarise(rounds)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    show(result)


def paths(options: argparse.Namespace) -> tuple[Path, Path]:
    label = options.name if options.layers is None else f"{options.name}-{options.layers}"
    folder: Path = options.folder
    return folder / f"{label}-{options.trunk}", folder / f"{label}-{options.type}.gguf"


def make_models(options: argparse.Namespace) -> tuple[Path, Path]:
    """The pack and the GGUF, made where they are not there."""
    pack, gguf = paths(options)
    pack.parent.mkdir(parents=True, exist_ok=True)
    if not is_pack(pack):
        initialise(options.name, pack, layers=options.layers, experts="q4", trunk=options.trunk, head="q8")
    if (options.llama_bench or options.llama_cpp_python) and not gguf.exists():
        part = gguf.with_suffix(".part")
        random_gguf.write(options.name, part, options.type, options.head, options.layers)
        part.replace(gguf)
    return pack, gguf


def run_round(runners: dict[str, Callable[[], Speeds]], number: int, options: argparse.Namespace) -> dict[str, Any]:
    """Every system once, in an order that turns from round to round, each between two probes."""
    names = list(runners)
    order = names[number % len(names) :] + names[: number % len(names)]
    made: dict[str, Any] = {}
    for name in order:
        for attempt in range(3):
            before = read_bytes_per_s(options.threads, seconds=0.5)
            speeds = runners[name]()
            after = read_bytes_per_s(options.threads, seconds=0.5)
            bandwidth = (before + after) / 2
            drift = abs(after - before) / bandwidth
            made[name] = {**speeds, "ram_read_bytes_per_s": bandwidth, "drift": drift, "attempt": attempt}
            if drift <= DRIFT:
                break
        shown = made[name]
        print(
            f"round {number + 1}, {name}: prefill {shown['prefill']:.1f}, decode {shown['decode']:.1f} tok/s; "
            f"{shown['ram_read_bytes_per_s'] / 1e9:.1f} GB/s, drift {100 * shown['drift']:.0f} %",
            flush=True,
        )
    return made


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_S)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def run_fewfire(pack: Path, options: argparse.Namespace) -> Speeds:
    command = [sys.executable, "-m", "fewfire", "bench", str(pack), "--json", "--threads", str(options.threads)]
    sizes = ["--prompt-tokens", str(options.prompt_tokens), "--new-tokens", str(options.new_tokens)]
    made = json.loads(_run([*command, *sizes]))
    return {
        "prefill": made["prefill_tokens_per_s"],
        "decode": made["decode_tokens_per_s"],
        "bytes_per_token": made["bytes_per_token"],
        "bandwidth_share": made["bandwidth_share"],
        "compute_share": made["compute_share"],
        "peak_rss_bytes": made["peak_rss_bytes"],
        "predicted_prefill": made["predicted_prefill_tokens_per_s"],
        "predicted_decode": made["predicted_decode_tokens_per_s"],
    }


def run_llama_bench(binary: str, gguf: Path, options: argparse.Namespace) -> Speeds:
    command = [binary, "-m", str(gguf), "-t", str(options.threads), "-r", "1", "-o", "json"]
    sizes = ["-p", str(options.prompt_tokens), "-n", str(options.new_tokens)]
    rows = json.loads(_run([*command, *sizes, *options.llama_bench_options.split()]))
    return {
        "prefill": next(row["avg_ts"] for row in rows if row["n_gen"] == 0),
        "decode": next(row["avg_ts"] for row in rows if row["n_prompt"] == 0),
    }


def run_worker(name: str, options: argparse.Namespace) -> Speeds:
    """A peer that is a Python package, in a process of its own."""
    words = [options.name, str(options.folder), "--worker", name, "--threads", str(options.threads)]
    words += ["--prompt-tokens", str(options.prompt_tokens), "--new-tokens", str(options.new_tokens)]
    words += ["--type", options.type, "--trunk", options.trunk]
    words += [] if options.layers is None else ["--layers", str(options.layers)]
    made: Speeds = json.loads(_run([sys.executable, str(Path(__file__)), *words]).splitlines()[-1])
    return made


def work_llama_cpp(options: argparse.Namespace) -> Speeds:
    import random

    from llama_cpp import Llama

    longest = max(options.prompt_tokens, options.new_tokens + 1)
    threads = options.threads
    model = Llama(
        str(paths(options)[1]), n_ctx=longest, n_threads=threads, n_threads_batch=threads, verbose=False,
        n_batch=options.prompt_tokens,
    )  # fmt: skip
    ids = [random.Random(0).randrange(256, model.n_vocab()) for _ in range(longest)]
    model.eval(ids[:8])
    model.reset()
    start = time.perf_counter()
    model.eval(ids[: options.prompt_tokens])
    prefill_s = time.perf_counter() - start
    model.reset()
    model.eval(ids[:1])
    start = time.perf_counter()
    for token in ids[1 : options.new_tokens + 1]:
        model.eval([token])
    return _speeds(options, prefill_s, time.perf_counter() - start)


def work_transformers(options: argparse.Namespace) -> Speeds:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    document = published.hub_config(options.name)
    if options.layers is not None:
        document = {**document, "num_hidden_layers": options.layers}
    config = AutoConfig.for_model(**document)
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    longest = max(options.prompt_tokens, options.new_tokens + 1)
    ids = torch.randint(0, config.vocab_size, (1, longest), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(ids[:, :8])
        start = time.perf_counter()
        model(ids[:, : options.prompt_tokens], logits_to_keep=1)
        prefill_s = time.perf_counter() - start
        cache = model(ids[:, :1], use_cache=True).past_key_values
        start = time.perf_counter()
        for at in range(1, options.new_tokens + 1):
            cache = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).past_key_values
        return _speeds(options, prefill_s, time.perf_counter() - start)


def _speeds(options: argparse.Namespace, prefill_s: float, decode_s: float) -> Speeds:
    return {"prefill": options.prompt_tokens / prefill_s, "decode": options.new_tokens / decode_s}


WORKERS = {"llama_cpp": work_llama_cpp, "transformers": work_transformers}


def summarise(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and spread of each system; ratios of fewfire to each, of the same round."""
    made: dict[str, Any] = {}
    for name in rounds[0]:
        made[name] = {}
        for part in ("prefill", "decode"):
            speeds = [each[name][part] for each in rounds]
            ratios = [each["fewfire"][part] / each[name][part] for each in rounds]
            made[name][part] = {
                "median": statistics.median(speeds), "least": min(speeds), "most": max(speeds),
                "fewfire_over_it": statistics.median(ratios), "ratio_least": min(ratios), "ratio_most": max(ratios),
            }  # fmt: skip
    return made


def show(result: dict[str, Any]) -> None:
    print(f"\npack {result['pack_bytes'] / 1e9:.2f} GB, GGUF {(result['gguf_bytes'] or 0) / 1e9:.2f} GB")
    print("\n| system | prefill tok/s | fewfire ÷ it | decode tok/s | fewfire ÷ it |")
    print("|---|--:|--:|--:|--:|")
    for name, parts in result["summary"].items():
        cells = []
        for part in ("prefill", "decode"):
            each = parts[part]
            cells.append(f"{each['median']:.1f} ({each['least']:.1f} to {each['most']:.1f})")
            cells.append(f"{each['fewfire_over_it']:.2f} ({each['ratio_least']:.2f} to {each['ratio_most']:.2f})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
