"""Routers: from a token's state to the experts it goes to and their weights.

T tokens, D model width, E experts, K chosen, N groups. Logits and scores are float32 whatever the input is.
The plain definition of every rule is `route`; `Router` adds the learned projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewfire import kernels
from fewfire.config import GroupConfig, RouterConfig
from fewfire.routing import Routing


def route(logits_TE: Tensor, config: RouterConfig, select_bias_E: Tensor | None = None) -> Routing:
    """Pick `config.top_k` experts per token from float32 logits.

    `select_bias_E` changes who is picked, never the weights. Ties go to the lower expert id; ids come in the order
    of falling selection score. Gradients flow through the weights and scores, not through the choice.
    Source: score rules of Switch (2101.03961), Mixtral (2401.04088), DeepSeek-V2/V3, gpt-oss, Llama 4.
    """
    if config.score == "sparsemixer":
        return _sparsemixer(logits_TE, config)
    scores_TE = torch.sigmoid(logits_TE) if config.score.startswith("sigmoid") else torch.softmax(logits_TE, dim=-1)
    selected_rule = config.score in ("softmax_selected", "sigmoid_selected", "noisy_softmax")
    choice_TE = (logits_TE if selected_rule else scores_TE).detach()
    if select_bias_E is not None:
        choice_TE = choice_TE + select_bias_E
    if config.groups is not None:
        choice_TE = keep_best_groups(choice_TE, config.groups)
    _, ids_TK = kernels.top_k(choice_TE, config.top_k)
    weights_TK = weigh(logits_TE, scores_TE, ids_TK, config)
    return Routing(ids_TK, weights_TK, logits_TE, scores_TE)


def weigh(logits_TE: Tensor, scores_TE: Tensor, ids_TK: Tensor, config: RouterConfig) -> Tensor:
    """Routing weights (T, K) of chosen experts."""
    if config.score in ("softmax_selected", "noisy_softmax"):
        weights_TK = torch.softmax(logits_TE.gather(1, ids_TK), dim=-1)
    else:
        weights_TK = scores_TE.gather(1, ids_TK)
    if config.renormalize:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + config.renormalize_eps)
    return weights_TK if config.scale == 1.0 else weights_TK * config.scale


def keep_best_groups(choice_TE: Tensor, groups: GroupConfig) -> Tensor:
    """Mask the experts outside the `top_groups` best groups: with 0 where groups score by `max`, else -inf."""
    choice_TNe = choice_TE.unflatten(-1, (groups.num_groups, -1))
    if groups.score == "max":
        group_TN = choice_TNe.amax(dim=-1)
    else:
        group_TN = choice_TNe.topk(min(2, choice_TNe.shape[-1]), dim=-1).values.sum(dim=-1)
    _, best = kernels.top_k(group_TN.contiguous(), groups.top_groups)
    keep_TN = torch.zeros_like(group_TN, dtype=torch.bool).scatter_(1, best, True)
    filler = 0.0 if groups.score == "max" else float("-inf")
    return choice_TNe.masked_fill(~keep_TN[..., None], filler).flatten(1)


def within_capacity(ids_TK: Tensor, num_experts: int, capacity: int, length: int | None = None) -> Tensor:
    """Bool (T, K): True for the first `capacity` assignments to an expert in each sequence of `length` tokens.

    The earlier position wins, whatever the weights (Switch Transformer, section 2.2, as released).
    """
    if ids_TK.shape[0] == 0:
        return torch.ones_like(ids_TK, dtype=torch.bool)
    chosen_TE = torch.zeros((ids_TK.shape[0], num_experts), dtype=torch.int64).scatter_(1, ids_TK, 1)
    rank_TE = chosen_TE.unflatten(0, (-1, length or ids_TK.shape[0])).cumsum(dim=1).flatten(0, 1)
    return rank_TE.gather(1, ids_TK) <= capacity


def _sparsemixer(logits_TE: Tensor, config: RouterConfig) -> Routing:
    """Phi-3.5's rule at evaluation: K rounds of argmax, each weighted by a softmax over the near-best of what is left.

    Source: SparseMixer-v2 (2409.12136) as released with Phi-3.5-MoE.
    """
    left_TE, ids, weights = logits_TE, [], []
    for _ in range(config.top_k):
        best_T1, id_T1 = left_TE.max(dim=-1, keepdim=True)
        id_T1 = (left_TE == best_T1).int().argmax(dim=-1, keepdim=True)
        scale_TE = torch.maximum(logits_TE.abs(), best_T1)
        far_TE = (best_T1 - logits_TE) / scale_TE > 2 * config.jitter
        near_TE = left_TE.masked_fill(far_TE, float("-inf"))
        ids.append(id_T1)
        weights.append(torch.softmax(near_TE, dim=-1).gather(1, id_T1))
        left_TE = left_TE.scatter(1, id_T1, float("-inf"))
    weights_TK = torch.cat(weights, dim=1) * config.scale
    return Routing(torch.cat(ids, dim=1), weights_TK, logits_TE, torch.softmax(logits_TE, dim=-1))


class Router(nn.Module):
    """A learned projection D -> E and the rule that turns its logits into a `Routing`.

    `select_bias` is a float32 buffer that no gradient touches; `balance.SelectBiasUpdate` moves it.
    In training, `jitter` multiplies the router's input by U(1 - jitter, 1 + jitter) (Switch, section 2.2).
    """

    def __init__(self, model_dim: int, config: RouterConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, model_dim))
        nn.init.normal_(self.weight, std=0.02)
        self.bias = nn.Parameter(torch.zeros(config.num_experts)) if config.bias else None
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.select_bias else None
        self.register_buffer("select_bias", bias)
        self.select_bias: Tensor | None

    def forward(self, x_TD: Tensor, length: int | None = None) -> Routing:
        """(T, D) -> Routing; the projection runs in float32 also under autocast.

        `length`: tokens a sequence, T a multiple of it; only `config.capacity` asks (None: one sequence).
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.float()
            if self.training and self.config.jitter > 0 and self.config.score != "sparsemixer":
                noise = torch.empty_like(x_TD).uniform_(1 - self.config.jitter, 1 + self.config.jitter)
                x_TD = x_TD * noise
            bias = None if self.bias is None else self.bias.float()
            logits_TE = torch.nn.functional.linear(x_TD, self.weight.float(), bias)
            routing = route(logits_TE, self.config, self.select_bias)
            if self.config.capacity is None:
                return routing
            kept_TK = within_capacity(routing.ids_TK, self.config.num_experts, self.config.capacity, length)
            return routing._replace(kept_TK=kept_TK)
