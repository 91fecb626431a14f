"""What decoding remembers: per-layer tensors that grow with the text, and the visibility of cached tokens.

Memory is taken as the text grows (by half again), never for the whole context at once.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Growing:
    """A tensor that grows along dimension -2, e.g. keys (B, H, S, d). `append` returns a view of all so far."""

    def __init__(self) -> None:
        self._store: Tensor | None = None
        self.length = 0

    def append(self, new: Tensor) -> Tensor:
        """Add `new` (..., T, d) behind what is held; returns (..., S, d), valid until the next append."""
        end = self.length + new.shape[-2]
        if self._store is None or end > self._store.shape[-2]:
            capacity = max(end, 64, self.length + self.length // 2)
            grown = new.new_empty((*new.shape[:-2], capacity, new.shape[-1]))
            if self._store is not None:
                grown[..., : self.length, :] = self._store[..., : self.length, :]
            self._store = grown
        self._store[..., self.length : end, :] = new
        self.length = end
        return self._store[..., :end, :]

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` entries."""
        self.length = min(self.length, length)


class LayerCache(dict[str, Growing | Tensor]):
    """One layer's state by name: growing tensors ('keys', 'values', 'latents') or plain ones (recurrent state)."""

    def grow(self, name: str, new: Tensor) -> Tensor:
        slot = self.setdefault(name, Growing())
        assert isinstance(slot, Growing)
        return slot.append(new)


class Cache:
    """All layers' state for one batch of sequences. `length` counts cached columns, padding included."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]
        self.length = 0
        self.visible_BS: Tensor | None = None  # bool; None = every cached column is a real token

    def see(self, mask_BT: Tensor | None, batch: int, num_new: int) -> Tensor | None:
        """Append the visibility of `num_new` columns; (B, S) bool over all columns, or None when all are real."""
        if mask_BT is None and self.visible_BS is None:
            self.length += num_new
            return None
        past = self.visible_BS
        if past is None:
            past = torch.ones((batch, self.length), dtype=torch.bool)
        new = torch.ones((batch, num_new), dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        self.visible_BS = torch.cat((past, new), dim=1)
        self.length += num_new
        return self.visible_BS
