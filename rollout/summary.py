"""What a rollout's records say: ties, how far the candidates differ, what was spent."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def difference_error(record: Record) -> float | None:
    """Standard error of best minus worst mean, given the branches; None where a single completion leaves it unknown.

    Two branches are compared pair by pair, as far as both have completions (the j-th share their random numbers). A
    branch that ended its response has one certain score and adds no error.
    """
    means = record["means"]
    best, worst = means.index(max(means)), means.index(min(means))
    high, low = record["scores"][best], record["scores"][worst]
    if record["finished"][best] and record["finished"][worst]:
        return 0.0
    if not (record["finished"][best] or record["finished"][worst]):
        return _error([a - b for a, b in zip(high, low, strict=False)])
    errors = [0.0 if record["finished"][branch] else _error(record["scores"][branch]) for branch in (best, worst)]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) if len(known) == len(errors) else None


def _error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def is_clear(record: Record) -> bool:
    """Whether best and worst candidate differ by more than two standard errors.

    A description of the labels, not a test: best and worst were picked by the same completions, and few completions
    that all agree have a standard error of 0.
    """
    error = difference_error(record)
    return error is not None and record["spread"] > 2 * error


def summarize(records: Sequence[Record], left_out: Sequence[Record], names: Sequence[str]) -> dict[str, Any]:
    """The whole rollout, and each task."""
    tasks = sorted({str(record["task"]) for record in (*records, *left_out)})
    return {
        **_part(records, left_out, names),
        "tasks": {
            task: _part(
                [record for record in records if record["task"] == task],
                [record for record in left_out if record["task"] == task],
                names,
            )
            for task in tasks
        },
    }


def _part(records: Sequence[Record], left_out: Sequence[Record], names: Sequence[str]) -> dict[str, Any]:
    decided = [record for record in records if not record["tie"]]
    labels = Counter(record["label"] for record in decided)
    return {
        "states": len(records),
        "questions": len({record["query_id"] for record in records}),
        "empty_prefixes": sum(record["border"] == 0 for record in records),
        "ties": len(records) - len(decided),
        "tie_share": _mean([record["tie"] for record in records]),
        "mean_spread": _mean([record["spread"] for record in records]),
        "clear_share": _mean([is_clear(record) for record in records]),
        "labels": {name: labels[index] for index, name in enumerate(names)},
        "mean_scores": {
            name: _mean([record["means"][index] for record in records]) for index, name in enumerate(names)
        },
        "outcomes": dict(Counter(record["outcome"] for record in records)),
        "completions": sum(sum(_written(record)) for record in records),
        "completions_per_branch": _mean([count for record in records for count in _written(record)]),
        "twin_branches": sum(len(record["counts"]) - len(_written(record)) for record in records),
        "tokens": sum(record["tokens"] for record in records),
        "tokens_per_state": _mean([record["tokens"] for record in records]),
        "left_out": dict(Counter(record["reason"] for record in left_out)),
    }


def _written(record: Record) -> list[int]:
    """Completions of each branch that were really written: not those that repeat an earlier branch."""
    twins = record.get("twin_of") or [None] * len(record["counts"])
    return [count for count, twin in zip(record["counts"], twins, strict=True) if twin is None]


def _mean(values: Sequence[float]) -> float | None:
    return round(statistics.fmean(values), 6) if values else None
