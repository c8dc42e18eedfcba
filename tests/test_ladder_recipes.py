"""The recipes of the large ladders: examined by the doctor, and run dry on tiny models of the same classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ladders import save_ladder

from infer.evaluation import main as evaluate
from infer.merging import main as merge
from rollout.stage import main as rollout
from switchgen.baselines import FAMILIES
from switchgen.config import load_recipe
from switchgen.doctor import examine
from switchgen.rundir import Run, open_run
from train.switcher import main as train

NAMES = ("pretrained", "finetuned", "aligned")
LADDERS = {"tulu3-8b": "llama", "qwen2.5-7b": "qwen2"}
"""Recipe → the kind of its models' configuration."""


def dry_run(recipe: str, folder: Path, test_data: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Run:
    """The recipe over three tiny models of its class, and the test data in place of the hub's."""
    data = folder / "data"
    data.mkdir()
    for path in test_data.glob("*.json"):
        (data / path.name).symlink_to(path)
    # The test data holds the small selection of this one.
    (data / "agieval.json").symlink_to(test_data / "agieval_tiny.json")
    monkeypatch.setenv("SWITCHGEN_DATA", str(data))
    save_ladder(folder / "ladder", NAMES, LADDERS[recipe])
    models = [f"pool.{i}.model={folder / 'ladder' / name}" for i, name in enumerate(NAMES)]
    dtypes = [f"pool.{i}.dtype=float32" for i in range(3)]
    return open_run(recipe, [*models, *dtypes, *overrides], folder / "run")


@pytest.mark.parametrize("recipe", LADDERS)
def test_the_recipe_names_the_whole_table(recipe: str) -> None:
    settings = load_recipe(recipe)
    run = open_run(recipe)
    assert run.recipe.names == list(NAMES) and settings.evaluate.baselines
    wanted = {*NAMES, "distilled", *(policy for family in FAMILIES.values() for policy in family)}
    assert set(run.recipe.evaluate.policies) == wanted
    assert settings.decoding.max_new_tokens == 512 and settings.decoding.segment.tokens == 50


@pytest.mark.parametrize("recipe", LADDERS)
def test_the_doctor_finds_no_problem(
    recipe: str, tmp_path: Path, test_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dry_run(recipe, tmp_path, test_data, monkeypatch)
    lines, sound = examine(run)
    text = "\n".join(lines)
    assert sound, text
    assert "no problems found" in text and "peak" in text and "responses, at most" in text


@pytest.mark.slow
@pytest.mark.parametrize("recipe", LADDERS)
def test_a_dry_run(recipe: str, tmp_path: Path, test_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels, a switcher, merged weights, and the whole table but the student, two questions a task."""
    tasks = json.dumps(["gsm8k", "popqa", "arc_challenge"])
    run = dry_run(
        recipe, tmp_path, test_data, monkeypatch, f"tasks={tasks}", "decoding.max_new_tokens=20", "decoding.segment=6",
        "rollout.queries=6", "rollout.completions=2", "train.keep_ties=true", "train.held_out=0",
        "train.args={max_steps: 1, gradient_checkpointing: false}", "evaluate.limit=2", "evaluate.seeds=[0]",
        "baselines.dev_questions=2", "evaluate.policies=[switcher]",
    )  # fmt: skip
    rollout(run)
    train(run)
    merge(run, ["soup"])
    results = evaluate(run)
    rows = {(row["policy"], row["task"]): row for row in results["rows"] if row["seed"] is None}
    policies = [*NAMES, *(policy for family in FAMILIES.values() for policy in family)]
    for policy in policies:
        row = rows[policy, "mean"]
        assert row["low"] <= row["value"] <= row["high"] and row["tokens"] > 0
