"""Loading a checkpoint beside reading its bytes, cold and from the page cache, interleaved in one run.

Prints seconds of both, the median ratio with its spread, and peak memory above the resident model. Bars: at most 1.3
times as long, at most 1 GB more. Reading keeps what it read, as loading does: making memory costs more than reading.
Before timing, every tensor is compared with what the safetensors library reads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import describe
from safetensors import safe_open

from fewfire.checkpoints.hub import open_hub, save_hub
from fewfire.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
    RouterConfig,
)
from fewfire.model.build import build_model
from fewfire.runtime.load import load_module

LAYER_BYTES = 622_000_000


def config(num_layers: int) -> ModelConfig:
    """A qwen3_moe of 64 experts a layer, in bf16: one hub tensor an expert and matrix."""
    attention = AttentionConfig(16, 4, 128, 128**-0.5, RopeConfig(1e6, 128), qk_norm="head")
    router = RouterConfig(64, 8, "softmax", renormalize=True, scale=1.0, select_bias=False)
    layer = LayerConfig(attention, MoEConfig(router, FeedForwardConfig(768, "silu", True)))
    return ModelConfig("qwen3_moe", 50_000, 2048, (layer,) * num_layers, NormConfig("rms", 1e-6), False, 4096)


def write(folder: Path, num_layers: int) -> None:
    with torch.device("meta"):
        module = build_model(config(num_layers))
    module = module.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for values in module.parameters():
            values.uniform_(-0.05, 0.05)
    save_hub(module, folder, shard_bytes=1_500_000_000)


def check(folder: Path) -> None:
    """Raise unless every tensor that is written as one parameter, or one expert of it, holds the library's values."""
    checkpoint, state = open_hub(folder), load_module(folder).state_dict()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for tensor in checkpoint.table:
                if checkpoint.stored[tensor.name].parts[0].path == path:
                    (piece,) = tensor.pieces
                    ours = state[piece.ours] if piece.row is None else state[piece.ours][piece.row]
                    assert ours.equal(file.get_tensor(tensor.name)), tensor.name


def forget(files: list[Path]) -> None:
    """Drop the files from the page cache."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: list[Path]) -> float:
    begin, kept = time.perf_counter(), []
    for path in files:
        with open(path, "rb", buffering=0) as file:
            kept.append(file.read())
    return time.perf_counter() - begin


def load(folder: Path) -> float:
    begin = time.perf_counter()
    load_module(folder)
    return time.perf_counter() - begin


PEAK = """
import sys
import torch
from fewfire.plan.limits import peak_rss_bytes
from fewfire.runtime.load import load_module
module = load_module(sys.argv[1])
resident = sum(v.numel() * v.element_size() for v in module.state_dict().values())
print(peak_rss_bytes() - resident)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", help="where to write the checkpoint (default: a temporary folder)")
    options = parser.parse_args()
    print(describe())
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary) / "checkpoint"
        write(folder, max(1, round(options.gigabytes * 1e9 / LAYER_BYTES)))
        check(folder)
        files = sorted(folder.glob("*.safetensors"))
        print(f"checkpoint: {sum(path.stat().st_size for path in files) / 1e9:.2f} GB in {len(files)} files")
        for name in ("cold", "cached"):
            pairs = []
            for _ in range(options.pairs):
                times = []
                for run in (lambda: read(files), lambda: load(folder)):
                    if name == "cold":
                        forget(files)
                    times.append(run())
                pairs.append(times)
            ratios = sorted(loaded / plain for plain, loaded in pairs)
            plain, loaded = (statistics.median(each) for each in zip(*pairs))
            print(
                f"{name}: read {plain:.2f} s, load {loaded:.2f} s, ratio {statistics.median(ratios):.2f} "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f}; bar 1.30)"
            )
        above = subprocess.run([sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, check=True)
        print(f"peak memory above the model: {int(above.stdout) / 1e9:.2f} GB, Python and torch included (bar 1.00)")


if __name__ == "__main__":
    main()
