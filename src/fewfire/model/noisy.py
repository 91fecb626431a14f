"""Noisy top-k gating, flat and hierarchical: the router of the 2017 sparsely-gated mixture of experts.

T tokens, D model width, E experts, b branches of n = E / b experts, K chosen in all, k chosen at one level.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewfire import kernels
from fewfire.config import RouterConfig
from fewfire.routing import Routing


class Gate(NamedTuple):
    """One level's choice among N: `ids_Rk`, `weights_Rk`, and `load_RN`, the chance of each to be chosen again."""

    ids_Rk: Tensor
    weights_Rk: Tensor
    load_RN: Tensor | None


def noisy_gate(clean_RN: Tensor, spread_RN: Tensor | None, k: int) -> Gate:
    """Softmax over the k best of clean + normal noise of standard deviation `spread_RN` (None: no noise, no load).

    `load_RN` is P(x, e) of equation 9: the chance that e stays among the k best when only its own noise is drawn
    anew. Ties go to the lower id. Source: Shazeer et al. 2017 (1701.06538), equations 3-5, 8-9.
    """
    noisy_RN = clean_RN if spread_RN is None else clean_RN + torch.randn_like(clean_RN) * spread_RN
    _, ids_Rk = kernels.top_k(noisy_RN, k)
    weights_Rk = torch.softmax(noisy_RN.gather(1, ids_Rk), dim=-1)
    if spread_RN is None:
        return Gate(ids_Rk, weights_Rk, None)
    if k == clean_RN.shape[1]:
        return Gate(ids_Rk, weights_Rk, torch.ones_like(clean_RN))
    best_Rk = noisy_RN.topk(k + 1, dim=-1).values
    chosen_RN = torch.zeros_like(noisy_RN, dtype=torch.bool).scatter_(1, ids_Rk, True)
    threshold_RN = torch.where(chosen_RN, best_Rk[:, k : k + 1], best_Rk[:, k - 1 : k])
    deviations_RN = (clean_RN - threshold_RN) / spread_RN.clamp_min(1e-6)
    return Gate(ids_Rk, weights_Rk, torch.special.ndtr(deviations_RN))


class NoisyRouter(nn.Module):
    """Noisy top-k gating; with `config.branches`, a gate over branches and one gate inside each (appendix B).

    Every matrix starts at zero, so that load starts equal. Noise is drawn in training only, and only then has the
    Routing its `load_TE`. Hierarchical: each level takes sqrt(top_k), weights multiply.
    """

    def __init__(self, model_dim: int, config: RouterConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.num_experts, model_dim))
        self.bias = None
        self.noise = nn.Linear(model_dim, config.num_experts, bias=False)
        nn.init.zeros_(self.noise.weight)
        self.branch = self.branch_noise = None
        if config.branches is not None:
            self.branch = nn.Linear(model_dim, config.branches, bias=False)
            self.branch_noise = nn.Linear(model_dim, config.branches, bias=False)
            nn.init.zeros_(self.branch.weight)
            nn.init.zeros_(self.branch_noise.weight)

    def forward(self, x_TD: Tensor, length: int | None = None) -> Routing:
        """(T, D) -> Routing. `length` is not used: there is no capacity here."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.float()
            logits_TE = F.linear(x_TD, self.weight.float())
            spread_TE = F.softplus(self.noise(x_TD)) if self.training else None
            if self.branch is not None:
                return self._route_by_branch(x_TD, logits_TE, spread_TE)
            ids_TK, weights_TK, load_TE = noisy_gate(logits_TE, spread_TE, self.config.top_k)
            scores_TE = torch.softmax(logits_TE, dim=-1)
            return Routing(ids_TK, weights_TK * self.config.scale, logits_TE, scores_TE, load_TE=load_TE)

    def _route_by_branch(self, x_TD: Tensor, logits_TE: Tensor, spread_TE: Tensor | None) -> Routing:
        assert self.branch is not None and self.branch_noise is not None and self.config.branches is not None
        branches, k = self.config.branches, math.isqrt(self.config.top_k)
        size = self.config.num_experts // branches
        branch_Tb = self.branch(x_TD)
        spread_Tb = F.softplus(self.branch_noise(x_TD)) if self.training else None
        outer = noisy_gate(branch_Tb, spread_Tb, k)
        rows_R = (torch.arange(x_TD.shape[0])[:, None] * branches + outer.ids_Rk).flatten()  # R = T * k

        def chosen(values_TE: Tensor) -> Tensor:
            return values_TE.reshape(-1, size)[rows_R]

        inner = noisy_gate(chosen(logits_TE), None if spread_TE is None else chosen(spread_TE), k)
        ids_TK = (outer.ids_Rk[..., None] * size + inner.ids_Rk.unflatten(0, (-1, k))).flatten(1)
        weights_TK = (outer.weights_Rk[..., None] * inner.weights_Rk.unflatten(0, (-1, k))).flatten(1)
        scores_Tbn = torch.softmax(branch_Tb, -1)[..., None] * torch.softmax(logits_TE.unflatten(1, (branches, -1)), -1)
        load_TE = None
        if outer.load_RN is not None and inner.load_RN is not None:
            # Load_ij = Load_primary(X)_i * Load_i(X^(i))_j / |X^(i)|, X^(i) the tokens sent to branch i.
            count_b = torch.bincount(outer.ids_Rk.flatten(), minlength=branches).clamp_min(1)
            share_b = outer.load_RN.sum(dim=0) / count_b
            load_TE = torch.zeros(logits_TE.numel() // size, size).index_add(0, rows_R, inner.load_RN)
            load_TE = (load_TE.unflatten(0, (-1, branches)) * share_b[:, None]).flatten(1)
        scale = self.config.scale
        return Routing(ids_TK, weights_TK * scale, logits_TE, scores_Tbn.flatten(1), load_TE=load_TE)
