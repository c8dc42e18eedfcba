"""`evaluation/results.json`: means with intervals, and comparisons of policies on the same questions.

Rows are per policy, task and run seed, and per policy and task over all run seeds (`seed` null); the task `mean` is the
mean over the exact tasks, each weighing the same. `tokens` and `seconds` are totals of the row's `n` responses (the
policy's whole time is shared out by tokens, as its rows are written together).
Comparisons pair the questions: each policy with the best single candidate of the task (chosen on these same questions,
which flatters the candidate), the switcher with random and untuned switching, the student with its base.
`confidence` has, per policy and task that asks for it, how far stated confidence agrees with being right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infer.confidence import calibration
from infer.stats import (
    FloatArray,
    Interval,
    bootstrap_mean,
    holm,
    mean_over_tasks,
    paired_difference_over_tasks,
)
from switchgen.assembly import DISTILLED

MEAN = "mean"
JSON = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One policy on one task in one run."""

    policy: str
    task: str
    metric: str
    exact: bool
    """Whether the task enters the mean."""
    seed: int
    scores: tuple[float | None, ...]
    """One per question, in the task's order; None where there is none."""
    tokens: int
    not_answered: tuple[str, ...] = ()
    """Ids of questions beyond the context."""
    seconds: float = 0.0
    confidences: tuple[float | None, ...] | None = None
    """Stated by the responses, one per question, None where one states none; None: the task asks for none."""


class _Scores:
    """The cells as arrays."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = cells
        self.kept: dict[str, list[int]] = {}
        """By task, the questions whose responses all have a score: pairs need both sides."""
        self.num_questions: dict[str, int] = {}
        for task in dict.fromkeys(cell.task for cell in cells):
            columns = list(zip(*(cell.scores for cell in cells if cell.task == task), strict=True))
            self.num_questions[task] = len(columns)
            self.kept[task] = [index for index, column in enumerate(columns) if None not in column]
        self.scored = [task for task, kept in self.kept.items() if kept]
        self.exact = [task for task in self.scored if next(c.exact for c in cells if c.task == task)]

    def of(self, policy: str, task: str, seed: int | None = None) -> list[Cell]:
        """The cells of a policy and a task, in all runs or in one."""
        return [c for c in self.cells if (c.policy, c.task) == (policy, task) and seed in (None, c.seed)]

    def array(self, policy: str, task: str, seed: int | None = None) -> FloatArray:
        """Scores [seeds, questions]."""
        kept = self.kept[task]
        cells = self.of(policy, task, seed)
        return np.array([[cell.scores[index] for index in kept] for cell in cells], dtype=np.float64)

    def arrays(self, policy: str, tasks: Sequence[str], seed: int | None = None) -> dict[str, FloatArray]:
        """`array` of several tasks."""
        return {task: self.array(policy, task, seed) for task in tasks}

    def tasks_of(self, task: str) -> list[str]:
        """The task, or what the mean is over."""
        return self.exact if task == MEAN else [task]

    @property
    def columns(self) -> list[str]:
        """The tasks with figures, and the mean of the exact ones."""
        return [*self.scored, *([MEAN] if self.exact else [])]

    def notes(self) -> list[str]:
        """What has no score."""
        notes = []
        for task, kept in self.kept.items():
            left_out = self.num_questions[task] - len(kept)
            if not kept:
                notes.append(f"{task}: its responses have no scores, so there are no figures")
            elif left_out:
                notes.append(f"{task}: {left_out} questions left out, a response to them has no score")
        return notes


def results_document(
    cells: Sequence[Cell],
    *,
    candidates: Sequence[str],
    policies: Sequence[str],
    against: str | None,
    student_base: str,
    collaboration: str,
    meta: JSON,
) -> JSON:
    """The results document.

    Args:
        cells: every policy, task and seed.
        candidates: in ladder order.
        against: policy that all others are compared with; None: the best single candidate of each task.
        student_base, collaboration: what the distilled student was, and whose responses it learnt from.
        meta: joined by `notes` and, where there is a student, `distillation`.
    """
    scores = _Scores(cells)
    notes = scores.notes()
    rows = [row for policy in policies for row in _rows(scores, policy)]
    singles = [policy for policy in policies if policy in candidates]
    if against is None and not singles:
        notes.append("no single candidate is among the policies, so none of them is compared with one")
    comparisons = _comparisons(scores, policies, singles, against, student_base)
    for comparison, corrected in zip(comparisons, holm([c["p"] for c in comparisons]), strict=True):
        comparison["p_holm"] = corrected
    distillation = _distillation(scores, policies, student_base, collaboration)
    meta = {**meta, "notes": notes, **({"distillation": distillation} if distillation else {})}
    confidence = confidence_rows(cells)
    return {
        "schema": 1,
        "rows": rows,
        "comparisons": comparisons,
        **({"confidence": confidence} if confidence else {}),
        "meta": meta,
    }


def _rows(scores: _Scores, policy: str) -> list[JSON]:
    rows = []
    for task in scores.columns:
        parts = scores.tasks_of(task)
        seeds = list(dict.fromkeys(cell.seed for cell in scores.of(policy, parts[0])))
        for seed in [*seeds, None]:
            arrays = scores.arrays(policy, parts, seed)
            interval = mean_over_tasks(arrays) if task == MEAN else bootstrap_mean(arrays[task])
            cells = [cell for part in parts for cell in scores.of(policy, part, seed)]
            rows.append(_row(policy, task, seed, interval, cells))
    return rows


def _row(policy: str, task: str, seed: int | None, interval: Interval, cells: Sequence[Cell]) -> JSON:
    return {
        "policy": policy,
        "task": task,
        "seed": seed,
        "metric": "mean of exact tasks" if task == MEAN else cells[0].metric,
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "n": sum(len(cell.scores) for cell in cells),
        "questions": interval.n,
        "tokens": sum(cell.tokens for cell in cells),
        "seconds": round(sum(cell.seconds for cell in cells), 3),
        "not_answered": sum(len(cell.not_answered) for cell in cells),
    }


def confidence_rows(cells: Sequence[Cell]) -> list[JSON]:
    """Per policy and task whose responses state their confidence: share that do, expected calibration error, Brier
    score, each with its interval; the errors are null where none does."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if cell.confidences is not None:
            groups.setdefault((cell.policy, cell.task), []).append(cell)
    rows = []
    for (policy, task), own in groups.items():
        stated_SQ = np.array([cell.confidences for cell in own], dtype=np.float64)
        right_SQ = np.array([[score == 1.0 for score in cell.scores] for cell in own])
        parts = {"stated": bootstrap_mean(~np.isnan(stated_SQ)), **calibration(stated_SQ, right_SQ)}
        rows.append({"policy": policy, "task": task, "n": stated_SQ.size, **_flat(parts)})
    return rows


