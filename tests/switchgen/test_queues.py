"""Who is served next, and that it changes nothing in what is written."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice, repeat
from typing import Any

import pytest
from reference import Ladder, collaborate, first_difference, make_ladder

from switchgen.api import make_policy
from switchgen.config import DecodingConfig
from switchgen.loop import Loop
from switchgen.queues import Queues, Turn, Waiting
from switchgen.rows import Row, Terms
from switchgen.trace import Decision, Query

QUERIES = [Query.from_text(f"How old is Vudak? {index} " * (1 + index % 3), str(index)) for index in range(12)]


@pytest.fixture(scope="module")
def ladder() -> Ladder:
    return make_ladder(switcher="llama")


def row(ladder: Ladder, index: int) -> Row:
    return Row(ladder.pool, QUERIES[index], index)


def test_waiting_looks_one_row_ahead(ladder: Ladder) -> None:
    taken: list[int] = []

    def source() -> Iterator[Row | None]:
        for index in (0, 1):
            taken.append(index)
            yield row(ladder, index)
        yield None
        yield row(ladder, 2)

    waiting = Waiting(source())
    assert not taken and waiting.more and waiting.more and taken == [0]
    # None: nobody waits at the moment, but somebody may come.
    found = [waiting.take() for _ in range(4)]
    assert [row and row.trace.seed for row in found] == [0, 1, None, 2]
    assert not waiting.more and waiting.take() is None


def test_the_fullest_queue_is_served_while_rows_come_and_those_behind_when_none_do(ladder: Ladder) -> None:
    def queues() -> Queues:
        made = Queues([[0], [1], [2]])
        for index, (writer, left) in enumerate([(0, 50), (0, 60), (0, 70), (1, 400), (1, 10), (2, 200)]):
            made.add(Turn(row(ladder, index), Decision(writer, 50), left))
        return made

    assert [turn.left for turn in queues().take(refilled=True)[0]] == [50, 60, 70]
    last = queues()
    assert [list(last.take(refilled=False)) for _ in range(4)] == [[1], [2], [0], []]


def test_nobody_is_left_behind_where_somebody_waits(ladder: Ladder) -> None:
    """A row whose queue is never the fullest once waited without bound, as long as other rows came."""

    def wait(*, live: bool) -> int | None:
        """Rounds until the lone row is served; None after 50."""
        queues = Queues([[0], [1], [2]], live=live)
        queues.add(Turn(row(ladder, 0), Decision(2, 50), 8))
        for count in range(50):
            for index in (1, 2):
                queues.add(Turn(row(ladder, index), Decision(index - 1, 50), 400))
            if 2 in queues.take(refilled=True):
                return count
        return None

    assert wait(live=False) is None
    assert wait(live=True) == 4


def test_a_short_row_ends_before_a_long_one(ladder: Ladder) -> None:
    """One row each for two candidates; the first one's once was written to its end before the other's began."""
    names = [candidate.name for candidate in ladder.pool]
    rows = []
    for index, tokens in ((0, 120), (1, 8)):
        terms = Terms(
            make_policy(names[index], ladder.pool), DecodingConfig(max_new_tokens=tokens, segment=5, eos="segment")
        )
        rows.append(Row(ladder.pool, QUERIES[index], index, terms=terms))
    loop = Loop(ladder.pool, make_policy("random", ladder.pool), DecodingConfig())
    source = chain(rows, repeat(None))
    ended = list(chain.from_iterable(islice(loop.rounds(source, live=True), 40)))
    assert ended == [rows[1], rows[0]]


def rounds(sequences: Sequence[Sequence[int]], ladder: Ladder, *, refilled: bool) -> int:
    """Rounds in which all rows' writers (one a segment of 50 tokens) have had their turns."""
    queues, count = Queues([[0], [1], [2]]), 0
    places = {row(ladder, 0): [*sequence] for sequence in sequences}
    ready = list(places)
    while any(places.values()):
        for each in ready:
            if places[each]:
                queues.add(Turn(each, Decision(places[each].pop(0), 50), 50 * (len(places[each]) + 1)))
        ready = [turn.row for turns in queues.take(refilled=refilled).values() for turn in turns]
        count += 1
    return count


def test_rows_that_are_behind_first_takes_fewer_rounds(ladder: Ladder) -> None:
    """64 rows of 11 segments by writers with shares of 6:3:1. The fullest queue leaves the rare writer's to the end."""
    draw = random.Random(0)
    sequences = [draw.choices(range(3), weights=(6, 3, 1), k=11) for _ in range(64)]
    assert rounds(sequences, ladder, refilled=False) < 0.85 * rounds(sequences, ladder, refilled=True)


# -- the schedule changes nothing in what is written -------------------------------------------------------------------


def emptiest(queues: Queues, *, refilled: bool) -> Mapping[int, list[Turn]]:
    """The emptiest queue that is not empty."""
    writer = min((index for index, turns in queues._turns.items() if turns), default=0,
                 key=lambda index: len(queues._turns[index]))  # fmt: skip
    taken = queues._turns[writer]
    queues._turns[writer] = []
    return {writer: taken} if taken else {}


SETTINGS = {
    "sentences": {"segment": {"tokens": 9, "end": "sentence"}},
    "stop strings": {"segment": {"tokens": 9, "end": "line"}, "stop": ["a", "e"]},
    "last writer and cue": {"last": "c1", "cue": " So:", "segment": {"tokens": 6, "end": "sentence"}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_who_is_served_first_does_not_matter(ladder: Ladder, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are behind first, the fullest queue, the emptiest; with caches dropped on the way."""
    decoding = DecodingConfig.model_validate(
        {"max_new_tokens": 40, "temperature": 1.0, "top_p": 0.95, **SETTINGS[name]}
    )
    alone = [collaborate(ladder, [query], "random", decoding)[0] for query in QUERIES]
    narrow = make_ladder(switcher="llama", max_slots=3)
    right = Queues.take
    orders = []
    for take in (right, lambda queues, refilled: right(queues, refilled=True), emptiest):
        served: list[list[int]] = []

        def noting(queues: Queues, *, refilled: bool, take: Any = take, served: Any = served) -> Any:
            taken = take(queues, refilled=refilled)
            served.append([len(turns) for turns in taken.values()])
            return taken

        monkeypatch.setattr(Queues, "take", noting)
        for pool in (ladder, narrow):
            together = collaborate(pool, QUERIES, "random", decoding, max_rows=8)
            assert [first_difference(one, other) for one, other in zip(alone, together, strict=True)] == [None] * 12
        orders.append(served)
    assert orders[0] != orders[2] and orders[1] != orders[2], "the schedules differ"
    assert any(candidate.engine.stats.evicted_rows for candidate in narrow.pool)
