"""What must hold for every answer, not only for the tables'."""

from __future__ import annotations

import json
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switchgen.scoring import METRICS, find_answer, score
from switchgen.scoring.number import is_number, last_number, parse_number
from switchgen.scoring.text import normalise, split_items, token_f1

CHOICES = {"A": "cat", "B": "dog", "C": "iron", "D": "iron oxide"}
ITEMS = {
    "number": {"output": "5"},
    "string": {"output": "x y"},
    "f1": {"output": '["x", "y z"]'},
    "multiple_choice": {"choices": CHOICES, "answer": "A"},
    "list": {"output": "a, b"},
    "one_of": {"answers": ["x", "y"]},
    "refusal": {},
}
PHRASINGS = st.sampled_from(
    [
        "{}",
        "The answer is {}.",
        "Answer: {}",
        "**Answer:** {}",
        "$\\boxed{{{}}}$",
        "It was 3, not B.\n#### {}",
        "I sum:\nAnswer:\n{}",
    ]
)
MARKED = PHRASINGS.filter(lambda phrasing: phrasing != "{}")
WORDS = st.from_regex(r"[b-z]{3,9}", fullmatch=True).filter(
    lambda word: word not in {"not", "then", "yes", "true", "was", "the", "hundred", "valid"}
)


def integers_as_written(value: int) -> list[str]:
    return [str(value), f"{value:,}", f"{value}.0", f"{value:,}.00", f"${value:,}".replace("$-", "-$"), f"{value:+}"]


@given(st.integers(-(10**12), 10**12), st.integers(0, 5), PHRASINGS)
def test_an_integer_is_read_however_it_is_written(value: int, form: int, phrasing: str) -> None:
    response = phrasing.format(integers_as_written(value)[form])
    assert score("number", response, {"output": str(value)}).correct


@given(st.integers(-9999, 9999), st.integers(-9999, 9999), PHRASINGS)
def test_another_integer_is_wrong(value: int, other: int, phrasing: str) -> None:
    got = score("number", phrasing.format(other), {"output": str(value)})
    assert got.correct == (value == other)


@given(st.fractions(max_denominator=999).filter(lambda f: abs(f) < 10**6))
def test_fractions_and_decimals_are_exact(value: Fraction) -> None:
    assert parse_number(f"{value.numerator}/{value.denominator}") == value
    assert last_number(f"so we get {value.numerator}/{value.denominator} of it") == value
    whole, rest = divmod(abs(value), 1)
    if rest and whole:
        assert parse_number(f"{int(whole)} {rest.numerator}/{rest.denominator}") == abs(value)


@pytest.mark.parametrize(
    ("text", "expected"), [("3/0", None), ("3/00", None), ("1 2/00", None), ("٣/٠", None), ("5/00 or 7", Fraction(7))]
)
def test_fractions_over_nothing_are_no_numbers(text: str, expected: Fraction | None) -> None:
    """A response that held `3/00` ended an evaluation with a division by zero."""
    assert parse_number(text) == expected
    assert not is_number(text)


@given(st.decimals(-(10**6), 10**6, places=3))
def test_decimals_keep_their_digits(value: object) -> None:
    assert parse_number(f"{value:f}") == Fraction(str(value))
    assert parse_number(f"{value:f}1") != Fraction(str(value))


@given(st.sampled_from("ABCD"), st.sampled_from(["{}", "({})", "{}.", "{})", "**{}**", "option {}"]), MARKED)
def test_a_letter_is_read_however_it_is_set(letter: str, form: str, phrasing: str) -> None:
    response = phrasing.format(form.format(letter))
    for gold in "ABCD":
        assert score("multiple_choice", response, {"choices": CHOICES, "answer": gold}).correct == (letter == gold)


@settings(max_examples=40)
@given(WORDS)
def test_a_word_is_no_letter(word: str) -> None:
    options = {"A": "qqq1", "B": "qqq2", "C": "qqq3", "D": "qqq4"}
    for response in (word.capitalize(), f"The answer is {word.capitalize()}", f"The answer is {word.upper()}"):
        assert score("multiple_choice", response, {"choices": options, "answer": "A"}).extracted is None


