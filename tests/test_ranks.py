"""A launcher's ranks share a verb's work: records as from one process, also after a rank was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from digits import save_digits
from kills import once_lines_are_there
from outcomes import final_state, repeated

from rollout.stage import main as rollout
from switchgen.__main__ import main as switchgen
from switchgen.errors import ConfigError
from switchgen.rundir import open_run
from switchgen.workers import num_workers_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ladder, a task, a recipe, and `alone/` with the labels of one process."""
    folder = tmp_path_factory.mktemp("ranks")
    recipe = {
        **save_digits(folder, train=20, test=6, queries=20),
        "rollout": {"queries": 12, "states": 2, "completions": 4},
        "evaluate": {"policies": ["random", "aligned"], "seeds": [0]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rollout(open_run(str(folder / "recipe.yaml"), [], folder / "alone"))
    return folder


LAUNCHERS = {
    "torchrun": ("--standalone", "--nproc-per-node", "2", "-m"),
    "deepspeed": ("--num_accelerators", "2", "--master_port", "29619", "--no_local_rank", "--module"),
}


def launch(home: Path, *words: str, launcher: str = "torchrun") -> tuple[int, str]:
    """A verb in two ranks; its exit code and what was said."""
    pytest.importorskip("torch" if launcher == "torchrun" else launcher)
    program = Path(sys.executable).with_name(launcher)
    process = subprocess.Popen(
        [str(program), *LAUNCHERS[launcher], "switchgen", *words], cwd=home, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu",
             "PATH": f"{program.parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=280)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


def kill_rank(number: int) -> bool:
    """Kill -9 that rank of this test's launch."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found, command = path.read_bytes().split(b"\0"), (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if f"RANK={number}".encode() in found and b"recipe.yaml\0--run-dir\0killed" in command:
            os.kill(int(path.parent.name), signal.SIGKILL)
            return True
    return False


def same_records(home: Path, name: str) -> bool:
    return repeated(home / name) == 0 and final_state(home / name, ["rollout"]) == final_state(
        home / "alone", ["rollout"]
    )


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_label_as_one_process(home: Path, launcher: str) -> None:
    code, said = launch(home, "rollout", "recipe.yaml", "--run-dir", launcher, launcher=launcher)
    assert code == 0, said
    assert said.count('"asked_states": 24') == 1, "one summary, by rank 0"
    assert len(list((home / launcher / "rollout").glob("labels-*.jsonl"))) == 2
    assert same_records(home, launcher)


def test_two_ranks_answer_and_evaluate_as_one_process(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    infer: Sequence[str] = ["infer", "recipe.yaml", "--input", "queries.jsonl", "--policy", "random"]
    assert switchgen([*infer, "--output", "one.jsonl", "--run-dir", "a"]) == 0
    code, said = launch(home, *infer, "--output", "two.jsonl", "--run-dir", "b")
    assert code == 0, said
    assert (home / "one.jsonl").read_bytes() == (home / "two.jsonl").read_bytes()
    assert switchgen(["evaluate", "recipe.yaml", "--run-dir", "a"]) == 0
    code, said = launch(home, "evaluate", "recipe.yaml", "--run-dir", "b")
    assert code == 0, said
    rows = [json.loads((home / name / "evaluation" / "results.json").read_text())["rows"] for name in ("a", "b")]
    assert [(row["policy"], row["value"], row["n"]) for row in rows[0]] == [
        (row["policy"], row["value"], row["n"]) for row in rows[1]
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_rank_ends_the_launch_and_nothing_is_lost(home: Path, number: int) -> None:
    folder = home / f"killed-{number}"
    with once_lines_are_there(folder / "rollout", "labels-*.jsonl", 3, lambda: kill_rank(number)):
        code, said = launch(home, "rollout", "recipe.yaml", "--run-dir", folder.name)
    assert code != 0 and "SIGKILL" in said
    rollout(open_run(str(home / "recipe.yaml"), [], folder))
    assert same_records(home, folder.name)


def test_a_user_s_mistake_is_said_once(home: Path) -> None:
    code, said = launch(home, "rollout", "recipe.yaml", "rollout.policy=nobody", "--run-dir", "wrong")
    assert code != 0 and said.count("switchgen: rollout.policy: got 'nobody'") == 1


def test_ranks_are_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert num_workers_of(1, None) == num_workers_of(1, 2) == 2
    with pytest.raises(ConfigError, match="workers: got 3, started by a launcher in 2 ranks"):
        num_workers_of(1, 3)
