"""A pack becomes what runs: the native engine where every step of it is native, else torch around native experts.

Within a memory budget: what does not fit of the experts stays on disk. The torch module without native parts is the
reference, and runs whatever can be packed.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from fewfire.checkpoints.pack import Pack, open_pack
from fewfire.config import MoEConfig, check
from fewfire.kernels.isa import native, return_freed_memory
from fewfire.model.build import build_model
from fewfire.model.decoder import Decoder
from fewfire.model.encoder_decoder import EncoderDecoder
from fewfire.model.moe import MoELayer
from fewfire.model.recurrent import Recurrent
from fewfire.plan import resident
from fewfire.plan.limits import rss_bytes
from fewfire.plan.memory import TORCH_FLOAT32_BYTES, WeightBytes, activation_bytes, torch_cache_bytes, weight_bytes
from fewfire.runtime.banks import LayerBank, ResidentExperts, StreamedExperts, Streaming
from fewfire.runtime.budget import MARGIN_BYTES, Account, check_floor, default_budget, planned_context
from fewfire.runtime.engine import CACHE_ELEMENT_BYTES, NativeDecoder
from fewfire.runtime.lossy import Lossy
from fewfire.runtime.low import LowPrecision
from fewfire.runtime.lower import why_not_native, why_not_native_experts
from fewfire.runtime.weights import Report

Module = NativeDecoder | Decoder | EncoderDecoder | Recurrent


def load_pack(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    memory: int | None = None,
    context: int | None = None,
    cache: str = "bf16",
    streaming: Streaming | None = None,
    lossy: Lossy | None = None,
    report: Report = lambda num_bytes: None,
) -> Module:
    """The native engine for a pack; torch around native experts where something has no native step (a warning says).

    `memory` bounds the resident bytes of the whole process (None: what the system has left, less an eighth); experts
    beyond it stay on disk. `context`: tokens of a text that are planned for. `cache`: format of keys and values, bf16
    or q8. `dtype` asks for the torch reference, all in memory. `lossy` needs the native engine.

    Raises: as `open_pack`; FormatError where bytes are not those written; BudgetError, with the table of what is
    needed, before anything is loaded.
    """
    pack = open_pack(folder)
    lossy = lossy if lossy is not None and lossy.modes else None
    if lossy is not None:
        _check_lossy(lossy, pack, dtype)
    budget = default_budget() if memory is None else memory
    if native() is None or dtype is not None:
        why = "the extension fewfire._native is missing"
        if dtype is None:
            warnings.warn(f"{folder} runs on torch, dequantized, instead of the native engine: {why}", stacklevel=2)
        return load_packed_module(folder, dtype=dtype)
    return_freed_memory()
    threads = torch.get_num_threads()
    check_floor(
        budget,
        pack.config,
        pack.formats,
        context,
        weights=pack_weights(pack),
        cache_element_bytes=CACHE_ELEMENT_BYTES[cache],
        threads=threads,
        more=_low_bytes(lossy, pack),
    )
    why_not = why_not_native(pack)
    if why_not is None:
        return NativeDecoder(
            pack, budget_bytes=budget, context=context, cache=cache, streaming=streaming, lossy=lossy, report=report
        )
    if not pack.layout.experts or why_not_native_experts(pack) is not None:
        warnings.warn(f"{folder} runs on torch, dequantized, instead of the native engine: {why_not}", stacklevel=2)
        return load_packed_module(folder)
    warnings.warn(f"{folder} runs on torch, but for its experts, instead of the native engine: {why_not}", stacklevel=2)
    return _load_hybrid(pack, budget, context, streaming, report)


def _check_lossy(lossy: Lossy, pack: Pack, dtype: torch.dtype | None) -> None:
    """Raises: ConfigError where modes cannot be had."""
    lossy.check_model([moe for _, _, moe in pack.config.moe_layers])
    missing = "the extension fewfire._native is missing" if native() is None else None
    asked = "a dtype asks for torch" if dtype is not None else None
    why = asked or missing or why_not_native(pack)
    check(why is None, f"lossy modes need the native engine, which does not run this: {why}")


def _low_bytes(lossy: Lossy | None, pack: Pack) -> dict[str, int]:
    """What low-precision copies add to the floor."""
    if lossy is None or lossy.low_precision is None:
        return {}
    return {"low-precision experts": LowPrecision.bytes_of(lossy.low_precision, pack)}


def pack_weights(pack: Pack) -> WeightBytes:
    """The bytes of a pack's weights, as it stores them."""
    return weight_bytes(pack.config, pack.formats)


