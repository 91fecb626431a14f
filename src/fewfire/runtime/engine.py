"""A pack that runs natively: the interface of `model.Decoder`, one native call a step. Token ids in, logits out.

Results of a token depend on the tokens before it alone: not on what else is in the batch, on how a prompt is cut into
chunks, or on the number of threads (tests/test_engine.py). B sequences, T new tokens, N tokens of a step, D model
width, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewfire.checkpoints.pack import Pack
from fewfire.config import MoEConfig, check
from fewfire.kernels.isa import native
from fewfire.model.moe import Observer
from fewfire.routing import Routing
from fewfire.runtime.lower import Lowered
from fewfire.runtime.weights import Report, Trunk, read_experts

PAGE_TOKENS = 64  # native/include/quantized.hpp
CHUNK_TOKENS = 512  # tokens that one native step runs at most
PHASES = ("norm", "project", "attend", "out", "route", "experts", "wait", "dense", "head")  # native/include/engine.hpp


class PagedSequence:
    """Keys and values of one text, in pages of 64 tokens that are taken as it grows."""

    def __init__(self, page_bytes: int):
        self.page_bytes, self.length = page_bytes, 0
        self.pages: list[Tensor] = []

    def grow(self, num_new: int) -> None:
        """Room for `num_new` more tokens."""
        wanted = -(-(self.length + num_new) // PAGE_TOKENS)
        while len(self.pages) < wanted:
            self.pages.append(torch.empty(self.page_bytes, dtype=torch.uint8))

    @property
    def num_bytes(self) -> int:
        return self.page_bytes * len(self.pages)


class PageTable:
    """Addresses of all pages of some texts, text after text, and where each text's begin."""

    def __init__(self, sequences: Sequence[PagedSequence]):
        self._made_of = [(weakref.ref(each), len(each.pages)) for each in sequences]
        counts = [len(each.pages) for each in sequences]
        self.addresses = torch.tensor([page.data_ptr() for each in sequences for page in each.pages], dtype=torch.int64)
        self.starts = torch.tensor([0, *counts[:-1]]).cumsum(0)

    def fits(self, sequences: Sequence[PagedSequence]) -> bool:
        """Whether these are the same texts, and no page has come since."""
        return len(sequences) == len(self._made_of) and all(
            ref() is each and pages == len(each.pages) for (ref, pages), each in zip(self._made_of, sequences)
        )


class PagedCache:
    """The sequences of one batch, all of the same length."""

    def __init__(self, page_bytes: int):
        self.page_bytes = page_bytes
        self.sequences: list[PagedSequence] = []

    @property
    def length(self) -> int:
        return self.sequences[0].length if self.sequences else 0

    def of(self, batch: int) -> list[PagedSequence]:
        """The sequences; made now if there are none yet."""
        held = len(self.sequences)
        check(held in (0, batch), f"the cache holds {held} sequences, not {batch}")
        if not held:
            self.sequences = [PagedSequence(self.page_bytes) for _ in range(batch)]
        return self.sequences

    @property
    def num_bytes(self) -> int:
        return sum(each.num_bytes for each in self.sequences)


@dataclass(frozen=True)
class Replay:
    """Routing that is taken instead of the routers' own: int32 ids and float32 weights, (MoE layers, N, top_k)."""

    ids_LNK: Tensor
    weights_LNK: Tensor

    def part(self, begin: int, end: int) -> Replay:
        return Replay(self.ids_LNK[:, begin:end].contiguous(), self.weights_LNK[:, begin:end].contiguous())


