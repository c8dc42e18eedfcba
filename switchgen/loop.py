"""The one loop: decide, group by writer, write, append, retire.

Rows move on their own. Each waits for a decision or for a candidate; the candidate with the fullest queue writes next
(candidates that are adapters over one base write together); a finished row makes room for a new one at once.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from switchgen.candidates import Pool
from switchgen.config import DecodingConfig
from switchgen.engines.base import Engine, WriteItem, Written
from switchgen.engines.joint import can_write_together, families, write_together
from switchgen.engines.transformers import SlotEngine
from switchgen.policies.base import Policy
from switchgen.policies.switcher import SwitcherPolicy
from switchgen.rows import Reader, Row
from switchgen.sampling import SamplingParams
from switchgen.segmentation import SegmentRule
from switchgen.trace import CUE, Decision, Segment

# A writer that ends its text at once, again and again, would never move the row on (eos: segment).
_MAX_EMPTY_SEGMENTS = 3


class Loop:
    """Writes rows with a pool under a policy.

    Args:
        max_rows: rows in flight.
        max_segments: rows stop (unfinished) after this many segments; None writes whole responses.
    """

    def __init__(
        self,
        pool: Pool,
        policy: Policy,
        decoding: DecodingConfig,
        *,
        max_rows: int = 64,
        max_segments: int | None = None,
    ) -> None:
        self.pool = pool
        self.policy = policy
        self.decoding = decoding
        self.max_rows = max_rows
        self.max_segments = max_segments
        self.params = SamplingParams(decoding.temperature, decoding.top_p)
        whole_words = len(pool.vocabularies) > 1
        self._rule = SegmentRule(decoding.segment.end, whole_words)
        # The last writer is not cut at a sentence: nobody comes after it.
        self._closing_rule = SegmentRule("length", whole_words)
        self._stop = [string.encode() for string in decoding.stop]
        self._families = families([candidate.engine for candidate in pool])
        self._first = None if decoding.first is None else pool.index(decoding.first)
        self._last = None if decoding.last is None else pool.index(decoding.last)

    @property
    def readers(self) -> list[tuple[Reader, Engine]]:
        """Every engine that may hold caches of a row."""
        readers: list[tuple[Reader, Engine]] = [
            (index, candidate.engine) for index, candidate in enumerate(self.pool.candidates)
        ]
        if self.policy.engine is not None:
            readers.append(("switcher", self.policy.engine))
        return readers

    def run(self, rows: Iterable[Row], *, release: bool = True) -> Iterator[Row]:
        """Write every row to its end; yields rows as they finish, in no particular order.

        Args:
            rows: taken as room becomes free.
            release: whether the engines forget a row when it is done (not if it will be forked).
        """
        source = iter(rows)
        undecided: list[Row] = []
        queues: dict[int, list[tuple[Row, Decision]]] = {index: [] for index in range(len(self.pool))}
        in_flight = 0
        exhausted = False
        while True:
            while not exhausted and in_flight < self.max_rows:
                row = next(source, None)
                if row is None:
                    exhausted = True
                elif self._admit(row):
                    undecided.append(row)
                    in_flight += 1
                else:
                    yield row
            for row, decision in self._decide(undecided):
                if decision is None:
                    in_flight -= 1
                    yield self._retire(row, release)
                else:
                    queues[decision.writer].append((row, decision))
            undecided = []
            # Candidates that share their weights write in one batch.
            writers = max(self._families, key=lambda group: sum(len(queues[index]) for index in group))
            batch = {index: queues[index] for index in writers if queues[index]}
            queues.update({index: [] for index in writers})
            if not batch:
                if exhausted:
                    return
                continue
            self._write(batch)
            for row in [row for part in batch.values() for row, _ in part]:
                if row.trace.finish is not None or self._paused(row):
                    in_flight -= 1
                    yield self._retire(row, release)
                else:
                    undecided.append(row)

    def _retire(self, row: Row, release: bool) -> Row:
        if release:
            row.release(self.readers)
        return row

    def _paused(self, row: Row) -> bool:
        return self.max_segments is not None and len(row.trace.segments) >= self.max_segments

    def _admit(self, row: Row) -> bool:
        """Whether the prompt leaves room for a segment in every context that may read the row."""
        row.expected = (self.decoding.max_new_tokens, -(-self.decoding.max_new_tokens // self.decoding.segment.tokens))
        needed = min(self.decoding.segment.tokens, self.decoding.max_new_tokens) + self._rule.max_extra
        for index in {*self.policy.writers(len(self.pool)), *self._forced()}:
            if len(row.prompt_ids(index)) + needed > self.pool.candidates[index].engine.max_positions:
                row.trace.finish = "too_long"
        if row.trace.finish is None and isinstance(self.policy, SwitcherPolicy) and not self.policy.fits(row):
            row.trace.finish = "too_long"
        return row.trace.finish is None

    def _forced(self) -> list[int]:
        return [writer for writer in (self._first, self._last) if writer is not None]

    # -- decide ---------------------------------------------------------------------------------------------------

    def _decide(self, rows: Sequence[Row]) -> Iterator[tuple[Row, Decision | None]]:
        """A decision per row; None where the row's context is full (its finish says so)."""
        asked: list[Row] = []
        for row in rows:
            forced = self._forced_decision(row)
            if forced is not None:
                yield row, self._fit(row, forced)
            elif isinstance(self.policy, SwitcherPolicy) and not self.policy.fits(row):
                row.trace.finish = "context"
                yield row, None
            else:
                asked.append(row)
        if not asked:
            return
        choice = self.policy.choose(asked)
        for index, (row, writer) in enumerate(zip(asked, choice.writers, strict=True)):
            scores = None if choice.scores_NC is None else tuple(choice.scores_NC[index].tolist())
            room = self._open_budget(row)
            decision = Decision(writer, min(self.decoding.segment.tokens, room), scores, ends_trace=self._ends(writer))
            yield row, self._fit(row, decision)

    def _open_budget(self, row: Row) -> int:
        """Tokens left before the last writer's reserve."""
        reserve = self.decoding.segment.tokens if self._last is not None else 0
        return self.decoding.max_new_tokens - reserve - row.num_written

    def _ends(self, writer: int) -> bool:
        if self._last is not None:
            return writer == self._last and self.decoding.cue is None
        return self.decoding.eos == "response"

    def _forced_decision(self, row: Row) -> Decision | None:
        """The first and the last writer's turns."""
        if self._last is not None and (row.closing or self._open_budget(row) <= 0):
            return Decision(self._last, self.decoding.segment.tokens, cue=self.decoding.cue, closes=True)
        if self._first is not None and not row.trace.segments:
            tokens = min(self.decoding.segment.tokens, self._open_budget(row))
            return Decision(self._first, tokens, ends_trace=self._ends(self._first))
        return None

    def _fit(self, row: Row, decision: Decision) -> Decision | None:
        """Shorten a decision to the writer's context; None if there is no room at all.

        A segment may go on beyond its limit until a character or word is complete: that room is kept free.
        """
        if decision.cue is not None:
            vocabulary = self.pool.candidates[decision.writer].vocabulary
            row.append(Segment(CUE, decision.cue, tuple(vocabulary.encode_text(decision.cue)), "cue"))
        room = self.pool.candidates[decision.writer].engine.max_positions - len(row.context(decision.writer).ids)
        room -= self._rule.max_extra
        if room <= 0:
            row.trace.finish = "context"
            return None
        return decision if room >= decision.max_tokens else replace(decision, max_tokens=room)

    # -- write ----------------------------------------------------------------------------------------------------

    def _write(self, batch: Mapping[int, Sequence[tuple[Row, Decision]]]) -> None:
        """One segment for each row, by writer."""
        for closes in (False, True):
            part = {
                writer: [(row, decision) for row, decision in rows if decision.closes == closes]
                for writer, rows in batch.items()
            }
            part = {writer: rows for writer, rows in part.items() if rows}
            if not part:
                continue
            written = self._segments({writer: [*map(self._item, rows)] for writer, rows in part.items()}, closes)
            for writer, rows in part.items():
                for (row, decision), result in zip(rows, written[writer], strict=True):
                    self._append(row, decision, result)

    def _item(self, turn: tuple[Row, Decision]) -> WriteItem:
        row, decision = turn
        longest = max((len(string) for string in self._stop), default=1) - 1
        context, trace = row.context(decision.writer), row.trace
        return WriteItem(context, decision.max_tokens, trace.seed, trace.num_tokens, row.tail(longest))

    def _segments(self, items: Mapping[int, Sequence[WriteItem]], closes: bool) -> dict[int, list[Written]]:
        """Each writer's segments, of all writers in one batch where they can."""
        rule = self._closing_rule if closes else self._rule
        engines = {writer: self.pool.candidates[writer].engine for writer in items}
        joint = [(engine, items[writer]) for writer, engine in engines.items() if isinstance(engine, SlotEngine)]
        if len(joint) == len(items) and can_write_together(joint):
            return dict(zip(items, write_together(joint, self.params, rule, self._stop), strict=True))
        return {
            writer: engine.write(items[writer], self.params, rule, self._stop) for writer, engine in engines.items()
        }

    def _append(self, row: Row, decision: Decision, written: Written) -> None:
        """Sign the segment and see whether the response has ended."""
        vocabulary = self.pool.candidates[decision.writer].vocabulary
        text = vocabulary.decode(written.ids)
        row.append(Segment(decision.writer, text, tuple(written.ids), written.finish, decision.scores))
        if written.finish == "stop":
            _cut(row, written.cut)
            row.trace.finish = "stop"
        elif written.finish == "eos":
            if decision.closes or decision.ends_trace:
                row.trace.finish = "eos"
            elif self._last is not None:
                row.closing = True
            elif _empty_at_end(row) >= _MAX_EMPTY_SEGMENTS:
                row.trace.finish = "eos"
        elif decision.closes:
            row.trace.finish = "length"
        if row.trace.finish is None and self._last is None and row.num_written >= self.decoding.max_new_tokens:
            row.trace.finish = "length"


