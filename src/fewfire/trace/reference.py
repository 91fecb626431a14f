"""The store's decisions in plain Python: small, slow, obvious. native/residency.cpp and policies.cpp equal it.

A policy keeps nothing but what it needs; who is in memory, `Cache` knows. Ids count all layers' records.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from fewfire.runtime.banks import LayerCounts

if TYPE_CHECKING:
    from fewfire.trace.simulate import Step

FADE = 255 / 256  # of what is learned of reuse, a layer's turn
MOST = 2.0**400  # weights stay below it


class Lru:
    """Least recently used."""

    def __init__(self) -> None:
        self.clock, self.used = 0, dict[int, int]()

    def want(self, first_id: int, ids: Sequence[int]) -> None: ...

    def hit(self, id: int) -> None:
        self.clock += 1
        self.used[id] = self.clock

    insert = hit

    def remove(self, id: int) -> None:
        del self.used[id]

    def victim(self, may_leave: Collection[int]) -> int | None:
        return min(may_leave, key=lambda id: self.used[id], default=None)


class Lfru:
    """How probably a record is wanted when its layer runs next, over how long its slot waits for that. The chance: the
    fading share of passes over the model in which it was wanted, and more where it was in the layer's last turn. How
    much more is learned: the share of the last turn's records that come again, beyond what their fading shares explain.
    So is the half-life of shares: of three, that whose chances have lately been nearest to what was wanted."""

    def __init__(self, first_ids: Sequence[int]) -> None:
        self.first_ids, self.layer = first_ids, first_ids[-1]
        self.memories = [Memory(2 ** (1 / half_life)) for half_life in (16, 64, 256)]
        self.used, self.last = self.memories[0], dict[int, list[int]]()
        self.again, self.seen = 1.0, 4.0

    def want(self, first_id: int, ids: Sequence[int]) -> None:
        if first_id <= self.layer:
            self.used = min(self.memories, key=lambda memory: memory.error)
            for memory in self.memories:
                memory.fade()
        self.layer = first_id
        last = self.last.get(first_id, [])
        if last:
            for memory in self.memories:
                memory.error += self.error(memory, first_id, last, ids)
            self.again, self.seen = self.again * FADE, self.seen * FADE
            for memory in self.memories:
                memory.expected *= FADE
            for id in last:
                self.again += id in ids
                self.seen += 1
                for memory in self.memories:
                    memory.expected += memory.sums[id] / memory.total
        self.last[first_id] = list(ids)
        for id in ids:
            for memory in self.memories:
                memory.set(first_id, id, memory.sums[id] + memory.weight)

    def error(self, memory: Memory, first_id: int, last: Sequence[int], ids: Sequence[int]) -> float:
        """The sum over a layer's records of (chance - wanted)², less the number wanted."""
        reuse = self.reuse(memory)
        fades = (1 - reuse) / memory.total
        wanted = sum(fades * memory.sums[id] + (reuse if id in last else 0) for id in ids)
        again = 2 * fades * sum(memory.sums[id] for id in last) + reuse * len(last)
        return fades * fades * memory.squares[first_id] + reuse * again - 2 * wanted

    def reuse(self, memory: Memory) -> float:
        extra = self.again - memory.expected
        return extra / (self.seen - memory.expected) if extra > 0 else 0.0

    def hit(self, id: int) -> None: ...

    def number(self, id: int) -> int:
        """The layer of a record."""
        return bisect.bisect_right(self.first_ids, id) - 1

    def is_last(self, id: int) -> bool:
        return any(id in ids for ids in self.last.values())

    def insert(self, id: int) -> None:
        if not self.is_last(id):
            first_id = self.first_ids[self.number(id)]
            for memory in self.memories:
                memory.set(first_id, id, max(memory.sums[id], memory.weight))

    def remove(self, id: int) -> None: ...

    def victim(self, may_leave: Collection[int]) -> int | None:
        return min(may_leave, key=lambda id: (self.worth(id), self.number(id), self.is_last(id), id), default=None)

    def worth(self, id: int) -> float:
        """The chance that it is wanted in its layer's next turn, over 1 + the share of a pass until then."""
        reuse, memory, num_layers = self.reuse(self.used), self.used, len(self.first_ids)
        chance = (1 - reuse) / (memory.total + memory.weight) * memory.sums[id] + (reuse if self.is_last(id) else 0)
        turns = (self.number(id) - self.number(self.layer) - 1) % num_layers + 1
        return chance / (1 + turns / num_layers)


