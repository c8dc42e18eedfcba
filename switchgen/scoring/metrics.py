"""One entry per metric: what it needs of an item, and how it scores a response."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from switchgen.errors import ConfigError, DataError
from switchgen.scoring.choice import extract_choice, options_in
from switchgen.scoring.confidence import split_confidence
from switchgen.scoring.extraction import Answer, find_answer, first_sentence
from switchgen.scoring.mathematics import equivalent, extract_expression
from switchgen.scoring.number import last_number, parse_number
from switchgen.scoring.refusal import expected_refusal, is_refusal
from switchgen.scoring.text import best_f1, lists_equal, normalise

Item = Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """What one response is worth."""

    value: float
    """0 to 1."""
    extracted: str | None
    """The answer that was read out of the response; None where none was found."""
    correct: bool | None
    """Right or wrong; None for a metric that knows no right answer."""


@dataclass(frozen=True)
class Metric:
    """A metric by name."""

    name: str
    description: str
    score: Callable[[str, Item, str | None, bool], Score] | None = None
    """(response, item, marker, strict) → Score. None: not scored one response at a time on its own."""
    needs_gold: bool = True
    """The item must hold an accepted answer (see `golds`)."""
    exact: bool = True
    """One right answer, and no model needed to tell: such tasks enter the mean over exact tasks. Open tasks, where any
    of many answers will do (`one_of`), stand beside it."""
    instead: str = ""
    """What to use where `score` is None."""


def golds(item: Item) -> list[str]:
    """The accepted answers of `item`: its `answers`, else its `output`, else its `answer`. A JSON list of strings in
    `output` (PopQA) holds several. Empty where there is none."""
    if isinstance(several := item.get("answers"), Sequence) and not isinstance(several, str):
        return [str(answer) for answer in several if answer is not None and str(answer).strip()]
    gold = item.get("output", item.get("answer"))
    if isinstance(gold, str) and re.match(r'\s*\[\s*"', gold):
        try:
            parsed = json.loads(gold)
        except json.JSONDecodeError:
            parsed = None
        if isinstance(parsed, list) and all(isinstance(answer, str) for answer in parsed):
            gold = parsed
    if isinstance(gold, Sequence) and not isinstance(gold, str):
        return [str(answer) for answer in gold if answer is not None and str(answer).strip()]
    return [] if gold is None or not str(gold).strip() else [str(gold)]


def gold(item: Item) -> str:
    """The one accepted answer of `item`, as text. Raises DataError where there is none."""
    value = item.get("output", item.get("answer"))
    if value is None or not str(value).strip():
        raise DataError(f"the item has no answer to compare with: fields {sorted(item)}, expected 'output' or 'answer'")
    return str(value)


_NOTHING = Score(0.0, None, False)
_LEAD = re.compile(
    r"(?:(?:it\s+is|it's|that\s+is|that's)\s+)?(?P<word>[a-z]+)\b"
    r"(?P<set_off>[\"'*_)]*\s*(?:$|[.,;:!\n–—]|-\s|(?:because|since|as)\b))?"
    r"(?!\s+(?:or|and)\b|(?<=\bno)\s+(?:doubt|one|matter|idea|wonder|need|problem|longer|question|way)\b)"
)
_CLOSED_SETS = ({"yes", "no"}, {"true", "false"}, {"valid", "invalid"})


def score_number(response: str, item: Item, marker: str | None, strict: bool) -> Score:
    """Exact equality of the numbers; unmarked, the response's last number counts."""
    wanted = parse_number(gold(item))
    if wanted is None:
        raise DataError(f"metric 'number': the gold answer {gold(item)!r} is no number")
    got = read_number(find_answer(response, marker=marker, strict=strict), strict=strict)
    return _NOTHING if got is None else _verdict(got == wanted, str(got))


def read_number(answer: Answer, *, strict: bool) -> Fraction | None:
    """The number that a marked answer states; unmarked, the response's last one."""
    if answer.text is None:
        return None
    if not answer.marked:
        return last_number(answer.text)
    return parse_number(answer.text if strict else first_sentence(answer.text))