@given(st.lists(WORDS, min_size=1, max_size=4), MARKED)
def test_a_string_is_right_and_no_part_of_it_is(words: list[str], phrasing: str) -> None:
    gold = " ".join(words)
    assert score("string", phrasing.format(gold.upper()), {"output": gold}).correct
    assert not score("string", phrasing.format(gold + "x"), {"output": gold}).correct
    assert not score("string", phrasing.format(gold[:-1]), {"output": gold}).correct
    assert not score("string", phrasing.format(f"{gold}, or maybe not"), {"output": gold}).correct


@given(st.lists(WORDS, min_size=2, max_size=6), st.sampled_from([", ", " ", "; ", "\n", " | ", " -> ", ","]), st.data())
def test_a_list_is_its_items_in_order(items: list[str], separator: str, data: st.DataObject) -> None:
    gold, written = ", ".join(items), separator.join(items)
    assert split_items(written, by_blank=True) == items
    assert score("list", written, {"output": gold}).correct
    assert score("list", f"Answer: {', '.join(items)}.", {"output": items}).correct
    shuffled = data.draw(st.permutations(items))
    assert score("list", separator.join(shuffled), {"output": gold}).correct == (list(shuffled) == items)
    assert not score("list", separator.join(items[:-1]), {"output": gold}).correct
    assert not score("list", separator.join([*items, items[0]]), {"output": gold}).correct


TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)


@given(TEXTS, TEXTS)
def test_f1_is_a_symmetric_share(one: str, other: str) -> None:
    value = token_f1(one, other)
    assert 0.0 <= value <= 1.0
    assert value == token_f1(other, one)
    assert token_f1(one, one) == 1.0


@given(TEXTS)
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once


@given(st.one_of(TEXTS, st.from_regex(r"[A-D(). \n*$\\{}answer is:0-9,/=-]{0,60}", fullmatch=True)))
def test_any_response_gets_a_score(response: str) -> None:
    for metric, item in ITEMS.items():
        got = score(metric, response, item)
        assert 0.0 <= got.value <= 1.0
        if METRICS[metric].exact:
            assert got.value == float(bool(got.correct))
        marked = score(metric, response, item, marker="Answer:", strict=True)
        if metric != "refusal" and "Answer:" not in response:
            assert (marked.value, marked.extracted, marked.correct) == (0.0, None, False)


@given(WORDS, WORDS, WORDS)
def test_strict_reads_the_last_marker_to_the_end_of_its_line(first: str, last: str, after: str) -> None:
    response = f"Answer: {first}\nthe answer is {after}\nAnswer: {last}\n{after}"
    assert find_answer(response, marker="Answer:", strict=True).text == last
    assert score("string", response, {"output": last}, marker="Answer:", strict=True).correct
    assert not score("string", f"The answer is {last}", {"output": last}, marker="Answer:", strict=True).correct
    assert score("string", f"The answer is {last}", {"output": last}, marker="Answer:").correct


@pytest.mark.parametrize(
    "unit",
    ["A ", "1,", "answer to ", "answer is ", "(", "\n ", " ", "\\boxed{", "\\[ ", "$ ", "1 ", "A. ", "= ", "cat dog ",
     "####\n", "minus ", "I can't ", "sorry, ", "a, ", '" ', ".) "],
)  # fmt: skip
def test_scoring_takes_time_linear_in_the_response(unit: str) -> None:
    # A candidate that repeats itself must not stop the run: patterns that backtrack would take minutes here.
    response = unit * (20_000 // len(unit)) + "x"
    start = time.process_time()
    for metric, item in ITEMS.items():
        score(metric, response, item)
    assert time.process_time() - start < 3


def test_the_table_of_hard_cases_is_in_one_language() -> None:
    table = json.loads(Path(__file__).with_name("hard_cases.json").read_text(encoding="utf-8"))
    assert all(isinstance(row[0], str) and re.fullmatch(r"\S.*", row[-1]) for rows in table.values() for row in rows)
