"""The demo's last part: the trained MoE packed, then run with half of its experts on disk, beside all in memory."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from fewfire.api import Generated, Model, load
from fewfire.checkpoints.pack import open_pack
from fewfire.quantize import pack
from fewfire.runtime.banks import StreamedExperts
from fewfire.runtime.engine import NativeDecoder
from fewfire.runtime.lower import why_not_native

_FORMAT = "q8"
_NEW_TOKENS = 96


@dataclass(frozen=True)
class OnDisk:
    """One prompt, greedy, with all experts in memory and with half of them. Bytes, tokens/s; `predicted_*` are the
    planner's, on this machine as measured, with the hit rate that was seen."""

    format: str
    checkpoint_bytes: int
    pack_bytes: int
    expert_bytes: int
    slot_bytes: int
    same_tokens: bool
    num_tokens: int
    hit_rate: float
    bytes_read: int
    access: str
    resident_tokens_per_s: float
    resident_predicted: float | None
    disk_tokens_per_s: float
    disk_predicted: float | None
    pack: str


def run_from_disk(checkpoint: Path, out: Path, prompt: str) -> OnDisk | None:
    """Pack `checkpoint` as `out` and compare. None where the native engine cannot run here."""
    shutil.rmtree(out, ignore_errors=True)
    packed = pack(checkpoint, out, quant=_FORMAT)
    if why_not_native(open_pack(out)) is not None:
        return None
    model = load(out)
    assert isinstance(model.module, NativeDecoder)
    expert_bytes = model.module.pack.layout.expert_bytes
    model.generate(prompt, max_tokens=_NEW_TOKENS)  # records are compared with their checksums at their first use
    resident, resident_predicted = _run(model, prompt)
    _keep_half(model, model.module)
    streamed, disk_predicted = _run(model, prompt)
    return OnDisk(
        format=_FORMAT,
        checkpoint_bytes=_size(checkpoint),
        pack_bytes=_size(out),
        expert_bytes=expert_bytes,
        slot_bytes=streamed.experts.budget_bytes,
        same_tokens=streamed.token_ids == resident.token_ids,
        num_tokens=len(streamed.token_ids),
        hit_rate=streamed.experts.hit_rate,
        bytes_read=streamed.experts.bytes_read,
        access=streamed.experts.access,
        resident_tokens_per_s=resident.decode_tokens_per_s or 0.0,
        resident_predicted=resident_predicted,
        disk_tokens_per_s=streamed.decode_tokens_per_s or 0.0,
        disk_predicted=disk_predicted,
        pack=str(packed.path),
    )


def _run(model: Model, prompt: str) -> tuple[Generated, float | None]:
    model.generate(prompt, max_tokens=4)  # what is touched first is not what is compared
    made = model.generate(prompt, max_tokens=_NEW_TOKENS)
    context = made.prompt_tokens + len(made.token_ids) // 2
    rate = made.experts.hit_rate if made.experts.streamed else None
    return made, model.predict_decode(context=context, hit_rate=rate)


def _keep_half(model: Model, module: NativeDecoder) -> None:
    """A budget in which half of the experts have no room, a text of the demo's length has."""
    account = module.account
    text = 4 * module.engine.page_bytes
    half = max(module.pack.layout.expert_bytes // 2, StreamedExperts.least_bytes_of(module.pack))
    model.set_memory(account.fixed_bytes + account.taken_bytes + text + half)


def _size(folder: Path) -> int:
    return sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