def score_string(response: str, item: Item, marker: str | None, strict: bool) -> Score:
    """Equality of the normalised strings. A single letter as gold and lettered options in the query make it a multiple
    choice; a gold yes/no, true/false or valid/invalid is read as the word that the answer begins with or comes to."""
    wanted = gold(item)
    letter = re.fullmatch(r"\s*\(?([A-Z])\)?\s*", wanted)
    if letter and letter[1] in (options := options_in(str(item.get("input", "")))):
        label = extract_choice(response, options, marker=marker, strict=strict)
        return _NOTHING if label is None else _verdict(label == letter[1], label)
    answer = find_answer(response, marker=marker, strict=strict)
    if answer.text is None:
        return _NOTHING
    closed = next((words for words in _CLOSED_SETS if normalise(wanted) in words), None)
    if closed is not None:
        word = _word_of(answer, closed)
        return _NOTHING if word is None else _verdict(word == normalise(wanted), word)
    return _first_equal(_readings(answer, strict), lambda text: normalise(text) == normalise(wanted))


def score_one_of(response: str, item: Item, marker: str | None, strict: bool) -> Score:
    """Equality with any one of several accepted answers, normalised."""
    accepted = {normalise(answer) for answer in golds(item)}
    if not accepted:
        raise DataError(f"metric 'one_of': the item has no 'answers': fields {sorted(item)}")
    answer = find_answer(response, marker=marker, strict=strict)
    if answer.text is None:
        return _NOTHING
    return _first_equal(_readings(answer, strict), lambda text: normalise(text) in accepted)


def score_list(response: str, item: Item, marker: str | None, strict: bool) -> Score:
    """The gold items, all of them, in their order; separators do not matter."""
    wanted = item.get("output", item.get("answer"))
    wanted = wanted if isinstance(wanted, Sequence) and not isinstance(wanted, str) else gold(item)
    answer = find_answer(response, marker=marker, strict=strict)
    if answer.text is None:
        return _NOTHING
    blocks = [answer.text]
    if not answer.marked:
        last = _last_line(answer)
        blocks += [re.split(r"\n\s*\n", answer.text)[-1], last, last.rpartition(":")[2]]
    return _first_equal(blocks, lambda text: lists_equal(text, wanted))


def score_f1(response: str, item: Item, marker: str | None, strict: bool) -> Score:
    """SQuAD token F1, the best over the accepted answers: of the marked answer, else of the whole response. `correct`
    is a perfect F1."""
    accepted = golds(item)
    if not accepted:
        raise DataError(f"metric 'f1': the item has no answer to compare with: fields {sorted(item)}")
    answer = find_answer(response, marker=marker, strict=strict)
    if answer.text is None:
        return _NOTHING
    text = first_sentence(answer.text) if answer.marked and not strict else answer.text
    value = best_f1(text, accepted)
    return Score(value, text, value == 1.0)


def score_multiple_choice(response: str, item: Item, marker: str | None, strict: bool) -> Score:
    """The label of the right option: an anchored label first, then an option's text."""
    choices, wanted = item.get("choices"), item.get("answer", item.get("output"))
    if not isinstance(choices, Mapping) or wanted not in choices:
        raise DataError(
            f"metric 'multiple_choice': expected 'choices' (label → text) and 'answer' among its labels, got {wanted!r}"
        )
    label = extract_choice(response, choices, marker=marker, strict=strict)
    return _NOTHING if label is None else _verdict(label == wanted, label)


def score_chosen(response: str, item: Item, marker: str | None, strict: bool) -> Score:
    """As `score_multiple_choice`; a response that is a label was chosen by likelihood, and needs no marker."""
    if response in (item.get("choices") or ()):
        marker, strict = None, False
    return score_multiple_choice(response, item, marker, strict)


def score_math(response: str, item: Item, marker: str | None, strict: bool) -> Score:
    """Mathematical equivalence with the gold expression."""
    wanted = gold(item)
    expression = extract_expression(response, marker=marker, strict=strict)
    return _NOTHING if expression is None else _verdict(equivalent(expression, wanted), expression)


def score_refusal(response: str, item: Item, marker: str | None, strict: bool) -> Score:
    """Whether the response refuses where it should (`should_refuse` of the item, true by default) and only there."""
    refused = is_refusal(response)
    return _verdict(
        bool(response.strip()) and refused == expected_refusal(item), "refusal" if refused else "compliance"
    )


