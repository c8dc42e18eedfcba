"""Scores of saved responses: read, filled in where a model gives them, given anew where they were made otherwise.

What a score was made with (metric, marker, strictness, answers, judge or reward model) is kept beside it as a stamp. A
score with another stamp is given anew from the response; nothing is generated for that.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import Counter
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
from switchgen.tasks import Example
from switchgen.weights import weights_hash

logger = logging.getLogger("switchgen")

JSON = dict[str, Any]


def scored_cells(run: Run, folder: Path, tasks: Sequence[Questions], *, rescore: bool) -> list[Cell]:
    """Every policy, task and run seed with its scores; scores that are new are kept in the responses' files.

    Args:
        rescore: score all saved responses anew, not only those without a score or with one that was made otherwise.

    Raises:
        DataError: a response is not there.
    """
    scorers = _Scorers(run)
    stamps = {questions.name: scorers.stamps(questions) for questions in tasks}
    outdated: Counter[str] = Counter()
    cells = []
    for policy in run.recipe.evaluate.policies:
        own = []
        for questions in tasks:
            for seed in run_seeds(run, policy):
                path = responses_path(folder, policy, questions.name, seed)
                records = saved_responses(path, questions)
                wanted = stamps[questions.name]
                outdated[questions.name] += sum(_is_outdated(record, wanted) for record in records.values())
                if _score(questions, records, wanted, scorers, again=rescore):
                    write_atomic(path, "".join(json_line(record).decode() for record in records.values()))
                own.append((_cell(policy, questions, seed, records), records.values()))
        cells += _timed(own)
    for task, count in outdated.items():
        if count:
            logger.info("task %s: %d responses were scored with another metric, other answers or another scorer; they "
                        "are scored again", task, count)  # fmt: skip
    return cells


class _Scorers:
    """The models that score, of the recipe's evaluation."""

    def __init__(self, run: Run) -> None:
        settings = run.recipe.evaluate
        self.reward: RewardModelScorer | None = None
        if settings.reward_model is not None:
            self.reward = RewardModelScorer(settings.reward_model, too_long="nan")
        self.judge = None if settings.judge is None else JudgeScorer(settings.judge)

    def stamps(self, questions: Questions) -> dict[str, str]:
        """What the scores of a task's responses are made with, by question id (`Questions.score_stamp`)."""
        scorer: Any = None
        if questions.metric == "reward_model" and self.reward is not None:
            scorer = weights_hash(self.reward.name)
        if questions.metric == "judge" and self.judge is not None:
            # How it is reached is no matter.
            scorer = self.judge.config.model_dump(mode="json", exclude={"key_env", "parallel", "timeout", "retries"})
        return {example.id: questions.score_stamp(example, scorer) for example in questions.task.examples}


def _is_outdated(record: Mapping[str, Any], stamps: Mapping[str, str]) -> bool:
    """Whether a response has a score that was made otherwise."""
    return record["score"] is not None and record["id"] in stamps and record.get("scored_by") != stamps[record["id"]]


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
    stamps: Mapping[str, str],
    scorers: _Scorers,
    *,
    again: bool,
) -> bool:
    """Score records in place; whether anything changed."""
    examples = {example.id: example for example in questions.task.examples}
    stale = [
        record for record in records.values()
        if record["id"] in examples and (again or record["score"] is None or _is_outdated(record, stamps))
    ]  # fmt: skip
    before = [dict(record) for record in stale]
    for record in stale:
        example = examples[record["id"]]
        questions.score_record(example, record)
        record["reference"] = reference_text(example)
    _score_by_model(questions, [record for record in stale if record["output"] is not None], examples, scorers)
    for record in stale:
        record["scored_by"] = stamps[record["id"]]
    return before != stale


def _score_by_model(
    questions: Questions, records: Sequence[JSON], examples: Mapping[str, Example], scorers: _Scorers
) -> None:
    """The scores of a reward model's or a judge's task, in place; None where the model gives none."""
    if not records:
        return
    own = [examples[record["id"]] for record in records]
    outputs = [record["output"] for record in records]
    values: Sequence[float | None]
    if questions.metric == "reward_model":
        assert scorers.reward is not None, "checked before anything was written"
        rewards = scorers.reward.score_batch([example.messages for example in own], outputs)
        # NaN: beyond the reward model's own context.
        values = [None if math.isnan(reward) else reward for reward in rewards]
    elif questions.metric == "judge":
        assert scorers.judge is not None, "checked before anything was written"
        references = [reference_text(example) for example in own]
        values = scorers.judge.score_batch([example.messages for example in own], outputs, references)
    else:
        return
    for record, value in zip(records, values, strict=True):
        record["score"] = value


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
