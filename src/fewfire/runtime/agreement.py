"""How far a lossy generation is from exact routing: the same tokens once more, exactly, and the logits compared.

V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewfire.runtime.engine import NativeDecoder
from fewfire.runtime.generate import Generation

MOST_POSITIONS = 64
_KEPT_BYTES, _COMPARED_BYTES = 2, 48  # a logit that is kept (float16), and one of the pair that is being compared


@dataclass(frozen=True)
class Agreement:
    """`modes` that were on. Over `positions` new tokens: the share whose most likely token is that of exact routing,
    and the mean of KL(exact || lossy) in nats; None where nothing could be compared."""

    modes: tuple[str, ...]
    agreement: float | None = None
    kl: float | None = None
    positions: int = 0


class LossyGeneration(Generation):
    """A generation of a model with lossy modes. Keeps logits of at most 64 new tokens, evenly spread, for `compare`.

    Raises, besides what `Generation` does: BudgetError where there is no memory for them.
    """

    def __init__(self, model: NativeDecoder, prompt_ids: Sequence[int], **options: Any):
        super().__init__(model, prompt_ids, **options)  # type: ignore[arg-type]
        assert model.lossy is not None
        self.native, self.modes = model, model.lossy.modes
        # The first token comes of the prompt, which only top-p routes otherwise.
        self._first, self._stride = 0 if model.lossy.top_p < 1 else 1, 1
        self._kept: dict[int, tuple[Tensor, int]] = {}  # by new token: float16 logits, and the most likely id
        self._agreement: Agreement | None = None
        self._taken_bytes = min(self.limits.max_tokens, MOST_POSITIONS) * _KEPT_BYTES * model.config.vocab_size
        try:
            model.account.take(self._taken_bytes, "logits that are compared with exact ones")
        except BaseException:
            self._taken_bytes = 0
            raise

    def __del__(self) -> None:
        self._release()

    def _release(self) -> None:
        self._kept = {}
        if getattr(self, "_taken_bytes", 0):
            self.native.account.give(self._taken_bytes)
            self._taken_bytes = 0

    def _step(self) -> Tensor:
        logits_V = super()._step()
        self._keep(self.measured.new_tokens, logits_V)
        return logits_V

    def _keep(self, index: int, logits_V: Tensor) -> None:
        """Every `stride`-th; a stride that fills the room is doubled."""
        if index < self._first or index % self._stride:
            return
        if len(self._kept) == MOST_POSITIONS:
            self._stride *= 2
            self._kept = {at: each for at, each in self._kept.items() if at % self._stride == 0}
            if index % self._stride:
                return
        self._kept[index] = logits_V.to(torch.float16), int(logits_V.argmax())

    @torch.inference_mode()
    def compare(self) -> Agreement:
        """Run prompt and new tokens exactly and compare; the generation ends here. The first call measures."""
        if self._agreement is not None:
            return self._agreement
        self._cache = None  # type: ignore[assignment]  # the exact run takes its memory
        model, compared = self.native, []
        ids = [*self._prompt_ids, *self.measured.token_ids]
        wanted = {len(self._prompt_ids) - 1 + index: kept for index, kept in self._kept.items()}
        end = max(wanted, default=-1) + 1
        with model.exactly(), model.account.lent(_COMPARED_BYTES * model.config.vocab_size, "exact logits"):
            cache, step = model.new_cache(), model.chunk_tokens
            for start in range(0, end, step):
                stop = min(start + step, end)
                hidden_1TD = model.hidden(torch.tensor([ids[start:stop]]), cache)
                for at in sorted(wanted.keys() & set(range(start, stop))):
                    compared.append(_compare(model.logits(hidden_1TD[:, at - start])[0], *wanted[at]))
        self._release()
        count = len(compared)
        agreement = sum(same for same, _ in compared) / count if count else None
        kl = sum(nats for _, nats in compared) / count if count else None
        self._agreement = Agreement(self.modes, agreement, kl, count)
        return self._agreement


def _compare(exact_V: Tensor, lossy_V: Tensor, lossy_id: int) -> tuple[bool, float]:
    """Whether the most likely token is the same, and KL(exact || lossy) of the two rounded alike (float16)."""
    exact_log_V = torch.log_softmax(exact_V.to(torch.float16).double(), dim=-1)
    lossy_log_V = torch.log_softmax(lossy_V.double(), dim=-1)
    nats = (exact_log_V.exp() * (exact_log_V - lossy_log_V)).sum()
    return int(exact_V.argmax()) == lossy_id, max(0.0, float(nats))
