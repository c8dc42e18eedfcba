"""Evaluation questions among those that are learned from: figures measured on them mean nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from switchgen.rundir import Run
from switchgen.tasks.loading import load_task
from switchgen.tasks.task import Example


class EvaluationQuestions:
    """The questions of a recipe's tasks in `evaluate.split`, all of them: `limit` leaves none out here.

    The text (case and white space aside) counts over all tasks. An id counts where both splits are the same one: there
    are published files that number each split's rows anew.

    Raises:
        DataError: a task's file is wrong, or has no such split.
    """

    def __init__(self, run: Run) -> None:
        self.split = run.recipe.evaluate.split
        self._ids: set[tuple[str, str]] = set()
        self._texts: dict[str, str] = {}
        for spec in run.task_specs(split=self.split):
            spec.pop("limit", None)
            task = load_task(spec)
            for example in task.examples:
                self._ids.add((task.name, example.id))
                self._texts.setdefault(_normal_text(example.messages), f"{task.name}/{example.id}")

    def among(self, questions: Iterable[tuple[str, Example]], split: str) -> list[str]:
        """In words, each of the questions that the evaluation asks, too.

        Args:
            questions: (task's name, example).
            split: where they are from.
        """
        found = []
        for task, example in questions:
            asked_as = self._texts.get(_normal_text(example.messages))
            if asked_as is not None:
                found.append(f"{task}/{example.id} is asked in the evaluation as {asked_as}")
            elif split == self.split and (task, example.id) in self._ids:
                found.append(f"{task}/{example.id} has the id of an evaluation question")
        return found


def _normal_text(messages: Sequence[Mapping[str, str]]) -> str:
    return "\x1e".join(f"{turn['role']}\x1f{' '.join(turn['content'].casefold().split())}" for turn in messages)
