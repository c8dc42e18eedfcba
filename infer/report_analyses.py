"""The report's analyses: speaker sequences, who helps, segment lengths, safety; for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infer.report_data import Responses, read_document
from infer.report_text import markdown_table
from infer.report_view import is_fraction, number, shares_of
from infer.segment_lengths import best_settings, tasks_of
from infer.sequences import SequenceEffect, helpfulness_of, sequence_effects
from switchgen.baselines import family_of

JSON = dict[str, Any]
_SHOWN = 12
"""Speaker sequences of a length that are listed, the most frequent ones."""
_TOO_MANY = 200_000
"""Responses of one policy beyond which sequences are not tested."""


def read_analyses(run_dir: Path) -> JSON:
    """The documents of `switchgen segments` and `switchgen safety`, where they are.

    Raises:
        DataError: a file holds something else.
    """
    documents = {name: read_document(run_dir / name / "results.json") for name in ("segments", "safety")}
    return {name: document for name, document in documents.items() if document is not None}


def analyses_of(results: Mapping[str, Any], responses: Responses | None, documents: Mapping[str, Any]) -> list[JSON]:
    """Sections `{"id", "title", "note", "tables": [{"title", "head", "rows"}]}`, those with something to show."""
    candidates = list((results.get("meta") or {}).get("candidates") or [])
    sections = [
        _sequences(responses, candidates),
        _helpfulness(results),
        _confidence(results),
        _segments(documents.get("segments")),
        _safety(documents.get("safety")),
    ]
    return [section for section in sections if section["tables"]]


def analyses_markdown(sections: Sequence[Mapping[str, Any]]) -> str:
    """The same for terminals and pull requests."""
    parts = []
    for section in sections:
        parts += [f"## {section['title']}", "", section["note"], ""]
        for table in section["tables"]:
            parts += [*([f"**{table['title']}**", ""] if table["title"] else [])]
            parts += [markdown_table(table["head"], table["rows"]), ""]
    return "\n".join(parts)


def _sequences(responses: Responses | None, candidates: Sequence[str]) -> JSON:
    tables = []
    for policy in responses.policies if responses else []:
        if family_of(policy, candidates) != "Taking turns" or responses is None:
            continue
        by_task = [tally.spoken for (own, _), tally in responses.tallies.items() if own == policy]
        shares = [own for own in by_task if is_fraction(*(one.score for one in own))]
        # Rewards have another unit: they enter where there is nothing else.
        spoken = [one for own in shares or by_task for one in own]
        if not spoken or len(spoken) > _TOO_MANY:
            continue
        effects = sequence_effects(spoken)
        shown = [one for length in (2, 3) for one in _of_length(effects, length)[:_SHOWN]]
        if shown:
            tables.append({
                "title": policy,
                "head": ["speakers", "responses", "share", "effect", "95% interval"],
                "rows": [
                    [" → ".join(one.writers), str(one.count), f"{number(one.share, True)}%",
                     number(one.effect, bool(shares), sign=True), _between(one.low, one.high, bool(shares))]
                    for one in shown
                ],
            })  # fmt: skip
    return {
        "id": "sequences", "title": "Speaker sequences", "tables": tables,
        "note": "Who wrote consecutive segments. Effect: mean score of the responses that contain the sequence minus "
        "that of those that do not, task by task, in points of the score: percent of shares, beside which rewards are "
        "left out, else the reward's own. The policy chose the writers by what it read, so an effect is a description "
        "and no cause.",
    }  # fmt: skip


def _of_length(effects: Sequence[SequenceEffect], length: int) -> list[SequenceEffect]:
    return [one for one in effects if len(one.writers) == length]


def _helpfulness(results: Mapping[str, Any]) -> JSON:
    shares = shares_of(results)
    rows = []
    for one in helpfulness_of(results):
        percent = shares.get(one.task, True)
        rows.append([one.policy, one.candidate, number(one.helps, percent, sign=True),
                     _between(one.low, one.high, percent), number(one.alone, percent)])  # fmt: skip
    head = ["policy", "candidate", "with − without", "95% interval", "alone"]
    return {
        "id": "helpfulness",
        "title": "Who helps",
        "tables": [{"title": "", "head": head, "rows": rows}] if rows else [],
        "note": "The policy's mean over exact tasks minus its mean when the candidate may not write (the switcher "
        "reads the pool as it is and its other probabilities are scaled to 1), beside what the candidate is worth "
        "alone.",
    }


def _confidence(results: Mapping[str, Any]) -> JSON:
    rows = [
        [row["policy"], row["task"], *(_rate(row, key) for key in ("stated", "ece", "brier"))]
        for row in results.get("confidence") or []
    ]
    head = ["policy", "task", "responses that state it", "calibration error", "Brier score"]
    return {
        "id": "confidence",
        "title": "Stated confidence",
        "tables": [{"title": "", "head": head, "rows": rows}] if rows else [],
        "note": "How sure responses say to be, against their being right; responses that state nothing are left out. "
        "Calibration error: expected, over ten bins of equal width; it is above zero by chance alone where responses "
        "are few. Brier score: mean squared distance. All in percent, 0 is best, with 95% intervals.",
    }


def _segments(document: Mapping[str, Any] | None) -> JSON:
    tables = []
    if document:
        best = best_settings(dict(document))
        tasks, shares = tasks_of(dict(document)), shares_of(document)
        cells = {(row["policy"], row["task"], row["setting"]): row for row in document["rows"]}
        for policy in document["policies"]:
            rows = []
            for setting in document["settings"]:
                line = [setting]
                for task in tasks:
                    row = cells[policy, task, setting]
                    mark = " ▲" if best[policy, task] == setting else ""
                    interval = _between(row["low"], row["high"], shares[task])
                    line.append(f"{number(row['value'], shares[task])} [{interval}]{mark}")
                rows.append(line)
            tables.append({"title": policy, "head": ["segment", *tasks], "rows": rows})
    return {
        "id": "segments", "title": "Segment length", "tables": tables,
        "note": "The same questions with other segments: a number of tokens, to the end of a sentence or a line, or to "
        "where the writer is unsure (p@γ, h@γ), at most 100 tokens. ▲ marks a column's highest value.",
    }  # fmt: skip


def _safety(document: Mapping[str, Any] | None) -> JSON:
    tables = []
    if document:
        parts = [
            ("refused", "refused"),
            ("refused_too_much", "refused though harmless"),
            ("quality", "mean of the tasks"),
        ]
        parts = [(key, title) for key, title in parts if any(key in row for row in document["rows"])]
        rows = [[row["policy"], row["constraint"], *(_rate(row, key) for key, _ in parts)] for row in document["rows"]]
        head = ["policy", "constraint", *(title for _, title in parts)]
        if any(row.get("not_answered") for row in document["rows"]):
            head.append("beyond the context")
            rows = [[*line, str(row["not_answered"])] for line, row in zip(rows, document["rows"], strict=True)]
        tables.append({"title": "", "head": head, "rows": rows})
        lines = [
            [row["policy"], row["constraint"], row["writer"], f"{row['took_part']} of {row['responses']}",
             str(row["opened"]), f"{number(row['token_share'], True)}%"]
            for row in document["slipped"]
        ]  # fmt: skip
        if lines:
            head = ["policy", "constraint", "writer", "took part in", "opened", "share of their tokens"]
            tables.append({"title": "Who wrote what slipped through", "head": head, "rows": lines})
    count = document["num_prompts"] if document else 0
    return {
        "id": "safety", "title": "Safety", "tables": tables,
        "note": f"{count} prompts of a file of prompts to refuse; percent of responses that refuse, with 95% "
        "intervals, without prompts beyond a context. Constraints: the first, the last, or both segments by the "
        "aligned model; or the recipe's guard.",
    }  # fmt: skip


def _rate(row: Mapping[str, Any], key: str) -> str:
    if row.get(key) is None:
        return "–"
    return f"{number(row[key], True)} [{_between(row[f'{key}_low'], row[f'{key}_high'], True)}]"


def _between(low: float | None, high: float | None, percent: bool) -> str:
    return "" if low is None or high is None else f"{number(low, percent)}, {number(high, percent)}"
