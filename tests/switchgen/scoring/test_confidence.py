"""Confidence as responses state it."""

from __future__ import annotations

from pathlib import Path

import pytest

from switchgen.errors import ConfigError
from switchgen.scoring import score
from switchgen.scoring.confidence import split_confidence
from switchgen.scoring.voting import AnswerForm, answer_key
from switchgen.tasks import load_task


@pytest.mark.parametrize(
    ("response", "confidence"),
    [
        ("Answer: 7. Confidence: 85%", 0.85),
        ("**Confidence:** 0.9", 0.9),
        ("I am 85% sure.", 0.85),
        ("I'm about 60 percent certain that it is 7.", 0.6),
        ("with a confidence of 0.25", 0.25),
        ("Confidence: 8/10", 0.8),
        ("Confidence level: 100%", 1.0),
        ("Confidence: 1", 1.0),
        ("Confidence: 0", 0.0),
        ("Confidence: 30%. On reflection, confidence: 70%", 0.7),
        ("It grew by 85%.", None),
        ("I am sure.", None),
        ("Confidence: 850%", None),
        ("Confidence: 8 out of 10", 0.8),
        ("I am 9 out of 10 sure.", 0.9),
        ("confidence: 5/5", 1.0),
        ("Confidence: 12/10", None),
        ("Confidence: 3/0", None),
        ("Confidence (0-100): 85", 0.85),
        ("Confidence (0–1): 0.85", 0.85),
        ("**Confidence score (out of 10):** 9", 0.9),
        ("There are 2 likely reasons.", None),
        ("", None),
    ],
)
def test_stated_confidence(response: str, confidence: float | None) -> None:
    assert split_confidence(response)[1] == (None if confidence is None else pytest.approx(confidence))


def test_what_is_stated_is_no_part_of_the_answer() -> None:
    """The last number of `The total is 42. Confidence: 85%` is the answer's, where the task asks for confidence."""
    assert score("number", "The total is 42. Confidence: 85%", {"output": "42"}, confidence=True).correct
    assert not score("number", "The total is 42. Confidence: 85%", {"output": "42"}).correct
    assert score("string", "Paris\n\n**Confidence:** 8/10.", {"output": "Paris"}, confidence=True).correct
    assert score("string", "I'm 90% sure that Paris", {"output": "Paris"}, confidence=True).correct
    assert answer_key("It is 42. Confidence: 85%", AnswerForm(confidence=True)) == "42"


def test_a_task_may_ask_for_confidence(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"input": "2 + 3", "output": "5"}\n')
    task = load_task({"file": "t.jsonl", "confidence": True}, base_dir=tmp_path)
    assert task.score("It is 5. I am 60% sure.", task.examples[0]).correct
    with pytest.raises(ConfigError, match="metric 'judge' does not tell"):
        load_task({"file": "t.jsonl", "confidence": True, "metric": "judge"}, base_dir=tmp_path)
