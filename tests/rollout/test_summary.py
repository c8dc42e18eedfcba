"""The summary, on records written by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rollout.budgets import UniformBudget
from rollout.summary import difference_error, is_clear, summarize
from switchgen.records import label_record
from switchgen.trace import Query

NAMES = ("a", "b", "c")


def _record(*scores: list[float], state: str = "q/0", task: str = "t", border: int = 1) -> dict[str, Any]:
    record = label_record(
        state_id=f"{task}/{state}", query=Query.from_text("?", id=f"{task}/{state.split('/')[0]}"), task=task,
        prefix=[], names=NAMES[: len(scores)], scores=scores, tokens=10,
    )  # fmt: skip
    return {**record, "border": border, "share": 0.5, "finished": [len(values) == 1 for values in scores]}


def test_error_of_paired_branches() -> None:
    # Differences 1, 0, 1, 0: standard deviation 0.577, standard error 0.289.
    assert difference_error(_record([1, 0, 1, 1], [0, 0, 0, 1])) == pytest.approx(math.sqrt(1 / 12))


def test_a_finished_branch_adds_no_error() -> None:
    record = _record([1.0], [0, 0, 0, 1])
    assert difference_error(record) == pytest.approx(0.25)
    assert is_clear(record)
    assert not is_clear(_record([1.0], [0, 1, 0, 1]))
    assert difference_error(_record([1.0], [0.0])) == 0.0
    assert is_clear(_record([1.0], [0.0]))
    assert not is_clear(_record([1.0], [1.0]))


def test_one_completion_leaves_the_error_unknown() -> None:
    record = {**_record([1.0], [0.0]), "finished": [False, False]}
    assert difference_error(record) is None
    assert not is_clear(record)


def test_counts() -> None:
    records = [
        _record([1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], state="q/0", border=0),
        _record([1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], state="q/1"),
        _record([0, 0, 0, 0], [0, 0, 0, 0], [1.0], state="r/0", task="u"),
    ]
    left_out = [{"id": "u/s/0", "query_id": "u/s", "task": "u", "reason": "no"}]
    summary = summarize(records, left_out, NAMES)
    assert summary["states"] == 3
    assert summary["questions"] == 2
    assert summary["empty_prefixes"] == 1
    assert summary["ties"] == 1, "the second state's best mean is shared"
    assert summary["labels"] == {"a": 1, "b": 0, "c": 1}, "ties are labels of nobody"
    assert summary["mean_spread"] == pytest.approx((1 + 0.75 + 1) / 3, abs=1e-6)
    assert summary["clear_share"] == 1.0
    assert summary["completions"] == 12 + 12 + 9
    assert summary["tokens"] == 30
    assert summary["left_out"] == {"no": 1}
    assert list(summary["tasks"]) == ["t", "u"]
    assert summary["tasks"]["u"]["states"] == 1
    assert summary["tasks"]["u"]["left_out"] == {"no": 1}
    assert summary["tasks"]["t"]["labels"] == {"a": 1, "b": 0, "c": 0}


def test_nothing_labelled() -> None:
    summary = summarize([], [], NAMES)
    assert summary["states"] == 0 and summary["mean_spread"] is None and summary["tasks"] == {}


def test_uniform_budget_asks_for_what_is_missing() -> None:
    budget = UniformBudget(4)
    assert budget.more([[], []], [False, False]) == [4, 4]
    assert budget.more([[1.0] * 4, [0.0] * 4], [False, False]) == [0, 0]
    assert budget.more([[], [1.0]], [False, True]) == [4, 0]
