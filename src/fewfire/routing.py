"""The seam between routers and experts: who gets which token, with what weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Routing(NamedTuple):
    """One MoE layer's decision. T tokens, K slots (top_k, or the most a rule can choose), E = num_experts.

    `ids_TK` int64, distinct along K, ties to the lower id. `weights_TK` float32: what each expert's output (or
    input, where the router says so) is multiplied by. `logits_TE` float32, raw: the z-loss reads these.
    `scores_TE` float32, activated, without selection bias: losses and traces read these. `kept_TK` bool, None
    when all are kept; False = dropped by capacity or not chosen: counts in no load. `load_TE` float32: the chance of
    each expert to be chosen, of which noisy gating makes a load that has a gradient (2017, equation 9); else None.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor
    scores_TE: Tensor
    kept_TK: Tensor | None = None
    load_TE: Tensor | None = None


class ExpertBank(Protocol):
    """All routed experts of one layer, wherever they live."""

    def __call__(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """(T, D) -> (T, D): the weighted sum of each token's experts."""
        ...
