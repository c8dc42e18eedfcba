"""A tiny ladder with random weights, tasks of several metrics, and recipes over them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ladders import save_judge, save_ladder

from switchgen.rundir import Run, open_run

NAMES = ("base", "tuned", "aligned")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `ladder/`, `judge/` (a reward model) and task files."""
    folder = tmp_path_factory.mktemp("infer")
    save_ladder(folder / "ladder", NAMES)
    save_judge(folder / "judge")
    ages = [{"id": f"age-{i}", "input": f"How old is person {i}?", "output": str(i % 10)} for i in range(12)]
    long = {"id": "long", "input": "How old is " + "Vudak " * 1500 + "?", "output": "7"}
    _save_task(folder, "ages", "exact_match", ages)
    _save_task(folder, "with-long", "exact_match", [ages[0], long, ages[1]])
    (folder / "with-dev.json").write_text(
        json.dumps({"name": "with-dev", "task_type": "exact_match", "dev": ages[:6], "test": ages[6:]})
    )
    facts = [{"id": f"fact-{i}", "input": f"Who is {i}?", "output": f'["the person {i}", "{i}"]'} for i in range(12)]
    _save_task(folder, "facts", "f1_match", facts)
    letters = [
        {"id": f"letter-{i}", "input": f"Which one, {i}?", "choices": {"A": "one", "B": "two"}, "answer": "AB"[i % 2]}
        for i in range(12)
    ]
    _save_task(folder, "letters", "multiple_choice", letters)
    _save_task(folder, "tales", "reward_model", [{"id": f"t{i}", "input": f"Tell me tale {i}."} for i in range(4)])
    _save_task(folder, "open", "generation_diversity", [{"id": f"o{i}", "input": f"Anything {i}?"} for i in range(4)])
    return folder


def _save_task(folder: Path, name: str, task_type: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"name": name, "task_type": task_type, "test": rows}))


@pytest.fixture
def make_run(home: Path, tmp_path: Path) -> Callable[..., Run]:
    """Opens a run in a folder of its own: float64, short responses, 8 rows in flight."""

    def make(name: str = "run", *overrides: str, tasks: tuple[str, ...] = ("ages",), ladder: Path | None = None) -> Run:
        places = ladder or home / "ladder"
        recipe = {
            "pool": [{"name": name, "model": str(places / name), "dtype": "float64"} for name in NAMES],
            "decoding": {"max_new_tokens": 16, "segment": 5},
            "engine": {"max_rows": 8},
            "tasks": [{"file": str(home / f"{task}.json")} for task in tasks],
            "evaluate": {"policies": ["base", "aligned", "random"], "seeds": [0, 1], "limit": 4},
        }
        source = tmp_path / f"{name}.yaml"
        source.write_text(yaml.safe_dump(recipe))
        return open_run(str(source), overrides, tmp_path / name)

    return make
