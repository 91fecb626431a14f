"""The plain definition of every kernel, in torch: what native code is compared with, and what runs without it.

Knows no native code. Nothing here is meant to be fast.
T tokens, E experts, K slots, A kept assignments; R rows, F expert width, P = 2 F pre-activations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fewfire.formats import GGML_FORMATS, Encoded, decode, ggml, ggml_tiles
from fewfire.formats.ggml import Runs
from fewfire.formats.tiles import GROUP, ROWS, split_mxfp4, split_q4, split_q8


def top_k(scores_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, best first, ties to the lower id, NaN after every number."""
    # An ascending sort of the negation is stable in id, and torch's order puts NaN last.
    ids_TK = torch.sort(-scores_TE.detach(), dim=-1, stable=True).indices[:, :k].contiguous()
    return scores_TE.gather(1, ids_TK), ids_TK


def group_by_expert(ids_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Flat assignments sorted by expert, and where each expert's begin."""
    flat_N = ids_TK.reshape(-1)
    if kept_TK is None:
        order_A = torch.argsort(flat_N, stable=True)
        kept_ids_A = flat_N
    else:
        kept_A = kept_TK.reshape(-1).nonzero().flatten()
        kept_ids_A = flat_N[kept_A]
        order_A = kept_A[torch.argsort(kept_ids_A, stable=True)]
    counts_E = torch.bincount(kept_ids_A, minlength=num_experts)
    offsets_E1 = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_TK.device)
    torch.cumsum(counts_E, 0, out=offsets_E1[1:])
    return order_A, offsets_E1


