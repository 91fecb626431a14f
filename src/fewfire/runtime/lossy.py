"""Lossy modes: routing that leaves the exact one so as to wait less for the disk. Off unless asked for, never silent.

Owns what can be asked for, and the plain definitions of the rules that the native router follows
(native/router.cpp). Described in docs/lossy.md. T tokens, E experts, K chosen ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fewfire import kernels
from fewfire.config import MoEConfig, RouterConfig, check
from fewfire.model.router import keep_best_groups, weigh
from fewfire.routing import Routing


@dataclass(frozen=True)
class Lossy:
    """What may differ from exact results. The defaults are exact.

    `prefer_cached` (0 to 1): in decode, experts in memory gain this share of the mean range of the router's values, in
    selection only. `top_p`: a token keeps the fewest experts whose weights reach this share of their sum.
    `low_precision`: a pack of the same model in a smaller format, kept in memory whole; in decode its experts stand in
    for those that are still on disk.

    Raises: ConfigError for a share out of range.
    """

    prefer_cached: float = 0.0
    top_p: float = 1.0
    low_precision: str | Path | None = None

    def __post_init__(self) -> None:
        check(0 <= self.prefer_cached <= 1, f"prefer_cached ({self.prefer_cached}) must be between 0 and 1")
        check(0 < self.top_p <= 1, f"expert top_p ({self.top_p}) must be above 0, and 1 at most")

    @property
    def modes(self) -> tuple[str, ...]:
        """What is on, each as name=value; nothing where results are exact."""
        low = None if self.low_precision is None else f"low_precision={self.low_precision}"
        cached = f"prefer_cached={self.prefer_cached:g}" if self.prefer_cached > 0 else None
        kept = f"top_p={self.top_p:g}" if self.top_p < 1 else None
        return tuple(each for each in (cached, kept, low) if each is not None)

    def check_model(self, moes: list[MoEConfig]) -> None:
        """Raises: ConfigError where a mode means nothing for a model with these MoE layers."""
        check(bool(moes) or not self.modes, "lossy modes are for routed experts; this model has none")
        if self.prefer_cached > 0:
            rounds = any(moe.router.score == "sparsemixer" for moe in moes)
            check(not rounds, "prefer_cached has no meaning where experts are chosen in rounds (sparsemixer)")


# ------------------------------------------------------------------------------------------------- plain definitions


@dataclass
class MeanRange:
    """The mean over the tokens that one layer decoded of how far its selection values lie apart."""

    ranges: list[float] = field(default_factory=list)

    def add(self, value: float) -> float:
        self.ranges.append(value)
        return sum(self.ranges) / len(self.ranges)


def route_cached_first(
    logits_TE: Tensor,
    config: RouterConfig,
    cached_E: Tensor,
    prefer_cached: float,
    mean_range: MeanRange,
    select_bias_E: Tensor | None = None,
) -> Routing:
    """`model.router.route`, but experts of `cached_E` (bool) gain `prefer_cached` x the mean range in selection.

    The values compared are logits, or biased scores where a selection bias or groups need them. A token's best expert
    stays. Weights are the original ones of those chosen. `mean_range` grows by every token.
    Source: Skliar et al. 2024 (2412.00099), section 3, the cache prior with J = 1.
    """
    scores_TE = torch.sigmoid(logits_TE) if config.score.startswith("sigmoid") else torch.softmax(logits_TE, dim=-1)
    values_TE = logits_TE
    if select_bias_E is not None or config.groups is not None:
        selected_rule = config.score in ("softmax_selected", "sigmoid_selected")
        values_TE = logits_TE if selected_rule else scores_TE
        values_TE = values_TE if select_bias_E is None else values_TE + select_bias_E
    if config.groups is not None:
        filler = 0.0 if config.groups.score == "max" else float("-inf")
        values_TE = keep_best_groups(values_TE, config.groups)
        values_TE = values_TE.masked_fill(values_TE == filler, float("-inf"))
    chosen = []
    for values_E in values_TE:
        allowed = values_E[values_E > float("-inf")]
        bonus = prefer_cached * mean_range.add(float(allowed.max() - allowed.min()))
        preferred_E = values_E + bonus * cached_E
        preferred_E[values_E.argmax()] = float("inf")
        _, ids_1K = kernels.top_k(preferred_E[None], config.top_k)
        chosen.append(ids_1K[0][values_E[ids_1K[0]].argsort(descending=True, stable=True)])
    ids_TK = torch.stack(chosen)
    return Routing(ids_TK, weigh(logits_TE, scores_TE, ids_TK, config), logits_TE, scores_TE)


def keep_top_p(routing: Routing, config: RouterConfig, top_p: float) -> Routing:
    """Each token keeps its fewest experts whose weights reach `top_p` of the sum of all K; ties to the earlier slot.

    Where the router makes weights sum to one (`renormalize`, softmax over the selected), those that stay are scaled to
    the sum of all; elsewhere they are as they were.
    """
    total_T1 = routing.weights_TK.sum(dim=-1, keepdim=True)
    falling_TK, order_TK = routing.weights_TK.sort(dim=-1, descending=True, stable=True)
    before_TK = falling_TK.cumsum(dim=-1) - falling_TK
    stays_TK = before_TK < top_p * total_T1
    stays_TK[:, 0] = True
    kept_TK = torch.zeros_like(stays_TK).scatter_(1, order_TK, stays_TK)
    weights_TK = routing.weights_TK * kept_TK
    if config.renormalize or config.score == "softmax_selected":
        weights_TK = weights_TK * (total_T1 / weights_TK.sum(dim=-1, keepdim=True))
    return routing._replace(weights_TK=weights_TK, kept_TK=kept_TK)
