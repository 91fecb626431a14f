"""The order of training, fixed by a seed, and evaluation in order. Knows no torch.

B windows a batch, L = seq_len; a window is L inputs and, one token on, L targets: L + 1 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fewfire.data.shards import TokenShards
from fewfire.errors import ConfigError


class Batches:
    """An endless iterator of int64 arrays (B, L + 1), resumable to the exact token.

    Each epoch cuts the run of tokens into windows from a random phase, so that every target is in one window, and
    goes through them in a random permutation. Both depend on (seed, epoch) alone, not on the batch size or the number
    of ranks. A batch may span two epochs: nothing is dropped. With `num_ranks` > 1, each rank takes its own B windows
    of a global batch of B * num_ranks; the state is the same on every rank.

    Raises: ConfigError where the tokens do not fill one window.
    """

    def __init__(
        self, shards: TokenShards, *, seq_len: int, batch_size: int, seed: int, rank: int = 0, num_ranks: int = 1
    ):
        for name, value in (("seq_len", seq_len), ("batch_size", batch_size), ("num_ranks", num_ranks)):
            if value < 1:
                raise ConfigError(f"{name} ({value}) must be at least 1")
        if not 0 <= rank < num_ranks:
            raise ConfigError(f"rank ({rank}) must be at least 0 and below num_ranks ({num_ranks})")
        if shards.num_tokens < seq_len + 1:
            raise ConfigError(
                f"the corpus has {shards.num_tokens} tokens, one sequence needs {seq_len + 1} (seq_len {seq_len} and "
                "the token after it); shorten seq_len or add text"
            )
        self.shards, self.seq_len, self.batch_size, self.seed = shards, seq_len, batch_size, seed
        self.rank, self.num_ranks = rank, num_ranks
        self.epoch = self.index = 0  # index: windows of this epoch that all ranks together have taken
        self._order, self._phase = self._draw(0)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> np.ndarray:
        """The next (B, L + 1) of this rank."""
        rows = np.empty((self.batch_size, self.seq_len + 1), dtype=np.int64)
        for number in range(self.batch_size * self.num_ranks):
            if self.index == len(self._order):
                self.epoch, self.index = self.epoch + 1, 0
                self._order, self._phase = self._draw(self.epoch)
            if number // self.batch_size == self.rank:
                start = self._phase + int(self._order[self.index]) * self.seq_len
                rows[number % self.batch_size] = self.shards.read(start, start + self.seq_len + 1)
            self.index += 1
        return rows

    @property
    def epoch_tokens(self) -> int:
        """Targets of the current epoch."""
        return len(self._order) * self.seq_len

    def _draw(self, epoch: int) -> tuple[np.ndarray, int]:
        """(order of windows, phase) of an epoch. The phase leaves room for at least one window."""
        generator = np.random.Generator(np.random.Philox(key=self.seed % 2**64, counter=[0, 0, 0, epoch]))
        spare = self.shards.num_tokens - 1
        phase = int(generator.integers(min(self.seq_len, spare - self.seq_len + 1)))
        return generator.permutation((spare - phase) // self.seq_len), phase

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch starts. Plain numbers and text, the same on every rank."""
        return {
            "epoch": self.epoch,
            "index": self.index,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "num_tokens": self.shards.num_tokens,
            "checksum": self.shards.checksum,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`. The batch size and the number of ranks may differ; the windows come in the same order.

        Raises: ConfigError where the state is of other tokens, another seed or another seq_len.
        """
        own = self.state_dict()
        missing = [key for key in own if key not in state]
        if missing:
            raise ConfigError(f"the saved data position lacks {', '.join(missing)}; restore the checkpoint")
        for key in ("seed", "seq_len", "num_tokens", "checksum"):
            if state[key] != own[key]:
                raise ConfigError(
                    f"the saved data position has {key} {state[key]}, this run {own[key]}; "
                    "go on with the same data settings, or start anew in another folder"
                )
        order, phase = self._draw(int(state["epoch"]))
        if not 0 <= int(state["index"]) <= len(order):
            raise ConfigError(f"the saved data position is window {state['index']} of {len(order)}; start anew")
        self.epoch, self.index = int(state["epoch"]), int(state["index"])
        self._order, self._phase = order, phase


class EvaluationWindow(NamedTuple):
    """`tokens_L1` int64 (at most L + 1,): inputs [:-1], targets [1:]. `num_bytes`: text that the targets stand for."""

    tokens_L1: np.ndarray
    num_bytes: int


class EvaluationBatch(NamedTuple):
    """`tokens_BL` int64 (B, L + 1), `mask_BL` bool (B, L): targets that count. `num_bytes` as in a window."""

    tokens_BL: np.ndarray
    mask_BL: np.ndarray
    num_bytes: int


def evaluation_windows(shards: TokenShards, seq_len: int) -> Iterator[EvaluationWindow]:
    """All of `shards` in order: every token is a target exactly once, the very first after an end token.

    The last window may be shorter. Bytes add up to `shards.text_bytes`.
    """
    if seq_len < 1:
        raise ConfigError(f"seq_len ({seq_len}) must be at least 1")
    for start in range(0, shards.num_tokens, seq_len):
        stop = min(start + seq_len, shards.num_tokens)
        tokens = shards.read(max(start - 1, 0), stop)
        if start == 0:
            tokens = np.concatenate([[shards.eos_token_id], tokens])
        yield EvaluationWindow(tokens, shards.count_bytes(start, stop))


def evaluation_batches(shards: TokenShards, *, seq_len: int, batch_size: int) -> Iterator[EvaluationBatch]:
    """`evaluation_windows` in batches; a short last window is filled up with end tokens that the mask leaves out."""
    windows: list[EvaluationWindow] = []
    for window in evaluation_windows(shards, seq_len):
        windows.append(window)
        if len(windows) == batch_size:
            yield _stack(windows, seq_len, shards.eos_token_id)
            windows = []
    if windows:
        yield _stack(windows, seq_len, shards.eos_token_id)


def _stack(windows: list[EvaluationWindow], seq_len: int, fill: int) -> EvaluationBatch:
    tokens = np.full((len(windows), seq_len + 1), fill, dtype=np.int64)
    mask = np.zeros((len(windows), seq_len), dtype=bool)
    for row, window in enumerate(windows):
        tokens[row, : len(window.tokens_L1)] = window.tokens_L1
        mask[row, : len(window.tokens_L1) - 1] = True
    return EvaluationBatch(tokens, mask, sum(window.num_bytes for window in windows))
