"""Stated confidence against being right: cases worked out by hand, intervals, and the way into the report."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer.confidence import calibration
from infer.evaluation import main
from infer.report import write_report
from switchgen.rundir import Run

NONE = float("nan")


def values(confidences: list[float], right: list[bool]) -> dict[str, float | None]:
    found = calibration(np.array([confidences]), np.array([right]))
    return {key: None if part is None else part.value for key, part in found.items()}


def test_worked_out_by_hand() -> None:
    assert values([1.0, 0.0, 0.5, 0.5], [True, False, True, False])["brier"] == pytest.approx(0.125)
    # bin 0.8 to 0.9: confidence 0.8, accuracy 0.5, four of six; bin 0.2 to 0.3: 0.2, accuracy 0.5, two of six
    confidences, right = [0.8] * 4 + [0.2] * 2, [True, True, False, False, True, False]
    assert values(confidences, right)["ece"] == pytest.approx(0.3)
    # who states nothing does not count
    assert values([*confidences, NONE], [*right, False])["ece"] == pytest.approx(0.3)
    assert values([1.0, 0.0], [True, False]) == {"ece": 0.0, "brier": 0.0}
    assert values([NONE], [True]) == {"ece": None, "brier": None}
    with pytest.raises(ValueError, match=r"got \(1, 1\) and \(1, 2\)"):
        values([0.5], [True, False])
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        values([1.5], [True])


def test_seeds_of_a_question_are_drawn_together() -> None:
    """Repeating every response in a second seed tells nothing new: the same value, the same interval."""
    rng = np.random.default_rng(0)
    confidence, right = rng.random((1, 60)), rng.random((1, 60)) < 0.5
    once, twice = calibration(confidence, right), calibration(np.repeat(confidence, 2, 0), np.repeat(right, 2, 0))
    for key, part in once.items():
        assert part is not None and part.low < part.value < part.high
        other = twice[key]
        assert other is not None
        assert (part.value, part.low, part.high) == pytest.approx((other.value, other.low, other.high))


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=20))
def test_scores_stay_between_perfect_and_worst(rows: list[tuple[float, bool]]) -> None:
    for part in calibration(np.array([[c for c, _ in rows]]), np.array([[r for _, r in rows]])).values():
        assert part is not None and -1e-9 <= part.low <= part.value <= part.high <= 1 + 1e-9


def test_from_responses_to_the_report(make_run: Callable[..., Run]) -> None:
    run = make_run("run", "evaluate.policies=[base]", "evaluate.seeds=[0]", "tasks.0.confidence=true")
    (nobody,) = main(run)["confidence"]
    assert (nobody["stated"], nobody["ece"], nobody["n"]) == (0.0, None, 4)
    path = run.dir / "evaluation" / "responses" / "base--ages--0.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    outputs = ["{}. I am 90% sure.", "{}\nConfidence: 9/10", "-1. Confidence: 0.9", "{} it is"]
    for record, output in zip(records, outputs, strict=True):
        record["output"] = output.format(record["reference"])
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    document = main(run, rescore=True)
    (row,) = document["confidence"]
    assert document["rows"][0]["value"] == 0.75
    assert (row["policy"], row["task"], row["stated"]) == ("base", "ages", 0.75)
    assert row["ece"] == pytest.approx(0.9 - 2 / 3) and row["brier"] == pytest.approx((0.01 + 0.01 + 0.81) / 3)
    assert row["brier_low"] <= row["brier"] <= row["brier_high"]
    write_report(run.dir)
    markdown = (run.dir / "report" / "results.md").read_text()
    assert "## Stated confidence" in markdown and "| 75.0 [" in markdown
    assert "Stated confidence" in (run.dir / "report" / "index.html").read_text()
    assert "confidence" not in main(make_run("other", "evaluate.policies=[base]"))
