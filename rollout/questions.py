"""Which questions the states come from, and what the labels depend on; checked before any model is loaded."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.racing import smallest_margin
from switchgen.api import POLICIES
from switchgen.assembly import check_writers, spread, switcher_adapter
from switchgen.config import RolloutConfig, nearest
from switchgen.errors import ConfigError, DataError
from switchgen.ids import derive_seed
from switchgen.policies.probe import PROBE_FILE
from switchgen.rundir import Run
from switchgen.scoring import metric_named
from switchgen.tasks import Example, Task, load_task
from switchgen.tasks.overlap import EvaluationQuestions
from switchgen.trace import Query
from switchgen.weights import candidate_weights

logger = logging.getLogger("switchgen")

REWARD_MODEL = "reward_model"

MAY_GROW = ("rollout.queries", "rollout.states")
"""Settings that may be raised in a run folder: the states that are there stay as they are.

More questions are a superset of fewer (`pick_questions`), a question's later states leave its earlier ones alone
(`Labelling._cut`), and every seed derives from the question and the state's number.
"""


@dataclass(frozen=True)
class Question:
    """One question of a task, with what scoring its responses needs.

    Example: task `recall`, metric `number`, query id `recall/17`, item `{"input": "How old is …", "output": "22"}`.
    """

    task: str
    metric: str
    marker: str | None
    strict: bool
    query: Query
    """Its id is `<task>/<the example's id>`: unique over all tasks."""
    example: Example
    confidence: bool = False

    @property
    def item(self) -> Mapping[str, Any]:
        """The task file's row."""
        return self.example.item

    def state_ids(self, num_states: int) -> list[str]:
        """Ids of its states, `<query id>/<number>`."""
        return [f"{self.query.id}/{index}" for index in range(num_states)]


def load_tasks(run: Run) -> list[Task]:
    """The recipe's tasks in the rollout's split.

    Raises:
        ConfigError: no tasks, two of one name, or one whose responses cannot be scored one by one.
        DataError: a task's file is wrong.
    """
    settings = run.recipe.rollout
    if not run.recipe.tasks:
        raise ConfigError(f"{run.source}: rollouts take their questions from `tasks`; the recipe lists none")
    tasks = [load_task(spec) for spec in run.task_specs(split=settings.split)]
    names = [task.name for task in tasks]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"two tasks have the same name: {', '.join(repeated)}; give one of them another `name`")
    unscored = [
        f"{task.name} ({task.metric})"
        for task in tasks
        if metric_named(task.metric).score is None and task.metric != REWARD_MODEL
    ]
    if unscored:
        raise ConfigError(
            f"rollouts score every response by itself, which these tasks' metrics cannot: {', '.join(unscored)}; leave "
            "the tasks out, or give them another metric, e.g. metric: reward_model with rollout.reward_model"
        )
    judged = [task.name for task in tasks if task.metric == REWARD_MODEL]
    if judged and settings.reward_model is None:
        raise ConfigError(
            f"tasks scored by a reward model: {', '.join(judged)}; rollout.reward_model is not set, allowed: a folder "
            "or a hub name"
        )
    if judged and settings.budget == "racing":
        raise ConfigError(
            f"rollout.budget: racing tests scores between 0 and 1, and a reward model scores {', '.join(judged)}; "
            "allowed for these tasks: uniform"
        )
    warn_of_budget(settings)
    if settings.reward_model is not None and not judged:
        logger.warning("rollout.reward_model has no effect: no task has the metric reward_model")
    return tasks


