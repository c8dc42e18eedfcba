"""Rounds: each is kept, later ones are written by the switcher before, the best is where the other stages look."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from fits import NAMES
from ladders import save_ladder

from switchgen import pipeline
from switchgen.errors import ConfigError
from switchgen.pipeline import learn_to_switch, round_runs
from switchgen.records import read_records
from switchgen.rundir import Run, open_run


def make_run(folder: Path, *overrides: str) -> Run:
    if not (folder / "ladder").is_dir():
        save_ladder(folder / "ladder", NAMES)
    rows = {
        split: [{"id": f"{split}-{i}", "input": f"{split} {i}: which digit?", "output": str(i % 10)} for i in range(8)]
        for split in ("train", "dev", "test")
    }
    (folder / "digits.json").write_text(json.dumps({"name": "digits", "task_type": "exact_match", **rows}))
    recipe: dict[str, Any] = {
        "pool": [{"name": name, "model": str(folder / "ladder" / name), "dtype": "float64"} for name in NAMES],
        "decoding": {"max_new_tokens": 16, "segment": 4},
        "engine": {"max_rows": 8},
        "tasks": [{"file": str(folder / "digits.json")}],
        "rollout": {"queries": 6, "states": 2, "completions": 2, "rounds": 2},
        "train": {"keep_ties": True, "lora": {"r": 2, "alpha": 4}, "args": {"max_steps": 2}},
        "evaluate": {"seeds": [0], "limit": 4},
    }
    path = folder / "rounds.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return open_run(str(path), overrides, folder / "run")


def test_a_round_is_not_chosen_on_the_test_questions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rounds_split: 'dev' is also evaluate.split"):
        make_run(tmp_path, "evaluate.split=dev")


def test_a_round_that_is_chosen_on_what_it_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline, "_round", lambda *_: 0.5)
    monkeypatch.setattr(pipeline, "_keep", lambda *_: None)
    for split, warns in (("train", False), ("dev", True)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "switchgen"):
            learn_to_switch(make_run(tmp_path, f"rollout.split={split}"))
        assert ("rollout.rounds_split is rollout.split (dev)" in caplog.text) is warns


def test_labels_of_one_round_are_not_replaced(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run.dir / "rollout").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds labels of a run of one round"):
        learn_to_switch(run)


def test_later_rounds_are_written_by_the_switcher_before(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    first, fitted = round_runs(run, 1)
    assert first.recipe.rollout.policy == "random" and first.dir == fitted.dir == run.dir / "rounds" / "1"
    second, fitted = round_runs(run, 2)
    assert second.recipe.rollout.policy == "switcher" and second.round == 2
    assert second.recipe.switcher.adapter == str(run.dir / "rounds" / "1" / "switcher")
    assert fitted.recipe.switcher.adapter is None, "evaluated with its own"
    assert fitted.recipe.evaluate.split == "dev" and fitted.recipe.evaluate.policies == ["switcher"]


@pytest.mark.slow
def test_two_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    learn_to_switch(run)
    chosen = json.loads((run.dir / "rounds" / "chosen.json").read_text())
    assert chosen["split"] == "dev" and len(chosen["scores"]) == 2
    assert chosen["chosen"] == 1 + chosen["scores"].index(max(chosen["scores"]))
    for number in (1, 2):
        folder = run.dir / "rounds" / str(number)
        records = list(read_records([folder / "rollout" / "labels-0.jsonl"]))
        assert records and {record["round"] for record in records} == {number}
        assert (folder / "switcher" / "adapter_model.safetensors").is_file()
        results = json.loads((folder / "evaluation" / "results.json").read_text())
        assert results["meta"]["split"] == "dev"
    kept = run.dir / "rounds" / str(chosen["chosen"])
    for name in ("rollout/labels-0.jsonl", "switcher/adapter_model.safetensors"):
        assert (run.dir / name).read_bytes() == (kept / name).read_bytes()
    # Again, with the copying undone: everything is found, nothing is loaded.
    (run.dir / "rounds" / "chosen.json").unlink()
    monkeypatch.setattr("rollout.workers.load_writers", None)
    monkeypatch.setattr("infer.responses.load_writers", None)
    learn_to_switch(run)
    assert json.loads((run.dir / "rounds" / "chosen.json").read_text()) == chosen
