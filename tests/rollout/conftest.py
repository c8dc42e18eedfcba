"""A tiny ladder, two tasks (a number's metric and a reward model) and a recipe over them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ladders import save_judge, save_ladder

from switchgen.records import read_records
from switchgen.rundir import Run, open_run

NAMES = ("base", "tuned", "aligned")

MakeRun = Callable[..., Run]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `ladder/`, `judge/` and the tasks' files."""
    folder = tmp_path_factory.mktemp("rollout")
    save_ladder(folder / "ladder", NAMES)
    save_judge(folder / "judge")
    rows = [
        {"id": str(index), "input": f"How old is person {index}?", "output": str(index % 10)} for index in range(40)
    ]
    _save_task(folder, "ages", "exact_match", rows)
    _save_task(folder, "tales", "reward_model", [{"input": f"Tell me tale number {index}."} for index in range(30)])
    return folder


def _save_task(folder: Path, name: str, task_type: str, rows: list[dict[str, Any]]) -> None:
    task = {"name": name, "task_type": task_type, "train": rows, "test": rows[:2]}
    (folder / f"{name}.json").write_text(json.dumps(task))


@pytest.fixture
def make_run(home: Path, tmp_path: Path) -> MakeRun:
    """Opens a run in a folder of its own: 6 questions, 2 states each, 4 completions, float64, short responses."""

    def make(name: str = "run", *overrides: str, **sections: Any) -> Run:
        recipe = {
            "pool": [{"name": name, "model": str(home / "ladder" / name), "dtype": "float64"} for name in NAMES],
            "decoding": {"max_new_tokens": 32, "segment": 8},
            "engine": {"max_rows": 16},
            "tasks": [{"file": str(home / "ages.json")}, {"file": str(home / "tales.json")}],
            "rollout": {"queries": 6, "states": 2, "completions": 4, "reward_model": str(home / "judge")},
            **sections,
        }
        source = tmp_path / f"{name}.yaml"
        source.write_text(yaml.safe_dump(recipe))
        return open_run(str(source), overrides, tmp_path / name)

    return make


@pytest.fixture
def labels_of() -> Callable[[Run], dict[str, dict[str, Any]]]:
    """Reads a run's label records, by id; none is there twice."""

    def read(run: Run) -> dict[str, dict[str, Any]]:
        records = list(read_records(sorted((run.dir / "rollout").glob("labels-*.jsonl"))))
        by_id = {record["id"]: record for record in records}
        assert len(by_id) == len(records), "a state was labelled twice"
        return by_id

    return read
