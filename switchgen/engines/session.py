"""A batch that sits in an engine's first slots and is stepped token by token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from switchgen.engines.base import Context
from switchgen.engines.slots import Plan, length_groups

if TYPE_CHECKING:
    from switchgen.engines.transformers import SlotEngine


class SlotSession:
    """Rows in the engine's first slots, stepped together."""

    def __init__(self, engine: SlotEngine, contexts: Sequence[Context]) -> None:
        self.engine = engine
        self.order = engine.table.make_resident(contexts)
        self._settle([contexts[index] for index in self.order])

    def _settle(self, contexts: list[Context]) -> None:
        """Take the rows as they lie in the slots."""
        self.contexts = contexts
        device, lengths = self.engine.device, [context.cached for context in contexts]
        self._runs = length_groups(lengths)
        self._slots_N = torch.arange(len(contexts), device=device)
        self.positions_N = torch.tensor(lengths, dtype=torch.long, device=device)

    def plan(self) -> Plan:
        """What the next step feeds."""
        lengths = [context.cached + 1 for context in self.contexts]
        groups = [(first, last, max(lengths[first:last])) for first, last in self._runs]
        return Plan(self._slots_N, self.positions_N, [], groups, max(lengths))

    def advance(self) -> None:
        """Every row has been fed one token."""
        for context in self.contexts:
            context.cached += 1
        self.positions_N = self.positions_N + 1

    def logits(self, ids_N: torch.Tensor | None = None) -> torch.Tensor:
        """Feed every row's last token; logits of the next one, shape [rows, vocabulary].

        Args:
            ids_N: these tokens, where the caller has them on the device already.
        """
        started = time.perf_counter()
        engine = self.engine
        if ids_N is None:
            ids_N = torch.tensor([context.ids[-1] for context in self.contexts], device=engine.device)
        logits_NV = engine.decode(self.plan(), ids_N)
        self.advance()
        engine.stats.decode_seconds += time.perf_counter() - started
        return logits_NV

    def keep(self, rows: list[int]) -> list[int]:
        """Go on with these rows only: the batch's last rows move into the places of those that left."""
        kept = set(rows)
        count = len(rows)
        holes = [row for row in range(count) if row not in kept]
        movers = [row for row in rows if row >= count]
        self.engine.table.exchange(zip(holes, movers, strict=True))
        moved = dict(zip(holes, movers, strict=True))
        order = [moved.get(row, row) for row in range(count)]
        self._settle([self.contexts[row] for row in order])
        return order
