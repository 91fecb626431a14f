"""All routed experts of a layer, resident: the double loop that defines them and the grouped form that is fast.

T tokens, K chosen, A rows: kept assignments (T*K when dropless) sorted by expert; E experts, D model, F expert width.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewfire import kernels
from fewfire.config import FeedForwardConfig
from fewfire.model.feedforward import activate
from fewfire.routing import Routing

ALIGN = 32  # rows: 3 % filling at 512 rows an expert


class Experts(nn.Module):
    """E feed-forwards of one shape, stacked. An `ExpertBank`: (x_TD, Routing) -> (T, D).

    `weight_on` = input multiplies what an expert receives instead of what it returns (Llama 4).
    """

    def __init__(self, model_dim: int, num_experts: int, config: FeedForwardConfig, weight_on: str = "output"):
        super().__init__()
        self.config, self.weight_on, self.num_experts = config, weight_on, num_experts
        width = config.hidden_dim

        def stacked(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape).normal_(std=0.02))

        self.gate = stacked(width, model_dim) if config.gated else None
        self.up = stacked(width, model_dim)
        self.down = stacked(model_dim, width)
        self.gate_bias = nn.Parameter(torch.zeros(num_experts, width)) if config.gated and config.bias else None
        self.up_bias = nn.Parameter(torch.zeros(num_experts, width)) if config.bias else None
        self.down_bias = nn.Parameter(torch.zeros(num_experts, model_dim)) if config.bias else None

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        num_tokens, top_k = routing.ids_TK.shape
        order_A, offsets = kernels.group_by_expert(routing.ids_TK, self.num_experts, routing.kept_TK)
        if self.weight_on == "output" and not self.config.bias:
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_TD.dtype
            layout = lay_out(order_A, offsets.tolist(), num_tokens, top_k, 1 if dtype == torch.float32 else ALIGN)
            weights_A = routing.weights_TK.flatten()[layout.order_A] * layout.real_A
            weights = (self.gate, self.up, self.down)
            return GroupedExperts.apply(x_TD, weights_A, layout, self.config, dtype, *weights)
        weights_A = routing.weights_TK.flatten()[order_A]
        return self._by_group(x_TD, weights_A, order_A // top_k, offsets.tolist())

    def _by_group(self, x_TD: Tensor, weights_A: Tensor, token_A: Tensor, offsets: list[int]) -> Tensor:
        """Plain autograd over expert groups: biases and input weighting, which the fused form leaves out."""
        x_AD = x_TD[token_A]
        if self.weight_on == "input":
            x_AD = x_AD * weights_A[:, None].to(x_AD.dtype)
        parts = [self.expert(e, x_AD[a:b]) for e, (a, b) in enumerate(zip(offsets, offsets[1:])) if b > a]
        if not parts:
            return torch.zeros_like(x_TD)
        y_AD = torch.cat(parts)
        if self.weight_on == "output":
            y_AD = y_AD * weights_A[:, None].to(y_AD.dtype)
        return torch.zeros_like(x_TD, dtype=y_AD.dtype).index_add(0, token_A, y_AD).to(x_TD.dtype)

    def expert(self, e: int, x_RD: Tensor) -> Tensor:
        """Expert `e` alone: (R, D) -> (R, D), unweighted."""

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return torch.nn.functional.linear(x, weight[e], None if bias is None else bias[e])

        gate = None if self.gate is None else linear(x_RD, self.gate, self.gate_bias)
        up = linear(x_RD, self.up, self.up_bias)
        return linear(activate(gate, up, self.config), self.down, self.down_bias)


def reference_experts(experts: Experts, x_TD: Tensor, routing: Routing) -> Tensor:
    """The definition: for every token, for every kept choice, weight * expert(token). Slow; what tests compare with."""
    rows = []
    for t in range(x_TD.shape[0]):
        row = torch.zeros_like(x_TD[t])
        for k in range(routing.ids_TK.shape[1]):
            if routing.kept_TK is not None and not bool(routing.kept_TK[t, k]):
                continue
            weight = routing.weights_TK[t, k].to(x_TD.dtype)
            x_1D = x_TD[t : t + 1] * weight if experts.weight_on == "input" else x_TD[t : t + 1]
            y_D = experts.expert(int(routing.ids_TK[t, k]), x_1D)[0]
            row = row + (y_D * weight if experts.weight_on == "output" else y_D)
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros_like(x_TD)


class Layout(NamedTuple):
    """Rows sorted by expert, each group filled up to a multiple of the alignment.

    `order_A`: the assignment (t * K + k) of each row; `token_A` its token; `real_A` float32, 0 for a filling row, whose
    routing weight is 0 so that it adds nothing to any output or gradient. `bounds`: where each group begins.
    `positions_TK`: the row of each assignment, -1 where it was dropped.
    """

    order_A: Tensor
    token_A: Tensor
    real_A: Tensor
    bounds: list[int]
    positions_TK: Tensor


def lay_out(order_A: Tensor, offsets: list[int], num_tokens: int, top_k: int, align: int) -> Layout:
    """Where every row lies. Low-precision products are compiled per shape, and the row counts of experts change with
    every batch: filling groups up leaves few shapes (measured: 1.1 ms a product without, in docs/LOG.md)."""
    counts = [end - begin for begin, end in zip(offsets, offsets[1:])]
    sizes = [-(-count // align) * align for count in counts]
    bounds = [0, *itertools.accumulate(sizes)]
    if bounds == offsets:
        rows_A, padded_A, real_A = torch.arange(order_A.numel()), order_A, torch.ones(order_A.numel())
    else:
        shifts = torch.tensor([new - old for new, old in zip(bounds, offsets)][:-1])
        rows_A = torch.arange(order_A.numel()) + torch.repeat_interleave(shifts, torch.tensor(counts))
        padded_A = torch.zeros(bounds[-1], dtype=torch.int64)
        padded_A[rows_A] = order_A
        real_A = torch.zeros(bounds[-1])
        real_A[rows_A] = 1.0
    positions = torch.full((num_tokens * top_k,), -1, dtype=torch.int64)
    positions[order_A] = rows_A
    return Layout(padded_A, padded_A // top_k, real_A, bounds, positions.view(num_tokens, top_k))


class GroupedExperts(torch.autograd.Function):
    """Experts as products over contiguous groups of sorted rows: one autograd node a layer.

    Saves the input and the pre-activations only (D + 2F numbers an assignment): the routing weight multiplies the
    hidden state before `down`, so the gradient of a weight is <d(w h), h> and no expert output is kept.
    Products run in `dtype`; gradients of the parameters come back in the parameters' dtype.
    Exactness: outputs and gradients equal `reference_experts` up to the rounding of `dtype`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_A: Tensor,
        layout: Layout,
        config: FeedForwardConfig,
        dtype: torch.dtype,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
    ) -> Tensor:
        bounds = layout.bounds
        x_AD = x_TD.to(dtype)[layout.token_A]
        into = _stack_in(gate, up, dtype)
        pre_AP = x_AD.new_empty((x_AD.shape[0], into.shape[1]))
        _products(x_AD, into, bounds, out=pre_AP, transpose=True)
        hidden_AF = _weighted_hidden(pre_AP, weights_A, config)
        y_AD = torch.empty_like(x_AD)
        down_cast = down.to(dtype)
        _products(hidden_AF, down_cast, bounds, out=y_AD, transpose=True)
        ctx.save_for_backward(x_AD, pre_AP, weights_A, into, down_cast)
        ctx.layout, ctx.config = layout, config
        ctx.gated, ctx.dtypes = gate is not None, (x_TD.dtype, up.dtype, down.dtype)
        return kernels.sum_rows(y_AD, layout.positions_TK).to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple:
        x_AD, pre_AP, weights_A, into, down = ctx.saved_tensors
        layout, bounds = ctx.layout, ctx.layout.bounds
        dy_AD = dy_TD.to(x_AD.dtype)[layout.token_A]
        dscaled_AF = dy_AD.new_empty((dy_AD.shape[0], down.shape[2]))
        _products(dy_AD, down, bounds, out=dscaled_AF, transpose=False)
        dpre_AP, hidden_AF, dweights_A = _weighted_hidden_backward(dscaled_AF, pre_AP, weights_A, ctx.config)
        ddown = _outer_products(dy_AD, hidden_AF, bounds, ctx.dtypes[2])
        dinto = _outer_products(dpre_AP, x_AD, bounds, ctx.dtypes[1])
        dx_AD = torch.empty_like(x_AD)
        _products(dpre_AP, into, bounds, out=dx_AD, transpose=False)
        dx_TD = kernels.sum_rows(dx_AD, layout.positions_TK).to(ctx.dtypes[0])
        half = dinto.shape[1] // 2
        dgate, dup = (dinto[:, :half], dinto[:, half:]) if ctx.gated else (None, dinto)
        return dx_TD, dweights_A, None, None, None, dgate, dup, ddown


