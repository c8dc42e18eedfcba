"""Where traces are cut: at decisions, in range, each border as often as any other, no state twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rollout.states import (
    NO_BORDER,
    REPEATED,
    TOO_LONG,
    Branch,
    decision_borders,
    draw_border,
    find_twins,
    prefix_of,
    shares,
)
from switchgen.candidates import Pool
from switchgen.config import CandidateConfig, DecodingConfig
from switchgen.loop import Loop
from switchgen.policies import RandomPolicy
from switchgen.rows import Row
from switchgen.trace import CUE, Query, Segment, Trace

PLAIN = DecodingConfig()


def _trace(*segments: tuple[int, int], seed: int = 0, finish: Any = "eos") -> Trace:
    """A finished trace of (writer, number of tokens)."""
    written = [
        Segment(writer, "x" * count, tuple(range(index * 100, index * 100 + count)), "length")
        for index, (writer, count) in enumerate(segments)
    ]
    return Trace(Query.from_text("?"), seed, written, finish)


@pytest.fixture(scope="module")
def pool(home: Path) -> Pool:
    names = ("base", "tuned", "aligned")
    return Pool.load([CandidateConfig(name=name, model=str(home / "ladder" / name)) for name in names])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"first": "aligned"},
        {"last": "aligned"},
        {"first": "tuned", "last": "aligned", "cue": " So:"},
        {"last": "base", "cue": " So:"},
        {"eos": "segment"},
        {"stop": ["e", "a"]},
    ],
    ids=str,
)
def test_decision_borders_are_those_where_the_loop_asked(pool: Pool, changes: dict[str, Any]) -> None:
    asked: dict[Row, list[int]] = {}

    class Spy(RandomPolicy):
        def choose(self, rows: Any) -> Any:
            for row in rows:
                asked.setdefault(row, []).append(len(row.trace.segments))
            return super().choose(rows)

    decoding = DecodingConfig(max_new_tokens=40, segment=8, temperature=1.2, top_p=1.0, **changes)
    # Some responses end early: any letter may end the text.
    for candidate in pool:
        candidate.engine.stop_ids |= {candidate.vocabulary.encode_text(letter)[0] for letter in "rst"}
    rows = [Row(pool, Query.from_text(f"Question {index}"), seed=index) for index in range(40)]
    for row in Loop(pool, Spy(), decoding).run(rows):
        borders = list(decision_borders(row.trace, decoding))
        # A stop string takes the segments after it away, and with them their borders.
        expected = [border for border in asked.get(row, []) if border < len(row.trace.segments)]
        assert borders == expected, row.trace
    assert len({row.trace.finish for row in rows}) > 1, "the traces should end in more than one way"


def test_shares_count_tokens_but_no_cue() -> None:
    assert shares(_trace((0, 10), (1, 20), (2, 10))) == [0.0, 0.25, 0.75]
    assert shares(_trace((0, 10), (CUE, 5), (2, 10))) == [0.0, 0.5, 0.5]
    assert shares(_trace((0, 0))) == [0.0]


def test_a_border_at_each_end_of_the_range_counts() -> None:
    trace = _trace((0, 5), (1, 40), (2, 5))
    drawn = {draw_border(_trace((0, 5), (1, 40), (2, 5), seed=seed), PLAIN, (0.1, 0.9), ()) for seed in range(50)}
    assert drawn == {(1, 0.1), (2, 0.9)}
    assert draw_border(trace, PLAIN, (0.11, 0.9), ()) == (2, 0.9)


def test_every_eligible_border_is_as_likely_as_any_other() -> None:
    counts = Counter(
        draw_border(_trace(*[(0, 10)] * 10, seed=seed * 7919), PLAIN, (0.0, 0.9), ()) for seed in range(2000)
    )
    assert {border for border, _ in counts} == set(range(10))  # type: ignore[misc]
    # 200 expected each, standard deviation 13.4.
    assert all(140 < count < 260 for count in counts.values()), counts


def test_no_prefix_is_used_twice() -> None:
    trace = _trace((0, 10), (1, 10))
    taken = {prefix_of(trace.segments[:0])}
    assert draw_border(trace, PLAIN, (0.0, 0.9), taken) == (1, 0.5)
    taken.add(prefix_of(trace.segments[:1]))
    assert draw_border(trace, PLAIN, (0.0, 0.9), taken) == REPEATED
    other = _trace((2, 10), (1, 10))
    assert draw_border(other, PLAIN, (0.0, 0.9), taken) == (1, 0.5), "another writer makes another state"


def test_reasons_why_there_is_no_state() -> None:
    assert draw_border(_trace((0, 10)), PLAIN, (0.1, 0.9), ()) == NO_BORDER
    assert draw_border(_trace((0, 10)), DecodingConfig(first="a"), (0.0, 0.9), ()) == NO_BORDER
    assert draw_border(_trace(finish="too_long"), PLAIN, (0.0, 0.9), ()) == TOO_LONG
    assert draw_border(_trace(finish="context"), PLAIN, (0.0, 0.9), ()) == NO_BORDER
    assert draw_border(_trace((0, 0)), PLAIN, (0.0, 0.9), ()) == (0, 0.0)


def test_twins_where_a_context_had_no_room(pool: Pool) -> None:
    """A candidate without room writes nothing after the empty prefix; two of them are twins, one that wrote is none."""

    def branch(writer: int, finish: Any, *segments: Segment) -> Branch:
        row = Row(pool, Query.from_text("?"), 0)
        for segment in segments:
            row.append(segment)
        row.trace.finish = finish
        return Branch(writer, row=row)

    branches = [branch(0, "context"), branch(1, None, Segment(1, "x", (5,), "length")), branch(2, "context")]
    find_twins(branches)
    assert [one.twin_of for one in branches] == [None, None, 0]