class NativeDecoder(nn.Module):
    """A causal language model run by the native engine. Holds the pack's weights as they are stored.

    `cache` is the format of keys and values, bf16 or q8. Threads: as many as torch may use. One step at a time for each
    decoder. Raises: FormatError where the pack's bytes are not those written.
    """

    invariant_reason: str | None = None

    def __init__(self, pack: Pack, *, cache: str = "bf16", report: Report = lambda num_bytes: None):
        super().__init__()
        module = native()
        assert module is not None, "the caller has asked why_not_native and for the extension"
        self.pack, self.config = pack, pack.config
        self.expert_bytes = pack.layout.expert_bytes
        self.lowered = Lowered(pack, Trunk(pack, report), cache)
        self._moes = [
            (index, layer.ffn) for index, layer in enumerate(self.config.layers) if isinstance(layer.ffn, MoEConfig)
        ]
        self._memory = read_experts(pack, report)
        layers = pack.layout.experts
        addresses = [self._memory.data_ptr() + layer.offset for layer in layers]
        experts = module.ResidentExperts(addresses, [layer.record_bytes for layer in layers])
        self.engine = module.Engine(self.lowered.spec, experts if layers else None)
        self._table: PageTable | None = None

    def new_cache(self) -> PagedCache:
        return PagedCache(self.engine.page_bytes)

    def forward(self, ids_BT: Tensor, cache: Any = None, *, observe: Observer | None = None) -> Tensor:
        """Logits (B, T, V) float32 of `ids_BT`, the continuation of what `cache` holds."""
        return self.logits(self.hidden(ids_BT, cache, observe=observe))

    def hidden(
        self,
        ids_BT: Tensor,
        cache: Any = None,
        *,
        mask_BT: Tensor | None = None,
        observe: Observer | None = None,
        replay: Replay | None = None,
    ) -> Tensor:
        """(B, T, D) float32 after the final norm. `cache` is extended in place. Padding is not taken.

        `replay`: routing of all tokens, sequence after sequence; only where all of them fit one step.
        """
        check(mask_BT is None, "the native engine takes no padding; run sequences of different length one by one")
        batch, num_new = ids_BT.shape
        cache = self.new_cache() if cache is None else cache
        sequences = cache.of(batch)
        step = max(1, CHUNK_TOKENS // max(batch, 1))
        check(replay is None or batch == 1 or num_new <= step, f"replayed steps hold {CHUNK_TOKENS} tokens at most")
        parts = []
        for start in range(0, num_new, step):
            some = ids_BT[:, start : start + step]
            routed = None if replay is None else replay.part(start * batch, (start + some.shape[1]) * batch)
            made_ND = self.run(sequences, list(some), observe, routed)
            parts.append(made_ND.view(batch, -1, self.config.model_dim))
        return torch.cat(parts, dim=1) if parts else torch.empty((batch, 0, self.config.model_dim))

    def run(
        self,
        sequences: Sequence[PagedSequence],
        ids: Sequence[Tensor],
        observe: Observer | None = None,
        replay: Replay | None = None,
    ) -> Tensor:
        """One step over new tokens of several texts, each as many as it has: (N, D) after the final norm, in order.

        Raises: ConfigError where a text would exceed the model's context.
        """
        limit, table, starts = self.config.max_context, *self._grow(sequences, ids)
        longest = max((each.length + len(new) for each, new in zip(sequences, ids, strict=True)), default=0)
        check(longest <= limit, f"{longest} tokens exceed the {limit} that the model was made for; shorten the text")
        self.lowered.prepare(longest)
        flat_N = torch.cat(list(ids)).to(torch.int64) if len(ids) != 1 else ids[0].to(torch.int64).contiguous()
        count = flat_N.numel()
        hidden_ND = torch.empty((count, self.config.model_dim))
        if not count:
            return hidden_ND
        positions_N = torch.cat(
            [torch.arange(each.length, each.length + len(new)) for each, new in zip(sequences, ids)]
        )
        starts_N = starts.repeat_interleave(torch.tensor([len(new) for new in ids]))
        routes = self._route_buffers(count) if observe is not None and self._moes else []
        replayed = [] if replay is None else [replay.ids_LNK, replay.weights_LNK]
        self.engine.step(
            flat_N.data_ptr(),
            positions_N.data_ptr(),
            starts_N.data_ptr(),
            table.data_ptr(),
            count,
            hidden_ND.data_ptr(),
            [*(each.data_ptr() for each in routes or _NONE), *(each.data_ptr() for each in replayed or _NONE[:2])],
            torch.get_num_threads(),
        )
        for each, new in zip(sequences, ids):
            each.length += len(new)
        if observe is not None:
            self._report(observe, routes)
        return hidden_ND

    def _grow(self, sequences: Sequence[PagedSequence], ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Room for the new tokens; addresses of all pages and where each text's begin."""
        for each, new in zip(sequences, ids, strict=True):
            each.grow(len(new))
        table = self._table
        if table is None or not table.fits(sequences):
            table = self._table = PageTable(sequences)
        return table.addresses, table.starts

    def take_timings(self) -> dict[str, float]:
        """Seconds in each phase of all steps since this was last asked."""
        return dict(zip(PHASES, self.engine.take_timings(), strict=True))

    def _route_buffers(self, count: int) -> list[Tensor]:
        router = self._moes[0][1].router
        chosen = (len(self._moes), count, router.top_k)
        logits = (len(self._moes), count, router.num_experts)
        return [torch.empty(chosen, dtype=torch.int32), torch.empty(chosen), torch.empty(logits)]

    def _report(self, observe: Callable[[int, Routing], None], routes: list[Tensor]) -> None:
        if not routes:
            return
        for (layer, moe), ids, weights, logits in zip(self._moes, *routes, strict=True):
            sigmoid = moe.router.score.startswith("sigmoid")
            scores = torch.sigmoid(logits) if sigmoid else torch.softmax(logits, dim=-1)
            observe(layer, Routing(ids.long(), weights, logits, scores))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32."""
        rows = hidden.reshape(-1, hidden.shape[-1]).float().contiguous()
        out = torch.empty((rows.shape[0], self.config.vocab_size))
        for part, target in zip(rows.split(CHUNK_TOKENS), out.split(CHUNK_TOKENS), strict=True):
            self.engine.head(part.data_ptr(), part.shape[0], target.data_ptr(), torch.get_num_threads())
        return out.reshape(*hidden.shape[:-1], self.config.vocab_size)


class _Null:
    """The address of nothing."""

    @staticmethod
    def data_ptr() -> int:
        return 0


_NONE = (_Null, _Null, _Null)