def _flat(parts: Mapping[str, Interval | None]) -> JSON:
    """`{"ece", "ece_low", "ece_high", …}`."""
    flat: JSON = {}
    for key, part in parts.items():
        value, low, high = (None, None, None) if part is None else (part.value, part.low, part.high)
        flat.update({key: value, f"{key}_low": low, f"{key}_high": high})
    return flat


def _comparisons(
    scores: _Scores, policies: Sequence[str], singles: Sequence[str], against: str | None, student_base: str
) -> list[JSON]:
    pairs: dict[tuple[str, str, str], None] = {}
    for task in scores.columns:
        if task == MEAN and len(scores.exact) == 1:
            continue  # the same comparison once more
        rival = against or (best_single(scores, singles, task) if singles else None)
        for policy in policies:
            rivals = [rival] if rival is not None and (against is not None or policy not in singles) else []
            if policy == "switcher":
                rivals += [name for name in ("random", "untuned") if name in policies]
            rivals += [name for name in policies if name.startswith(f"{policy}~")]  # without a candidate
            if policy == DISTILLED and student_base in policies:
                rivals.append(student_base)
            for other in rivals:
                if other != policy:
                    pairs[policy, other, task] = None
    return [_compare(scores, *pair) for pair in pairs]


def best_single(scores: _Scores, singles: Sequence[str], task: str) -> str:
    """The candidate with the highest value on a task; the earlier one where two are as good."""
    parts = scores.tasks_of(task)
    return max(singles, key=lambda name: np.mean([a.mean() for a in scores.arrays(name, parts).values()]))


def _compare(scores: _Scores, policy: str, against: str, task: str) -> JSON:
    parts = scores.tasks_of(task)
    compared = paired_difference_over_tasks(scores.arrays(policy, parts), scores.arrays(against, parts))
    return {
        "policy": policy,
        "against": against,
        "task": task,
        "difference": compared.difference,
        "low": compared.low,
        "high": compared.high,
        "p": compared.p,
        "n": compared.n,
        "effect": compared.effect,
        "wins": compared.wins,
        "losses": compared.losses,
    }


def _distillation(scores: _Scores, policies: Sequence[str], base: str, collaboration: str) -> JSON | None:
    """Student − base and collaboration − base by task, and what a response of each costs."""
    if not {DISTILLED, base, collaboration} <= set(policies) or not scores.scored:
        return None

    def gains(policy: str) -> list[JSON]:
        compared = (_compare(scores, policy, base, task) for task in scores.columns)
        return [{key: c[key] for key in ("task", "difference", "low", "high", "p")} for c in compared]

    student, together = gains(DISTILLED), gains(collaboration)
    costs = []
    for policy in (base, collaboration, DISTILLED):
        cells = [cell for cell in scores.cells if cell.policy == policy]
        count = sum(len(cell.scores) for cell in cells)
        costs.append({"policy": policy, "tokens a response": round(sum(c.tokens for c in cells) / count, 1),
                      "seconds a response": round(sum(c.seconds for c in cells) / count, 4)})  # fmt: skip
    document: JSON = {f"student_minus_{base}": student, f"{collaboration}_minus_{base}": together, "cost": costs}
    if scores.exact:
        kept, gained = student[-1]["difference"], together[-1]["difference"]
        # A share of no gain, or of a loss, means nothing.
        document["share of the mean gain kept"] = round(kept / gained, 3) if gained > 0 else None
    return document
