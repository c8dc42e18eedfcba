"""Kills at any instant, several workers, two runs in one folder: nothing lost, nothing twice, equal records."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kills import worker_killed

from rollout.stage import main
from switchgen.errors import ConfigError, WorkerError
from switchgen.files import StorageError, lock
from switchgen.ids import share_of
from switchgen.rundir import Run

ROOT = Path(__file__).resolve().parents[2]
ReadLabels = Callable[[Run], dict[str, dict[str, Any]]]

LARGER = ("rollout.queries=12", "rollout.completions=5")
"""Some seconds of work: time for kills."""


def _start(run: Run, workers: int) -> subprocess.Popen[bytes]:
    arguments = ["rollout", str(run.source), *LARGER, "--workers", str(workers), "--run-dir", str(run.dir)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "switchgen", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def _lines(run: Run) -> int:
    return sum(path.read_bytes().count(b"\n") for path in run.dir.glob("rollout/labels-*.jsonl"))


def _wait_for_lines(run: Run, process: subprocess.Popen[bytes], count: int) -> None:
    deadline = time.monotonic() + 120
    while _lines(run) < count:
        assert process.poll() is None, process.stderr.read().decode()  # type: ignore[union-attr]
        assert time.monotonic() < deadline, "no labels for two minutes"
        time.sleep(0.02)


def _children(process_id: int) -> list[int]:
    """Processes whose parent it is."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process_id and b"spawn_main" in (stat.parent / "cmdline").read_bytes():
            found.append(int(stat.parent.name))
    return found


@pytest.fixture(scope="module")
def _made() -> dict[str, Any]:
    return {}