def _stack_in(gate: Tensor | None, up: Tensor, dtype: torch.dtype) -> Tensor:
    """(E, 2F, D) of gate and up (or (E, F, D) of up alone) in `dtype`: one product reads a token's row once."""
    if gate is None:
        return up.to(dtype)
    experts, width, dim = up.shape
    stacked = torch.empty((experts, 2 * width, dim), dtype=dtype)
    stacked[:, :width] = gate
    stacked[:, width:] = up
    return stacked


def _is_swiglu(config: FeedForwardConfig) -> bool:
    return config.gated and config.activation == "silu"


def _weighted_hidden(pre_AP: Tensor, weights_A: Tensor, config: FeedForwardConfig) -> Tensor:
    """weight * act(pre): (A, F) in the dtype of `pre_AP`."""
    if _is_swiglu(config):
        return kernels.swiglu_forward(pre_AP, weights_A)
    return _activate(pre_AP, config) * weights_A[:, None].to(pre_AP.dtype)


def _weighted_hidden_backward(
    grad_AF: Tensor, pre_AP: Tensor, weights_A: Tensor, config: FeedForwardConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient by pre, the weighted hidden state again, gradient by the weights)."""
    if _is_swiglu(config):
        return kernels.swiglu_backward(grad_AF, pre_AP, weights_A)  # type: ignore[return-value]
    weights_A1 = weights_A[:, None].to(pre_AP.dtype)
    with torch.enable_grad():
        leaf = pre_AP.detach().requires_grad_()
        hidden_AF = _activate(leaf, config)
    (dpre_AP,) = torch.autograd.grad(hidden_AF, leaf, grad_AF * weights_A1)
    hidden_AF = hidden_AF.detach()
    dweights_A = (grad_AF * hidden_AF).sum(dim=-1, dtype=torch.float32).to(weights_A.dtype)
    return dpre_AP, hidden_AF * weights_A1, dweights_A


def _activate(pre_AP: Tensor, config: FeedForwardConfig) -> Tensor:
    gate, up = pre_AP.chunk(2, dim=-1) if config.gated else (None, pre_AP)
    return activate(gate, up, config)


def _products(x_AD: Tensor, weight: Tensor, bounds: list[int], *, out: Tensor, transpose: bool) -> None:
    """out[group e] = x[group e] @ weight[e] (transposed if asked) for every group that has rows."""
    for e, (a, b) in enumerate(zip(bounds, bounds[1:])):
        if b > a:
            torch.mm(x_AD[a:b], weight[e].t() if transpose else weight[e], out=out[a:b])


def _outer_products(left_AM: Tensor, right_AN: Tensor, bounds: list[int], dtype: torch.dtype) -> Tensor:
    """(E, M, N): left[group e]^T @ right[group e]; zero for a group without rows."""
    out = left_AM.new_empty((len(bounds) - 1, left_AM.shape[1], right_AN.shape[1]))
    for e, (a, b) in enumerate(zip(bounds, bounds[1:])):
        if b > a:
            torch.mm(left_AM[a:b].t(), right_AN[a:b], out=out[e])
        else:
            out[e].zero_()
    return out.to(dtype)