def swiglu_forward(pre_RP: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """silu(gate) * up * weight, where a row of `pre_RP` is gate, then up (P = 2 F)."""
    gate_RF, up_RF = pre_RP.chunk(2, dim=-1)
    hidden_RF = torch.nn.functional.silu(gate_RF) * up_RF
    return hidden_RF if weights_R is None else hidden_RF * weights_R[:, None].to(pre_RP.dtype)


def swiglu_backward(
    grad_RF: Tensor, pre_RP: Tensor, weights_R: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(grad_pre_RP, hidden_RF, grad_weights_R): gradients of `swiglu_forward`, and its output again."""
    with torch.enable_grad():
        pre = pre_RP.detach().requires_grad_()
        hidden_RF = swiglu_forward(pre)
    weights_R1 = 1 if weights_R is None else weights_R[:, None].to(pre_RP.dtype)
    (grad_pre_RP,) = torch.autograd.grad(hidden_RF, pre, grad_RF * weights_R1)
    hidden_RF = hidden_RF.detach()
    if weights_R is None:
        return grad_pre_RP, hidden_RF, None
    grad_weights_R = (grad_RF * hidden_RF).sum(dim=-1, dtype=weights_R.dtype)
    return grad_pre_RP, hidden_RF * weights_R1, grad_weights_R


def sum_rows(rows_AD: Tensor, positions_TK: Tensor) -> Tensor:
    """Each token's rows added up in slot order, float32."""
    padded = torch.cat((rows_AD.float(), rows_AD.new_zeros((1, rows_AD.shape[1]), dtype=torch.float32)))
    return padded[positions_TK.clamp(min=-1)].sum(dim=1)  # a negative position is the zero row at the end


WIDE_FROM, WIDE_MOST, WIDE_STEP = 1.5, 126, 128


class Activations(NamedTuple):
    """Integers `codes + 128 * high` (T, G, 128), both int8, times `scales` (T, G)."""

    codes_TGk: Tensor
    high_TGk: Tensor
    scales_TG: Tensor


def quantize_activations(x_TK: Tensor) -> Activations:
    """Each group of 128 columns, padded with zeros: its largest magnitude becomes 127.

    Where the quad of columns (four in a row) that has it exceeds all others 1.5 times, theirs becomes 127, and that
    quad is wide: its integers exceed a byte, 126 times 127 at most. A group with NaN or infinity has a NaN scale and
    codes of 0; one below 1e-30 has codes of 0.
    """
    padded = F.pad(x_TK, (0, -x_TK.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    (largest_TG, second_TG), quad_TG = _two_largest(padded.abs().unflatten(-1, (-1, 4)).amax(dim=-1))
    broken = ~torch.isfinite(padded).all(dim=-1)
    silent = broken | (largest_TG < 1e-30)
    is_wide_TG = ~silent & (largest_TG > WIDE_FROM * second_TG)
    limit_TG = torch.where(is_wide_TG, torch.maximum(second_TG, largest_TG / WIDE_MOST), largest_TG)
    inverse = torch.where(silent, torch.zeros(()), 127 / torch.where(silent, 1.0, limit_TG))
    integers = torch.where(silent[..., None], torch.zeros(()), padded * inverse[..., None]).round().to(torch.int32)
    in_quad = torch.arange(GROUP) // 4 == quad_TG[..., None]
    high = torch.where(in_quad & is_wide_TG[..., None], (integers + WIDE_STEP // 2) >> 7, 0)
    scales = torch.where(broken, float("nan"), limit_TG / 127)
    return Activations((integers - WIDE_STEP * high).to(torch.int8), high.to(torch.int8), scales)


def _two_largest(most_TGq: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Along the last dimension: the largest and the next, and where the largest is."""
    found = most_TGq.topk(2, dim=-1)
    first, second = found.values.unbind(dim=-1)
    return (first, second), found.indices[..., 0]


def fused(sum_: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a * b + sum_ of float32, rounded once. In float64 a * b is exact; the sum is rounded to odd there, so that
    rounding it once more, to float32, gives what one rounding gives (Boldo and Melquiond, 2008)."""
    product, added = a.double() * b.double(), sum_.double()
    total = product + added
    part = total - product
    lost = (product - (total - part)) + (added - part)  # of the exact sum (Knuth's two-sum)
    bits = total.view(torch.int64)
    is_even = (lost != 0) & torch.isfinite(total) & ((bits & 1) == 0)
    towards = torch.where((lost > 0) == (total > 0), bits + 1, bits - 1)
    return torch.where(is_even, towards, bits).view(torch.float64).float()


def linear(x_TK: Tensor, weight: Encoded, name: str, shape: tuple[int, int]) -> Tensor:
    """(T, N): x times a weight (N, K) in format `name`. Quantized weights meet quantized activations: integer sums over
    what shares a weight scale are exact; they are scaled and added one after the other, each by one fused multiply-add,
    in rising order of columns. Minima times the sums of activations are added up apart, in the same order, and so are
    the high parts of codes."""
    if name not in _TILED_RUNS and name not in GGML_FORMATS:
        return F.linear(x_TK, decode(weight, name, shape))
    runs = split_runs(weight, name, shape)
    x = quantize_activations(x_TK)
    total_TN, below_TN = _add_runs(x.codes_TGk, x.scales_TG, runs)
    if below_TN is not None:
        total_TN = total_TN + below_TN
    return (total_TN + _add_high(x, runs))[:, : shape[0]]


def _add_runs(codes_TGk: Tensor, act_scales_TG: Tensor, runs: Runs) -> tuple[Tensor, Tensor | None]:
    """Scaled sums of all runs, and of their minima where there are any."""
    integers_NPk, scales_NP, minima_NP = runs
    run = integers_NPk.shape[-1]
    codes_TPk = codes_TGk.flatten(1).unflatten(1, (-1, run))
    total_TN = below_TN = torch.zeros((codes_TGk.shape[0], scales_NP.shape[0]))
    for part in range(codes_TPk.shape[1]):
        act_scale_T1 = act_scales_TG[:, part * run // GROUP, None]
        exact_TN = codes_TPk[:, part].double() @ integers_NPk[:, part].double().t()
        total_TN = fused(total_TN, exact_TN.float(), scales_NP[:, part] * act_scale_T1)
        if minima_NP is not None:
            sum_T1 = codes_TPk[:, part].sum(dim=-1, keepdim=True, dtype=torch.int32).float()
            below_TN = fused(below_TN, minima_NP[:, part], sum_T1 * act_scale_T1)
    return total_TN, None if minima_NP is None else below_TN


def _add_high(x: Activations, runs: Runs) -> Tensor:
    """What high parts add: each group's quad alone, its minimum after it."""
    integers_NPk, scales_NP, minima_NP = runs
    run = integers_NPk.shape[-1]
    high_TPk = x.high_TGk.flatten(1).unflatten(1, (-1, run))
    made_TN = torch.zeros((high_TPk.shape[0], scales_NP.shape[0]))
    for part in range(high_TPk.shape[1]):
        wide_T1 = (high_TPk[:, part] != 0).any(dim=-1, keepdim=True)
        act_scale_T1 = x.scales_TG[:, part * run // GROUP, None] * WIDE_STEP
        exact_TN = high_TPk[:, part].double() @ integers_NPk[:, part].double().t()
        next_TN = fused(made_TN, exact_TN.float(), scales_NP[:, part] * act_scale_T1)
        if minima_NP is not None:
            sum_T1 = high_TPk[:, part].sum(dim=-1, keepdim=True, dtype=torch.int32).float()
            next_TN = fused(next_TN, minima_NP[:, part], sum_T1 * act_scale_T1)
        made_TN = torch.where(wide_T1, next_TN, made_TN)
    return made_TN


_TILED_RUNS = {"q8": split_q8, "q4": split_q4, "mxfp4": split_mxfp4}


def split_runs(weight: Encoded, name: str, shape: tuple[int, int]) -> Runs:
    """A quantized weight (N, K) as runs of columns; N and K padded to whole tiles."""
    blocks, groups = -(-shape[0] // ROWS), -(-shape[1] // GROUP)
    if name in _TILED_RUNS:
        integers, scales = _TILED_RUNS[name](weight, shape)  # (B, G, r, [4,] k) and (B, G, r, [4,] 1)
        run = integers.shape[-1]
        ints_NPk = integers.transpose(1, 2).reshape(blocks * ROWS, groups * GROUP // run, run)
        return Runs(ints_NPk, scales.transpose(1, 2).reshape(ints_NPk.shape[:2]), None)
    rows = ggml_tiles.from_tiles(weight, name, (blocks * ROWS, groups * GROUP))
    integers_NPk, scales_NP, minima_NP = ggml.runs(ggml.split(rows, name), name)
    count = groups * GROUP // integers_NPk.shape[-1]  # a K format may have a group more than there are columns
    return Runs(integers_NPk[:, :count], scales_NP[:, :count], None if minima_NP is None else minima_NP[:, :count])


# -------------------------------------------------------------------------------------------------------- checksums

_POLYNOMIAL = 0x82F63B78
_LANES = 4096  # runs of bytes that go through the table side by side


def _crc_table() -> Tensor:
    table = torch.arange(256, dtype=torch.int64)
    for _ in range(8):
        table = torch.where((table & 1) == 1, (table >> 1) ^ _POLYNOMIAL, table >> 1)
    return table


def _step_zeros(crc: int, matrix: list[int]) -> int:
    """The register after as many zero bytes as `matrix` (the image of each bit) stands for."""
    made = 0
    for bit, image in enumerate(matrix):
        if crc >> bit & 1:
            made ^= image
    return made


def _zeros_matrix(count: int) -> list[int]:
    """The image of every bit of the register under `count` zero bytes, by squaring."""
    table = _crc_table().tolist()
    power = [table[(1 << bit) & 255] ^ ((1 << bit) >> 8) for bit in range(32)]
    made = [1 << bit for bit in range(32)]
    while count:
        if count & 1:
            made = [_step_zeros(image, power) for image in made]
        power = [_step_zeros(image, power) for image in power]
        count >>= 1
    return made


def crc32c(bytes_: Tensor, before: int = 0) -> int:
    """CRC-32C of a uint8 vector: a table of 256, byte by byte, in many runs side by side that are joined at the end."""
    table, crc = _crc_table(), before ^ 0xFFFFFFFF
    run = bytes_.numel() // _LANES
    if run:
        lanes = torch.zeros(_LANES, dtype=torch.int64)
        columns = bytes_[: run * _LANES].reshape(_LANES, run).t().contiguous().long()
        for column in columns:
            lanes = table[(lanes ^ column) & 255] ^ (lanes >> 8)
        shift = _zeros_matrix(run)
        for lane in lanes.tolist():
            crc = _step_zeros(crc, shift) ^ lane
    plain = table.tolist()
    for byte in bytes_[run * _LANES :].tolist():
        crc = plain[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF
