"""The one loop: decide, group by writer, write, append, retire.

Rows move on their own. Each waits for a decision or for a candidate; the candidate with the fullest queue writes next
(adapters over one base write together, and so do candidates behind servers); a finished row makes room for a new one at
once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from switchgen.candidates import Pool
from switchgen.config import DecodingConfig, unsure_over_the_wire
from switchgen.engines.base import Engine, WriteItem, Written
from switchgen.engines.joint import can_write_together, families, write_together
from switchgen.engines.remote import RemoteEngine, write_remotely
from switchgen.engines.transformers import SlotEngine
from switchgen.errors import ConfigError
from switchgen.policies.base import Policy
from switchgen.policies.fixed import decoding_under
from switchgen.policies.masked import fits
from switchgen.queues import Queues, Turn, Waiting
from switchgen.rows import Reader, Row, Terms
from switchgen.sampling import SamplingParams
from switchgen.segmentation import SegmentRule
from switchgen.stops import cut
from switchgen.trace import CUE, Decision, Segment

# A writer that ends its text at once, again and again, would never move the row on (eos: segment).
_MAX_EMPTY_SEGMENTS = 3

Manner = tuple[SegmentRule, SamplingParams, tuple[bytes, ...]]
"""How segments are written; those of one manner are written in one batch."""


class Loop:
    """Writes rows with a pool under a policy. A subclass may decide `next_writer` and `pauses`.

    Args:
        policy, decoding: for rows that bring no terms of their own. A candidate alone has no first and last writer.
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
        self.decoding = decoding_under(policy, decoding)
        self.max_rows = max_rows
        self.max_segments = max_segments
        self._families = families([candidate.engine for candidate in pool])
        self._terms = Terms(policy, self.decoding)
        self._check(self.decoding)

    def _check(self, decoding: DecodingConfig) -> None:
        for name in (decoding.first, decoding.last):
            if name is not None:
                self.pool.index(name)
        remote = [candidate.name for candidate in self.pool if isinstance(candidate.engine, RemoteEngine)]
        if remote and decoding.segment.unsure is not None:
            raise ConfigError(unsure_over_the_wire(decoding.segment.end, remote[0]))

    def terms(self, row: Row) -> Terms:
        """Who chooses the row's writers, and how they write."""
        return row.terms or self._terms

    @property
    def readers(self) -> list[tuple[Reader, Engine]]:
        """Every engine that may hold caches of a row without terms of its own."""
        return self._readers(self.policy)

    def _readers(self, policy: Policy) -> list[tuple[Reader, Engine]]:
        readers: list[tuple[Reader, Engine]] = [
            (index, candidate.engine) for index, candidate in enumerate(self.pool.candidates)
        ]
        if policy.engine is not None:
            readers.append(("switcher", policy.engine))
        return readers

    def run(self, rows: Iterable[Row | None], *, release: bool = True) -> Iterator[Row]:
        """Write every row to its end; yields rows as they finish, in no particular order.

        Args:
            rows: taken as room becomes free; None stands for "nobody waits at the moment".
            release: whether the engines forget a row when it is done (not if it will be forked).
        """
        for done in self.rounds(rows, release=release):
            yield from done

    def rounds(self, rows: Iterable[Row | None], *, release: bool = True, live: bool = False) -> Iterator[list[Row]]:
        """The same, round by round: admit, decide, let one queue be written; yields the rows that finished.

        Args:
            rows: None stands for "nobody waits at the moment": the round goes on with the rows in flight.
            live: whether somebody waits for each row: none is left behind for fuller batches.
        """
        waiting = Waiting(rows)
        in_flight: set[Row] = set()
        try:
            yield from self._rounds(waiting, in_flight, Queues(self._families, live=live), release)
        finally:
            # Who asks for no more rounds, or an error, takes the rows in flight along.
            if release:
                for row in in_flight:
                    self._retire(row, release)

    def _rounds(self, waiting: Waiting, in_flight: set[Row], queues: Queues, release: bool) -> Iterator[list[Row]]:
        undecided: list[Row] = []
        while in_flight or waiting.more:
            done: list[Row] = []
            while len(in_flight) < self.max_rows and (row := waiting.take()) is not None:
                if self._admit(row):
                    undecided.append(row)
                    in_flight.add(row)
                else:
                    done.append(row)
            for row, decision in self._decide(undecided):
                if decision is None:
                    in_flight.remove(row)
                    done.append(self._retire(row, release))
                else:
                    queues.add(Turn(row, decision, self.terms(row).decoding.max_new_tokens - row.num_written))
            undecided = []
            batch = queues.take(refilled=waiting.more)
            self._write(batch)
            for turn in chain.from_iterable(batch.values()):
                if turn.row.trace.finish is not None or self.pauses(turn.row):
                    in_flight.remove(turn.row)
                    done.append(self._retire(turn.row, release))
                else:
                    undecided.append(turn.row)
            yield done

    def _retire(self, row: Row, release: bool) -> Row:
        if release:
            row.release(self._readers(self.terms(row).policy))
        return row

    def _admit(self, row: Row) -> bool:
        """Whether the prompt leaves room for a segment in every context that may read the row."""
        policy, decoding = self.terms(row).policy, self.terms(row).decoding
        row.expected = (decoding.max_new_tokens, -(-decoding.max_new_tokens // decoding.segment.tokens))
        needed = min(decoding.segment.tokens, decoding.max_new_tokens) + self._rule(row, closes=False).max_extra
        forced = {self.pool.index(name) for name in (decoding.first, decoding.last) if name is not None}
        for index in {*policy.writers(len(self.pool)), *forced}:
            if len(row.prompt_ids(index)) + needed > self.pool.candidates[index].engine.max_positions:
                row.trace.finish = "too_long"
        if row.trace.finish is None and not fits(policy, row):
            row.trace.finish = "too_long"
        return row.trace.finish is None

    # -- what a subclass may decide -------------------------------------------------------------------------------

    def next_writer(self, row: Row) -> int | None:
        """Who writes the row's next segment whatever the policy says; None leaves it to the policy.

        Asked once before every segment but the last writer's. Here: the first writer, of a row that has nothing yet.
        """
        first = self.terms(row).decoding.first
        return None if first is None or row.trace.segments else self.pool.index(first)

    def pauses(self, row: Row) -> bool:
        """Whether an unfinished row is given back after the segment that it has just got. Here: by `max_segments`."""
        return self.max_segments is not None and len(row.trace.segments) >= self.max_segments

    # -- decide ---------------------------------------------------------------------------------------------------

    def _decide(self, rows: Sequence[Row]) -> Iterator[tuple[Row, Decision | None]]:
        """A decision per row; None where the row's context is full (its finish says so)."""
        asked: dict[Policy, list[Row]] = {}
        for row in rows:
            policy = self.terms(row).policy
            if row.cancelled:
                row.trace.finish = "cancelled"
                yield row, None
                continue
            forced = self._forced_decision(row)
            if forced is not None:
                yield row, self._fit(row, forced)
            elif not fits(policy, row):
                row.trace.finish = "context"
                yield row, None
            else:
                asked.setdefault(policy, []).append(row)
        for policy, own in asked.items():
            choice = policy.choose(own)
            for index, (row, writer) in enumerate(zip(own, choice.writers, strict=True)):
                scores = None if choice.scores_NC is None else tuple(choice.scores_NC[index].tolist())
                yield row, self._fit(row, self._decision(row, writer, scores))

    def _open_budget(self, row: Row) -> int:
        """Tokens left before the last writer's reserve."""
        decoding = self.terms(row).decoding
        reserve = decoding.segment.tokens if decoding.last is not None else 0
        return decoding.max_new_tokens - reserve - row.num_written

    def _ends(self, row: Row, writer: int) -> bool:
        decoding = self.terms(row).decoding
        if decoding.last is not None:
            return writer == self.pool.index(decoding.last) and decoding.cue is None
        return decoding.eos == "response"

    def _decision(self, row: Row, writer: int, scores: tuple[float, ...] | None = None) -> Decision:
        """A writer's turn that does not close the response."""
        tokens = min(self.terms(row).decoding.segment.tokens, self._open_budget(row))
        return Decision(writer, tokens, scores, ends_trace=self._ends(row, writer))

    def _forced_decision(self, row: Row) -> Decision | None:
        """A turn that the policy is not asked about."""
        decoding = self.terms(row).decoding
        if decoding.last is not None and (row.closing or self._open_budget(row) <= 0):
            return Decision(self.pool.index(decoding.last), decoding.segment.tokens, cue=decoding.cue, closes=True)
        writer = self.next_writer(row)
        return None if writer is None else self._decision(row, writer)

    def _fit(self, row: Row, decision: Decision) -> Decision | None:
        """Shorten a decision to the writer's context; None if there is no room at all.

        A segment may go on beyond its limit until a character or word is complete: that room is kept free.
        """
        if decision.cue is not None:
            vocabulary = self.pool.candidates[decision.writer].vocabulary
            row.append(Segment(CUE, decision.cue, tuple(vocabulary.encode_text(decision.cue)), "cue"))
        room = self.pool.candidates[decision.writer].engine.max_positions - len(row.context(decision.writer).ids)
        room -= self._rule(row, closes=decision.closes).max_extra
        if room <= 0:
            row.trace.finish = "context"
            return None
        return decision if room >= decision.max_tokens else replace(decision, max_tokens=room)

    # -- write ----------------------------------------------------------------------------------------------------

    def _rule(self, row: Row, *, closes: bool) -> SegmentRule:
        """Where the row's next segment ends."""
        segment = self.terms(row).decoding.segment
        return SegmentRule.of(segment, closes=closes, whole_words=len(self.pool.vocabularies) > 1)

    def _write(self, batch: Mapping[int, Sequence[Turn]]) -> None:
        """One segment for each row, by writer."""
        parts: dict[Manner, dict[int, list[Turn]]] = {}
        for writer, turns in batch.items():
            for turn in turns:
                terms = self.terms(turn.row)
                manner = (self._rule(turn.row, closes=turn.decision.closes), terms.params, terms.stop)
                parts.setdefault(manner, {}).setdefault(writer, []).append(turn)
        for manner, part in parts.items():
            written = self._segments({writer: [*map(self._item, turns)] for writer, turns in part.items()}, manner)
            for writer, turns in part.items():
                for turn, result in zip(turns, written[writer], strict=True):
                    self._append(turn.row, turn.decision, result)

    def _item(self, turn: Turn) -> WriteItem:
        row, decision = turn.row, turn.decision
        longest = max(map(len, self.terms(row).stop), default=1) - 1
        context, trace = row.context(decision.writer), row.trace
        return WriteItem(
            context, decision.max_tokens, trace.seed, trace.num_tokens, row.tail(longest), listener=row.listener
        )

    def _segments(self, items: Mapping[int, Sequence[WriteItem]], manner: Manner) -> dict[int, list[Written]]:
        """Each writer's segments, of all writers in one batch where they can."""
        rule, params, stop = manner
        engines = {writer: self.pool.candidates[writer].engine for writer in items}
        remote = [(engine, items[writer]) for writer, engine in engines.items() if isinstance(engine, RemoteEngine)]
        if len(remote) == len(items):
            return dict(zip(items, write_remotely(remote, params, rule, stop), strict=True))
        joint = [(engine, items[writer]) for writer, engine in engines.items() if isinstance(engine, SlotEngine)]
        if len(joint) == len(items) and can_write_together(joint):
            return dict(zip(items, write_together(joint, params, rule, stop), strict=True))
        return {writer: engine.write(items[writer], params, rule, stop) for writer, engine in engines.items()}

    def _append(self, row: Row, decision: Decision, written: Written) -> None:
        """Sign the segment and see whether the response has ended."""
        decoding = self.terms(row).decoding
        vocabulary = self.pool.candidates[decision.writer].vocabulary
        text = vocabulary.decode(written.ids)
        row.append(Segment(decision.writer, text, tuple(written.ids), written.finish, decision.scores))
        if written.finish == "stop":
            cut(row, written.cut)
            row.trace.finish = "stop"
        elif written.finish == "eos":
            if decision.closes or decision.ends_trace:
                row.trace.finish = "eos"
            elif decoding.last is not None:
                row.closing = True
            elif _empty_at_end(row) >= _MAX_EMPTY_SEGMENTS:
                row.trace.finish = "eos"
        elif decision.closes:
            row.trace.finish = "length"
        if row.trace.finish is None and decoding.last is None and row.num_written >= decoding.max_new_tokens:
            row.trace.finish = "length"


def _empty_at_end(row: Row) -> int:
    count = 0
    for segment in reversed(row.trace.segments):
        if segment.ids:
            break
        count += 1
    return count