def _empty_at_end(row: Row) -> int:
    count = 0
    for segment in reversed(row.trace.segments):
        if segment.ids:
            break
        count += 1
    return count


def _cut(row: Row, num_bytes: int) -> None:
    """Take the stop string and what follows it off the response's end; ids keep every token that has text left."""
    segments = row.trace.segments
    room = len(row.trace.text.encode()) - num_bytes
    kept: list[Segment] = []
    for segment in segments:
        raw = segment.text.encode()[:room]
        if room <= 0 and kept:
            break
        text = raw.decode("utf-8", errors="ignore")
        kept.append(replace(segment, text=text, ids=_ids_of(row, segment, len(raw))))
        room -= len(raw)
    kept[-1] = replace(kept[-1], finish="stop")
    segments[:] = kept


def _ids_of(row: Row, segment: Segment, num_bytes: int) -> tuple[int, ...]:
    """The segment's first tokens that together hold the first `num_bytes` bytes of its text."""
    if segment.writer == CUE or num_bytes == 0:
        return segment.ids if num_bytes else ()
    vocabulary = row.pool.candidates[segment.writer].vocabulary
    raw = b""
    for count, index in enumerate(segment.ids, start=1):
        raw += vocabulary.token_bytes[index]
        # Bytes that are no UTF-8 stand in the text as U+FFFD.
        if len(codecs.utf_8_decode(raw, "replace", False)[0].encode()) >= num_bytes:
            return segment.ids[:count]
    return segment.ids
