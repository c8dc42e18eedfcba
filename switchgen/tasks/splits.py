"""Which splits the stages of a run will ask the recipe's tasks for, and whether they are there."""

from __future__ import annotations

from switchgen.errors import SwitchgenError
from switchgen.rundir import Run
from switchgen.tasks.loading import load_task


def splits_of(run: Run) -> dict[str, list[str]]:
    """Split → the settings that name it, of the stages of `switchgen run`."""
    recipe = run.recipe
    named = {
        "rollout.split": recipe.rollout.split,
        "distill.split": recipe.distill.split,
        "evaluate.split": recipe.evaluate.split,
    }
    if recipe.rollout.rounds > 1:
        named["rollout.rounds_split"] = recipe.rollout.rounds_split
    found: dict[str, list[str]] = {}
    for setting, split in named.items():
        found.setdefault(split, []).append(setting)
    return found


def split_problems(run: Run) -> list[str]:
    """What is wrong with the tasks in the splits that the stages will ask for; each problem once."""
    problems: dict[str, None] = {}
    for split, settings in splits_of(run).items():
        for spec in run.task_specs(split=split):
            try:
                load_task(spec)
            except SwitchgenError as error:
                message = str(error)
                named = f"no split {split!r}" in message
                problems[f"{', '.join(settings)}: {message}" if named else message] = None
    return list(problems)