class Memory:
    """Fading shares of one half-life: sums of weights, of which each pass over the model has a larger one."""

    def __init__(self, growth: float):
        self.growth, self.weight, self.total = growth, 1.0, 0.0
        self.sums, self.squares = defaultdict[int, float](float), defaultdict[int, float](float)
        self.expected, self.error = 0.0, 0.0

    def set(self, first_id: int, id: int, value: float) -> None:
        self.squares[first_id] += value * value - self.sums[id] * self.sums[id]
        self.sums[id] = value

    def fade(self) -> None:
        """One pass has ended."""
        self.error *= 2 ** (-1 / 64)
        self.total += self.weight
        self.weight *= self.growth
        if self.weight >= MOST:
            self.weight, self.total = self.weight / MOST, self.total / MOST
            self.sums = defaultdict(float, {id: value / MOST for id, value in self.sums.items()})
            self.squares = defaultdict(float, {id: value / (MOST * MOST) for id, value in self.squares.items()})


class S3Fifo:
    """A short queue for what is new, a long one for what was wanted again, and a memory of what left the short one."""

    def __init__(self) -> None:
        self.small, self.main = list[int](), list[int]()
        self.uses, self.ghost, self.clock = Counter[int](), dict[int, int](), 0

    def want(self, first_id: int, ids: Sequence[int]) -> None: ...

    def hit(self, id: int) -> None:
        self.uses[id] = min(self.uses[id] + 1, 3)

    def insert(self, id: int) -> None:
        remembered = id in self.ghost and self.clock - self.ghost[id] <= len(self.main) + len(self.small)
        (self.main if remembered else self.small).append(id)
        self.uses[id] = 0

    def remove(self, id: int) -> None:
        if id in self.main:
            self.main.remove(id)
            return
        self.small.remove(id)
        self.clock += 1
        self.ghost[id] = self.clock

    def victim(self, may_leave: Collection[int]) -> int | None:
        size = len(self.small) + len(self.main)
        for _ in range(5 * size + 1):
            from_small = len(self.small) * 10 > size or not self.main
            queue = self.small if from_small else self.main
            if not queue:
                return None
            id = queue[0]
            if id in may_leave and self.uses[id] == 0:
                return id
            queue.pop(0)
            if id in may_leave:  # wanted since it came: to the long queue, or round again
                self.uses[id] -= 1
                self.main.append(id)
            else:
                queue.append(id)
        return next((id for id in (*self.small, *self.main) if id in may_leave), None)


class Belady:
    """What is wanted latest leaves. `wanted`: all ids of the trace; `now`: where what comes after this begins."""

    def __init__(self, wanted: Sequence[int]):
        self.uses, self.now = dict[int, list[int]](), 0
        self.next = dict[int, float]()
        for at, id in enumerate(wanted):
            self.uses.setdefault(id, []).append(at)

    def want(self, first_id: int, ids: Sequence[int]) -> None:
        self.now += len(ids)

    def hit(self, id: int) -> None:
        uses = self.uses.get(id, [])
        at = bisect.bisect_left(uses, self.now)
        self.next[id] = uses[at] if at < len(uses) else float("inf")

    insert = hit

    def remove(self, id: int) -> None:
        del self.next[id]

    def victim(self, may_leave: Collection[int]) -> int | None:
        return min(may_leave, key=lambda id: (-self.next[id], id), default=None)


