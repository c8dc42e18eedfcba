"""The in-process engine: a transformers model with its caches kept.

Each row's cache has one number, how many of its context's tokens it holds. A turn first feeds the missing ones of all
its rows in packed forwards (all but the last token of each), then decodes the rows as one batch that sits in the
first slots of the cache. Nothing is read twice as long as the cache has room.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from switchgen.engines.base import Context, EngineStats, Family, WriteItem, Written
from switchgen.engines.fitting import in_batches
from switchgen.engines.scoring import TokenScore, score_tokens
from switchgen.engines.slots import ATTENTION, Plan, SlotCache, length_groups, register
from switchgen.engines.writing import write_segments
from switchgen.sampling import SamplingParams
from switchgen.segmentation import SegmentRule
from switchgen.vocabulary import Vocabulary

# Tokens of one packed read; bounds the memory of its activations.
_MAX_PACKED = 4096
# Two ways to the same logits may differ by this share of their range, by dtype. (Some of transformers' own attention
# computes its softmax in float32 whatever the model's dtype.)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.05}


def banned_tokens(vocabulary: Vocabulary, stop_ids: frozenset[int], logits_size: int) -> list[int]:
    """Ids that are never drawn: control tokens that are not the writer's end of text, and rows that are no token's."""
    tokens = set(vocabulary.tokenizer.get_vocab().values()) - (vocabulary.control_ids - stop_ids)
    return sorted(set(range(logits_size)) - tokens)


def states_device(model: PreTrainedModel) -> torch.device:
    """Where the states that the LM head reads are computed: the device of the last norm, the body's last parameter.

    A parameter that is off its device until it is needed (offloaded weights) is computed where ids go in.
    """
    *_, last = model.base_model.parameters()
    device: torch.device = last.device
    return model.get_input_embeddings().weight.device if device.type == "meta" else device


class SlotEngine:
    """Engine over slots (`engines.slots`), for models with full or sliding-window attention.

    Args:
        model: a causal LM in eval mode; its attention function is replaced.
        activate: called before forwards; switches the right adapter on where several engines share one model.
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
        register()
        model.set_attn_implementation(ATTENTION)
        self.name = name
        self.model = model
        self.vocabulary = vocabulary
        self.stop_ids = stop_ids
        self.max_positions = max_positions
        self.hidden_size: int = model.config.get_text_config().hidden_size
        self.max_slots = max_slots
        self.halved = False
        self.family: Family | None = None
        self.adapter: str | None = None
        self.stats = EngineStats()
        self.cache = SlotCache(model.config.get_text_config().num_hidden_layers)
        # Of a model whose layers are spread over several devices: where ids go in and logits come out, and where the
        # last layer's states are.
        self.device = model.get_input_embeddings().weight.device
        self._states_device = states_device(model)
        self._activate = activate or (lambda: None)
        self._owners: list[Context | None] = []
        self._clock = 0
        logits_size = model.get_output_embeddings().weight.shape[0]
        self.banned_ids = torch.tensor(
            banned_tokens(vocabulary, stop_ids, logits_size), dtype=torch.long, device=self.device
        )

    # -- the engine's contract ------------------------------------------------------------------------------------

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
        self._activate()
        return torch.stack(
            in_batches(self, contexts, contexts, lambda batch: self._label_logits(batch, suffix, labels))
        )

    def _label_logits(
        self, contexts: Sequence[Context], suffix: Sequence[int], labels: Sequence[int]
    ) -> list[torch.Tensor]:
        self._place(contexts, leave=0)
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

    def token_scores(self, ids: Sequence[int], first: int, num_top: int) -> list[TokenScore]:
        """Log-probabilities of `ids[first:]`; see `scoring.score_tokens`."""
        self._activate()
        return score_tokens(self.model, ids, first, num_top)

    @torch.inference_mode()
    def hidden(self, contexts: Sequence[Context]) -> torch.Tensor:
        """The state that the LM head reads, after each context's last token; packed reads of what is missing."""
        self._activate()
        return torch.stack(in_batches(self, contexts, contexts, self._hidden))

    def _hidden(self, contexts: Sequence[Context]) -> list[torch.Tensor]:
        self._place(contexts, leave=1)
        for context in contexts:
            # States are not kept: the last token is fed once more where nothing is missing.
            context.cached = min(context.cached, len(context.ids) - 1)
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
        if context.slot is not None:
            self._owners[context.slot] = None
            context.slot, context.cached = None, 0

    @torch.inference_mode()
    def begin(self, contexts: Sequence[Context]) -> SlotSession:
        """Catch up with every context (all but its last token) and make the rows a batch in the first slots."""
        self._activate()
        for context in contexts:
            # A drawn token that was not appended (an end of text, a sentence's next word) left nothing unread: the
            # last token is fed once more.
            context.cached = min(context.cached, len(context.ids) - 1)
        self.catch_up(contexts, leave=1)
        return SlotSession(self, contexts)

    @torch.inference_mode()
    def read(self, contexts: Sequence[Context], leave: int = 0) -> None:
        """Read contexts ahead of time, except their last `leave` tokens."""
        self._activate()
        self.catch_up(contexts, leave)

    def clear(self) -> None:
        """Forget all contexts and give the caches' memory back."""
        for owner in self._owners:
            if owner is not None:
                self.release(owner)
        self._owners = []
        self.cache.clear()

    # -- reading --------------------------------------------------------------------------------------------------

    def catch_up(self, contexts: Sequence[Context], leave: int = 0) -> None:
        """Feed what the cache has not seen of each context, except its last `leave` tokens."""
        self._place(contexts, leave)
        missing = [context for context in contexts if context.cached < len(context.ids) - leave]
        chunks = [context.ids[context.cached : len(context.ids) - leave] for context in missing]
        self.stats.read_tokens += sum(map(len, chunks))
        for rows in _packs(list(map(len, chunks))):
            self._read([missing[row] for row in rows], [chunks[row] for row in rows], "hidden")
        for context, chunk in zip(missing, chunks, strict=True):
            context.cached += len(chunk)

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
        last = torch.tensor([len(chunk) for chunk in chunks], device=self._states_device).cumsum(0) - 1
        result: torch.Tensor
        if wanted == "hidden":
            states = self._forward(self.model.base_model, plan, ids_T[None], positions_T[None]).last_hidden_state
            result = states[0, last.to(states.device)]
        else:
            result = self._forward(self.model, plan, ids_T[None], positions_T[None], logits_to_keep=last).logits[0]
        self.stats.read_seconds += time.perf_counter() - started
        return result

    def _forward(
        self, module: torch.nn.Module, plan: Plan, ids: torch.Tensor, positions: torch.Tensor, **kwargs: Any
    ) -> Any:
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
        self._clock += 1
        self.cache.expected = min(max([self.cache.expected, *(context.expected for context in contexts)]),
                                  self.max_positions)  # fmt: skip
        for context in [*contexts, *parents.values()]:
            context.last_used = self._clock
        homeless = [context for context in contexts if context.slot is None]
        copies: list[tuple[int, int, int]] = []
        for context in homeless:
            context.slot, context.cached = self._free_slot(), 0
            self._owners[context.slot] = context
            parent = context.parent
            if parent is not None and parent.slot is not None and id(parent) in parents:
                context.cached = min(context.shared, parent.cached, len(context.ids) - leave)
                copies.append((parent.slot, context.slot, context.cached))
        copies = [copy for copy in copies if copy[2] > 0]
        if copies:
            sources, targets, lengths = zip(*copies, strict=True)
            self.cache.move(list(sources), list(targets), max(lengths))
            self.stats.copied_rows += len(copies)

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

    def _free_slot(self) -> int:
        for slot, owner in enumerate(self._owners):
            if owner is None:
                return slot
        if len(self._owners) < self.max_slots:
            slot = len(self._owners)
            if slot == self.cache.num_slots:
                self.cache.add_slots(min(self.max_slots, max(8, 2 * slot)))
            self._owners.append(None)
            return slot
        slot, owner = min(
            ((slot, owner) for slot, owner in enumerate(self._owners) if owner is not None),
            key=lambda pair: pair[1].last_used,
        )
        self.release(owner)
        self.stats.evicted_rows += 1
        return slot

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
        return [wanted[id(self._owners[slot])] for slot in range(len(contexts))]

    def _rearrange(self, residents: Sequence[Context]) -> None:
        """Move rows so that the first slots are these contexts'; who sat there takes the slots they left."""
        count = len(residents)
        staying = {id(context) for context in residents}
        left = [context.place for context in residents if context.place >= count]
        guests = [owner for owner in self._owners[:count] if owner is not None and id(owner) not in staying]
        targets = [*zip(residents, range(count), strict=True), *zip(guests, left, strict=False)]
        moves = [(context, target) for context, target in targets if context.slot != target]
        for slot in left:
            self._owners[slot] = None
        copied = [(context.place, target, context.cached) for context, target in moves if context.cached]
        for context, target in moves:
            self._owners[target], context.slot = context, target
        if copied:
            sources, places, lengths = zip(*copied, strict=True)
            self.cache.move(list(sources), list(places), max(lengths))

    def _exchange(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Swap the rows of each pair of slots."""
        sources: list[int] = []
        targets: list[int] = []
        length = 0
        for left, right in pairs:
            for source, target in ((left, right), (right, left)):
                owner = self._owners[source]
                if owner is not None and owner.cached:
                    sources.append(source)
                    targets.append(target)
                    length = max(length, owner.cached)
            one, other = self._owners[left], self._owners[right]
            self._owners[left], self._owners[right] = other, one
            if one is not None:
                one.slot = right
            if other is not None:
                other.slot = left
        if sources:
            self.cache.move(sources, targets, length)


class SlotSession:
    """Rows in the engine's first slots, stepped together."""

    def __init__(self, engine: SlotEngine, contexts: Sequence[Context]) -> None:
        self.engine = engine
        self.order = engine.make_resident(contexts)
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
        logits_NV: torch.Tensor = engine._forward(
            engine.model, self.plan(), ids_N[:, None], self.positions_N[:, None], logits_to_keep=1
        ).logits[:, -1]
        self.advance()
        engine.stats.decode_seconds += time.perf_counter() - started
        return logits_NV

    def keep(self, rows: list[int]) -> list[int]:
        """Go on with these rows only: the batch's last rows move into the places of those that left."""
        kept = set(rows)
        count = len(rows)
        holes = [row for row in range(count) if row not in kept]
        movers = [row for row in rows if row >= count]
        self.engine._exchange(zip(holes, movers, strict=True))
        moved = dict(zip(holes, movers, strict=True))
        order = [moved.get(row, row) for row in range(count)]
        self._settle([self.contexts[row] for row in order])
        return order


def _packs(lengths: Sequence[int]) -> list[list[int]]:
    """Group chunk indices into packs of at most `_MAX_PACKED` tokens (a longer chunk is a pack of its own)."""
    packs: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not packs or length > room:
            packs.append([])
            room = _MAX_PACKED
        packs[-1].append(index)
        room -= length
    return packs
