"""What a format costs in quality: perplexity of several forms of one model on one text, and how near packs come to the
float32 forward of the very weights they hold.

python benchmarks/quality.py TEXT MODEL [MODEL ...] [--positions 10000] [--context 512]

The first MODEL is what the others are compared with: a checkpoint in hub layout, a pack or a GGUF file. All read the
token ids of its tokenizer. For packs that run natively: the share of positions with the same most likely token, KL, and
the median relative L2 error of logits, with the native engine's own routing and with the float32 forward's replayed.

N positions, K experts a token, L MoE layers, V vocabulary.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

import fewfire
from fewfire.plan.count import count
from fewfire.routing import Routing
from fewfire.runtime.engine import NativeDecoder, Replay
from fewfire.runtime.packed import load_packed_module
from fewfire.tokenizer import Tokenizer


@dataclass
class Nearness:
    """Sums over positions of a pack's native logits beside those of the float32 forward."""

    positions: int = 0
    same: int = 0
    kl: float = 0.0
    errors: tuple[Tensor, ...] = ()

    def add(self, ours_NV: Tensor, exact_NV: Tensor) -> None:
        log_ours, log_exact = log_softmax(ours_NV.double(), dim=-1), log_softmax(exact_NV.double(), dim=-1)
        self.positions += len(ours_NV)
        self.same += int((ours_NV.argmax(dim=-1) == exact_NV.argmax(dim=-1)).sum())
        self.kl += float((log_exact.exp() * (log_exact - log_ours)).sum())
        self.errors += ((ours_NV - exact_NV).norm(dim=-1) / exact_NV.norm(dim=-1),)

    def __str__(self) -> str:
        median = float(torch.cat(self.errors).median())
        top1, kl = 100 * self.same / self.positions, self.kl / self.positions
        return f"top-1 {top1:.2f} %, KL {kl:.5f}, median L2 error {median:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--positions", type=int, default=10_000)
    parser.add_argument("--context", type=int, default=512)
    options = parser.parse_args()
    print(describe())
    windows, first = [], None
    for path in options.models:
        model: Any = fewfire.load(path)
        if not windows:
            assert model.tokenizer is not None
            text = options.text.read_text(encoding="utf-8")
            windows = list(cut(model.tokenizer, text, options.positions, options.context))
        nats = mean_nats(model.module, windows)
        first = nats if first is None else first
        perplexity, change = torch.tensor(nats).exp().item(), 100 * torch.tensor(nats - first).expm1().item()
        print(f"{path.name:24} {bits_a_weight(path, model):6.3f} bits  perplexity {perplexity:.4f} ({change:+.2f} %)")
        if isinstance(model.module, NativeDecoder):
            exact: Any = load_packed_module(path, dtype=torch.float32)
            print(f"    own routing       {nearness(model.module, exact, windows, replay=False)}")
            if any(True for _ in model.module.config.moe_layers):
                print(f"    routing replayed  {nearness(model.module, exact, windows, replay=True)}")


def bits_a_weight(path: Path, model: Any) -> float:
    """Stored bits of weights over parameters; a GGUF file's metadata and a pack's padding included."""
    endings = (".safetensors", ".bin", ".gguf")
    files = [path] if path.is_file() else [each for each in path.iterdir() if each.suffix in endings]
    return 8 * sum(os.path.getsize(each) for each in files) / count(model.module.config).total


def cut(tokenizer: Tokenizer, text: str, positions: int, context: int) -> Iterator[Tensor]:
    """Windows of `context` + 1 ids, disjoint but for one, until `positions` of them are targets."""
    ids = torch.tensor(tokenizer.encode(text))
    while positions > 0 and len(ids) > context:
        yield ids[: min(positions, context) + 1]
        ids, positions = ids[context:], positions - context


@torch.inference_mode()
def mean_nats(module: Any, windows: list[Tensor]) -> float:
    total = sum(
        float(cross_entropy(module(each[None, :-1])[0].double(), each[1:], reduction="sum")) for each in windows
    )
    return total / sum(len(each) - 1 for each in windows)


@torch.inference_mode()
def nearness(native: NativeDecoder, exact: Any, windows: list[Tensor], *, replay: bool) -> Nearness:
    found = Nearness()
    for window in windows:
        routed: list[Routing] = []
        ids_1N = window[None, :-1]
        exact_NV = exact.logits(
            exact.hidden(ids_1N, observe=lambda layer, routing, routed=routed: routed.append(routing))
        )
        given = replay_of(routed) if replay else None
        found.add(native.logits(native.hidden(ids_1N, replay=given))[0], exact_NV[0])
    return found


def replay_of(routed: list[Routing]) -> Replay:
    ids_LNK = torch.stack([each.ids_TK for each in routed])
    return Replay(ids_LNK.to(torch.int32).contiguous(), torch.stack([each.weights_TK.float() for each in routed]))


if __name__ == "__main__":
    main()