class Cache:
    """Which records are in memory. In prefill, in order, those that are not pass through a few slots (`idle` of the
    window) without pushing out what is, once their layer has its share of free slots."""

    def __init__(self, first_ids: Sequence[int], slots: int, policy: Any):
        self.first_ids, self.slots, self.policy = first_ids, slots, policy
        self.free, self.idle, self.window = slots, 0, 0
        self.held, self.passing, self.pins = set[int](), set[int](), Counter[int]()
        self.ahead, self.ahead_layer, self.ahead_next = list[int](), -1, 0
        self.waiting = deque[int]()
        self.hits, self.misses, self.useful, self.wasted = (Counter[int]() for _ in range(4))
        self.evictions = 0

    def run(self, step: Step) -> None:
        """One layer: all that it wants, given back one after the other."""
        layer, first = step.layer, self.first_ids[step.layer]
        ids = [first + expert for expert in step.experts]
        in_order = step.in_order or len(ids) > self.slots
        self.policy.want(first, ids)
        expected = self._end_read_ahead(layer, ids)
        if in_order:
            self._make_window(ids)
        else:
            self.free, self.idle, self.window = self.free + self.idle, 0, 0
        missing = []
        for id in ids:
            self.pins[id] += 1
            if id in expected:  # it had to be read, though earlier
                self.misses[layer] += 1
                self.useful[layer] += 1
                self.pins[id] -= 1
            elif id in self.held:
                self.hits[layer] += 1
                self.policy.hit(id)
            else:
                self.misses[layer] += 1
                missing.append(id)
        self.waiting.extend(missing)
        reads_ahead = step.reads_ahead and in_order
        self._admit(layer, in_order, reads_ahead)
        for id in ids:
            self.pins[id] -= 1
            if id in self.passing and not self.pins[id]:
                self.passing.remove(id)
                self.idle += 1
            self._admit(layer, in_order, reads_ahead)
        assert not self.waiting

    def _admit(self, layer: int, in_order: bool, reads_ahead: bool) -> None:
        """Slots for what waits for one, in order; then for the next layer."""
        while self.waiting and self._place(self.waiting[0], in_order):
            self.waiting.popleft()
        if not reads_ahead or self.waiting or layer + 2 >= len(self.first_ids):
            return
        if self.ahead_layer != layer + 1:
            self.ahead_layer, self.ahead_next = layer + 1, self.first_ids[layer + 1]
        while self.idle and self.ahead_next < self.first_ids[layer + 2]:
            id, self.ahead_next = self.ahead_next, self.ahead_next + 1
            if id not in self.held and id not in self.passing:
                self.idle -= 1
                self.passing.add(id)
                self.pins[id] += 1
                self.ahead.append(id)

    def _place(self, id: int, in_order: bool) -> bool:
        if self._room(id) if in_order else self.free:
            self.free -= 1
        elif in_order:
            if not self.idle:
                return False
            self.idle -= 1
            self.passing.add(id)
            return True
        elif not self._evict():
            return False
        self.held.add(id)
        self.policy.insert(id)
        return True

    def _room(self, id: int) -> int:
        """Free slots that the layer of a record may take in a prompt: its share, less what it has."""
        layer = bisect.bisect_right(self.first_ids, id) - 1
        first, last = self.first_ids[layer : layer + 2]
        share = -(-self.slots * (last - first) // self.first_ids[-1])
        return min(self.free, max(0, share - sum(first <= held < last for held in self.held)))

    def _evict(self) -> bool:
        id = self.policy.victim({id for id in self.held if not self.pins[id]})
        if id is None:
            return False
        self.held.remove(id)
        self.policy.remove(id)
        self.evictions += 1
        return True

    def _make_window(self, ids: Sequence[int]) -> None:
        missing = sum(id not in self.held and id not in self.passing for id in ids)
        room = self._room(ids[0])
        size = min(min(max(self.slots // 4, 2), 16), missing - room)
        while self.window < size:
            if self.free > room or not self._evict():
                if not self.free:
                    return
                self.free -= 1
            self.idle += 1
            self.window += 1

    def _end_read_ahead(self, layer: int, ids: Sequence[int]) -> set[int]:
        """Those that were read for this layer, and are wanted. The others' slots are idle again."""
        expected = {id for id in self.ahead if layer == self.ahead_layer and id in ids}
        for id in self.ahead:
            if id not in expected:
                self.pins[id] -= 1
                self.passing.remove(id)
                self.idle += 1
                self.wasted[self.ahead_layer] += 1
        self.ahead, self.ahead_layer = [], -1
        return expected


def simulate(
    policy: str, first_ids: Sequence[int], slots: int, steps: Sequence[Step]
) -> tuple[tuple[LayerCounts, ...], int]:
    """Counts by layer, and evictions."""
    wanted = [first_ids[step.layer] + expert for step in steps for expert in step.experts]
    made = {"lru": Lru, "lfru": lambda: Lfru(first_ids[:-1]), "s3fifo": S3Fifo, "belady": lambda: Belady(wanted)}[
        policy
    ]()
    cache = Cache(first_ids, slots, made)
    for step in steps:
        cache.run(step)
    counts = (cache.hits, cache.misses, cache.useful, cache.wasted)
    layers = tuple(LayerCounts(*(count[layer] for count in counts)) for layer in range(len(first_ids) - 1))
    return layers, cache.evictions