@pytest.fixture
def uninterrupted(make_run: Any, labels_of: ReadLabels, _made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The labels that every kill must end with; made once."""
    if not _made:
        run = make_run("uninterrupted", *LARGER)
        main(run)
        _made.update(labels_of(run))
        assert len(_made) >= 20
    return _made


def test_killed_and_resumed(make_run: Any, labels_of: ReadLabels, uninterrupted: dict[str, Any]) -> None:
    run = make_run("killed", *LARGER)
    process = _start(run, workers=1)
    _wait_for_lines(run, process, 3)
    process.kill()
    process.communicate()
    kept = _lines(run)
    assert 3 <= kept < len(uninterrupted), "killed too late to test anything"
    with open(run.dir / "rollout" / "labels-0.jsonl", "ab") as stream:
        stream.write(b'{"id": "torn')  # as if the kill had come within a line
    summary = main(run)
    assert labels_of(run) == uninterrupted
    assert summary["states"] == len(uninterrupted)
    assert summary["command"]["states"] == summary["asked_states"] - kept - sum(summary["left_out"].values())


def test_two_workers_equal_one(make_run: Any, labels_of: ReadLabels, uninterrupted: dict[str, Any]) -> None:
    run = make_run("two", *LARGER)
    summary = main(run, workers=2)
    assert labels_of(run) == uninterrupted
    for worker in (0, 1):
        lines = (run.dir / "rollout" / f"labels-{worker}.jsonl").read_text().splitlines()
        assert lines and all(share_of(json.loads(line)["query_id"], 2) == worker for line in lines)
    assert summary["command"]["workers"] == 2
    assert summary["command"]["decoded_tokens"] >= summary["tokens"]


def test_another_number_of_workers_goes_on(make_run: Any, labels_of: ReadLabels) -> None:
    """A run of three workers, half of whose lines are taken away, is finished by one, and by none again."""
    whole = make_run("whole", "rollout.queries=4")
    main(whole)
    run = make_run("run", "rollout.queries=4")
    main(run)
    folder = run.dir / "rollout"
    lines = (folder / "labels-0.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "labels-0.jsonl").write_bytes(lines[0])
    (folder / "labels-5.jsonl").write_bytes(lines[1] + lines[2][:20])
    (folder / "summary.json").unlink()
    assert main(run)["command"]["states"] == len(lines) - 2
    assert labels_of(run) == labels_of(whole)
    assert (folder / "labels-5.jsonl").read_bytes() == lines[1]


@pytest.mark.parametrize(
    ("fewer", "more"),
    [
        (("rollout.queries=3", "rollout.states=2"), ("rollout.queries=6", "rollout.states=2")),
        (("rollout.queries=3", "rollout.states=1"), ("rollout.queries=4", "rollout.states=3")),
    ],
)
def test_more_questions_or_states_go_on(
    make_run: Any, labels_of: ReadLabels, fewer: tuple[str, ...], more: tuple[str, ...]
) -> None:
    """What a fresh run with the larger numbers would have made, and nothing of it written again; never fewer."""
    fresh = make_run("fresh", *more)
    wanted = main(fresh)
    run = make_run("run", *fewer)
    before = main(run)["states"]
    raised = make_run("run", *more)
    summary = main(raised)
    assert labels_of(raised) == labels_of(fresh)
    assert {key: value for key, value in summary.items() if key != "command"} == {
        key: value for key, value in wanted.items() if key != "command"
    }
    assert summary["command"]["decoded_tokens"] < wanted["command"]["decoded_tokens"]
    assert 0 < before < summary["states"]
    with pytest.raises(ConfigError, match=r"rollout\.queries: was \d, is 3 \(it may be raised\)"):
        main(make_run("run", *fewer))
    with pytest.raises(ConfigError, match=r"rollout\.completions: was 4, is 5"):
        main(make_run("run", *more, "rollout.completions=5", "rollout.queries=9"))
    assert main(make_run("run", *more)) == summary, "the refused settings left no trace"


def test_a_second_run_in_the_folder_is_refused(make_run: Any) -> None:
    run = make_run()
    with lock(run.dir / "rollout"), pytest.raises(StorageError, match="another run"):
        main(run)


@pytest.mark.slow
def test_a_worker_s_mistake_is_the_user_s(make_run: Any, home: Path) -> None:
    """What a worker process finds wrong with the input comes out as the same error as without workers."""
    run = make_run("run", f"rollout.reward_model={home / 'nowhere'}")
    with pytest.raises(ConfigError, match="nowhere"):
        main(run, workers=2)


@pytest.mark.slow
def test_a_worker_s_failure_shows_where(make_run: Any) -> None:
    run = make_run("run", "rollout.queries=2", "rollout.states=1")
    (run.dir / "rollout").mkdir(parents=True)
    for worker in (0, 1):
        # A fault of the machine's, not of the recipe's: the shard can neither be read nor written.
        os.symlink(f"labels-{worker}.jsonl", run.dir / "rollout" / f"labels-{worker}.jsonl")
    with pytest.raises((WorkerError, OSError)) as raised:
        main(run, workers=2)
    assert "labels-" in str(raised.value)


@pytest.mark.slow
def test_a_killed_worker_is_replaced(
    make_run: Any, labels_of: ReadLabels, uninterrupted: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run("killed", *LARGER)
    with worker_killed(run.dir / "rollout", "labels-*.jsonl", after=3):
        main(run, workers=2)
    assert "killed by signal 9); another takes its place" in caplog.text
    assert labels_of(run) == uninterrupted
    assert len(list((run.dir / "rollout").glob("labels-*.jsonl"))) == 2


@pytest.mark.slow
def test_random_kills_of_parent_and_workers(
    make_run: Any, labels_of: ReadLabels, uninterrupted: dict[str, Any]
) -> None:
    """Whoever is killed whenever, the same command goes on at once; orphaned workers do not write beside it."""
    chance = random.Random(20)
    run = make_run("killed", *LARGER)
    kills = 0
    for workers in (2, 1, 2, 2, 3):
        process = _start(run, workers)
        time.sleep(chance.uniform(2.0, 14.0))
        if process.poll() is None:
            victims = [process.pid, *_children(process.pid)]
            os.kill(chance.choice(victims), signal.SIGKILL)
            kills += 1
            if process.poll() is None and chance.random() < 0.5:
                process.kill()
        process.communicate(timeout=60)
    assert kills, "every run finished before its kill"
    main(run)
    assert labels_of(run) == uninterrupted
