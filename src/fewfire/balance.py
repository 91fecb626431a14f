"""Keeping a router balanced: losses, the selection-bias rule, and the monitor that tells whether it worked.

One convention throughout: a load-balancing loss is 1 at perfect balance, and layers are averaged, never pooled, so
that the imbalances of two layers cannot cancel. T tokens, K slots, E experts. Knows no optimizer and no file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewfire.routing import Routing


def count_load(routing: Routing) -> Tensor:
    """(E,) int64: assignments each expert received. Dropped and unchosen slots count for nothing."""
    ids = routing.ids_TK if routing.kept_TK is None else routing.ids_TK[routing.kept_TK]
    return torch.bincount(ids.reshape(-1), minlength=routing.logits_TE.shape[1])


def load_balancing_loss(routing: Routing) -> Tensor:
    """E * sum_e f_e P_e: f_e the share of assignments expert e chose, P_e its mean share of the scores.

    Scalar, 1 at perfect balance, E / top_k when top_k experts take all. 1 without tokens. Gradient through P only.
    Source: Switch Transformer, equations 4-6, divided by top_k; sigmoid scores are normalised per token first
    (DeepSeek-V3, equations 17-20).
    """
    num_tokens, num_experts = routing.scores_TE.shape
    if num_tokens == 0:
        return routing.scores_TE.sum() + 1.0
    scores_TE = routing.scores_TE
    share_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    load_E = count_load(routing).float()
    frequency_E = load_E / load_E.sum().clamp_min(1.0)
    return num_experts * torch.dot(frequency_E, share_TE.mean(dim=0))


def z_loss(routing: Routing) -> Tensor:
    """Mean over tokens of (logsumexp of the logits)^2: keeps router logits small. Scalar; (ln E)^2 at zero logits.

    Source: ST-MoE (2202.08906), equation 5.
    """
    if routing.logits_TE.shape[0] == 0:
        return routing.logits_TE.sum()
    return torch.logsumexp(routing.logits_TE, dim=-1).square().mean()


def importance_loss(gates_TE: Tensor) -> Tensor:
    """Squared coefficient of variation of each expert's summed gate. Scalar, 0 at balance.

    Source: Shazeer et al. 2017 (1701.06538), equations 6-7.
    """
    return cv_squared(gates_TE.sum(dim=0))


def cv_squared(values_E: Tensor) -> Tensor:
    """(std / mean)^2 with the population variance; 0 for one value or none."""
    if values_E.numel() < 2:
        return values_E.sum() * 0.0
    return values_E.float().var(unbiased=False) / values_E.float().mean().square().clamp_min(1e-20)


def mean_over_layers(values: Sequence[Tensor]) -> Tensor:
    """The average of one scalar a layer; 0 for a model without MoE layers."""
    return torch.stack(list(values)).mean() if values else torch.zeros(())


class SelectBiasUpdate:
    """Loss-free balancing: after each optimizer step, b_e += rate * sign(mean load - load_e), then centred.

    `observe` collects loads over every micro-batch; `apply` moves the biases in place and forgets the loads.
    Source: 2408.15664, algorithm 1 (rate 1e-3); centring as the sum of the biases changes no choice.
    """

    def __init__(self, rate: float):
        self.rate = rate
        self._loads: dict[int, Tensor] = {}

    def observe(self, layer: int, routing: Routing) -> None:
        load_E = count_load(routing)
        self._loads[layer] = self._loads[layer] + load_E if layer in self._loads else load_E

    def apply(self, biases: dict[int, Tensor]) -> None:
        """`biases`: layer index -> its (E,) float32 select_bias buffer."""
        with torch.no_grad():
            for layer, load_E in self._loads.items():
                step_E = torch.sign(load_E.float().mean() - load_E.float()) * self.rate
                biases[layer] += step_E - step_E.mean()
        self._loads.clear()


def noise_floor(num_experts: int, assignments: int) -> float:
    """MaxVio that perfectly uniform random routing shows over `assignments`: sqrt(2 ln E / (assignments / E))."""
    if num_experts < 2 or assignments == 0:
        return 0.0
    return math.sqrt(2 * math.log(num_experts) / (assignments / num_experts))


@dataclass(frozen=True)
class LoadHealth:
    """One layer's balance over what was observed. `max_vio` = max load / mean load - 1; fractions are 0-1."""

    layer: int
    load: tuple[int, ...]
    max_vio: float
    noise_floor: float
    num_dead: int
    entropy_frac: float

    @property
    def excess(self) -> float:
        """MaxVio above what chance alone would show: the figure to alarm on."""
        return self.max_vio - self.noise_floor


def load_health(layer: int, load_E: Tensor) -> LoadHealth:
    """Summarise (E,) counts. No assignments at all: no violation, and every expert is dead."""
    total, num_experts = int(load_E.sum()), load_E.numel()
    share = load_E.double() / max(total, 1)
    positive = share[share > 0]
    entropy = float(-(positive * positive.log()).sum()) / math.log(num_experts) if num_experts > 1 else 1.0
    return LoadHealth(
        layer=layer,
        load=tuple(load_E.tolist()),
        max_vio=float(load_E.max()) * num_experts / total - 1 if total else 0.0,
        noise_floor=noise_floor(num_experts, total),
        num_dead=int((load_E == 0).sum()),
        entropy_frac=entropy,
    )


class LoadMonitor:
    """Counts every layer's load until `reset`; hand its `observe` to a forward pass."""

    def __init__(self) -> None:
        self.loads: dict[int, Tensor] = {}

    def observe(self, layer: int, routing: Routing) -> None:
        load_E = count_load(routing)
        self.loads[layer] = self.loads[layer] + load_E if layer in self.loads else load_E

    def health(self) -> list[LoadHealth]:
        return [load_health(layer, load) for layer, load in sorted(self.loads.items())]

    def reset(self) -> None:
        self.loads.clear()


def worst(healths: Iterable[LoadHealth]) -> LoadHealth | None:
    """The layer whose MaxVio lies furthest above its noise floor; None without MoE layers."""
    return max(healths, key=lambda health: health.excess, default=None)
