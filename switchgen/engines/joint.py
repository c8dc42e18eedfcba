"""Rows of several candidates in one batch: adapters over one base, each row with its own.

Every candidate keeps its own slots (keys and values differ by adapter), and reads for itself. A decode step is one
forward of all rows: PEFT computes each row with its adapter, and each row's keys, values and attention belong to its
candidate's slots. The weights are gone through once a step instead of once for each candidate's rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from switchgen.engines.base import EngineStats, WriteItem, Written
from switchgen.engines.fitting import out_of_memory
from switchgen.engines.remote import RemoteEngine
from switchgen.engines.slots import Part, Plan
from switchgen.engines.transformers import SlotEngine
from switchgen.engines.writing import write_segments
from switchgen.sampling import SamplingParams
from switchgen.segmentation import SegmentRule


def families(engines: Sequence[object]) -> list[list[int]]:
    """Indices of the engines that may write together.

    Adapters over one base that end and ban the same tokens share a batch; requests to servers are in flight together.

    Every engine is in one group, most of them alone.
    """
    found: list[list[int]] = []
    for index, engine in enumerate(engines):
        for group in found:
            first = engines[group[0]]
            if _related(first, engine):
                group.append(index)
                break
        else:
            found.append([index])
    return found


def _related(one: object, other: object) -> bool:
    if isinstance(one, RemoteEngine) and isinstance(other, RemoteEngine):
        return True
    if not isinstance(one, SlotEngine) or not isinstance(other, SlotEngine):
        return False
    return (
        one.family is not None
        and one.family is other.family
        and one.vocabulary.token_bytes == other.vocabulary.token_bytes
        and one.stop_ids == other.stop_ids
        and torch.equal(one.banned_ids, other.banned_ids)
    )


def can_write_together(parts: Sequence[tuple[SlotEngine, Sequence[WriteItem]]]) -> bool:
    """Whether these rows go into one batch: they may, there are several writers, and each has slots for its rows."""
    family = parts[0][0].family
    fits = all(len(items) <= engine.max_slots for engine, items in parts)
    return len(parts) > 1 and fits and family is not None and family.together


@torch.inference_mode()
def write_together(
    parts: Sequence[tuple[SlotEngine, Sequence[WriteItem]]],
    params: SamplingParams,
    rule: SegmentRule,
    stop: Sequence[bytes] = (),
) -> list[list[Written]]:
    """Write one segment per item; the engines are of one family.

    Returns:
        Each engine's results, in its items' order. Where one batch does not fit in memory, the engines write one after
        the other, from then on.
    """
    lengths = [[len(item.context.ids) for item in items] for _, items in parts]
    first = parts[0][0]
    try:
        session = JointSession(parts)
        everything = [item for _, items in parts for item in items]
        # The session counts; each engine has its share of the tokens.
        written = write_segments(
            session, everything, params, rule, stop, first.vocabulary, first.stop_ids, first.banned_ids, EngineStats()
        )
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        written = []
    if not written:
        assert first.family is not None
        first.family.together = False
        for (engine, items), before in zip(parts, lengths, strict=True):
            for item, length in zip(items, before, strict=True):
                del item.context.ids[length:]
            engine.clear()
        return [engine.write(items, params, rule, stop) for engine, items in parts]
    results, start = [], 0
    for _, items in parts:
        results.append(written[start : start + len(items)])
        start += len(items)
    return results


class JointSession:
    """The resident batches of several engines of one family, stepped in one forward."""

    def __init__(self, parts: Sequence[tuple[SlotEngine, Sequence[WriteItem]]]) -> None:
        self.sessions = [engine.begin([item.context for item in items]) for engine, items in parts]
        self.cache = JointCache(len(self.sessions[0].engine.cache.layers))
        self.order: list[int] = []
        start = 0
        for session, (_, items) in zip(self.sessions, parts, strict=True):
            self.order += [start + index for index in session.order]
            start += len(items)
        self._describe()

    def _describe(self) -> None:
        """Note who sits in the batch."""
        self.contexts = [context for session in self.sessions for context in session.contexts]
        self._adapters = [session.engine.adapter for session in self.sessions for _ in session.contexts]

    def logits(self, ids_N: torch.Tensor | None = None) -> torch.Tensor:
        """Feed every row's last token; logits of the next one, shape [rows, vocabulary]."""
        started = time.perf_counter()
        engine = self.sessions[0].engine
        if ids_N is None:
            ids_N = torch.tensor([context.ids[-1] for context in self.contexts], device=engine.device)
        parts, start = [], 0
        for session in self.sessions:
            count = len(session.contexts)
            if count:
                plan = session.plan()
                session.engine.cache.set_plan(plan)
                parts.append(Part(session.engine.cache, plan, start, start + count))
            start += count
        positions_N = torch.cat([session.positions_N for session in self.sessions])
        plan = Plan(positions_N, positions_N, [], [], max(part.plan.max_length for part in parts), parts=parts)
        self.cache.plan = plan
        assert engine.family is not None
        logits_NV: torch.Tensor = engine.family.forward_each(
            self._adapters,
            input_ids=ids_N[:, None],
            position_ids=positions_N[:, None],
            attention_mask=torch.zeros(1, 1, 1, 1, dtype=engine.model.dtype, device=engine.device),
            past_key_values=self.cache,
            use_cache=True,
            slot_plan=plan,
            logits_to_keep=1,
        ).logits[:, -1]
        self._count(time.perf_counter() - started)
        return logits_NV

    def _count(self, seconds: float) -> None:
        total = len(self.contexts)
        for session in self.sessions:
            stats, count = session.engine.stats, len(session.contexts)
            session.advance()
            stats.decoded_tokens += count
            stats.decode_seconds += seconds * count / total
        # One step for all: `decoded / steps` over all engines is still the mean batch.
        self.sessions[0].engine.stats.steps += 1

    def keep(self, rows: list[int]) -> list[int]:
        """Go on with these rows only; returns them in their new order."""
        order, start = [], 0
        for session in self.sessions:
            count = len(session.contexts)
            own = [row - start for row in rows if start <= row < start + count]
            order += [start + row for row in session.keep(own)] if len(own) < count else [start + row for row in own]
            start += count
        self._describe()
        return order


class JointCache(Cache):
    """Hands every row's keys and values to its own engine's slots."""

    plan: Plan

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[JointLayer(self, index) for index in range(num_layers)])


class JointLayer(CacheLayerMixin):
    """One layer of all engines."""

    def __init__(self, cache: JointCache, index: int) -> None:
        super().__init__()
        self.cache = cache
        self.index = index
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Each engine's layer has its own."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write each row's keys and values into its slots; attention finds them by the plan's parts."""
        for part in self.cache.plan.parts:
            rows = slice(part.first, part.last)
            part.pools = part.cache.layers[self.index].update(key_states[rows], value_states[rows])
        return self.cache.plan.parts[0].pools

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1
