"""The fallback engine for models whose caches cannot live in slots: linear attention, hybrids, unusual attention.

Every row keeps a cache of transformers' own, fed one row at a time. Forks and rewinds copy it (a snapshot), because
such caches cannot be cut back. Correct for any causal LM, and slow.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import DynamicCache, PreTrainedModel

from switchgen.engines.base import Context, WriteItem, Written
from switchgen.engines.fitting import in_batches
from switchgen.engines.local import TOLERANCE, LocalEngine
from switchgen.engines.writing import write_segments
from switchgen.sampling import SamplingParams
from switchgen.segmentation import SegmentRule
from switchgen.vocabulary import Vocabulary

Feeding = Literal["chunks", "tokens", "nothing kept"]
"""How a model takes what its cache has not seen: many tokens at once, one by one, or everything anew each time."""


@dataclass(slots=True)
class _Snapshot:
    """One row's cache."""

    context: Context
    cache: Any
    logits: torch.Tensor | None = None
    """After the last token that was fed, shape [V]."""


class SnapshotEngine(LocalEngine):
    """Engine over one transformers cache per row; same contract as `SlotEngine`.

    Args:
        max_slots: rows whose caches are kept; see also `LocalEngine`.
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
        self.max_slots = max_slots
        self._snapshots: OrderedDict[int, _Snapshot] = OrderedDict()
        # Mamba calls its cache by another name, and takes no notice of the usual one.
        names = inspect.signature(model.forward).parameters
        self._cache_name = next((name for name in ("past_key_values", "cache_params") if name in names), None)
        self._keeps_logits = "logits_to_keep" in names
        self.feeding: Feeding = self._find_feeding()

    # -- the engine's contract ------------------------------------------------------------------------------------

    @torch.inference_mode()
    def write(
        self, items: Sequence[WriteItem], params: SamplingParams, rule: SegmentRule, stop: Sequence[bytes] = ()
    ) -> list[Written]:
        """Write one segment per item; more items than caches are written in several batches."""

        def work(batch: Sequence[WriteItem]) -> list[Written]:
            session = self.begin([item.context for item in batch])
            return write_segments(
                session, batch, params, rule, stop, self.vocabulary, self.stop_ids, self.banned_ids, self.stats
            )

        return in_batches(self, items, [item.context for item in items], work)

    def begin(self, contexts: Sequence[Context]) -> SnapshotSession:
        """Rows to be stepped; what their caches miss is fed with the first step."""
        return SnapshotSession(self, contexts)

    @torch.inference_mode()
    def label_logits(self, contexts: Sequence[Context], suffix: Sequence[int], labels: Sequence[int]) -> torch.Tensor:
        """Logits of the label tokens after context + suffix; the suffix is fed to a copy of the cache."""
        rows = []
        for context in contexts:
            if self.feeding == "nothing kept":
                self.stats.read_tokens += len(context.ids)
                logits = self._forward([*context.ids, *suffix], None)
            else:
                self.logits_after(context)
                snapshot = self._snapshots[id(context)]
                logits = self._extend(copy.deepcopy(snapshot.cache), suffix, fresh=False)
            self.stats.scored_tokens += len(suffix)
            rows.append(logits[list(labels)].double().cpu())
        return torch.stack(rows)

    def clear(self) -> None:
        """Forget all contexts."""
        for snapshot in list(self._snapshots.values()):
            self.release(snapshot.context)

    @torch.inference_mode()
    def hidden(self, contexts: Sequence[Context]) -> torch.Tensor:
        """The state that the LM head reads, after each context's last token; every context is read anew."""
        self.activate()
        rows = []
        for context in contexts:
            self.stats.read_tokens += len(context.ids)
            ids = torch.tensor([context.ids], device=self.device)
            states = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            rows.append(states[0, -1].double().cpu())
        return torch.stack(rows)

    def release(self, context: Context) -> None:
        """Drop the context's cache."""
        self._snapshots.pop(id(context), None)
        context.slot, context.cached = None, 0

    # -- feeding --------------------------------------------------------------------------------------------------

    def logits_after(self, context: Context, *, drawn: int = 0) -> torch.Tensor:
        """Logits after the context's last token, shape [V]; feeds what its cache has not seen.

        Args:
            drawn: how many of its last tokens are steps of decoding, which do not count as read.
        """
        if self.feeding == "nothing kept":
            self.stats.read_tokens += len(context.ids) - drawn
            return self._forward(context.ids, None)
        snapshot = self._snapshot(context)
        missing = context.ids[context.cached :]
        if missing:
            self.stats.read_tokens += max(0, len(missing) - drawn)
            snapshot.logits = self._extend(snapshot.cache, missing, fresh=context.cached == 0)
            context.cached = len(context.ids)
        while len(self._snapshots) > self.max_slots:
            self.release(next(iter(self._snapshots.values())).context)
            self.stats.evicted_rows += 1
        assert snapshot.logits is not None
        return snapshot.logits

    def _snapshot(self, context: Context) -> _Snapshot:
        """The context's cache; a fork's begins as a copy of its parent's, which is read first."""
        if id(context) not in self._snapshots:
            parent = context.parent
            if parent is not None:
                self.logits_after(parent)
            if parent is not None and parent.cached == context.shared and id(parent) in self._snapshots:
                source = self._snapshots[id(parent)]
                self._snapshots[id(context)] = _Snapshot(context, copy.deepcopy(source.cache), source.logits)
                context.cached = parent.cached
                self.stats.copied_rows += 1
            else:
                self._snapshots[id(context)] = _Snapshot(context, DynamicCache(config=self.model.config))
                context.cached = 0
            context.slot = 0
        self._snapshots.move_to_end(id(context))
        return self._snapshots[id(context)]

    def _extend(self, cache: Any, ids: Sequence[int], *, fresh: bool) -> torch.Tensor:
        """Feed tokens to a cache; logits after the last one, shape [V]."""
        if fresh or self.feeding == "chunks":
            return self._forward(ids, cache)
        for token in ids:
            logits = self._forward([token], cache)
        return logits

    def _forward(self, ids: Sequence[int], cache: Any) -> torch.Tensor:
        # Here, for engines over one model may be stepped by turns.
        self.activate()
        started = time.perf_counter()
        arguments: dict[str, Any] = {"use_cache": cache is not None}
        if self._cache_name is not None and cache is not None:
            arguments[self._cache_name] = cache
        if self._keeps_logits:
            arguments["logits_to_keep"] = 1
        logits: torch.Tensor = self.model(input_ids=torch.tensor([list(ids)], device=self.device), **arguments).logits[
            0, -1
        ]
        elapsed = time.perf_counter() - started
        if len(ids) == 1:
            self.stats.decode_seconds += elapsed
        else:
            self.stats.read_seconds += elapsed
        return logits

    @torch.inference_mode()
    def _find_feeding(self) -> Feeding:
        """See which way of feeding goes on where the cache was left.

        Some recurrent layers forget their state when they are fed several tokens at once, and short tests of random
        text do not tell: they are always fed one by one. Some models keep no cache at all, some
        keep it in their modules, where rows would mix.
        """
        if self._cache_name is None:
            return "nothing kept"
        size = self.model.get_input_embeddings().weight.shape[0]
        ids = [(7 + 37 * index) % size for index in range(16)]
        layers = getattr(self.model.config.get_text_config(), "layer_types", None) or ()
        recurrent = any("attention" not in kind or "linear" in kind for kind in layers)
        feeding: Feeding = "tokens" if recurrent else "chunks"
        step = 1 if recurrent else 4
        whole = self._forward(ids, None)
        before = self._module_state()
        try:
            cache = DynamicCache(config=self.model.config)
            logits = self._forward(ids[:8], cache)
            for start in range(8, len(ids), step):
                logits = self._forward(ids[start : start + step], cache)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            return "nothing kept"
        if self._module_state() - before:
            return "nothing kept"
        spread = (whole.max() - whole.min()).item() or 1.0
        allowed = TOLERANCE.get(self.model.dtype, 0.15) * spread
        return feeding if (logits - whole).abs().max().item() <= allowed else "nothing kept"

    def _module_state(self) -> set[tuple[str, str]]:
        """Tensors that modules hold beside their weights."""
        return {
            (path, name)
            for path, module in self.model.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, torch.Tensor)
        }


class SnapshotSession:
    """Rows stepped one after the other."""

    def __init__(self, engine: SnapshotEngine, contexts: Sequence[Context]) -> None:
        self.engine = engine
        self.order = list(range(len(contexts)))
        self.contexts = list(contexts)

    def logits(self, ids_N: torch.Tensor | None = None) -> torch.Tensor:
        """Feed what each row's cache has not seen; logits of the next token, shape [rows, vocabulary]."""
        return torch.stack([self.engine.logits_after(context, drawn=1) for context in self.contexts])

    def keep(self, rows: list[int]) -> list[int]:
        """Go on with these rows only."""
        self.contexts = [self.contexts[row] for row in rows]
        return rows
