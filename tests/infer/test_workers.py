"""Several processes answer: what comes out is what one writes, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kills import lines_in, worker_killed

from infer.batch import main as infer
from infer.evaluation import main as evaluate
from infer.output_file import work_folder
from switchgen.errors import ConfigError, WorkerError
from switchgen.ids import share_of
from switchgen.rundir import Run

ROOT = Path(__file__).resolve().parents[2]
MakeRun = Callable[..., Run]
JSON = dict[str, Any]
TASKS = ("ages", "letters")
LONGER = ("decoding.max_new_tokens=48", "engine.max_rows=4", "evaluate.limit=12")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    lines = [{"id": f"q{i}", "input": f"How old is person {i}?"} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def written(run: Run) -> dict[tuple[str, str], JSON]:
    """An evaluation's responses by file and id, without times; none is there twice."""
    found: dict[tuple[str, str], JSON] = {}
    for path in (run.dir / "evaluation" / "responses").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            del record["seconds"]
            assert (path.name, record["id"]) not in found, "written twice"
            found[path.name, record["id"]] = record
    return found


@pytest.fixture
def expected(make_run: MakeRun) -> dict[tuple[str, str], JSON]:
    run = make_run("one", *LONGER, tasks=TASKS)
    evaluate(run)
    return written(run)


def test_two_workers_evaluate_as_one(
    make_run: MakeRun, expected: dict[tuple[str, str], JSON], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "switchgen")
    run = make_run("two", *LONGER, "evaluate.workers=2", tasks=TASKS)
    document = evaluate(run)
    assert written(run) == expected
    assert not (run.dir / "evaluation" / "shards").exists()
    assert {row["n"] for row in document["rows"] if row["task"] == "ages" and row["seed"] == 0} == {12}
    assert f"{len(expected)} responses by 2 workers" in caplog.text


def test_a_killed_worker_is_replaced(
    make_run: MakeRun, expected: dict[tuple[str, str], JSON], caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run("killed", *LONGER, tasks=TASKS)
    with worker_killed(run.dir / "evaluation", "shards/*/*.jsonl", after=5):
        evaluate(run, workers=2)
    assert "another takes its place" in caplog.text
    assert written(run) == expected


def test_killed_workers_leave_what_is_finished(
    make_run: MakeRun, expected: dict[tuple[str, str], JSON], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One dies too often, the other is ended; another number of workers goes on, over a torn line."""
    monkeypatch.setattr("switchgen.workers.REPLACEMENTS", 0)
    run = make_run("killed", *LONGER, tasks=TASKS)
    folder = run.dir / "evaluation"
    with worker_killed(folder, "shards/*/*.jsonl", after=5), pytest.raises(WorkerError, match=r"evaluate-\d.*signal 9"):
        evaluate(run, workers=2)
    assert 5 <= lines_in(folder, "shards/*/*.jsonl") < len(expected)
    shards = sorted(folder.glob("shards/*/*.jsonl"))
    for shard in shards:
        for line in shard.read_text().splitlines():
            record = json.loads(line)
            assert shard.parent.name == str(share_of(f"{record['task']}/{record['id']}", 2))
    kept = lines_in(folder, "shards/*/*.jsonl")
    with open(shards[0], "ab") as stream:
        stream.write(b'{"id": "torn')
    # As if the parent had been killed while it gathered: one line is in its place already, the shard still there.
    (folder / "responses").mkdir(exist_ok=True)
    (folder / "responses" / shards[0].name).write_bytes(shards[0].read_bytes().splitlines(keepends=True)[0])
    evaluate(run, workers=3)
    assert written(run) == expected
    assert kept >= 5 and not (folder / "shards").exists()


@pytest.mark.parametrize("unordered", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_workers_answer_as_one(make_run: MakeRun, source: Path, tmp_path: Path, unordered: bool) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    infer(make_run("one", *LONGER), input=source, output=one, policy="random", unordered=unordered)
    run = make_run("two", *LONGER)
    summary = infer(run, input=source, output=two, policy="random", unordered=unordered, workers=2)
    if unordered:
        assert sorted(two.read_text().splitlines()) == sorted(one.read_text().splitlines())
    else:
        assert two.read_bytes() == one.read_bytes()
    assert summary["written"] == 40 and summary["load_seconds"] > 0 and summary["tokens_per_second"] > 0
    assert not (work_folder(run, two) / "shards").exists()


@pytest.mark.slow
@pytest.mark.parametrize("unordered", [False, True])
def test_a_killed_worker_s_rows_are_written_once(
    make_run: MakeRun, source: Path, tmp_path: Path, unordered: bool
) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    infer(make_run("whole", *LONGER), input=source, output=whole, policy="random")
    run = make_run("killed", *LONGER)
    with worker_killed(work_folder(run, output), "shards/*/*.jsonl", after=4):
        infer(run, input=source, output=output, policy="random", workers=2, unordered=unordered)
    assert sorted(output.read_text().splitlines()) == sorted(whole.read_text().splitlines())


@pytest.mark.slow
def test_a_killed_worker_s_rows_are_gone_on_with(
    make_run: MakeRun, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("switchgen.workers.REPLACEMENTS", 0)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    infer(make_run("whole", *LONGER), input=source, output=whole, policy="random")
    run = make_run("killed", *LONGER)
    folder = work_folder(run, output)
    with worker_killed(folder, "shards/*/rows.jsonl", after=4), pytest.raises(WorkerError):
        infer(run, input=source, output=output, policy="random", workers=2)
    kept = lines_in(folder, "shards/*/rows.jsonl")
    assert 4 <= kept < 40 and not output.exists()
    summary = infer(run, input=source, output=output, policy="random", workers=1)
    assert summary["written"] == 40 - kept
    assert output.read_bytes() == whole.read_bytes()


def test_no_workers_at_all(make_run: MakeRun, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="workers: got 0"):
        evaluate(make_run(), workers=0)
    with pytest.raises(ConfigError, match="workers: got 0"):
        infer(make_run(), input=source, output=tmp_path / "out.jsonl", policy="random", workers=0)


@pytest.mark.slow
def test_control_c_ends_all_of_them(make_run: MakeRun, source: Path, tmp_path: Path) -> None:
    """As a terminal sends it: to the parent and its workers."""
    run, output = make_run("run", *LONGER), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "switchgen", "infer", str(run.source), "--run-dir", str(run.dir), "--workers", "2",
               "--input", str(source), "--output", str(output), "--policy", "random", *LONGER]  # fmt: skip
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, start_new_session=True
    )
    folder = work_folder(run, output)
    deadline = time.monotonic() + 300
    while lines_in(folder, "shards/*/rows.jsonl") < 2:
        assert process.poll() is None, process.stderr.read().decode()  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in shown and b"start the same command again to go on" in shown
    deadline = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:  # multiprocessing's own tracker ends a moment later
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    kept = lines_in(folder, "shards/*/rows.jsonl")
    assert infer(run, input=source, output=output, policy="random")["written"] == 40 - kept
