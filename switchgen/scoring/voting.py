"""Which responses give the same answer, before anybody knows the right one: the keys of a majority vote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from switchgen.scoring.choice import extract_choice
from switchgen.scoring.confidence import split_confidence
from switchgen.scoring.extraction import Answer, find_answer, first_sentence
from switchgen.scoring.mathematics import extract_expression
from switchgen.scoring.metrics import read_number
from switchgen.scoring.number import is_number, last_number, parse_number
from switchgen.scoring.text import normalise


@dataclass(frozen=True)
class AnswerForm:
    """How a task's answers stand in responses, as far as the query tells."""

    marker: str | None = None
    """What announces the answer."""
    strict: bool = False
    """Without the marker nothing is answered."""
    choices: Mapping[str, str] | None = None
    """Label → text of a multiple choice."""
    confidence: bool = False
    """Responses state their confidence, which is no part of the answer."""
    metric: str | None = None
    """By what answers are scored; None: unknown, and a number in an answer is taken for the answer."""


def answer_key(response: str, form: AnswerForm | None = None) -> str | None:
    """What a response answers, so that equal answers have equal keys; None where it answers nothing.

    A choice's label; else what the metric reads, or the marked answer or the last line: numbers by value, other texts
    normalised.
    """
    form = form or AnswerForm()
    if form.confidence:
        response = split_confidence(response)[0]
    if form.choices:
        return extract_choice(response, form.choices, marker=form.marker, strict=form.strict)
    if form.metric == "math":
        text = extract_expression(response, marker=form.marker, strict=form.strict) or ""
        return _key(text, parse_number(text) if is_number(text) else None)
    answer = find_answer(response, marker=form.marker, strict=form.strict)
    if form.metric == "number":
        return _key("", read_number(answer, strict=form.strict))
    text = _read(answer, strict=form.strict)
    if form.metric is not None:
        return _key(text, None)
    return _key(text, parse_number(text) if answer.marked else last_number(text))


def _key(text: str, number: Fraction | None) -> str | None:
    return str(number) if number is not None else normalise(text) or None


def _read(answer: Answer, *, strict: bool) -> str:
    """The part of the response that is compared."""
    text = answer.text or ""
    if answer.marked:
        return text if strict else first_sentence(text)
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
