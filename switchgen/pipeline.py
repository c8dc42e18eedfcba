"""`switchgen run`: the verbs in order, through files. Beside the front door, the only place that imports stages."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from switchgen.errors import ConfigError, DataError
from switchgen.files import finished_folder, write_json
from switchgen.rundir import SHIPPED_LAB, Run, open_run, shipped_lab_fits, write_provenance

logger = logging.getLogger("switchgen")

T = TypeVar("T")


def run_all(recipe: str, overrides: Sequence[str], run_dir: Path | None) -> str:
    """Every stage in order; each goes on with what is there, so a second start takes seconds.

    Returns:
        The result table and where the report is.
    """
    from infer.evaluation import main as evaluate  # noqa: PLC0415
    from infer.report import results_table, write_report  # noqa: PLC0415
    from switchgen.tasks.splits import split_problems  # noqa: PLC0415
    from train.distill import main as distill  # noqa: PLC0415

    run = open_run(recipe, list(overrides), run_dir)
    if run.recipe.lab is not None:
        _stage("lab", lambda: build_lab(run))
        # The ladder's folder is now in the run folder, and the recipe's paths lead there.
        run = open_run(recipe, list(overrides), run_dir)
    if not run.recipe.tasks:
        raise ConfigError(f"{run.source}: `run` needs tasks to learn from and to evaluate on; the recipe lists none")
    if problems := split_problems(run):
        # Known now, not after hours of the stages before.
        raise DataError("\n".join(problems))
    write_provenance(run)
    learn_to_switch(run)
    _stage("distill", lambda: distill(run))
    results = _stage("evaluate", lambda: evaluate(run))
    page = _stage("report", lambda: write_report(run.dir))
    return f"{results_table(results)}\n\nreport: {page}"


def learn_to_switch(run: Run) -> None:
    """Labels and a switcher in RUN/rollout and RUN/switcher: one round, or the best of `rollout.rounds`.

        RUN/rounds/<n>/{rollout,switcher,evaluation}/   every round, evaluated on `rollout.rounds_split`
        RUN/rounds/chosen.json                          which one is the best, and all their scores

    From the second round on, prefixes and completions are written by the switcher of the round before: its states are
    those that the policy comes to, and its labels say who is best if the policy goes on. Of equally good rounds the
    earlier one is chosen.

    Raises:
        ConfigError: the folder holds labels of a run of one round.
    """
    from rollout.stage import main as rollout  # noqa: PLC0415
    from train.switcher import main as train  # noqa: PLC0415

    rounds = run.recipe.rollout.rounds
    if rounds == 1:
        _stage("rollout", lambda: rollout(run))
        _stage("train", lambda: train(run))
        return
    if (run.dir / "rollout").is_dir() and not (run.dir / "rounds").is_dir():
        raise ConfigError(
            f"{run.dir / 'rollout'} holds labels of a run of one round; rollout.rounds: {rounds} puts its best round's "
            "there. Use another --run-dir, or go back to rollout.rounds: 1"
        )
    if run.recipe.rollout.rounds_split == run.recipe.rollout.split:
        logger.warning("rollout.rounds_split is rollout.split (%s): the best round is chosen on questions that its "
                       "switcher has learned from", run.recipe.rollout.split)  # fmt: skip
    scores = [_round(run, number) for number in range(1, rounds + 1)]
    _keep(run, 1 + scores.index(max(scores)), scores)


def _round(run: Run, number: int) -> float:
    """One round of labels, switcher and evaluation; returns the switcher's score."""
    from rollout.stage import main as rollout  # noqa: PLC0415
    from train.switcher import main as train  # noqa: PLC0415

    labelled, fitted = round_runs(run, number)
    _stage(f"round {number}: rollout", lambda: rollout(labelled))
    _stage(f"round {number}: train", lambda: train(fitted))
    return _stage(f"round {number}: evaluate", lambda: _round_score(fitted))


def round_runs(run: Run, number: int) -> tuple[Run, Run]:
    """A round's run for its labels, and for its fit and evaluation: they differ in whose switcher writes."""
    recipe = run.recipe
    folder = run.dir / "rounds" / str(number)
    rollout, switcher = recipe.rollout, recipe.switcher
    if number > 1:
        before = run.dir / "rounds" / str(number - 1) / "switcher"
        rollout = rollout.model_copy(update={"policy": "switcher"})
        switcher = switcher.model_copy(update={"adapter": str(before)})
    evaluate = recipe.evaluate.model_copy(
        update={"policies": ["switcher"], "split": rollout.rounds_split, "against": None}
    )
    labelled = recipe.model_copy(update={"rollout": rollout, "switcher": switcher})
    own = recipe.switcher.model_copy(update={"adapter": None})
    fitted = recipe.model_copy(update={"switcher": own, "evaluate": evaluate})
    return (
        Run(run.name, labelled, folder, run.source, number),
        Run(run.name, fitted, folder, run.source, number),
    )


def _round_score(run: Run) -> float:
    """The mean over exact tasks, over all tasks where none is exact."""
    from infer.evaluation import main as evaluate  # noqa: PLC0415

    values = {row["task"]: row["value"] for row in evaluate(run)["rows"] if row["seed"] is None}
    if not values:
        raise ConfigError(f"{run.source}: rollout.rounds needs a task whose responses are scored, to choose a round by")
    return float(values.get("mean", sum(values.values()) / len(values)))


def _keep(run: Run, chosen: int, scores: Sequence[float]) -> None:
    """Copy the chosen round's labels and switcher to where the other stages look for them."""
    import shutil  # noqa: PLC0415

    path = run.dir / "rounds" / "chosen.json"
    wanted = {"schema": 1, "chosen": chosen, "split": run.recipe.rollout.rounds_split, "scores": list(scores)}
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) == wanted:
        return
    logger.info("round %d is the best of %s", chosen, ", ".join(f"{score:.3f}" for score in scores))
    for name in ("rollout", "switcher"):
        with finished_folder(run.dir / name) as part:
            shutil.copytree(run.dir / "rounds" / str(chosen) / name, part, dirs_exist_ok=True)
    write_json(path, wanted)


def _stage(name: str, work: Callable[[], T]) -> T:
    started = time.monotonic()
    logger.info("== %s", name)
    result = work()
    logger.info("== %s: %.1f s", name, time.monotonic() - started)
    return result


def build_lab(run: Run) -> Path:
    """The lab's ladder and tasks in RUN/lab: copied where a ready one is shipped, else trained.

    Raises:
        ConfigError: the recipe has no lab section.
    """
    settings = run.recipe.lab
    if settings is None:
        raise ConfigError(f"{run.source}: the recipe has no `lab` section; the shipped recipe `lab` has one")
    target = run.dir / "lab"
    if shipped_lab_fits(settings):
        # A copy appears as a whole, so one that is there is finished.
        if not (target / "aligned").is_dir():
            if any(run.dir.rglob("stage.json")):
                logger.info("lab: the shipped ladder is used where it is: there is work in %s that it was used for",
                            run.dir)  # fmt: skip
                return SHIPPED_LAB
            import shutil  # noqa: PLC0415

            with finished_folder(target) as part:
                shutil.copytree(SHIPPED_LAB, part, dirs_exist_ok=True)
        elif (target / "lab.json").read_bytes() != (SHIPPED_LAB / "lab.json").read_bytes():
            logger.warning("lab: %s is not the ladder that is shipped now; it stays in use here, and another --run-dir "
                           "takes the shipped one", target)  # fmt: skip
        return target
    from train.lab import main as train_ladder  # noqa: PLC0415

    train_ladder(run)
    return target