def _verdict(correct: bool, extracted: str) -> Score:
    return Score(float(correct), extracted, correct)


def _first_equal(readings: Sequence[str], equal: Callable[[str], bool]) -> Score:
    """Right where the first reading or a documented alternative is; wrong with the first reading shown."""
    if not readings or not readings[0].strip():
        return _NOTHING
    right = next((text for text in readings if equal(text)), None)
    return _verdict(right is not None, right if right is not None else readings[0])


def _readings(answer: Answer, strict: bool) -> list[str]:
    """The texts compared with the gold: a marked answer's first sentence or whole line (a gold may hold a full stop),
    an unmarked response's whole, or its last line."""
    text = answer.text or ""
    if strict:
        return [text]
    return [first_sentence(text), text] if answer.marked else [text, _last_line(answer)]


def _last_line(answer: Answer) -> str:
    lines = [line for line in (answer.text or "").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _word_of(answer: Answer, words: set[str]) -> str | None:
    """The word of a closed set (`yes`, `no`) that the answer begins with, unmarked also the one that its last line ends
    with, not negated: the first where it is set off (`No, …`), else the last. Whole words only: `know` is no `no`,
    and neither are `no doubt` and the question `True or False?`."""
    text = (answer.text or "").casefold().strip().lstrip("(\"'*_ ")
    lead = _LEAD.match(text)
    first = lead["word"] if lead and lead["word"] in words else None
    if answer.marked or (first and lead and lead["set_off"] is not None):
        return first
    end = re.search(r"(?<!not )(?<!or )\b([a-z]+)$", normalise(_last_line(answer)))
    return end[1] if end and end[1] in words else first


_ENTRIES = (
    Metric("number", "exact number", score_number),
    Metric("string", "exact string, normalised", score_string),
    Metric("f1", "token F1 (SQuAD), best of the accepted answers", score_f1, exact=False),
    Metric("multiple_choice", "label of the right option", score_multiple_choice),
    Metric("choice_likelihood", "the likeliest option (nothing is written)", score_chosen),
    Metric("math", "mathematical equivalence (math-verify)", score_math),
    Metric("list", "ordered list of items", score_list),
    Metric("one_of", "any one of several accepted answers", score_one_of, exact=False),
    Metric("refusal", "refuses exactly where it should", score_refusal, needs_gold=False, exact=False),
    Metric(
        "reward_model",
        "a reward model's score",
        needs_gold=False,
        exact=False,
        instead="switchgen.scoring.RewardModelScorer, in batches",
    ),
    Metric(
        "judge",
        "a judge's rating",
        needs_gold=False,
        exact=False,
        instead="switchgen.scoring.judge.JudgeScorer, in batches",
    ),
    Metric("none", "no score per response", needs_gold=False, exact=False, instead="a metric over all responses"),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _ENTRIES}


def metric_named(name: str) -> Metric:
    """The metric of that name. Raises ConfigError with the nearest spelling and the list of names."""
    if name in METRICS:
        return METRICS[name]
    near = difflib.get_close_matches(str(name), METRICS, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"unknown metric {name!r}{hint} (there are: {', '.join(METRICS)})")


def score(
    metric: str,
    response: str,
    item: Item,
    *,
    marker: str | None = None,
    strict: bool = False,
    confidence: bool = False,
) -> Score:
    """Score one response to `item`.

    marker: what announces the answer in this task, for example `Answer:`; strict: without it the answer is wrong, and
    it ends with its line; confidence: the response states one, which is no part of the answer. Raises ConfigError for
    an unknown metric or one that is not scored response by response, DataError where the item lacks what the metric
    needs.
    """
    entry = metric_named(metric)
    if entry.score is None:
        raise ConfigError(f"metric {metric!r} does not score single responses: use {entry.instead}")
    if strict and not marker:
        raise ConfigError(f"metric {metric!r}: strict scoring needs a marker, got strict=True with marker={marker!r}")
    return entry.score(split_confidence(response)[0] if confidence else response, item, marker, strict)


def score_many(
    metric: str, rows: Iterable[tuple[str, Item]], *, marker: str | None = None, strict: bool = False
) -> list[Score]:
    """Score (response, item) pairs, in order."""
    return [score(metric, response, item, marker=marker, strict=strict) for response, item in rows]
