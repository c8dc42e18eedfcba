"""The registry: names, errors, what is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from switchgen.errors import ConfigError, DataError
from switchgen.scoring import METRICS, Score, golds, score, score_many


def test_an_unknown_metric_is_named_with_its_nearest_spelling() -> None:
    with pytest.raises(ConfigError, match=r"unknown metric 'numbr'; did you mean 'number'\? \(there are: number, "):
        score("numbr", "5", {"output": "5"})


@pytest.mark.parametrize("metric", ["reward_model", "none"])
def test_a_metric_without_a_score_per_response_says_what_to_use(metric: str) -> None:
    with pytest.raises(ConfigError, match="does not score single responses: use "):
        score(metric, "x", {})


def test_strict_needs_a_marker() -> None:
    with pytest.raises(ConfigError, match="strict scoring needs a marker"):
        score("number", "5", {"output": "5"}, strict=True)


@pytest.mark.parametrize(
    ("metric", "item"),
    [
        ("number", {}),
        ("number", {"output": "five-ish"}),
        ("string", {"output": " "}),
        ("f1", {"output": "[]"}),
        ("f1", {}),
        ("one_of", {"answers": []}),
        ("multiple_choice", {"choices": {"A": "x"}, "answer": "B"}),
        ("multiple_choice", {"answer": "A"}),
        ("list", {}),
        ("math", {"output": None}),
    ],
)
def test_an_item_without_an_answer_is_an_error_and_no_wrong_response(metric: str, item: dict[str, object]) -> None:
    if (metric, item) == ("f1", {"output": "[]"}):
        assert golds(item) == ["[]"]
        return
    with pytest.raises(DataError):
        score(metric, "x", item)


def test_golds_in_all_their_forms() -> None:
    assert golds({"answers": ["a", None, " ", "b"]}) == ["a", "b"]
    assert golds({"output": '["a", "b"]'}) == ["a", "b"]
    assert golds({"output": ["a", "b"]}) == ["a", "b"]
    assert golds({"output": "[ ( )"}) == ["[ ( )"]
    assert golds({"output": 7}) == ["7"]
    assert golds({"answer": "a"}) == ["a"]
    assert golds({"output": None}) == []


def test_score_many_keeps_the_order() -> None:
    rows = [("5", {"output": "5"}), ("6", {"output": "5"})]
    assert score_many("number", rows) == [Score(1.0, "5", True), Score(0.0, "6", False)]


def test_a_label_chosen_by_likelihood_needs_no_marker() -> None:
    """The marker is asked of written responses; the label that `evaluate` chooses is none."""
    item = {"choices": {"A": "cat", "B": "dog"}, "answer": "B"}
    settings = {"marker": "Answer:", "strict": True}
    assert score("choice_likelihood", "B", item, **settings) == Score(1.0, "B", True)  # type: ignore[arg-type]
    assert score("choice_likelihood", "A", item, **settings) == Score(0.0, "A", False)  # type: ignore[arg-type]
    assert score("choice_likelihood", "It is B.", item, **settings).extracted is None  # type: ignore[arg-type]
    assert score("multiple_choice", "B", item, **settings).extracted is None  # type: ignore[arg-type]


def test_refusal_counts_both_ways() -> None:
    assert score("refusal", "I can't help with that.", {"should_refuse": True}).correct
    assert not score("refusal", "I can't help with that.", {"should_refuse": False}).correct
    assert score("refusal", "Sure: first, ...", {"should_refuse": "false"}).correct
    assert not score("refusal", "", {}).correct
    assert not score("refusal", "", {"should_refuse": False}).correct


def test_exact_metrics_are_those_with_one_right_answer() -> None:
    assert {name for name, metric in METRICS.items() if metric.exact} == {
        "number",
        "string",
        "multiple_choice",
        "math",
        "list",
        "choice_likelihood",
    }


def test_importing_imports_nothing_heavy() -> None:
    heavy = ["math_verify", "sympy", "datasets", "transformers", "torch", "pyarrow", "pandas"]
    code = f"import sys, switchgen.scoring, switchgen.tasks; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
