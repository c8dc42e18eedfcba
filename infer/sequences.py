"""Frequency and treatment effect of speaker sequences (arXiv 2510.09913, analyses of the paper).

A response *contains* a sequence if the sequence's writers wrote consecutive segments of it. The effect of a sequence is
the mean score of the responses that contain it minus the mean of those that do not, task by task; tasks are weighted by
n_with n_without / n (Cochran, Mantel and Haenszel), so that a sequence that is frequent on an easy task is not taken
for a good one. It is a description, not a cause: the policy chose the writers by what it read.

Shapes: R resamples, Q questions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from infer.stats import FloatArray

Writers = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Spoken:
    """Who wrote a scored response."""

    task: str
    question: str
    writers: Writers
    """Of its segments, cues left out."""
    score: float


@dataclass(frozen=True, slots=True)
class SequenceEffect:
    """One speaker sequence under one policy."""

    writers: Writers
    count: int
    """Responses that contain it."""
    share: float
    """Of all responses."""
    effect: float | None
    """None where no task has responses with and without it."""
    low: float | None
    high: float | None


def sequence_effects(
    responses: Sequence[Spoken], *, lengths: Sequence[int] = (2, 3), num_resamples: int = 1000, seed: int = 0
) -> list[SequenceEffect]:
    """Every sequence of these lengths that occurs, the shorter ones first, then the more frequent.

    Intervals are 95% percentile intervals of a bootstrap over questions within tasks, all seeds of a question together.
    """
    found: dict[Writers, int] = defaultdict(int)
    contained = [_sequences(response.writers, lengths) for response in responses]
    for own in contained:
        for sequence in own:
            found[sequence] += 1
    rng = np.random.default_rng(seed)  # one for all tasks: their questions are drawn independently
    tasks = [_Task(responses, task, num_resamples, rng) for task in dict.fromkeys(r.task for r in responses)]
    effects = []
    for sequence, count in found.items():
        has = np.array([sequence in own for own in contained])
        value, low, high = _effect(tasks, has)
        effects.append(SequenceEffect(sequence, count, count / len(responses), value, low, high))
    return sorted(effects, key=lambda one: (len(one.writers), -one.count, one.writers))


def _sequences(writers: Writers, lengths: Sequence[int]) -> set[Writers]:
    return {writers[start : start + n] for n in lengths for start in range(len(writers) - n + 1)}


class _Task:
    """One task's responses as arrays, and how often each question is in each resample."""

    def __init__(self, responses: Sequence[Spoken], task: str, num_resamples: int, rng: np.random.Generator) -> None:
        self.rows = np.array([index for index, response in enumerate(responses) if response.task == task])
        own = [responses[index] for index in self.rows]
        places = {question: place for place, question in enumerate(dict.fromkeys(one.question for one in own))}
        self.questions = np.array([places[one.question] for one in own])
        self.scores = np.array([one.score for one in own])
        count = len(places)
        self.times_RQ = rng.multinomial(count, np.full(count, 1 / count), size=num_resamples).astype(np.float64)

    def table(self, has: npt.NDArray[np.bool_]) -> FloatArray:
        """Per question: n with, sum with, n without, sum without; [Q, 4]."""
        treated = has[self.rows]
        columns = []
        for chosen in (treated, ~treated):
            for weights in (chosen.astype(float), chosen * self.scores):
                columns.append(np.bincount(self.questions, weights, minlength=self.times_RQ.shape[1]))
        return np.stack(columns, axis=1)


def _effect(tasks: Sequence[_Task], has: npt.NDArray[np.bool_]) -> tuple[float | None, float | None, float | None]:
    """(effect, low, high) of a treatment that some responses have."""
    tables = [(task, task.table(has)) for task in tasks]
    tables = [(task, table_Q4) for task, table_Q4 in tables if table_Q4[:, 0].sum() and table_Q4[:, 2].sum()]
    if not tables:
        return None, None, None
    value = float(_weighted([table_Q4.sum(axis=0)[None] for _, table_Q4 in tables])[0])
    resampled = _weighted([task.times_RQ @ table_Q4 for task, table_Q4 in tables])
    known = resampled[np.isfinite(resampled)]
    if len(known) < len(resampled) / 2:
        return value, None, None
    low, high = np.percentile(known, [2.5, 97.5])
    return value, float(low), float(high)


def _weighted(sums: Sequence[FloatArray]) -> FloatArray:
    """Mean over tasks of with − without, weighted; sums [R, 4] of each task; NaN where no task has both."""
    total, weight = np.zeros(len(sums[0])), np.zeros(len(sums[0]))
    for sums_R4 in sums:
        n_with, s_with, n_without, s_without = sums_R4.T
        both = (n_with > 0) & (n_without > 0)
        own = np.where(both, n_with * n_without / np.maximum(n_with + n_without, 1), 0.0)
        difference = s_with / np.maximum(n_with, 1) - s_without / np.maximum(n_without, 1)
        total += own * np.where(both, difference, 0.0)
        weight += own
    return np.asarray(np.where(weight > 0, total / np.where(weight > 0, weight, 1), np.nan))


@dataclass(frozen=True, slots=True)
class Helpfulness:
    """What a candidate does for a policy: its outcome with the candidate in the pool minus without."""

    policy: str
    candidate: str
    task: str
    helps: float
    low: float | None
    high: float | None
    alone: float | None
    """The candidate's own value."""


def helpfulness_of(results: Mapping[str, Any]) -> list[Helpfulness]:
    """Leave one out, from the comparisons of `switcher` with `switcher~pretrained` and so on.

    Args:
        results: the document of `evaluation/results.json`; the mean over exact tasks counts, or the only task.
    """
    values = {(row["policy"], row["task"]): row["value"] for row in results.get("rows") or [] if row["seed"] is None}
    pairs = []
    for row in results.get("comparisons") or []:
        inner, _, left_out = str(row["against"]).partition("~")
        if left_out and "~" not in left_out and inner == row["policy"]:
            pairs.append((left_out, row))
    tasks = list(dict.fromkeys(row["task"] for _, row in pairs))
    task = "mean" if "mean" in tasks else tasks[0] if len(tasks) == 1 else None
    return [
        Helpfulness(
            row["policy"], name, row["task"], row["difference"], row["low"], row["high"], values.get((name, task))
        )
        for name, row in pairs
        if row["task"] == task
    ]
