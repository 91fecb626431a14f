"""Whose routing a measured run follows: the model's own, or one that is laid over it.

Random weights do not route uniformly within one text: what attention adds to every token of it is much alike. Where the
planner's uniform routing is to be measured, it is drawn here; the router's arithmetic runs all the same. N tokens.
"""

from __future__ import annotations

from typing import Protocol

import torch

from fewfire.runtime.engine import NativeDecoder, Replay


class Source(Protocol):
    """Routing of the next tokens of a run, in order, made before the clock starts."""

    def take(self, num_tokens: int) -> Replay | None: ...


class Own:
    """The model's routers decide."""

    def take(self, num_tokens: int) -> None:
        return None


class Uniform:
    """Every expert is as likely as another for every token, whatever came before. Deterministic."""

    def __init__(self, module: NativeDecoder, seed: int = 0):
        self._routers = [moe.router for _, _, moe in module.config.moe_layers]
        self._draw = torch.Generator().manual_seed(seed)

    def take(self, num_tokens: int) -> Replay | None:
        if not self._routers or not num_tokens:
            return None
        ids_LNK = torch.stack(
            [
                torch.rand((num_tokens, router.num_experts), generator=self._draw).topk(router.top_k).indices
                for router in self._routers
            ]
        ).to(torch.int32)
        weights_LNK = torch.full(ids_LNK.shape, 1.0 / ids_LNK.shape[-1])
        return Replay(ids_LNK, weights_LNK)
