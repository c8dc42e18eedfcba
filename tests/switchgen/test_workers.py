"""Processes that share work: a killed one is replaced, one that fails ends the work, and no share is done by two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kills import a_user_s_mistake, ends_by_itself, killed_at_once, lines_in, one_piece_a_life

from switchgen.errors import ConfigError, WorkerError
from switchgen.files import StorageError
from switchgen.workers import Share, at_work, do_shares


@pytest.fixture
def do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Has work done by two processes, each of which may be replaced once; returns what was reported."""
    monkeypatch.setattr("switchgen.workers.REPLACEMENTS", 1)
    run: Any = SimpleNamespace(recipe=SimpleNamespace(engine=SimpleNamespace(executor="local", threads=1)))

    def done(work: Any) -> list[str]:
        shares = [Share(run, 0, tmp_path, ["a", "b"]), Share(run, 1, tmp_path, ["c"])]
        reported: list[str] = []
        do_shares(work, shares, name="test", folder=tmp_path, report=reported.append)
        return reported

    return done


def test_a_killed_worker_is_replaced_as_long_as_something_gets_finished(
    do: Callable[..., list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One is killed twice, more often than it may be without getting on; nothing is lost, nothing done twice."""
    assert sorted(do(one_piece_a_life)) == ["a", "b", "c"]
    assert lines_in(tmp_path, "*.jsonl") == 3
    assert caplog.text.count("test-0 was lost (process") == 2 and caplog.text.count("killed by signal 9") == 3


def test_workers_that_are_always_killed_end_the_work(do: Callable[..., list[str]]) -> None:
    with pytest.raises(WorkerError, match=r"test-\d was lost 2 times without finishing anything .*; what is finished"):
        do(killed_at_once)


@pytest.mark.parametrize(
    ("work", "error", "said"),
    [
        (ends_by_itself, WorkerError, r"test-\d failed; .*\n.*exit code 7"),
        (a_user_s_mistake, ConfigError, "^no such thing$"),
    ],
)
def test_what_a_worker_does_itself_is_not_tried_again(
    do: Callable[..., list[str]], caplog: pytest.LogCaptureFixture, work: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        do(work)
    assert "was lost" not in caplog.text


def test_a_share_has_one_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is out of reach and yet at work (a node behind a broken link) keeps its replacement waiting."""
    monkeypatch.setattr("switchgen.workers._LEFTOVER_SECONDS", 0.2)
    with at_work(tmp_path, 0):
        with at_work(tmp_path, 1):
            pass
        with pytest.raises(StorageError, match="still writing here"), at_work(tmp_path, 0):
            pass
    with at_work(tmp_path, 0):
        pass
