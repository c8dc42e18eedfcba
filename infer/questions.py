"""The questions of an evaluation: the recipe's tasks, cut to their limits, and the score of one response."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from switchgen.errors import ConfigError
from switchgen.ids import content_hash
from switchgen.rundir import Run
from switchgen.scoring import METRICS, golds
from switchgen.tasks import Example, Task, load_task

logger = logging.getLogger("switchgen")


@dataclass(frozen=True)
class Questions:
    """A task as it is evaluated: its first examples."""

    task: Task
    examples: tuple[Example, ...]
    content: str
    """Hash of all its prompts, whatever the limit: responses to other prompts are not taken for responses to these."""

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def metric(self) -> str:
        """The task's metric."""
        return self.task.metric

    @property
    def exact(self) -> bool:
        """Whether the task enters the mean over exact tasks."""
        return METRICS[self.metric].exact

    @property
    def scored_singly(self) -> bool:
        """Whether one response can be scored by itself, without a model."""
        return METRICS[self.metric].score is not None

    def score(self, example: Example, output: str | None) -> tuple[float | None, str | None]:
        """Score of one response and what was read in it; (None, None) where more than the response is needed.

        Args:
            output: None for a question beyond the context, which counts as wrong where no model scores.
        """
        if not self.scored_singly:
            return None, None
        if output is None:
            return 0.0, None
        score = self.task.score(output, example)
        return score.value, score.extracted

    def score_stamp(self, example: Example, scorer: Any = None) -> str:
        """Hash of all that a response's score depends on beside the response: how the task is scored, and the answers.

        Args:
            scorer: the settings of the judge or the reward model, where one scores.
        """
        item = json.dumps(example.item, sort_keys=True, default=str)  # hub rows hold dates and the like
        task = self.task
        return content_hash([self.metric, task.marker, task.strict, task.confidence, item, scorer])

    def score_record(self, example: Example, record: dict[str, Any]) -> None:
        """Write `score`, `extracted` and the stamp `scored_by` into a kept response; a model's score is left open."""
        record["score"], record["extracted"] = self.score(example, record["output"])
        record["scored_by"] = self.score_stamp(example) if self.scored_singly else None


def load_questions(run: Run) -> list[Questions]:
    """The recipe's tasks, cut to their limits and to `evaluate.limit`.

    Raises:
        ConfigError, DataError: there are none, a spec or a file is wrong, or two tasks have one name.
    """
    settings = run.recipe.evaluate
    if not run.recipe.tasks:
        raise ConfigError(f"{run.source}: nothing to evaluate on; the recipe lists no tasks")
    tasks = []
    for given, spec in zip(run.recipe.tasks, run.task_specs(settings.split), strict=True):
        limits = [limit for limit in (spec.pop("limit", None), settings.limit) if limit is not None]
        task = load_task(spec)
        if given.split not in ("test", settings.split):
            logger.warning(
                "task %s: its split %r has no effect; evaluate.split is %r", task.name, given.split, settings.split
            )
        content = content_hash([[example.id, [dict(m) for m in example.messages]] for example in task.examples])
        tasks.append(Questions(task, task.examples[: min(limits, default=None)], content))
    names = [questions.name for questions in tasks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"tasks: two tasks are called {', '.join(repeated)}; give one of them another `name`")
    if "mean" in names:
        raise ConfigError(
            "tasks: a task is called 'mean', which stands for the mean over tasks; give it another `name`"
        )
    return tasks


def reference_text(example: Example) -> str | None:
    """The accepted answers, for people to read; None where there are none."""
    choices, answer = example.item.get("choices"), example.item.get("answer")
    if isinstance(choices, Mapping) and answer in choices:
        return f"{answer}: {choices[answer]}"
    return " | ".join(golds(example.item)) or None
