"""The in-process engine: a transformers model with its caches kept.

Each row's cache has one number, how many of its context's tokens it holds. A turn first feeds the missing ones of all
its rows in packed forwards (all but the last token of each), then decodes the rows as one batch that sits in the
first slots of the cache. Nothing is read twice as long as the cache has room.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from switchgen.engines.attention import ATTENTION, register
from switchgen.engines.base import Context, Family, WriteItem, Written
from switchgen.engines.compiled import CompiledDecoder
from switchgen.engines.fitting import in_batches
from switchgen.engines.local import LocalEngine
from switchgen.engines.session import SlotSession
from switchgen.engines.slot_table import SlotTable
from switchgen.engines.slots import Plan, SlotCache
from switchgen.engines.writing import write_segments
from switchgen.sampling import SamplingParams
from switchgen.segmentation import SegmentRule
from switchgen.vocabulary import Vocabulary

MAX_PACKED = 4096
"""Tokens of one packed read: bounds the memory of its activations and masks."""


class SlotEngine(LocalEngine):
    """Engine over slots (`engines.slots`), for models with full or sliding-window attention.

    Args:
        model: its attention function is replaced; see also `LocalEngine`.
        max_slots: rows whose caches are kept; the least recently used row makes room for a new one.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        *,
        stop_ids: frozenset[int],
        max_positions: int,
        max_slots: int = 128,
        activate: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(
            name, model, vocabulary, stop_ids=stop_ids, max_positions=max_positions, activate=activate
        )  # fmt: skip
        register()
        model.set_attn_implementation(ATTENTION)
        self.family: Family | None = None
        self.adapter: str | None = None
        self.cache = SlotCache(model.config.get_text_config().num_hidden_layers)
        self.table = SlotTable(self.cache, max_slots)
        self.decoder: CompiledDecoder | None = None

    def compile(self) -> None:
        """Compile decode steps from now on, at the first of them.

        Raises:
            ConfigError: they cannot be (`CompiledDecoder`).
        """
        self.decoder = CompiledDecoder(self)
        self.clear()
        self.cache.spare = 1

    # -- the engine's contract ------------------------------------------------------------------------------------

    @property
    def max_slots(self) -> int:
        """Rows whose caches are kept."""
        return self.table.max_slots

    @max_slots.setter
    def max_slots(self, number: int) -> None:
        self.table.max_slots = number

    @torch.inference_mode()
    def write(
        self, items: Sequence[WriteItem], params: SamplingParams, rule: SegmentRule, stop: Sequence[bytes] = ()
    ) -> list[Written]:
        """Write one segment per item; more items than slots are written in several batches."""

        def work(batch: Sequence[WriteItem]) -> list[Written]:
            session = self.begin([item.context for item in batch])
            return write_segments(
                session, batch, params, rule, stop, self.vocabulary, self.stop_ids, self.banned_ids, self.stats
            )

        return in_batches(self, items, [item.context for item in items], work)

    @torch.inference_mode()
    def label_logits(self, contexts: Sequence[Context], suffix: Sequence[int], labels: Sequence[int]) -> torch.Tensor:
        """Logits of the label tokens after context + suffix; one packed read, the suffix rewound."""
        return torch.stack(
            in_batches(self, contexts, contexts, lambda batch: self._label_logits(batch, suffix, labels))
        )

    def _label_logits(
        self, contexts: Sequence[Context], suffix: Sequence[int], labels: Sequence[int]
    ) -> list[torch.Tensor]:
        self._place(contexts, leave=0)
        self._read_beginnings(contexts, [len(context.ids) + len(suffix) for context in contexts])
        chunks = [[*context.ids[context.cached :], *suffix] for context in contexts]
        self.stats.scored_tokens += len(suffix) * len(contexts)
        self.stats.read_tokens += sum(map(len, chunks)) - len(suffix) * len(contexts)
        rows_C: list[torch.Tensor] = []
        for rows in _packs(list(map(len, chunks))):
            logits = self._read([contexts[row] for row in rows], [chunks[row] for row in rows], "logits")
            rows_C.extend(logits[:, list(labels)].double().cpu())
        for context in contexts:
            context.cached = len(context.ids)
        return rows_C

    @torch.inference_mode()
    def hidden(self, contexts: Sequence[Context]) -> torch.Tensor:
        """The state that the LM head reads, after each context's last token; packed reads of what is missing."""
        return torch.stack(in_batches(self, contexts, contexts, self._hidden))

    def _hidden(self, contexts: Sequence[Context]) -> list[torch.Tensor]:
        self._place(contexts, leave=1)
        for context in contexts:
            # States are not kept: the last token is fed once more where nothing is missing.
            context.cached = min(context.cached, len(context.ids) - 1)
        self._read_beginnings(contexts, [len(context.ids) for context in contexts])
        chunks = [context.ids[context.cached :] for context in contexts]
        self.stats.read_tokens += sum(map(len, chunks))
        rows_H: list[torch.Tensor] = []
        for rows in _packs(list(map(len, chunks))):
            states = self._read([contexts[row] for row in rows], [chunks[row] for row in rows], "hidden")
            rows_H.extend(states.double().cpu())
        for context in contexts:
            context.cached = len(context.ids)
        return rows_H

    def release(self, context: Context) -> None:
        """Free the context's slot."""
        self.table.release(context)

    @torch.inference_mode()
    def begin(self, contexts: Sequence[Context]) -> SlotSession:
        """Catch up with every context (all but its last token) and make the rows a batch in the first slots."""
        for context in contexts:
            # A drawn token that was not appended (an end of text, a sentence's next word) left nothing unread: the
            # last token is fed once more.
            context.cached = min(context.cached, len(context.ids) - 1)
        self.catch_up(contexts, leave=1)
        return SlotSession(self, contexts)

    @torch.inference_mode()
    def read(self, contexts: Sequence[Context], leave: int = 0) -> None:
        """Read contexts ahead of time, except their last `leave` tokens."""
        self.catch_up(contexts, leave)

    def clear(self) -> None:
        """Forget all contexts and give the caches' memory back."""
        self.table.clear()

    # -- reading --------------------------------------------------------------------------------------------------

    def catch_up(self, contexts: Sequence[Context], leave: int = 0) -> None:
        """Feed what the cache has not seen of each context, except its last `leave` tokens."""
        self._place(contexts, leave)
        self._read_beginnings(contexts, [len(context.ids) - leave for context in contexts])
        missing = [context for context in contexts if context.cached < len(context.ids) - leave]
        chunks = [context.ids[context.cached : len(context.ids) - leave] for context in missing]
        self.stats.read_tokens += sum(map(len, chunks))
        for rows in _packs(list(map(len, chunks))):
            self._read([missing[row] for row in rows], [chunks[row] for row in rows], "hidden")
        for context, chunk in zip(missing, chunks, strict=True):
            context.cached += len(chunk)

    def _read_beginnings(self, contexts: Sequence[Context], ends: Sequence[int]) -> None:
        """Read of what is missing up to position `ends` so much that one packed read takes the rest of each."""
        for context, end in zip(contexts, ends, strict=True):
            while end - context.cached > MAX_PACKED and context.cached < len(context.ids):
                piece = context.ids[context.cached : context.cached + MAX_PACKED]
                self._read([context], [piece], "hidden")
                self.stats.read_tokens += len(piece)
                context.cached += len(piece)

    def _read(
        self, contexts: Sequence[Context], chunks: Sequence[list[int]], wanted: Literal["hidden", "logits"]
    ) -> torch.Tensor:
        """One packed forward of each context's next tokens; hidden state or logits after each, [rows, H or V]."""
        started = time.perf_counter()
        spans = [(context.place, context.cached, len(chunk)) for context, chunk in zip(contexts, chunks, strict=True)]
        device = self.device
        ids_T = torch.tensor([token for chunk in chunks for token in chunk], device=device)
        slots_T = torch.tensor([slot for slot, _, count in spans for _ in range(count)], device=device)
        positions_T = torch.tensor(
            [position for _, first, count in spans for position in range(first, first + count)], device=device
        )
        plan = Plan(slots_T, positions_T, spans, [], max(first + count for _, first, count in spans))
        # A list: the last layer's states may lie on another device than a tensor here would.
        last = [end - 1 for end in accumulate(map(len, chunks))]
        result: torch.Tensor
        if wanted == "hidden":
            states = self.forward(self.model.base_model, plan, ids_T[None], positions_T[None]).last_hidden_state
            result = states[0, last]
        else:
            result = self.forward(self.model, plan, ids_T[None], positions_T[None], logits_to_keep=last).logits[0]
        self.stats.read_seconds += time.perf_counter() - started
        return result

    def decode(self, plan: Plan, ids_N: torch.Tensor) -> torch.Tensor:
        """One token a row of the first slots; logits of the next one, shape [rows, vocabulary]."""
        # Rows of which nothing was read yet: the layers make their pools as they are fed.
        if self.decoder is not None and all(layer.is_initialized for layer in self.cache.layers):
            self.activate()
            return self.decoder(plan, ids_N)
        logits_NV: torch.Tensor = self.forward(
            self.model, plan, ids_N[:, None], plan.positions_T[:, None], logits_to_keep=1
        ).logits[:, -1]
        return logits_NV

    def forward(
        self, module: torch.nn.Module, plan: Plan, ids: torch.Tensor, positions: torch.Tensor, **kwargs: Any
    ) -> Any:
        """One forward of the model, or of its body alone, that feeds what the plan says."""
        # Here, for engines over one model may be stepped by turns.
        self.activate()
        self.cache.set_plan(plan)
        # The 4-D mask is a marker: models hand it on as it is instead of building their own; slots do the masking.
        marker = torch.zeros(1, 1, 1, 1, dtype=self.model.dtype, device=self.device)
        return module(
            input_ids=ids,
            position_ids=positions,
            attention_mask=marker,
            past_key_values=self.cache,
            use_cache=True,
            slot_plan=plan,
            **kwargs,
        )

    # -- slots ----------------------------------------------------------------------------------------------------

    def _place(self, contexts: Sequence[Context], leave: int) -> None:
        """Give every context a slot; forks start from a copy of their parent's row, which is read first.

        Of each context all but the last `leave` tokens are wanted.
        """
        assert len(contexts) <= self.max_slots, "more rows than slots would take each other's"
        parents = {
            id(context.parent): context.parent
            for context in contexts
            if context.slot is None and context.parent is not None
        }
        # A parent is worth its room only while it and its children fit together; else each child reads for itself.
        if len(parents) + len(contexts) > self.max_slots:
            parents = {}
        if parents:
            # Children that have slots need nothing of their parents any more.
            homeless = [context for context in contexts if context.slot is None]
            self._catch_up_parents(list(parents.values()), homeless, leave)
        held = [*contexts, *(owner for owner in self.table.owners if owner is not None)]
        expected = max((max(context.expected, len(context.ids)) for context in held), default=0)
        self.cache.fit(min(expected, self.max_positions), max((context.cached for context in held), default=0))
        self.table.seat(contexts, list(parents.values()), leave, self.stats)

    def _catch_up_parents(self, parents: list[Context], children: Sequence[Context], leave: int) -> None:
        # A child that has nothing of its own yet decodes from the last shared token, which the parent then leaves out.
        owing = {
            id(child.parent)
            for child in children
            if child.parent is not None and len(child.ids) - leave >= child.shared
        }
        for group, leave in (
            ([parent for parent in parents if id(parent) in owing], 0),
            ([parent for parent in parents if id(parent) not in owing], 1),
        ):
            if group:
                self.catch_up(group, leave=leave)


def _packs(lengths: Sequence[int]) -> list[list[int]]:
    """Group chunk indices into packs of at most `MAX_PACKED` tokens; no chunk is longer (`_read_beginnings`)."""
    packs: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not packs or length > room:
            packs.append([])
            room = MAX_PACKED
        packs[-1].append(index)
        room -= length
    return packs
