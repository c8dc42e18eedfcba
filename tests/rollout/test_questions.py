"""Which questions are taken, and what is refused before any model is loaded."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rollout.questions import load_tasks, pick_questions, warn_of_evaluation_questions
from rollout.stage import main
from switchgen.errors import ConfigError, DataError, ModelError
from switchgen.tasks import load_task


def _tasks(home: Path) -> list[Any]:
    return [load_task({"file": str(home / f"{name}.json"), "split": "train"}) for name in ("ages", "tales")]


def test_questions_are_spread_over_the_tasks_in_turn(home: Path) -> None:
    questions = pick_questions(_tasks(home), 7, seed=0)
    assert [question.task for question in questions] == ["ages", "tales"] * 3 + ["ages"]
    assert len({question.query.id for question in questions}) == 7
    assert all(question.query.id.startswith(question.task + "/") for question in questions)


def test_questions_depend_on_the_seed_and_grow_with_their_number(home: Path) -> None:
    def ids(count: int, seed: int) -> set[str]:
        return {question.query.id for question in pick_questions(_tasks(home), count, seed)}

    assert ids(10, 0) == ids(10, 0)
    assert ids(10, 0) != ids(10, 1)
    assert ids(10, 0) < ids(20, 0)


def test_a_task_with_too_few_questions_gives_all_and_warns(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "switchgen"):
        questions = pick_questions(_tasks(home), 70, seed=0)
    assert sum(question.task == "tales" for question in questions) == 30
    assert "tales has 30 questions" in caplog.text and "35" in caplog.text


def _spoilt(make_run: Any, home: Path, tmp_path: Path, case: str) -> Any:
    ages = {"file": str(home / "ages.json")}
    (tmp_path / "plain.json").write_text(
        json.dumps({"name": "plain", "task_type": "generation_diversity", "train": [{"input": "Say something."}]})
    )
    pool = [{"name": "base", "model": str(home / "ladder" / "base")}]
    cases: dict[str, Any] = {
        "no tasks": lambda: make_run(tasks=[]),
        "twice": lambda: make_run(tasks=[ages, ages]),
        "unscored": lambda: make_run(tasks=[ages, {"file": str(tmp_path / "plain.json")}]),
        "no reward model": lambda: make_run(rollout={"queries": 2}),
        "split": lambda: make_run("run", "rollout.split=dev"),
        "one candidate": lambda: make_run(pool=pool, tasks=[ages]),
        "policy": lambda: make_run("run", "rollout.policy=randon"),
        "router": lambda: make_run("run", "rollout.policy=baco-p@0.3"),
        "student": lambda: make_run("run", "rollout.policy=distilled"),
        "no switcher": lambda: make_run("run", "rollout.policy=switcher"),
        "model": lambda: make_run("run", "pool.1.model=./nowhere"),
    }
    return cases[case]()


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("no tasks", ConfigError, ["tasks", "lists none"]),
        ("twice", ConfigError, ["same name", "ages"]),
        ("unscored", ConfigError, ["plain (none)", "reward_model"]),
        ("no reward model", ConfigError, ["tales", "rollout.reward_model"]),
        ("split", DataError, ["dev", "train"]),
        ("one candidate", ConfigError, ["base", "compare"]),
        ("policy", ConfigError, ["randon", "did you mean 'random'"]),
        ("router", ConfigError, ["baco-p@0.3", "random"]),
        ("student", ConfigError, ["distilled", "random"]),
        ("no switcher", ConfigError, ["switcher", "switchgen train"]),
        ("model", ModelError, ["tuned", "nowhere"]),
    ],
)
def test_refused_before_anything_is_written(
    make_run: Any, home: Path, tmp_path: Path, case: str, error: type[Exception], words: list[str]
) -> None:
    run = _spoilt(make_run, home, tmp_path, case)
    with pytest.raises(error) as raised:
        main(run)
    assert all(word in str(raised.value) for word in words), raised.value
    assert not list(run.dir.glob("rollout/*.jsonl"))


def test_a_reward_model_that_cannot_be_used_is_known_at_once(make_run: Any, home: Path) -> None:
    run = make_run("run", f"rollout.reward_model={home / 'nowhere'}")
    with pytest.raises(ConfigError, match="nowhere"):
        main(run)
    assert not list(run.dir.glob("rollout/labels-*.jsonl"))


def test_a_reward_model_that_nobody_needs_warns(make_run: Any, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run("run", "rollout.queries=1", "rollout.states=1", tasks=[{"file": str(home / "ages.json")}])
    with caplog.at_level(logging.WARNING, "switchgen"):
        main(run)
    assert "rollout.reward_model has no effect" in caplog.text


def test_workers_must_be_positive(make_run: Any) -> None:
    with pytest.raises(ConfigError, match="workers: got 0"):
        main(make_run(), workers=0)


def test_evaluation_questions_among_those_that_are_learned_from(
    make_run: Any, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The task's two test rows are among its train rows: labels are made all the same, but not in silence."""
    small = {"rollout": {"queries": 40, "states": 1, "completions": 1}, "tasks": [{"file": str(home / "ages.json")}]}
    run = make_run("run", **small)
    questions = pick_questions(load_tasks(run), 40, seed=0)
    with caplog.at_level(logging.WARNING, "switchgen"):
        warn_of_evaluation_questions(run, questions)
    assert "rollout.split 'train': 2 of 40 questions are evaluation questions (split 'test')" in caplog.text
    assert "is asked in the evaluation as ages/" in caplog.text
    caplog.clear()
    others = [question for question in questions if question.example.id not in ("0", "1")]
    with caplog.at_level(logging.WARNING, "switchgen"):
        warn_of_evaluation_questions(run, others)
        warn_of_evaluation_questions(make_run("elsewhere", "evaluate.split=dev", **small), questions)
    assert not caplog.text


def test_the_stage_looks_for_evaluation_questions(make_run: Any, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run("run", "rollout.split=test", "rollout.states=1", tasks=[{"file": str(home / "ages.json")}])
    with caplog.at_level(logging.WARNING, "switchgen"):
        main(run)
    assert "2 of 2 questions are evaluation questions" in caplog.text
