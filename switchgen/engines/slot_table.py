"""Which context has which slot of a cache: rows are seated, moved side by side, and make room for others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from switchgen.engines.base import Context, EngineStats
from switchgen.engines.slots import SlotCache, length_groups

_SLOTS = 8
"""Slots come in multiples of this."""


class SlotTable:
    """The owners of a cache's slots.

    Args:
        max_slots: how many there may be; the least recently used row makes room for a new one.
    """

    def __init__(self, cache: SlotCache, max_slots: int) -> None:
        self.cache = cache
        self.max_slots = max_slots
        self.owners: list[Context | None] = []
        """By slot; None where it is free."""
        self._clock = 0

    def release(self, context: Context) -> None:
        """Free the context's slot, if it has one."""
        if context.slot is not None:
            self.owners[context.slot] = None
            context.slot, context.cached = None, 0

    def clear(self) -> None:
        """Free all slots and give the cache's memory back."""
        for owner in self.owners:
            if owner is not None:
                self.release(owner)
        self.owners = []
        self.cache.clear()

    def seat(self, contexts: Sequence[Context], parents: Sequence[Context], leave: int, stats: EngineStats) -> None:
        """Give every context a slot; one of these parents' forks starts with a copy of what its parent has read.

        Args:
            parents: have slots of their own.
            leave: how many of each context's last tokens are not wanted in the cache.
        """
        self._clock += 1
        for context in [*contexts, *parents]:
            context.last_used = self._clock
        readers = set(map(id, parents))
        homeless = [context for context in contexts if context.slot is None]
        self._make_room(len(homeless))
        copies: list[tuple[int, int, int]] = []
        for context in homeless:
            context.slot, context.cached = self._free_slot(stats), 0
            self.owners[context.slot] = context
            parent = context.parent
            if parent is not None and parent.slot is not None and id(parent) in readers:
                context.cached = min(context.shared, parent.cached, len(context.ids) - leave)
                copies.append((parent.slot, context.slot, context.cached))
        copies = [copy for copy in copies if copy[2] > 0]
        if copies:
            sources, targets, lengths = zip(*copies, strict=True)
            self.cache.move(list(sources), list(targets), max(lengths))
            stats.copied_rows += len(copies)

    def make_resident(self, contexts: Sequence[Context]) -> list[int]:
        """Bring the contexts into slots 0 … n-1, rows of like length side by side.

        Returns:
            For each slot the index of its context.
        """
        by_length = sorted(contexts, key=lambda context: -context.cached)
        residents: list[Context | None] = [None] * len(contexts)
        for first, last in length_groups([context.cached for context in by_length]):
            run = by_length[first:last]
            # Rows that are in their run's slots already stay where they are.
            moving = [context for context in run if not first <= context.place < last]
            for context in run:
                if first <= context.place < last:
                    residents[context.place] = context
            for slot in range(first, last):
                if residents[slot] is None:
                    residents[slot] = moving.pop()
        self._rearrange([context for context in residents if context is not None])
        wanted = {id(context): index for index, context in enumerate(contexts)}
        return [wanted[id(self.owners[slot])] for slot in range(len(contexts))]

    def _rearrange(self, residents: Sequence[Context]) -> None:
        """Move rows so that the first slots are these contexts'; who sat there takes the slots they left."""
        count = len(residents)
        staying = {id(context) for context in residents}
        left = [context.place for context in residents if context.place >= count]
        guests = [owner for owner in self.owners[:count] if owner is not None and id(owner) not in staying]
        targets = [*zip(residents, range(count), strict=True), *zip(guests, left, strict=False)]
        moves = [(context, target) for context, target in targets if context.slot != target]
        for slot in left:
            self.owners[slot] = None
        copied = [(context.place, target, context.cached) for context, target in moves if context.cached]
        for context, target in moves:
            self.owners[target], context.slot = context, target
        if copied:
            sources, places, lengths = zip(*copied, strict=True)
            self.cache.move(list(sources), list(places), max(lengths))

    def exchange(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Swap the rows of each pair of slots."""
        sources: list[int] = []
        targets: list[int] = []
        length = 0
        for left, right in pairs:
            for source, target in ((left, right), (right, left)):
                owner = self.owners[source]
                if owner is not None and owner.cached:
                    sources.append(source)
                    targets.append(target)
                    length = max(length, owner.cached)
            one, other = self.owners[left], self.owners[right]
            self.owners[left], self.owners[right] = other, one
            if one is not None:
                one.slot = right
            if other is not None:
                other.slot = left
        if sources:
            self.cache.move(sources, targets, length)

    def _make_room(self, number: int) -> None:
        """Have slots for so many more rows, as far as there may be: in steps, for each of them copies the caches."""
        needed = min(self.max_slots, len(self.owners) + number - self.owners.count(None))
        if needed > self.cache.num_slots:
            grown = max(needed, self.cache.num_slots * 5 // 4)
            self.cache.add_slots(min(self.max_slots, -(-grown // _SLOTS) * _SLOTS))

    def _free_slot(self, stats: EngineStats) -> int:
        for slot, owner in enumerate(self.owners):
            if owner is None:
                return slot
        if len(self.owners) < self.max_slots:
            self.owners.append(None)
            return len(self.owners) - 1
        slot, owner = min(
            ((slot, owner) for slot, owner in enumerate(self.owners) if owner is not None),
            key=lambda pair: pair[1].last_used,
        )
        self.release(owner)
        stats.evicted_rows += 1
        return slot