def load_packed_module(folder: str | Path, *, dtype: torch.dtype | None = None) -> Decoder | EncoderDecoder | Recurrent:
    """The module of a pack, in evaluation mode, in `dtype`; None: float32 up to 4 GiB of it, else bfloat16.

    Selection biases stay float32. Raises: as `open_pack`, and FormatError where bytes are not those written.
    """
    pack = open_pack(folder)
    with torch.device("meta"):
        module = build_model(pack.config)
    _fill(module, pack, dtype)
    return module.eval()


def _load_hybrid(
    pack: Pack, budget: int, context: int | None, streaming: Streaming | None, report: Report
) -> Decoder | EncoderDecoder | Recurrent:
    """Torch around native experts: the trunk dequantized, experts as they are stored, in memory or on disk."""
    with torch.device("meta"):
        module = build_model(pack.config)
    layers = {name: each for name, each in module.named_modules() if isinstance(each, MoELayer)}
    for layer in layers.values():
        del layer.experts
    _fill(module, pack, None)
    context = planned_context(pack.config, context)
    scratch = activation_bytes(pack.config, resident.CHUNKS[-1]) + torch_cache_bytes(pack.config, context)
    account = Account(budget, rss_bytes() + MARGIN_BYTES + scratch)
    fits = pack.layout.expert_bytes <= account.expert_bytes
    experts: ResidentExperts | StreamedExperts
    experts = ResidentExperts(pack, report) if fits else StreamedExperts(pack, account.expert_bytes, streaming)
    account.experts = experts
    experts.account = account
    for number, held in enumerate(pack.layout.experts):
        layer = layers[held.prefix.removesuffix(".experts.")]
        config = layer.config
        assert isinstance(config, MoEConfig)
        layer.experts = experts.bank(number, config.expert, weight_on_input=config.router.weight_on == "input")
    return module.eval()


def experts_of(module: nn.Module) -> ResidentExperts | StreamedExperts | None:
    """The experts of what `load_pack` made; None where torch holds them."""
    if isinstance(module, NativeDecoder):
        return module.experts
    banks = (each.experts for each in module.modules() if isinstance(each, LayerBank))
    return next(banks, None)


def account_of(module: nn.Module) -> Account | None:
    """The memory budget that `module` keeps; None where it has none."""
    if isinstance(module, NativeDecoder):
        return module.account
    experts = experts_of(module)
    return None if experts is None else experts.account


def _fill(module: nn.Module, pack: Pack, dtype: torch.dtype | None) -> None:
    """Dequantize into `module` what it has room for. Routed experts that it does not hold are not read."""
    state = module.state_dict()
    if dtype is None:
        size = 4 * sum(values.numel() for values in state.values())
        dtype = torch.float32 if size <= TORCH_FLOAT32_BYTES else torch.bfloat16
    made: dict[str, Tensor] = {}
    for name, expert, values in pack.parameters(with_experts=any(".experts." in name for name in state)):
        if name not in made:
            kept = torch.float32 if name.endswith("select_bias") else dtype
            made[name] = torch.empty(state[name].shape, dtype=kept)
        target = made[name] if expert is None else made[name][expert]
        target.copy_(values)
    module.load_state_dict(made, strict=True, assign=True)
