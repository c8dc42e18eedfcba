"""`switchgen evaluate`: tasks x policies x run seeds.

    RUN/evaluation/
      responses/<policy>--<task>--<seed>.jsonl   what was written, with its score; a line as soon as it is finished
      shards/<worker>/*.jsonl                    the same, of several workers that are still writing
      claims/<policy>--<task>/stage.json         what those responses depend on
      results.json                               means, intervals, comparisons (`infer/results.py`)

A question beyond the context has a response with `status` `too_long` and output null. It counts as wrong (score 0); a
task that a reward model or a judge scores has no score for it, and the question is left out for every policy. A killed
run goes on where it was; `rescore` scores the saved responses again and generates nothing.
"""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

from infer.choosing import BY_LIKELIHOOD, check_choosing
from infer.claims import weights_bytes
from infer.merging import main as merge
from infer.questions import Questions, load_questions
from infer.report_data import read_document
from infer.responses import claim_responses, run_seeds, write_missing
from infer.results import Cell, results_document
from infer.scores import scored_cells
from switchgen.assembly import check_writers
from switchgen.config import CandidateConfig
from switchgen.errors import ConfigError
from switchgen.files import lock, write_json
from switchgen.loading import check_model
from switchgen.merges import is_merge
from switchgen.rundir import Run, provenance
from switchgen.workers import num_workers_of

logger = logging.getLogger("switchgen")

JSON = dict[str, Any]
_SHOWN_IDS = 20


def main(run: Run, *, rescore: bool = False, workers: int | None = None) -> JSON:
    """Write and score responses, and sum them up in `evaluation/results.json`, which is also returned.

    Args:
        rescore: score the saved responses again, and generate nothing; the models need not be there.
        workers: processes that write; default `evaluate.workers`. The responses do not depend on it.

    Raises:
        ConfigError: no tasks, a policy that cannot work, responses made by another recipe.
        DataError: a task file is wrong; with `rescore`, responses that are not there.
        WorkerError: a worker process died; what is finished is kept.
    """
    num_workers = num_workers_of(run.recipe.evaluate.workers, workers)
    tasks = load_questions(run)
    _check_settings(run, tasks)
    if not rescore:
        if merges := [name for name in run.recipe.evaluate.policies if is_merge(name)]:
            merge(run, merges)
        check_writers(run, run.recipe.evaluate.policies)
    folder = run.dir / "evaluation"
    with lock(folder):
        claim_responses(run, folder, tasks, saved_only=rescore)
        if not rescore:
            write_missing(run, folder, tasks, workers=num_workers)
        cells = scored_cells(run, folder, tasks, rescore=rescore)
        document = results_document(cells, **_comparison_settings(run), meta=_meta(run, tasks, cells, rescore=rescore))
        write_json(folder / "results.json", document)
    return document


def _check_settings(run: Run, tasks: Sequence[Questions]) -> None:
    settings = run.recipe.evaluate
    if settings.against is not None and settings.against not in settings.policies:
        raise ConfigError(
            f"evaluate.against: {settings.against!r} is not evaluated; allowed: {', '.join(settings.policies)}"
        )
    by_judge = [questions.name for questions in tasks if questions.task.metric == "judge"]
    if by_judge and settings.judge is None:
        raise ConfigError(
            f"evaluate.judge is not set, and a judge scores {', '.join(by_judge)}; give its url and model, or leave "
            "the task out"
        )
    for questions in tasks:
        if questions.metric == BY_LIKELIHOOD:
            check_choosing(settings.policies, questions.name)
    by_reward = [questions.name for questions in tasks if questions.task.metric == "reward_model"]
    if by_reward and settings.reward_model is None:
        raise ConfigError(
            f"evaluate.reward_model is not set, and a reward model scores {', '.join(by_reward)}; name one (a folder "
            "or a hub name), or leave the task out"
        )
    if by_reward:
        check_model(CandidateConfig(name="evaluate.reward_model", model=str(settings.reward_model)))


def _comparison_settings(run: Run) -> JSON:
    recipe = run.recipe
    return {
        "candidates": recipe.names,
        "policies": recipe.evaluate.policies,
        "against": recipe.evaluate.against,
        "student_base": recipe.distill.base or recipe.names[-1],
        "collaboration": recipe.distill.policy,
    }


def _meta(run: Run, tasks: Sequence[Questions], cells: Iterable[Cell], *, rescore: bool) -> JSON:
    recipe = run.recipe
    facts = provenance(run)
    not_answered = _not_answered(cells)
    counted = {q.name: "counted as wrong" if q.scored_singly else "left out for every policy" for q in tasks}
    for task, ids in not_answered.items():
        shown = ", ".join(ids[:_SHOWN_IDS]) + (f" … and {len(ids) - _SHOWN_IDS} more" if len(ids) > _SHOWN_IDS else "")
        logger.warning("task %s: %d questions beyond the context, %s: %s", task, len(ids), counted[task], shown)
    return {
        "recipe": run.name,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "candidates": recipe.names,
        "policies": list(recipe.evaluate.policies),
        "seeds": list(recipe.evaluate.seeds),
        "world_seed": recipe.lab.seed if recipe.lab is not None else None,
        "split": recipe.evaluate.split,
        "tasks": {
            q.name: {"metric": q.task.metric, "questions": len(q.examples), "sha256": q.task.sha256,
                     "left out (no answer)": len(q.task.unanswered)}
            for q in tasks
        },
        "decoding": recipe.decoding.model_dump(mode="json"),
        "not_answered": not_answered,
        "evaluated": {
            "seeds": {policy: run_seeds(run, policy) for policy in recipe.evaluate.policies},
            "questions": {q.name: [example.id for example in q.examples] for q in tasks},
        },
        "weights_bytes": _weights_bytes(run, as_recorded=rescore),
        "versions": facts["versions"],
        "python": facts["python"],
        "machine": facts["machine"],
    }  # fmt: skip


def _weights_bytes(run: Run, *, as_recorded: bool) -> dict[str, int | None]:
    """Bytes of weights by policy; as the results have them already where no model need be there."""
    document = read_document(run.dir / "evaluation" / "results.json") if as_recorded else None
    recorded = document["meta"].get("weights_bytes", {}) if document else {}
    return {policy: recorded.get(policy) or weights_bytes(run, policy) for policy in run.recipe.evaluate.policies}


def _not_answered(cells: Iterable[Cell]) -> dict[str, list[str]]:
    """Ids of questions beyond the context of some policy, by task."""
    found: dict[str, dict[str, None]] = {}
    for cell in cells:
        if cell.not_answered:
            found.setdefault(cell.task, {}).update(dict.fromkeys(cell.not_answered))
    return {task: list(ids) for task, ids in found.items()}


def hardware() -> str:
    """Processor, cores and GPUs of this machine, in words."""
    return f"{_processor()}, {os.cpu_count()} CPUs{_devices()}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return "unknown processor"


def _devices() -> str:
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return ""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", " + ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
