"""Workers on Ray: records as from one process; a killed actor and a removed node are replaced, nothing twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from digits import save_digits
from kills import lines_in, once_lines_are_there
from outcomes import final_state, repeated

from rollout.stage import main as rollout
from switchgen.__main__ import main as switchgen
from switchgen.config import Recipe
from switchgen.errors import ConfigError, WorkerError
from switchgen.rundir import Run, open_run
from switchgen.workers import Share, do_shares

# A busy machine takes longer than half a minute to start Ray's processes; read when ray is imported.
os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

LABELS = "labels-*.jsonl"


@pytest.fixture(autouse=True)
def _no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tokens between the processes of one machine."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ladder, a task, a recipe, and `alone/` with the labels and answers of one process."""
    folder = tmp_path_factory.mktemp("ray")
    recipe = {
        **save_digits(folder, train=40, test=2, queries=40),
        "rollout": {"queries": 24, "states": 2, "completions": 4},
    }
    (folder / "ray.yaml").write_text(yaml.safe_dump(recipe))
    rollout(open_run(str(folder / "ray.yaml"), [], folder / "alone"))
    return folder


def on_ray(home: Path, name: str) -> Run:
    return open_run(str(home / "ray.yaml"), ["engine.executor=ray"], home / name)


def actors() -> list[int]:
    """Processes of replicas at work."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::Replica.do"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def kill_an_actor() -> bool:
    found = actors()
    if found:
        os.kill(found[0], signal.SIGKILL)
    return bool(found)


def assert_same(home: Path, run: Run, shards: int) -> None:
    assert repeated(run.dir) == 0
    assert final_state(run.dir, ["rollout"]) == final_state(home / "alone", ["rollout"])
    assert len(list((run.dir / "rollout").glob("labels-*.jsonl"))) == shards


def test_a_killed_actor_is_replaced(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = on_ray(home, "killed")
    with once_lines_are_there(run.dir / "rollout", LABELS, 6, kill_an_actor):
        rollout(run, workers=2)
    assert "another takes its place" in caplog.text
    assert_same(home, run, shards=2)
    assert not actors(), "left running"


def test_a_removed_node_is_replaced(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A cluster of two nodes with a place each; one goes away in mid-run, and its share moves to the other."""
    from ray.cluster_utils import Cluster

    store = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**store, "include_dashboard": False})
    try:
        node = cluster.add_node(**store)
        ray.init(address=cluster.address, configure_logging=False, log_to_driver=False)
        run = on_ray(home, "removed")

        def remove() -> bool:
            cluster.remove_node(node, allow_graceful=False)
            return True

        with once_lines_are_there(run.dir / "rollout", LABELS, 6, remove):
            rollout(run, workers=2)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert "another takes its place" in caplog.text
    assert_same(home, run, shards=2)


def test_an_actor_out_of_reach_is_ended_before_another_takes_its_place(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray gives an actor up that is at work, as it does when the link to its node breaks."""
    run, given_up = on_ray(home, "unreachable"), []
    waited, got = ray.wait, ray.get

    def wait(results: list[Any], **options: Any) -> Any:
        if not given_up and lines_in(run.dir / "rollout", LABELS) >= 3:
            given_up.append(results[0])
            return results[:1], results[1:]
        return waited(results, **options)

    def get(result: Any, **options: Any) -> Any:
        if given_up == [result]:
            raise ray.exceptions.ActorUnavailableError("the link is broken", None)
        return got(result, **options)

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)
    rollout(run, workers=2)
    assert given_up and "another takes its place" in caplog.text
    assert_same(home, run, shards=2)


def test_infer_by_command(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a relative path, beside somebody's cluster; the output is one process's."""
    from ray.cluster_utils import Cluster

    monkeypatch.chdir(home)
    words = ["infer", "ray.yaml", "--input", "queries.jsonl", "--policy", "random", "--run-dir"]
    assert switchgen([*words, "a", "--output", "a.jsonl"]) == 0
    store = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=store)
    try:
        assert switchgen([*words, "b", "--output", "b.jsonl", "--executor", "ray", "--workers", "2"]) == 0
    finally:
        cluster.shutdown()
    assert (home / "a.jsonl").read_bytes() == (home / "b.jsonl").read_bytes()


def test_mistakes_and_endless_losses_end_the_stage(home: Path) -> None:
    # Defined here, they travel to the actors by value: those cannot import this file.
    def a_user_s_mistake(share: Share[Any], report: Any) -> Any:
        raise ConfigError("no such thing")

    def an_end(share: Share[Any], report: Any) -> Any:
        os._exit(9)

    run = on_ray(home, "failing")
    assert isinstance(run.recipe, Recipe)
    run.dir.mkdir()
    shares = [Share(run, worker, run.dir, None) for worker in range(2)]
    with pytest.raises(ConfigError, match="no such thing"):
        do_shares(a_user_s_mistake, shares, name="test", folder=run.dir, report=print)
    with pytest.raises(WorkerError, match="test-0 was lost 4 times without finishing anything"):
        do_shares(an_end, shares[:1], name="test", folder=run.dir, report=print)
