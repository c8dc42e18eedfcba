"""Records: what crosses stage borders, key by key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from switchgen.errors import DataError
from switchgen.records import label_record, query_of, read_records, released_log, response_record, usage_of
from switchgen.trace import CUE, Query, Segment, Trace, writer_name

NAMES = ["base", "aligned"]
QUERY = Query("q7", ({"role": "user", "content": "How old is Vudak?"},), {"level": 3})


def trace() -> Trace:
    segments = [
        Segment(0, "He is", (5, 6), "length", (0.75, 0.25)),
        Segment(CUE, " The answer is", (7, 8, 9), "cue"),
        Segment(1, " 17.", (10,), "eos"),
    ]
    return Trace(QUERY, 1, segments, "eos")


def test_a_trace() -> None:
    assert trace().text == "He is The answer is 17."
    assert trace().num_tokens == 6 and trace().writers == (0, 1)
    assert trace().signed() == [(0, "He is"), (1, " The answer is 17.")]
    assert [writer_name(segment.writer, NAMES) for segment in trace().segments] == ["base", "cue", "aligned"]


def test_a_response_record() -> None:
    record = response_record(trace(), NAMES)
    assert record == {
        "id": "q7",
        "output": "He is The answer is 17.",
        "segments": [
            {"writer": "base", "text": "He is", "num_tokens": 2, "finish": "length",
             "scores": {"base": 0.75, "aligned": 0.25}},
            {"writer": "cue", "text": " The answer is", "num_tokens": 3, "finish": "cue", "scores": None},
            {"writer": "aligned", "text": " 17.", "num_tokens": 1, "finish": "eos", "scores": None},
        ],
        "finish": "eos",
        "usage": {"new_tokens": 3, "cue_tokens": 3, "by_writer": {"base": 2, "aligned": 1}},
    }  # fmt: skip
    assert json.loads(json.dumps(record)) == record
    assert "".join(segment["text"] for segment in record["segments"]) == record["output"]


def test_a_row_beyond_the_context_has_no_output() -> None:
    record = response_record(Trace(QUERY, 1, [], "too_long"), NAMES)
    assert record["output"] is None and record["segments"] == [] and record["finish"] == "too_long"
    assert response_record(Trace(QUERY, 1, [], "eos"), NAMES)["output"] == ""


def test_the_released_log() -> None:
    assert released_log(trace()) == {
        "query": "How old is Vudak?",
        "generated_segments": ["He is", " The answer is 17."],
        "segment_model_index": [0, 1],
        "generated_sequence": "He is The answer is 17.",
    }
    assert usage_of(Trace(QUERY, 1), NAMES)["by_writer"] == {"base": 0, "aligned": 0}


@pytest.mark.parametrize(
    ("scores", "label", "tie", "margin", "spread"),
    [
        ([[1.0, 0.0], [1.0, 1.0]], 1, False, 0.5, 0.5),
        ([[1.0, 1.0], [1.0, 1.0]], 0, True, 0.0, 0.0),
        ([[0.0], [0.5], [0.5]], 1, True, 0.0, 0.5),
        ([[0.25, 0.75], [0.5]], 0, True, 0.0, 0.0),
        ([[2.0]], 0, False, 0.0, 0.0),
        # Graded scores: .1 + .2 is .30000000000000004.
        ([[0.3, 0.0], [0.1, 0.2]], 1, True, 0.0, 0.0),
    ],
)
def test_a_label_record(scores: list[list[float]], label: int, tie: bool, margin: float, spread: float) -> None:
    names = ["a", "b", "c"][: len(scores)]
    record = label_record(
        state_id="s", query=QUERY, task="t", prefix=[(0, "He")], names=names, scores=scores, tokens=99
    )
    assert (record["label"], record["tie"], record["margin"], record["spread"]) == (label, tie, margin, spread)
    assert record["counts"] == [len(values) for values in scores] and record["scores"] == scores
    assert record["std_errors"][0] is None or len(scores[0]) > 1
    assert record["segments"] == [{"writer": 0, "text": "He"}] and record["schema"] == 1
    assert query_of(json.loads(json.dumps(record))) == Query("q7", QUERY.messages)


def test_standard_errors() -> None:
    scores = [[0.0, 1.0, 1.0, 0.0], [0.5, 0.5]]
    record = label_record(state_id="s", query=QUERY, task="t", prefix=[], names=NAMES, scores=scores, tokens=0)
    assert record["std_errors"] == [pytest.approx((1 / 3 / 4) ** 0.5), 0.0]


def test_torn_and_wrong_lines(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xe2\x80\xa8"}\n{"a": ')
    assert list(read_records([path, path])) == [{"a": 1}, {"a": "\u2028"}] * 2
    for content, message in (
        (b'{"a": 1}\n{"a"\n', r"records.jsonl, line 2: not JSON: b'\{\"a\"'"),
        (b'"\xff"\n', "line 1: not JSON"),
        (b"[1]\n", "line 1: not a record of schema 1"),
        (b'{"schema": 2}\n', "line 1: not a record of schema 1"),
        (b"\n", "line 1: not JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            list(read_records([path]))
