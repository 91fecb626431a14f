"""A pack that runs natively: the interface of `model.Decoder`, one native call a step. Token ids in, logits out.

Results of a token depend on the tokens before it alone: not on what else is in the batch, on how a prompt is cut into
chunks, or on the number of threads (tests/test_engine.py). B sequences, T new tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewfire.checkpoints.pack import Pack
from fewfire.config import MoEConfig, check
from fewfire.kernels.isa import native
from fewfire.model.moe import Observer
from fewfire.routing import Routing
from fewfire.runtime.lower import Lowered

PAGE_TOKENS = 64  # native/include/quantized.hpp
CHUNK_TOKENS = 512  # tokens that one native step runs at most


class PagedCache:
    """Keys and values of B sequences of the same length, in pages of 64 tokens (bf16), taken as the texts grow."""

    def __init__(self, page_elements: int):
        self.page_elements, self.length = page_elements, 0
        self.pages: list[list[Tensor]] = []  # of each sequence
        self._table: Tensor | None = None

    def grow(self, batch: int, num_new: int) -> None:
        """Room for `num_new` more tokens of each of `batch` sequences."""
        check(not self.pages or len(self.pages) == batch, f"the cache holds {len(self.pages)} sequences, not {batch}")
        self.pages = self.pages or [[] for _ in range(batch)]
        wanted = -(-(self.length + num_new) // PAGE_TOKENS)
        for each in self.pages:
            while len(each) < wanted:
                each.append(torch.empty(self.page_elements, dtype=torch.bfloat16))
                self._table = None

    @property
    def table(self) -> Tensor:
        """Addresses of all pages, sequence after sequence."""
        if self._table is None:
            self._table = torch.tensor([page.data_ptr() for each in self.pages for page in each], dtype=torch.int64)
        return self._table

    @property
    def num_bytes(self) -> int:
        return sum(2 * self.page_elements * len(each) for each in self.pages)


class NativeDecoder(nn.Module):
    """A causal language model run by the native engine. Holds the pack's weights as they are stored.

    Threads: as many as torch may use. One step at a time for each decoder.
    Raises: FormatError where the pack's bytes are not those written.
    """

    invariant_reason: str | None = None

    def __init__(self, pack: Pack):
        super().__init__()
        module = native()
        assert module is not None, "the caller has asked why_not_native and for the extension"
        self.config = pack.config
        self.lowered = Lowered(pack)
        self.expert_bytes = self.lowered.expert_bytes
        self.engine = module.Engine(self.lowered.spec)
        self._moes = [(index, ffn) for index, layer in enumerate(self.config.layers)
                      if isinstance(ffn := layer.ffn, MoEConfig)]  # fmt: skip

    def new_cache(self) -> PagedCache:
        """An empty cache for one batch of sequences."""
        return PagedCache(self.engine.page_elements)

    def forward(self, ids_BT: Tensor, cache: PagedCache | None = None, *, observe: Observer | None = None) -> Tensor:
        """Logits (B, T, V) float32 of `ids_BT`, the continuation of what `cache` holds."""
        return self.logits(self.hidden(ids_BT, cache, observe=observe))

    def hidden(
        self,
        ids_BT: Tensor,
        cache: Any = None,
        *,
        mask_BT: Tensor | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """(B, T, D) float32 after the final norm. `cache` is extended in place. Padding is not taken."""
        check(mask_BT is None, "the native engine takes no padding; run sequences of different length one by one")
        batch, num_new = ids_BT.shape
        cache = self.new_cache() if cache is None else cache
        limit = self.config.max_context
        check(
            cache.length + num_new <= limit,
            f"{cache.length + num_new} tokens exceed the {limit} that the model was made for; shorten the text",
        )
        out_BTD = torch.empty((batch, num_new, self.config.model_dim))
        step = max(1, CHUNK_TOKENS // max(batch, 1))
        for start in range(0, num_new, step):
            part = ids_BT[:, start : start + step]
            out_BTD[:, start : start + step] = self._step(part, cache, observe)
        return out_BTD

    def _step(self, ids_BT: Tensor, cache: PagedCache, observe: Observer | None) -> Tensor:
        batch, num_new = ids_BT.shape
        if batch * num_new == 0:
            return torch.empty((batch, num_new, self.config.model_dim))
        cache.grow(batch, num_new)
        self.lowered.prepare(cache.length + num_new)
        ids = ids_BT.to(torch.int64).contiguous()
        positions = (cache.length + torch.arange(num_new)).repeat(batch)
        starts = (torch.arange(batch) * len(cache.pages[0])).repeat_interleave(num_new)
        hidden_BTD = torch.empty((batch, num_new, self.config.model_dim))
        count = batch * num_new
        routes = self._route_buffers(count) if observe is not None and self._moes else []
        self.engine.step(
            ids.data_ptr(),
            positions.data_ptr(),
            starts.data_ptr(),
            cache.table.data_ptr(),
            count,
            hidden_BTD.data_ptr(),
            *(each.data_ptr() for each in routes or [torch.empty(0)] * 3),
            torch.get_num_threads(),
        )
        cache.length += num_new
        if observe is not None:
            self._report(observe, routes)
        return hidden_BTD

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
