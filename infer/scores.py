"""Scores of saved responses: read, filled in where a model gives them, or all given anew."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from infer.choosing import BY_LIKELIHOOD
from infer.questions import Questions, reference_text
from infer.responses import responses_path, run_seeds
from infer.results import Cell
from switchgen.errors import DataError
from switchgen.files import Shard, json_line, write_atomic
from switchgen.rundir import Run
from switchgen.scoring import METRICS, RewardModelScorer
from switchgen.scoring.confidence import split_confidence
from switchgen.scoring.judge import JudgeScorer

JSON = dict[str, Any]


def scored_cells(run: Run, folder: Path, tasks: Sequence[Questions], *, rescore: bool) -> list[Cell]:
    """Every policy, task and run seed with its scores; scores that are new are kept in the responses' files.

    Args:
        rescore: score all saved responses anew, not only those without a score.

    Raises:
        DataError: a response is not there.
    """
    reward: RewardModelScorer | None = None
    if run.recipe.evaluate.reward_model is not None:
        reward = RewardModelScorer(run.recipe.evaluate.reward_model, too_long="nan")
    judge = None if run.recipe.evaluate.judge is None else JudgeScorer(run.recipe.evaluate.judge)
    cells = []
    for policy in run.recipe.evaluate.policies:
        own = []
        for questions in tasks:
            for seed in run_seeds(run, policy):
                path = responses_path(folder, policy, questions.name, seed)
                records = saved_responses(path, questions)
                if _score(questions, records, reward, judge, again=rescore):
                    write_atomic(path, "".join(json_line(record).decode() for record in records.values()))
                own.append((_cell(policy, questions, seed, records), records.values()))
        cells += _timed(own)
    return cells


def _timed(own: Sequence[tuple[Cell, Collection[JSON]]]) -> list[Cell]:
    """One policy's cells with their seconds; beside each the saved responses, which may be more than the cell's.

    Rows of all tasks are written together, so the time is shared out by tokens. Options that are chosen by likelihood
    have no tokens, and a time of their own.
    """
    written = [record for cell, records in own if cell.metric != BY_LIKELIHOOD for record in records]
    seconds = sum(record["seconds"] for record in written)
    tokens = max(1, sum(record["usage"]["new_tokens"] for record in written))
    return [
        replace(cell, seconds=seconds * cell.tokens / tokens)
        if cell.metric != BY_LIKELIHOOD
        else replace(cell, seconds=statistics.fmean(record["seconds"] for record in records) * len(cell.scores))
        for cell, records in own
    ]


def saved_responses(path: Path, questions: Questions) -> dict[str, JSON]:
    """Saved responses by question id, in the file's order; there may be more of them than questions.

    Raises:
        DataError: the response to a question is not there.
    """
    records: dict[str, JSON] = {}
    if path.is_file():
        with Shard(path):  # cuts off a torn last line
            pass
        with open(path, encoding="utf-8", newline="\n") as stream:
            for line in stream:
                record = json.loads(line)
                records[record["id"]] = record
    if missing := [example.id for example in questions.examples if example.id not in records]:
        raise DataError(
            f"{path}: {len(missing)} of {len(questions.examples)} responses are not there (the first: {missing[0]!r}); "
            "`switchgen evaluate` without --rescore writes them"
        )
    return records


def _score(
    questions: Questions,
    records: Mapping[str, JSON],
    reward: RewardModelScorer | None,
    judge: JudgeScorer | None,
    *,
    again: bool,
) -> bool:
    """Score records in place; whether anything changed."""
    examples = {example.id: example for example in questions.task.examples}
    stale = [record for record in records.values() if record["id"] in examples and (again or record["score"] is None)]
    before = [(record["score"], record["extracted"]) for record in stale]
    for record in stale:
        record["score"], record["extracted"] = questions.score(examples[record["id"]], record["output"])
    answered = [record for record in stale if record["output"] is not None]
    if questions.metric == "reward_model" and answered:
        assert reward is not None, "checked before anything was written"
        messages = [examples[record["id"]].messages for record in answered]
        values = reward.score_batch(messages, [record["output"] for record in answered])
        for record, value in zip(answered, values, strict=True):
            # NaN: beyond the reward model's own context.
            record["score"] = None if math.isnan(value) else value
    if questions.metric == "judge" and answered:
        assert judge is not None, "checked before anything was written"
        own = [examples[record["id"]] for record in answered]
        outputs = [record["output"] for record in answered]
        ratings = judge.score_batch([one.messages for one in own], outputs, [reference_text(one) for one in own])
        for record, rating in zip(answered, ratings, strict=True):
            record["score"] = rating
    return before != [(record["score"], record["extracted"]) for record in stale]


def _cell(policy: str, questions: Questions, seed: int, records: Mapping[str, JSON]) -> Cell:
    used = [records[example.id] for example in questions.examples]
    return Cell(
        policy=policy,
        task=questions.name,
        metric=questions.metric,
        exact=METRICS[questions.metric].exact,
        seed=seed,
        scores=tuple(record["score"] for record in used),
        tokens=sum(record["usage"]["new_tokens"] for record in used),
        confidences=_confidences(used) if questions.task.confidence else None,
        not_answered=tuple(record["id"] for record in used if record["status"] == "too_long"),
    )


def _confidences(records: Sequence[JSON]) -> tuple[float | None, ...]:
    """What each response states."""
    return tuple(split_confidence(record["output"] or "")[1] for record in records)