def warn_of_budget(settings: RolloutConfig) -> None:
    """Say which settings of the completions have no effect, and where a race would hardly ever be decided."""
    fresh = RolloutConfig()
    if settings.budget == "racing" and settings.completions != fresh.completions:
        logger.warning("rollout.completions has no effect: rollout.budget is racing (rollout.racing.start, max)")
    if settings.budget == "uniform" and settings.racing != fresh.racing:
        logger.warning("rollout.racing has no effect: rollout.budget is uniform")
    racing = settings.racing
    # Pairs that score alike are the shortest way to a tie, and few states go it without an exception.
    needed = smallest_margin((racing.max + 1) // 2, racing.confidence)
    if settings.budget == "racing" and racing.margin < needed:
        logger.warning(
            "rollout.racing.margin: %g is too small for max %d at confidence %g: even candidates that always score "
            "alike need more than half of the completions to be called a tie, so most states will end undecided "
            "(outcome budget), without racing's guarantee; allowed without this warning: %.3f or more, or a larger max",
            racing.margin, racing.max, racing.confidence, needed,
        )  # fmt: skip


def check(run: Run) -> None:
    """See that prefixes can be written and candidates compared.

    Raises:
        ConfigError, ModelError: an unusable policy, a pool of one, a missing model.
    """
    policy = run.recipe.rollout.policy
    if len(run.recipe.names) < 2:
        raise ConfigError(f"rollouts compare candidates; the pool has only {run.recipe.names[0]!r}")
    allowed = [*POLICIES, *run.recipe.names]
    if policy not in allowed:
        raise ConfigError(
            f"rollout.policy: got {policy!r}{nearest(policy, allowed)}; allowed are those that choose segment by "
            f"segment within the pool: {', '.join(allowed)}"
        )
    check_writers(run, [policy])


def pick_questions(tasks: Sequence[Task], num_questions: int, seed: int) -> list[Question]:
    """Questions spread evenly over the tasks, the tasks taking turns; which of a task's is drawn by the seed.

    A task with too few questions gives all it has, with a warning. More questions are always a superset of fewer.
    """
    by_task = []
    for (_, wanted), task in zip(spread(num_questions, [task.name for task in tasks]), tasks, strict=True):
        drawn = sorted(task.examples, key=lambda example: derive_seed(seed, "question", example.id))[:wanted]
        if len(drawn) < wanted:
            logger.warning(
                "task %s has %d questions in split %s; rollout.queries asks for %d of them",
                task.name, len(drawn), task.split, wanted,
            )  # fmt: skip
        by_task.append(
            [
                Question(
                    task.name, task.metric, task.marker, task.strict,
                    Query(f"{task.name}/{example.id}", example.messages), example, task.confidence,
                )
                for example in drawn
            ]
        )  # fmt: skip
    turns = itertools.zip_longest(*by_task)
    return [question for turn in turns for question in turn if question is not None]


def warn_of_evaluation_questions(run: Run, questions: Sequence[Question]) -> None:
    """Say so where states come from questions that the switcher is to be measured on."""
    split = run.recipe.rollout.split
    try:
        evaluation = EvaluationQuestions(run)
    except DataError:
        return  # a task without that split: it is for learning only, or `evaluate` says what is wrong with it
    if found := evaluation.among([(question.task, question.example) for question in questions], split):
        logger.warning(
            "rollout.split %r: %d of %d questions are evaluation questions (split %r): what is measured on them "
            "flatters a switcher that has learned from them; leave them out of the file, or choose another split. The "
            "first: %s", split, len(found), len(questions), evaluation.split, found[0],
        )  # fmt: skip


def dependencies(run: Run, tasks: Sequence[Task]) -> dict[str, Any]:
    """Everything that the labels depend on. Not the number of workers, rows in flight or the device."""
    recipe = run.recipe
    settings: dict[str, Any] = {
        "rollout": recipe.rollout.model_dump(mode="json", exclude={"workers", "rounds", "rounds_split"}),
        "decoding": recipe.decoding.model_dump(mode="json"),
        "pool": [candidate.model_dump(mode="json", exclude={"device", "device_map"}) for candidate in recipe.pool],
        "tasks": {task.name: _task_settings(task, spec) for task, spec in zip(tasks, recipe.tasks, strict=True)},
        # By what the files hold: a ladder that was trained anew in the same folders has other labels.
        "weights": {candidate.name: candidate_weights(candidate) for candidate in recipe.pool},
    }
    if recipe.rollout.policy in ("switcher", "untuned"):
        settings["switcher"] = recipe.switcher.model_dump(mode="json", exclude={"device"})
    if recipe.rollout.policy == "switcher":
        settings["switcher"]["weights"] = _adapter_hash(switcher_adapter(run))
    return settings


def _task_settings(task: Task, spec: Any) -> dict[str, Any]:
    stated = spec.model_dump(mode="json", exclude_none=True, exclude={"file", "split"})
    return {**stated, "sha256": task.sha256, "metric": task.metric, "marker": task.marker, "strict": task.strict}


def _adapter_hash(adapter: str) -> str:
    """Of the adapter's or the probe's weights; of its name for a hub adapter."""
    files = [Path(adapter) / name for name in ("adapter_model.safetensors", PROBE_FILE)]
    content = next((path.read_bytes() for path in files if path.is_file()), adapter.encode())
    return hashlib.sha256(content).hexdigest()
