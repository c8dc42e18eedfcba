"""`switchgen run` from end to end on the shipped ladder, and the recipes that are shipped."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from switchgen.__main__ import main
from switchgen.config import load_recipe, shipped_recipes
from switchgen.pipeline import build_lab
from switchgen.rundir import SHIPPED_LAB, check_lab, claim_stage, open_run
from switchgen.tasks import shipped_tasks

SMALL = [
    "rollout.queries=40",
    "rollout.completions=4",
    "rollout.workers=1",
    "train.args.num_train_epochs=2",
    "train.held_out=0.2",
    "distill.queries=30",
    "distill.samples=1",
    "distill.workers=1",
    "distill.min_score=0",
    "evaluate.limit=6",
    "evaluate.seeds=[0]",
    "evaluate.workers=1",
]


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_load(name: str) -> None:
    recipe = load_recipe(name)
    assert len(recipe.pool) >= 2
    assert recipe.tasks
    assert [task.shipped for task in recipe.tasks if task.shipped and task.shipped not in shipped_tasks()] == []


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_doctor_speaks_of_every_shipped_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The lab is sound anywhere; the large ladders' files may be missing, and then that is what it says."""
    code = main(["doctor", name])
    out = capsys.readouterr().out
    assert "memory" in out and "rollout:" in out
    assert code == (0 if "no problems found" in out else 2)
    if name == "lab":
        assert code == 0


def test_run_after_single_verbs_uses_the_ladder_that_they_used(tmp_path: Path) -> None:
    """They took the shipped ladder where it is; a copy in the run folder would make their work another recipe's."""
    folder = tmp_path / "run"
    run = open_run("lab", [], folder)
    claim_stage(folder / "rollout", "rollout", {"pool": [candidate.model for candidate in run.recipe.pool]})
    assert build_lab(run) == SHIPPED_LAB and not (folder / "lab").exists()
    assert open_run("lab", [], folder).recipe.pool == run.recipe.pool
    fresh = open_run("lab", [], tmp_path / "fresh")
    assert build_lab(fresh) == tmp_path / "fresh" / "lab"


def test_single_verbs_say_how_the_ladder_is_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["rollout", "lab", "--run-dir", str(tmp_path / "run"), "lab.seed=7"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "the small ladder is not in" in said and "`switchgen lab` with the same recipe" in said
    rungs = ("pretrained", "finetuned", "aligned")
    models = [f"pool.{index}.model={SHIPPED_LAB / name}" for index, name in enumerate(rungs)]
    check_lab(open_run("lab", ["lab.seed=7", *models], tmp_path / "run"))


def test_a_split_that_a_later_stage_needs_is_missed_at_once(
    tmp_path: Path, lab_ladder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"task_type": "exact_match", "train": [{"input": "1 + 1 =", "output": "2"}]}
    (tmp_path / "sums.json").write_text(json.dumps(task))
    settings = [f"tasks=[{{file: {tmp_path / 'sums.json'}}}]", "distill.split=dev"]
    assert main(["run", "lab", "--run-dir", str(tmp_path / "run"), *settings]) == 2
    said = capsys.readouterr().err
    assert "distill.split: task file" in said and "no split 'dev'; there are: train (1 rows)" in said
    assert "evaluate.split: task file" in said and "rollout.split" not in said
    assert not (tmp_path / "run" / "rollout").exists()
    assert main(["doctor", "lab", *settings]) == 2
    assert "distill.split: task file" in capsys.readouterr().out


@pytest.mark.slow
def test_run_goes_through_all_stages_and_starts_again_in_seconds(
    tmp_path: Path, lab_ladder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "lab", "--run-dir", str(tmp_path / "run"), *SMALL]
    assert main(command) == 0
    # A library may have said something of its own before.
    table = capsys.readouterr().out.partition("| policy")[2]
    policies = load_recipe("lab").evaluate.policies
    assert [name for name in policies if f"| {name}" not in table] == []
    assert "report:" in table
    run = tmp_path / "run"
    for left in ("lab/aligned/model.safetensors", "lab/tasks/recall.json", "rollout/summary.json",
                 "switcher/adapter_model.safetensors", "switcher/switchgen.json", "distilled/switchgen.json",
                 "evaluation/results.json", "report/index.html", "report/results.md", "recipe.yaml"):  # fmt: skip
        assert (run / left).is_file(), left
    results = json.loads((run / "evaluation" / "results.json").read_text())
    for row in results["rows"]:
        assert {"policy", "task", "seed", "metric", "value", "low", "high", "n", "tokens", "seconds"} <= set(row)
        assert row["low"] <= row["value"] <= row["high"]
    families = {row["task"] for row in results["rows"]}
    assert {"recall", "compositional", "arithmetic", "list", "open", "mean"} <= families

    before = {path: path.read_bytes() for path in run.rglob("*.jsonl")}
    assert before
    started = time.process_time()
    assert main(command) == 0
    assert time.process_time() - started < 20
    assert capsys.readouterr().out.partition("| policy")[2] == table
    assert {path: path.read_bytes() for path in run.rglob("*.jsonl")} == before
