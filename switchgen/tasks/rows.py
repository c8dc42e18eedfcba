"""From rows to examples: the query, the choices, the answer, the id; what is missing is a problem of that row."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from switchgen.errors import ConfigError
from switchgen.scoring import METRICS, golds
from switchgen.scoring.number import is_number, parse_number
from switchgen.tasks.columns import prepare_choices
from switchgen.tasks.reading import Problems, Row
from switchgen.tasks.task import CHOICE_METRICS, Example

_log = logging.getLogger("switchgen")

QUERY_FIELDS = ("messages", "input", "question", "prompt")
_FIELD = re.compile(r"\{(\w+)\}")
_TASK_TYPES = {
    "f1_match": "f1",
    "multiple_choice": "multiple_choice",
    "reward_model": "reward_model",
    "generation_diversity": "none",
    "noncompliance": "refusal",
}
TASK_TYPES = ("exact_match", *_TASK_TYPES)


def metric_by_type(task_type: str, name: str, rows: Sequence[Row]) -> str | None:
    """The metric that a file's `task_type` stands for; None for an unknown type."""
    if task_type != "exact_match":
        return _TASK_TYPES.get(task_type)
    if name == "math":
        return "math"
    answers = [answer for row in rows for answer in golds(row.record)]
    return "number" if answers and all(is_number(answer) for answer in answers) else "string"


def metric_by_rows(rows: Sequence[Row]) -> str:
    """The metric of rows that come without any word about it: by the fields they hold."""
    if any("choices" in row.record for row in rows):
        return "multiple_choice"
    if any("answers" in row.record for row in rows):
        return "one_of"
    answers = [answer for row in rows for answer in golds(row.record)]
    if not answers:
        return "none"
    return "number" if all(is_number(answer) for answer in answers) else "string"


def build_examples(
    rows: Sequence[Row], metric: str, problems: Problems, *, prompt: str | None, marker: str | None, unique_ids: bool
) -> tuple[tuple[Example, ...], tuple[str, ...]]:
    """The examples of `rows`, and the ids of rows left out because their answer is null.

    unique_ids: an id that repeats is a problem; else (published sets number their rows by subject) only a whole row
    that repeats is, and repeated ids get a suffix made from the row's content.
    """
    prepared = []
    for row in rows:
        record = dict(row.record)
        if metric in CHOICE_METRICS:
            prepare_choices(row.where, record, problems)
        messages = _messages(row.where, record, metric, prompt, marker, problems)
        answered = _check_answer(row.where, record, metric, problems)
        prepared.append((row.where, record, messages, answered))
    ids = _ids(rows, problems, unique_ids=unique_ids)
    examples, unanswered = [], []
    for name, (_, record, messages, answered) in zip(ids, prepared, strict=True):
        if not answered:
            unanswered.append(name)
        elif messages is not None:
            examples.append(Example(name, messages, record))
    if rows and len(unanswered) == len(rows):
        problems.add("", f"no row has an answer, which metric {metric!r} needs")
    return tuple(examples), tuple(unanswered)


def _messages(
    where: str, record: dict[str, Any], metric: str, prompt: str | None, marker: str | None, problems: Problems
) -> tuple[dict[str, str], ...] | None:
    key = next((key for key in QUERY_FIELDS if record.get(key) is not None), None)
    if key is None:
        known = ", ".join(map(repr, QUERY_FIELDS))
        problems.add(
            where, f"no query: expected one of {known}, got {', '.join(map(repr, record)) or 'an empty object'}"
        )
        return None
    if key == "messages":
        return _checked_messages(where, record["messages"], prompt, problems)
    if not isinstance(record[key], str):
        problems.add(where, f"{key!r} must be a text, got {record[key]!r:.60}")
        return None
    if not record[key].strip():
        problems.add(where, f"{key!r} is empty")
        return None
    if prompt is None and metric == "multiple_choice":
        end = f" Write its letter after {marker!r}." if marker else ""
        prompt = f"{{{key}}}\n\n{{choices}}\n\nAnswer with the letter of the right choice.{end}"
    text = record[key] if prompt is None else _fill(prompt, record)
    return ({"role": "user", "content": text},)


