"""Low-precision copies of a pack's experts: another pack of the same model, in memory whole, its layout its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewfire.checkpoints.pack import Pack, open_pack
from fewfire.checkpoints.shards import Shards
from fewfire.config import check
from fewfire.formats import decode
from fewfire.runtime.banks import ResidentExperts
from fewfire.runtime.budget import Account
from fewfire.runtime.lower import expert_layout, why_not_native_experts
from fewfire.runtime.weights import Report

_SAME = 0.02  # of its norm, a router may differ between formats: 8 bits give 0.006


class LowPrecision:
    """`experts` and, of each MoE layer, the engine's layout of a record. Memory is taken from `account`.

    Raises: ConfigError where `folder` is no smaller pack of the model of `pack`, BudgetError where it does not fit,
    FormatError where its bytes are not those written.
    """

    def __init__(self, folder: str | Path, pack: Pack, account: Account, report: Report = lambda num_bytes: None):
        low = open_low(folder, pack)
        account.take(low.layout.expert_bytes, "low-precision experts")
        self.experts = ResidentExperts(low, report)
        self.experts.verify()
        self.layouts: list[dict[str, Any]] = [
            expert_layout(held, moe.expert)
            for held, (_, _, moe) in zip(low.layout.experts, pack.config.moe_layers, strict=True)
        ]

    @staticmethod
    def bytes_of(folder: str | Path, pack: Pack) -> int:
        """The memory that it will take. Raises: ConfigError as above."""
        return open_low(folder, pack).layout.expert_bytes


def open_low(folder: str | Path, pack: Pack) -> Pack:
    """The pack of low-precision copies. Raises: ConfigError, FormatError as `LowPrecision`."""
    low = open_pack(folder)
    other = f"low_precision ({folder}) is not a pack of the same model"
    check(low.config == pack.config, f"{other}: its config.json differs; make one with `fewfire pack`")
    why_not = why_not_native_experts(low)
    check(why_not is None, f"low_precision ({folder}) cannot stand in: {why_not}")
    check(
        low.layout.expert_bytes < pack.layout.expert_bytes,
        f"low_precision ({folder}) holds {low.layout.expert_bytes} bytes of experts, the pack itself "
        f"{pack.layout.expert_bytes}; make a smaller one, e.g. with `fewfire pack --quant q4`",
    )
    for held in (pack.layout.experts[0], pack.layout.experts[-1]):
        name = held.prefix.removesuffix("experts.") + "router.weight"
        ours, theirs = _trunk_values(pack, name), _trunk_values(low, name)
        check(float((ours - theirs).norm()) <= _SAME * float(ours.norm()), f"{other}: {name} differs")
    return low


def _trunk_values(pack: Pack, name: str) -> Any:
    placed = next(each for each in pack.layout.trunk if each.name == name)
    with Shards() as shards:
        return decode(pack.read_trunk(placed, shards), placed.format, placed.shape)
