"""A pack that runs natively: the interface of `model.Decoder`, one native call a step. Token ids in, logits out.

Results of a token depend on the tokens before it alone: not on what else is in the batch, on how a prompt is cut into
chunks, on the number of threads, or on where experts are (tests/test_engine.py, tests/test_streaming.py). B sequences,
T new tokens, N tokens of a step, D model width, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewfire.checkpoints.pack import Pack
from fewfire.config import MoEConfig, check
from fewfire.kernels.isa import native
from fewfire.model.moe import Observer
from fewfire.plan import resident
from fewfire.plan.limits import rss_bytes
from fewfire.routing import Routing
from fewfire.runtime.banks import ResidentExperts, StreamedExperts, Streaming
from fewfire.runtime.budget import MARGIN_BYTES, Account, choose_chunk, default_budget, planned_context, scratch_bytes
from fewfire.runtime.lossy import Lossy
from fewfire.runtime.low import LowPrecision
from fewfire.runtime.lower import Lowered
from fewfire.runtime.weights import Report, Trunk, huge_memory

PAGE_TOKENS = resident.PAGE_TOKENS  # native/include/quantized.hpp
CACHE_ELEMENT_BYTES = {"bf16": 2, "q8": 1}
PHASES = ("norm", "project", "attend", "out", "route", "experts", "wait", "dense", "head")  # native/include/engine.hpp


class SparePages:
    """Pages that texts gave back, for the next ones: new memory is cleared first, and some hosts give it slowly.

    Kept are as many as lie in memory that neither texts nor experts have a use for, and 256 MiB at most.
    """

    MOST_BYTES = 256 * 2**20

    def __init__(self) -> None:
        self._pages: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        return sum(page.numel() for page in self._pages)

    def take(self, page_bytes: int) -> Tensor:
        """A page of that size, of any contents."""
        try:
            return self._pages.pop()
        except IndexError:
            return huge_memory(page_bytes)

    def put(self, pages: Sequence[Tensor], room: int) -> None:
        """Keep these too, as far as there is `room` for all."""
        self._pages += pages
        self.fit(room)

    def fit(self, room: int) -> None:
        """Let go of what exceeds `room` bytes."""
        if self._pages:  # all of one size
            del self._pages[max(0, min(room, self.MOST_BYTES)) // self._pages[0].numel() :]


class PagedSequence:
    """Keys and values of one text, in pages of 64 tokens that are taken as it grows, out of the memory budget."""

    def __init__(self, page_bytes: int, account: Account, spare: SparePages):
        self.page_bytes, self.account, self.spare, self.length = page_bytes, account, spare, 0
        self.pages: list[Tensor] = []
        self._reserved = 0

    def reserve(self, num_tokens: int) -> None:
        """Set memory aside for `num_tokens` in all. Raises: BudgetError where there is not so much."""
        wanted = -(-num_tokens // PAGE_TOKENS)
        if wanted > self._reserved:
            self.account.take(
                (wanted - self._reserved) * self.page_bytes, f"the cache of a text of {num_tokens} tokens"
            )
            self._reserved = wanted

    def grow(self, num_new: int) -> None:
        """Room for `num_new` more tokens."""
        self.reserve(self.length + num_new)
        wanted = -(-(self.length + num_new) // PAGE_TOKENS)
        if len(self.pages) < wanted:
            self.pages += [self.spare.take(self.page_bytes) for _ in range(wanted - len(self.pages))]
            self.account.check()

    def __del__(self) -> None:
        self.account.give(self._reserved * self.page_bytes)
        self.spare.put(self.pages, self.account.unused_bytes)

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

    def __init__(self, page_bytes: int, account: Account, spare: SparePages):
        self.page_bytes, self.account, self.spare = page_bytes, account, spare
        self.sequences: list[PagedSequence] = []

    @property
    def length(self) -> int:
        return self.sequences[0].length if self.sequences else 0

    def of(self, batch: int) -> list[PagedSequence]:
        """The sequences; made now if there are none yet."""
        held = len(self.sequences)
        check(held in (0, batch), f"the cache holds {held} sequences, not {batch}")
        if not held:
            self.sequences = [PagedSequence(self.page_bytes, self.account, self.spare) for _ in range(batch)]
        return self.sequences

    def reserve(self, num_tokens: int, batch: int = 1) -> None:
        """Set memory aside for `num_tokens` of every sequence. Raises: BudgetError where there is not so much."""
        for each in self.of(batch):
            each.reserve(num_tokens)

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

    `budget_bytes` bounds the whole process (None: `default_budget`), experts give way; it is not compared with the
    floor here. `context`: tokens of a text that experts are kept for in memory, if all of them fit (longer texts take
    from them, or are refused). `cache` is the format of keys and values, bf16 or q8. Threads: as many as torch may use.
    `lossy`: what may differ from exact results.
    One step at a time for each decoder. Raises: FormatError where the pack's bytes are not those written.
    """

    invariant_reason: str | None = None

    def __init__(
        self,
        pack: Pack,
        *,
        budget_bytes: int | None = None,
        context: int | None = None,
        cache: str = "bf16",
        streaming: Streaming | None = None,
        lossy: Lossy | None = None,
        report: Report = lambda num_bytes: None,
    ):
        super().__init__()
        self.pack, self.config, self.cache_format = pack, pack.config, cache
        self._moes = [
            (index, layer.ffn) for index, layer in enumerate(self.config.layers) if isinstance(layer.ffn, MoEConfig)
        ]
        self.lossy = lossy if lossy is not None and lossy.modes else None
        self.low: LowPrecision | None = None
        if self.lossy is not None:
            self.lossy.check_model([moe for _, moe in self._moes])
            self.invariant_reason = f"lossy modes are on: {', '.join(self.lossy.modes)}"
        budget = default_budget() if budget_bytes is None else budget_bytes
        self.lowered = Lowered(pack, Trunk(pack, report), cache)
        self._roped = planned_context(self.config, context)
        self.account = Account(budget, rss_bytes() + MARGIN_BYTES)
        self._spare = self.account.spare = SparePages()
        self._open_experts(streaming, report)
        self._table: PageTable | None = None

    def _open_experts(self, streaming: Streaming | None, report: Report) -> None:
        """All in memory where they, a text of the context and the scratch of a step fit; else as many as do."""
        account, context, threads = self.account, self._roped, torch.get_num_threads()
        text = resident.paged_cache_bytes(self.config, context, element_bytes=CACHE_ELEMENT_BYTES[self.cache_format])
        experts = self.pack.layout.expert_bytes
        room = account.expert_bytes - experts - text
        fits = scratch_bytes(self.config, resident.CHUNKS[-1], context, threads) <= room
        if fits:
            self._planned_chunk = self._scratch_tokens = choose_chunk(self.config, room, context, threads, share=1.0)
        else:
            self._open_low(report)
            account.fixed_bytes -= self.lowered.leave_embedding_on_disk()
            self._planned_chunk = choose_chunk(self.config, account.expert_bytes, context, threads)
            self._scratch_tokens = resident.CHUNKS[-1]
        account.fixed_bytes += self._scratch_bytes(self._scratch_tokens)
        if fits or not experts:
            self.use(ResidentExperts(self.pack, report))
        else:
            self.use(StreamedExperts(self.pack, account.expert_bytes, streaming))

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a prefill step: as many as were planned for, fewer where memory has become short since."""
        fits = (
            n for n in resident.CHUNKS if n <= self._planned_chunk and self._missing_scratch(n) <= self.account.room
        )
        return next(fits, resident.CHUNKS[-1])

    def _step_tokens(self, num_tokens: int) -> int:
        """As many of these tokens as one step takes."""
        return num_tokens if num_tokens <= self._scratch_tokens else min(num_tokens, self.chunk_tokens)

    def _scratch_bytes(self, num_tokens: int) -> int:
        return scratch_bytes(self.config, num_tokens, self._roped, torch.get_num_threads())

    def _missing_scratch(self, num_tokens: int) -> int:
        if num_tokens <= self._scratch_tokens:
            return 0
        return self._scratch_bytes(num_tokens) - self._scratch_bytes(self._scratch_tokens)

    def _make_room(self, num_tokens: int) -> None:
        """Scratch for a step of so many tokens: what is missing is taken from experts when first needed, and kept.

        Raises: BudgetError where there is not so much.
        """
        if num_tokens > self._scratch_tokens:
            self.account.take(self._missing_scratch(num_tokens), f"a step of {num_tokens} tokens")
            self._scratch_tokens = num_tokens

    def use(self, experts: ResidentExperts | StreamedExperts) -> None:
        """Run with these experts of the same pack from now on; texts go on as they were."""
        module = native()
        assert module is not None, "the caller has asked why_not_native and for the extension"
        self.experts = self.account.experts = experts
        self.engine = module.Engine(self.lowered.spec, experts.source)
        if self.lossy is not None:
            low = self.low if isinstance(experts, StreamedExperts) else None
            if low is not None:
                experts.source.set_low(low.experts.source)
            layouts = [] if low is None else low.layouts
            self.engine.set_lossy(self.lossy.prefer_cached, self.lossy.top_p, layouts)

    def _open_low(self, report: Report = lambda num_bytes: None) -> None:
        """Low-precision copies of all experts, if they are asked for, in memory taken from the budget."""
        if self.lossy is not None and self.lossy.low_precision is not None and self.low is None:
            self.low = LowPrecision(self.lossy.low_precision, self.pack, self.account, report)

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Lossy modes rest."""
        self.engine.set_exact(True)
        try:
            yield
        finally:
            self.engine.set_exact(self.lossy is None)

    def set_budget(self, budget_bytes: int, streaming: Streaming | None = None) -> None:
        """Another memory budget from now on; experts leave memory where they no longer all fit.

        Raises: BudgetError, and nothing changes, where what is held already exceeds it.
        """
        resident_now = isinstance(self.experts, ResidentExperts)
        if not resident_now or self.account.fits(budget_bytes):
            self.account.change(budget_bytes)
            return
        least, low = StreamedExperts.least_bytes_of(self.pack), 0
        if self.lossy is not None and self.lossy.low_precision is not None and self.low is None:
            low = LowPrecision.bytes_of(self.lossy.low_precision, self.pack)
        self.account.check_change(budget_bytes, least + low)
        self.account.fixed_bytes -= self.lowered.leave_embedding_on_disk()
        room = budget_bytes - self.account.fixed_bytes - self.account.taken_bytes - low
        experts = StreamedExperts(self.pack, room, streaming)
        self.account.budget_bytes = budget_bytes
        self.use(experts)
        if low:
            self._open_low()
            self.use(experts)

    @property
    def resident_weights(self) -> Tensor:
        """Stored bytes that are in memory anyway: the trunk, or experts where there are more of them."""
        trunk, experts = self.lowered.trunk.in_memory, self.experts.touched_memory
        return experts if experts.numel() > trunk.numel() else trunk

    def new_cache(self) -> PagedCache:
        return PagedCache(self.engine.page_bytes, self.account, self._spare)

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
        step = max(1, self._step_tokens(batch * num_new) // max(batch, 1))
        check(replay is None or batch == 1 or num_new <= step, f"replayed steps hold {step} tokens of a text at most")
        if num_new <= step:
            return self.run(sequences, list(ids_BT), observe, replay).view(batch, num_new, self.config.model_dim)
        with self.account.lent(4 * ids_BT.numel() * self.config.model_dim, f"the states of {num_new} tokens"):
            hidden_BTD = torch.empty((batch, num_new, self.config.model_dim))
            for start in range(0, num_new, step):
                some = ids_BT[:, start : start + step]
                routed = None if replay is None else replay.part(start * batch, (start + some.shape[1]) * batch)
                made_ND = self.run(sequences, list(some), observe, routed)
                hidden_BTD[:, start : start + step] = made_ND.view(batch, -1, self.config.model_dim)
        return hidden_BTD

    def run(
        self,
        sequences: Sequence[PagedSequence],
        ids: Sequence[Tensor],
        observe: Observer | None = None,
        replay: Replay | None = None,
    ) -> Tensor:
        """One step over new tokens of several texts, each as many as it has: (N, D) after the final norm, in order.

        Raises: ConfigError where a text would exceed the model's context, BudgetError where it would exceed the memory
        budget, FormatError where an expert cannot be read.
        """
        limit = self.config.max_context
        longest = max((each.length + len(new) for each, new in zip(sequences, ids, strict=True)), default=0)
        check(longest <= limit, f"{longest} tokens exceed the {limit} that the model was made for; shorten the text")
        table, starts = self._grow(sequences, ids)
        self._prepare(longest)
        self._make_room(sum(len(new) for new in ids))
        flat_N = torch.cat(list(ids)).to(torch.int64) if len(ids) != 1 else ids[0].to(torch.int64).contiguous()
        count = flat_N.numel()
        hidden_ND = torch.empty((count, self.config.model_dim))
        if not count:
            return hidden_ND
        lengths = [each.length for each in sequences]
        if all(len(new) == 1 for new in ids):
            positions_N, starts_N = torch.tensor(lengths), starts
        else:
            positions_N = torch.cat([torch.arange(at, at + len(new)) for at, new in zip(lengths, ids)])
            starts_N = starts.repeat_interleave(torch.tensor([len(new) for new in ids]))
        observed = observe is not None and bool(self._moes)
        with self.account.lent(self._route_bytes(count), "what routers chose") if observed else nullcontext():
            routes = self._route_buffers(count) if observed else []
            replayed = [] if replay is None else [replay.ids_LNK, replay.weights_LNK]
            with self.experts.named_errors():
                self.engine.step(
                    flat_N.data_ptr(),
                    positions_N.data_ptr(),
                    starts_N.data_ptr(),
                    table.data_ptr(),
                    count,
                    hidden_ND.data_ptr(),
                    [
                        *(each.data_ptr() for each in routes or _NONE),
                        *(each.data_ptr() for each in replayed or _NONE[:2]),
                    ],
                    torch.get_num_threads(),
                )
            for each, new in zip(sequences, ids):
                each.length += len(new)
            if observe is not None:
                self._report(observe, routes)
        return hidden_ND

    def _prepare(self, longest: int) -> None:
        """Angles up to the longest text; what exceeds the planned context is taken from the budget."""
        if longest > self._roped:
            more = resident.rope_bytes(self.config, 2 * longest) - resident.rope_bytes(self.config, self._roped)
            self.account.take(more, f"the angles of {longest} positions")
            self._roped = 2 * longest
        self.lowered.prepare(longest)

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

    def _route_bytes(self, count: int) -> int:
        router = self._moes[0][1].router
        return len(self._moes) * count * (8 * router.top_k + 4 * router.num_experts) + 16 * count * router.num_experts

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
            dropped = self.lossy is not None and self.lossy.top_p < 1  # those are ~id
            kept = ids >= 0 if dropped else None
            chosen = torch.where(kept, ids, ~ids).long() if kept is not None else ids.long()
            observe(layer, Routing(chosen, weights, logits, scores, kept))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32."""
        rows, vocab = hidden.reshape(-1, hidden.shape[-1]).float().contiguous(), self.config.vocab_size
        count = rows.shape[0]
        with self.account.lent(4 * count * vocab, f"the logits of {count} tokens") if count > 1 else nullcontext():
            out = torch.empty((count, vocab))
            step = max(1, self._step_tokens(count))
            self._make_room(step)
            for part, target in zip(rows.split(step), out.split(step), strict=True):
                self.engine.head(part.data_ptr(), part.shape[0], target.data_ptr(), torch.get_num_threads())
        return out.reshape(*hidden.shape[:-1], vocab)


class _Null:
    """The address of nothing."""

    @staticmethod
    def data_ptr() -> int:
        return 0


_NONE = (_Null, _Null, _Null)