def _fill(prompt: str, record: Mapping[str, Any]) -> str:
    """`prompt` with each `{field}` replaced by the row's field; other braces stay. ConfigError for an unknown field."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in record:
            raise ConfigError(f"prompt {prompt!r}: no field {match[1]!r} in the rows; there are: {', '.join(record)}")
        if match[1] == "choices" and isinstance(record["choices"], Mapping):
            return "\n".join(f"{label}. {text}" for label, text in record["choices"].items())
        return str(record[match[1]])

    return _FIELD.sub(value, prompt)


def _checked_messages(
    where: str, messages: Any, prompt: str | None, problems: Problems
) -> tuple[dict[str, str], ...] | None:
    if prompt is not None:
        problems.add(where, "has 'messages', where the task's 'prompt' cannot apply: leave one of them out")
        return None
    good = isinstance(messages, Sequence) and not isinstance(messages, str) and len(messages) > 0
    if not good or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    ):
        problems.add(where, '\'messages\' must be a list of {"role": …, "content": text}')
        return None
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        problems.add(where, "the last of 'messages' must be a non-empty turn of role 'user'")
        return None
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in messages)


def _check_answer(where: str, record: dict[str, Any], metric: str, problems: Problems) -> bool:
    """Whether the row can be scored. An absent or empty answer is a problem; an explicit null leaves the row out."""
    if metric not in METRICS or not METRICS[metric].needs_gold:
        return True
    keys = [key for key in ("answers", "output", "answer") if key in record]
    if keys and all(record[key] is None for key in keys):
        return False
    accepted = golds(record) if metric not in CHOICE_METRICS else [str(record.get("answer") or "")]
    if not any(answer.strip() for answer in accepted):
        what = "'answer'" if metric in CHOICE_METRICS else "'output' (or 'answers')"
        problems.add(where, f"no answer: metric {metric!r} needs {what}")
    elif metric == "number" and parse_number(str(record.get("output", record.get("answer")))) is None:
        problems.add(
            where, f"metric 'number': the answer {record.get('output', record.get('answer'))!r:.60} is no number"
        )
    return True


def _ids(rows: Sequence[Row], problems: Problems, *, unique_ids: bool) -> list[str]:
    """One id a row, all different."""
    contents = [
        hashlib.sha256(json.dumps(row.record, sort_keys=True, default=str).encode()).hexdigest()[:10] for row in rows
    ]
    given: list[str | None] = []
    for row in rows:
        value = row.record.get("id")
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip()
        ):
            problems.add(row.where, f"'id' must be a text or a whole number, got {value!r:.60}")
            value = None
        given.append(None if value is None else str(value))
    first_by_content: dict[str, str] = {}
    first_by_id: dict[str, str] = {}
    for row, content, name in zip(rows, contents, given, strict=True):
        if content in first_by_content:
            problems.add(row.where, f"repeats {first_by_content[content]} word for word")
        elif unique_ids and name is not None and name in first_by_id:
            problems.add(row.where, f"id {name!r} was used before, in {first_by_id[name]}")
        first_by_content.setdefault(content, row.where)
        if name is not None:
            first_by_id.setdefault(name, row.where)
    counts = Counter(name for name in given if name is not None)
    if not unique_ids and any(count > 1 for count in counts.values()):
        repeated = sum(count for count in counts.values() if count > 1)
        _log.info(
            "%s: %d rows share an id with another row; theirs got a suffix from their content",
            problems.source,
            repeated,
        )
    ids = []
    for index, (content, name) in enumerate(zip(contents, given, strict=True)):
        if name is None:
            ids.append(f"{index}-{content}")
        else:
            ids.append(name if counts[name] == 1 else f"{name}-{content}")
    return ids
