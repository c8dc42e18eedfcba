"""`switchgen rollout`: states, branches, completions, scores, labels (arXiv 2510.09913, labels from rollouts).

    RUN/rollout/
      labels-<worker>.jsonl    one record per labelled state, written as soon as it is done (records.label_record)
      left_out-<worker>.jsonl  states that came to nothing, with the reason
      summary.json             ties, how far candidates differ, what was spent

Started again, it goes on where it was, with any number of workers, and with more questions or states if they are asked
for.

Departures from the paper: traces are cut at segment borders where a decision was taken, not at any token; the empty
trace is a state too (`rollout.prefix`); exact ties are marked, not given to the lowest index; a branch that ended the
response has one score, because its completions would all be the same; a state's branches share their random numbers.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rollout.questions import (
    MAY_GROW,
    Question,
    check,
    dependencies,
    load_tasks,
    pick_questions,
    warn_of_evaluation_questions,
)
from rollout.summary import summarize
from rollout.workers import LabelWork, label_share
from switchgen.files import Shard, lock, write_json
from switchgen.progress import progress
from switchgen.records import read_records
from switchgen.rundir import Run, claim_stage
from switchgen.workers import Share, Spent, do_shares, num_workers_of, split, wait_for_leftovers

logger = logging.getLogger("switchgen")

SCHEMA = 1


def main(run: Run, *, workers: int | None = None) -> dict[str, Any]:
    """Label the states that the recipe asks for and that are not there yet.

    Args:
        workers: processes; default `rollout.workers`. The records do not depend on it.

    Returns:
        The summary (also in RUN/rollout/summary.json).

    Raises:
        ConfigError, DataError, ModelError: the recipe cannot be worked with; found before any model is loaded.
        StorageError: the folder cannot be written, or another run is at work in it.
        WorkerError: a worker process died; what is finished is kept.
    """
    settings = run.recipe.rollout
    num_workers = num_workers_of(settings.workers, workers)
    tasks = load_tasks(run)
    check(run)
    questions = pick_questions(tasks, settings.queries, settings.seed)
    warn_of_evaluation_questions(run, questions)
    folder = run.dir / "rollout"
    with lock(folder):
        wait_for_leftovers(folder)
        claim_stage(folder, "rollout", dependencies(run, tasks), may_grow=MAY_GROW)
        done = _finished_ids(folder)
        wanted = _state_ids(questions, settings.states)
        pending = [question for question in questions if not done.issuperset(question.state_ids(settings.states))]
        if not pending and (summary := _summary_of(folder, len(wanted))) is not None:
            return summary
        shares = [
            Share(run, worker, folder, LabelWork(own, done.intersection(_state_ids(own, settings.states))))
            for worker, own in enumerate(split(pending, lambda question: question.query.id, num_workers))
            if own
        ]
        started = time.perf_counter()
        with progress("rollout", total=len(wanted), done=len(done), unit="state") as advance:
            spent = do_shares(label_share, shares, name="rollout", folder=folder, report=advance)
        seconds = time.perf_counter() - started
        return _write_summary(run, folder, len(wanted), num_workers, len(done), seconds, spent)


def _state_ids(questions: Sequence[Question], states: int) -> list[str]:
    return [name for question in questions for name in question.state_ids(states)]


def _shards(folder: Path) -> list[Path]:
    return sorted([*folder.glob("labels-*.jsonl"), *folder.glob("left_out-*.jsonl")])


def _finished_ids(folder: Path) -> set[str]:
    """States that any run with any number of workers has finished; torn last lines are cut off."""
    done: set[str] = set()
    for path in _shards(folder):
        with Shard(path) as shard:
            done |= shard.done
    return done


def _summary_of(folder: Path, asked: int) -> dict[str, Any] | None:
    """The summary of all states that are asked for; None where a kill came before it, or left that of fewer states."""
    path = folder / "summary.json"
    if not path.is_file():
        return None
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary if summary["asked_states"] == asked else None


def _write_summary(
    run: Run, folder: Path, asked: int, workers: int, found: int, seconds: float, spent: Sequence[Spent]
) -> dict[str, Any]:
    records = list(read_records(sorted(folder.glob("labels-*.jsonl"))))
    left_out = list(read_records(sorted(folder.glob("left_out-*.jsonl"))))
    summary = {
        "schema": SCHEMA,
        "asked_states": asked,
        **summarize(records, left_out, run.recipe.names),
        "command": {
            "states": len(records) + len(left_out) - found,
            "workers": workers,
            "seconds": round(seconds, 3),
            "load_seconds": round(max((part.load_seconds for part in spent), default=0.0), 3),
            **_engine_totals(spent),
        },
    }
    if not records:
        logger.warning("rollout: no state could be labelled; see left_out in %s", folder / "summary.json")
    write_json(folder / "summary.json", summary)
    return summary


def _engine_totals(spent: Sequence[Spent]) -> dict[str, Any]:
    """What the latest command's engines did, over all workers."""
    engines: dict[str, dict[str, float]] = {}
    for part in spent:
        for name, stats in (part.engines or {}).items():
            total = engines.setdefault(name, {})
            for key, value in stats.items():
                total[key] = round(total.get(key, 0) + value, 3)
    work = max((part.work_seconds for part in spent), default=0.0)
    decoded = sum(total["decoded_tokens"] for total in engines.values())
    return {
        "decoded_tokens": decoded,
        "read_tokens": sum(total["read_tokens"] for total in engines.values()),
        "scored_tokens": sum(total["scored_tokens"] for total in engines.values()),
        "work_seconds": round(work, 3),
        "cpu_seconds": round(sum(part.cpu_seconds for part in spent), 3),
        "decoded_per_second": round(decoded / work, 1) if work else None,
        "engines": engines,
    }
