"""A row: one trace in flight, and what each model has been told of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from switchgen.candidates import Pool
from switchgen.config import DecodingConfig
from switchgen.engines.base import Context, Engine, Listener
from switchgen.engines.transformers import SlotEngine
from switchgen.sampling import SamplingParams
from switchgen.trace import CUE, Query, Segment, Trace

if TYPE_CHECKING:
    from switchgen.policies.base import Policy

Reader = int | Literal["switcher"]


@dataclass(frozen=True)
class Terms:
    """Who chooses a row's writers, and how they write."""

    policy: Policy
    decoding: DecodingConfig

    @cached_property
    def params(self) -> SamplingParams:
        """How tokens are drawn."""
        return SamplingParams(self.decoding.temperature, self.decoding.top_p)

    @cached_property
    def stop(self) -> tuple[bytes, ...]:
        """Strings that end the response."""
        return tuple(string.encode() for string in self.decoding.stop)


class Row:
    """One trace while it is written.

    The response's tokens are kept once per vocabulary. Each model that reads the row has a `Context` (prompt and
    trace in its own tokens), brought up to date when it is needed. A fork shares its parent's past: engines copy what
    they have read of it instead of reading it again. A row that was forked is frozen; it is kept until its forks are
    done.

    Args:
        prompts: what candidates read before the trace, by index; made from the query where it is missing.
        terms: its own, where the rows of a loop differ in them.
    """

    def __init__(
        self,
        pool: Pool,
        query: Query,
        seed: int,
        parent: Row | None = None,
        *,
        prompts: Mapping[int, list[int]] | None = None,
        terms: Terms | None = None,
    ) -> None:
        self.pool = pool
        self.trace = Trace(query, seed)
        self.parent = parent
        self.terms = terms
        self.listener: Listener | None = None
        """Is told of every token as it is written."""
        self.cancelled = False
        """Whether nobody waits for it any more; it ends with its segment."""
        self.closing = False
        """Whether the last writer's turn has come."""
        self.signed = 0
        """Segments that the switcher's context holds."""
        self._signed_lengths: list[int] = []
        """The switcher's context's tokens with so many signed segments, from none on; of a row that is no fork."""
        self.forked = False
        self.expected = (0, 0)
        """Tokens and segments that the response is expected to have in the end; caches are sized for them."""
        self._contexts: dict[Reader, Context] = {}
        if parent is None:
            self._prompts: dict[int, list[int]] = dict(prompts or {})
            self._ids: list[list[int]] = [[] for _ in pool.vocabularies]
        else:
            self.trace.segments = list(parent.trace.segments)
            self.closing = parent.closing
            self.expected = parent.expected
            self.terms = parent.terms
            self._prompts = parent._prompts
            self._ids = [list(ids) for ids in parent._ids]

    def fork(self, seed: int) -> Row:
        """A row that goes on from here by itself."""
        assert self.trace.finish is None, "a finished response does not go on"
        self.forked = True
        return Row(self.pool, self.trace.query, seed, parent=self)

    def prompt_ids(self, candidate: int) -> list[int]:
        """Tokens the candidate reads before the trace."""
        if candidate not in self._prompts:
            self._prompts[candidate] = self.pool.candidates[candidate].prompt_ids(self.trace.query)
        return self._prompts[candidate]

    def context(self, candidate: int) -> Context:
        """What a candidate reads: its prompt and the trace so far."""
        prompt = self.prompt_ids(candidate)
        context = self._open(candidate, lambda row: row.context(candidate), lambda: list(prompt))
        ids = self._ids[self.pool.candidates[candidate].vocabulary_index]
        context.ids.extend(ids[len(context.ids) - len(prompt) :])
        context.expected = len(prompt) + self.expected[0]
        return context

    def switcher_context(self, start: Callable[[Query], list[int]], sign: Callable[[int, str], list[int]]) -> Context:
        """What the switcher reads, without its question: the query and the signed segments.

        Args:
            start: tokens of the query.
            sign: tokens of one signed segment.
        """
        is_new = "switcher" not in self._contexts
        context = self._open("switcher", lambda row: row.switcher_context(start, sign), lambda: start(self.trace.query))
        if is_new:
            self.signed = 0 if self.parent is None else self.parent.signed
            tokens, segments = self.expected
            context.expected = len(context.ids) + tokens + segments * len(sign(0, "")) if tokens else 0
            self._signed_lengths = [len(context.ids)]
        signed = self.trace.signed()
        for writer, text in signed[self.signed :]:
            context.ids.extend(sign(writer, text))
            self._signed_lengths.append(len(context.ids))
        self.signed = len(signed)
        return context

    def _open(self, reader: Reader, of_parent: Callable[[Row], Context], build: Callable[[], list[int]]) -> Context:
        if reader not in self._contexts:
            if self.parent is None:
                self._contexts[reader] = Context(build())
            else:
                parent = of_parent(self.parent)
                self._contexts[reader] = Context(list(parent.ids), parent, len(parent.ids))
        return self._contexts[reader]

    def append(self, segment: Segment) -> None:
        """Add a segment to the trace, in every vocabulary of the pool."""
        assert not self.forked, "a forked row is frozen"
        self.trace.segments.append(segment)
        own = None if segment.writer == CUE else self.pool.candidates[segment.writer].vocabulary_index
        for index, vocabulary in enumerate(self.pool.vocabularies):
            self._ids[index].extend(segment.ids if index == own else vocabulary.encode_text(segment.text))

    def rewind(self, border: int, engines: Iterable[tuple[Reader, Engine]]) -> None:
        """Take the trace back to before its segment `border`. Slots are cut: what was read of the rest stays read.

        Caches that cannot be cut (`SnapshotEngine`) are given up.
        """
        assert self.parent is None and not self.forked
        kept = self.trace.segments[:border]
        self.trace = Trace(self.trace.query, self.trace.seed)
        self.closing = False
        self._ids = [[] for _ in self.pool.vocabularies]
        for segment in kept:
            self.append(segment)
        self.signed = min(self.signed, len(self.trace.signed()))
        for reader, engine in engines:
            context = self._contexts.get(reader)
            if context is None:
                continue
            if not isinstance(engine, SlotEngine):
                engine.release(context)
                context.cached = 0
            del context.ids[self._length(reader) :]
            context.cached = min(context.cached, len(context.ids))

    def _length(self, reader: Reader) -> int:
        """Tokens of the trace and what stands before it, as far as the reader's context holds them."""
        if reader == "switcher":
            return self._signed_lengths[self.signed]
        return len(self.prompt_ids(reader)) + len(self._ids[self.pool.candidates[reader].vocabulary_index])

    @property
    def contexts(self) -> Mapping[Reader, Context]:
        """What each model that has read the row holds of it."""
        return self._contexts

    @property
    def num_written(self) -> int:
        """Tokens written by candidates."""
        return sum(len(segment.ids) for segment in self.trace.segments if segment.writer != CUE)

    def tail(self, length: int) -> bytes:
        """The response's last bytes."""
        if length == 0:
            return b""
        text = b""
        for segment in reversed(self.trace.segments):
            text = segment.text.encode() + text
            if len(text) >= length:
                break
        return text[-length:]

    def release(self, engines: Iterable[tuple[Reader, Engine]]) -> None:
        """Let the engines forget this row."""
        for reader, engine in engines:
            context = self._contexts.pop(reader, None)
            if context is not None:
                engine.release(context)
