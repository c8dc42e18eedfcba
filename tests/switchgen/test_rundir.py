"""Run folders: kills, torn lines, full disks, other recipes' work, and what is never lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from switchgen.config import load_recipe
from switchgen.errors import ConfigError, DataError
from switchgen.files import Shard, StorageError, finished_folder, json_line, lock, write_atomic, write_json
from switchgen.rundir import claim_stage, lab_folder, open_run, write_provenance
from switchgen.workers import at_work

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *arguments: str, **options: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), *arguments]


# -- shards ------------------------------------------------------------------------------------------------------------


def test_a_shard_keeps_what_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "shard.jsonl"
    with Shard(path) as shard:
        shard.append({"id": "a", "text": "東京\u2028\x85\n"})
        shard.append({"id": 7, "text": ""})
        assert shard.done == {"a", "7"}
    with Shard(path) as shard:
        assert shard.done == {"a", "7"}
        shard.append({"id": "b"})
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["a", 7, "b"]
    assert json.loads(lines[0])["text"] == "東京\u2028\x85\n"


def test_a_record_is_one_line_for_every_reader() -> None:
    line = json_line({"a": "x\u2028y\u2029z\x85\r\n\x0b\x0c"})
    assert line.count(b"\n") == 1 and len(line.decode().splitlines()) == 1
    assert json.loads(line) == {"a": "x\u2028y\u2029z\x85\r\n\x0b\x0c"}


@pytest.mark.parametrize("torn", [b'{"id": "b"}', b'{"id": ', b"\xe6\x9d", b"{"])
def test_a_torn_last_line_is_done_again(tmp_path: Path, torn: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "shard.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + torn)
    with Shard(path) as shard:
        assert shard.done == {"a"}
        shard.append({"id": "b"})
    assert "the last line was cut off by a kill" in caplog.text
    assert path.read_bytes() == b'{"id": "a"}\n{"id": "b"}\n'


@pytest.mark.parametrize("line", [b"not json", b'{"key": 1}', b"[1]", b"7", b"\xff", b""])
def test_a_damaged_line_is_named_and_nothing_is_touched(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "shard.jsonl"
    content = b'{"id": "a"}\n' + line + b'\n{"id": "c"}\n'
    path.write_bytes(content)
    with pytest.raises(DataError, match="shard.jsonl, line 2: not a finished record with 'id'"):
        Shard(path)
    assert path.read_bytes() == content


def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    """kill -9 at no particular moment, again and again: every line that was appended is whole, none is there twice."""
    path = tmp_path / "shard.jsonl"
    code = """
        import sys
        from switchgen.files import Shard
        shard = Shard(__import__("pathlib").Path(sys.argv[1]))
        for index in range(100_000):
            if str(index) not in shard.done:
                shard.append({"id": str(index), "text": "x" * 5000})
                print(index, flush=True)
    """
    promised: set[str] = set()
    for _ in range(3):
        process = subprocess.Popen(python(code, str(path)), stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stdout is not None
        for _ in range(40):
            promised.add(process.stdout.readline().strip())
        process.send_signal(signal.SIGKILL)
        promised |= set(process.stdout.read().split())
        process.wait()
    with Shard(path) as shard:
        assert promised <= shard.done
    ids = [json.loads(line)["id"] for line in path.read_bytes().splitlines()]
    assert len(ids) == len(set(ids)) >= 120


# -- full disks and folders that cannot be written ---------------------------------------------------------------------


def on_small_disk(folder: Path, code: str, *, options: str = "") -> str:
    """Run code with `folder` a file system of 64 KB, in a mount namespace of its own; what it printed."""
    folder.mkdir()
    script = folder.parent / "script.py"
    script.write_text("import sys\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n" + textwrap.dedent(code))
    mount = 'mount -t tmpfs -o size=64k none "$0" || exit 77\n' + options + '"$1" "$2" "$0"'
    words = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(folder), sys.executable, str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("NOT RUN: missing a file system that tests may mount")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.needs("unshare", "mount")
def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    shown = on_small_disk(
        tmp_path / "disk",
        """
        import json
        from switchgen.files import Shard, StorageError, finished_folder, write_json

        path = folder / "shard.jsonl"
        shard = Shard(path)
        write_json(folder / "old.json", {"kept": True})
        count = 0
        try:
            while True:
                shard.append({"id": str(count), "text": "x" * 3000})
                count += 1
        except StorageError as error:
            print("append:", error)
        lines = path.read_bytes()
        assert lines.endswith(b"\\n"), "a torn line was left"
        assert [json.loads(line)["id"] for line in lines.splitlines()] == [str(index) for index in range(count)]
        assert len(shard.done) == count >= 10
        shard.close()

        try:
            write_json(folder / "old.json", {"text": "y" * 60000})
        except StorageError as error:
            print("write:", error)
        assert json.loads((folder / "old.json").read_text()) == {"kept": True}
        assert sorted(item.name for item in folder.iterdir()) == ["old.json", "shard.jsonl"]

        try:
            with finished_folder(folder / "model") as part:
                (part / "weights").write_bytes(b"z" * 60000)
        except StorageError as error:
            print("folder:", error)
        assert not (folder / "model").exists()
        """,
    )
    for line, start in zip(shown.splitlines(), ("append:", "write:", "folder:"), strict=True):
        assert line.startswith(start) and "the disk is full. What is finished is kept; make room" in line


@pytest.mark.needs("unshare", "mount")
def test_a_read_only_disk_is_named(tmp_path: Path) -> None:
    shown = on_small_disk(
        tmp_path / "disk",
        """
        from switchgen.files import Shard, StorageError, lock, write_json
        from switchgen.rundir import claim_stage

        def enter(manager):
            with manager:
                pass

        for action in (
            lambda: Shard(folder / "shard.jsonl"),
            lambda: write_json(folder / "x.json", 1),
            lambda: claim_stage(folder / "stage", "rollout", {}),
            lambda: enter(lock(folder / "run")),
        ):
            try:
                action()
            except StorageError as error:
                print(error)
        """,
        options='mount -o remount,ro "$0" || exit 77\n',
    )
    assert shown.count("cannot be written (Read-only file system); allowed: a path in a folder that you may w") == 4


def test_folders_below_a_file(tmp_path: Path) -> None:
    """As root there is no forbidden folder; below a file there is none for anybody."""
    (tmp_path / "file").write_text("x")
    below = tmp_path / "file" / "run"
    with pytest.raises(StorageError, match="shard.jsonl: cannot be written"):
        Shard(below / "shard.jsonl")
    with pytest.raises(StorageError, match="x.json: cannot be written"):
        write_json(below / "x.json", {})
    with pytest.raises(StorageError, match="run: cannot be written"), lock(below):
        pass
    with pytest.raises(StorageError, match="model: cannot be written"), finished_folder(below / "model"):
        pass
    with pytest.raises(StorageError, match="cannot be written"):
        Shard(tmp_path)  # a folder is no shard


def test_a_limit_on_file_sizes_is_a_refusal_too(tmp_path: Path) -> None:
    code = """
        import resource, sys
        from pathlib import Path
        from switchgen.files import Shard, StorageError
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        shard = Shard(Path(sys.argv[1]))
        try:
            for index in range(20):
                shard.append({"id": str(index), "text": "x" * 900})
        except StorageError as error:
            print(len(shard.done), error)
    """
    path = tmp_path / "shard.jsonl"
    shown = subprocess.run(python(code, str(path)), capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert shown.startswith("10 ") and "cannot be written (File too large)" in shown
    with Shard(path) as shard:
        assert len(shard.done) == 10


# -- whole files and folders -------------------------------------------------------------------------------------------


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"é": [1]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1]}
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1]}
    assert [item.name for item in path.parent.iterdir()] == ["x.json"]


def test_a_finished_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with finished_folder(path) as part:
        (part / "weights").write_text("1")
        assert not path.exists()
    assert (path / "weights").read_text() == "1"
    with pytest.raises(RuntimeError, match="training failed"), finished_folder(path) as part:
        (part / "weights").write_text("2")
        raise RuntimeError("training failed")
    assert (path / "weights").read_text() == "1"  # what was there stays
    (tmp_path / ".model.old").mkdir()  # a kill between the two renames left it
    with finished_folder(path) as part:
        (part / "other").write_text("3")
    assert [item.name for item in path.iterdir()] == ["other"]
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


# -- one run at a time, one recipe per folder --------------------------------------------------------------------------


def test_a_finished_folder_is_on_the_disk_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()

    def sync(handle: int) -> None:
        assert not (tmp_path / "folder").exists()
        synced.add(Path(os.readlink(f"/proc/self/fd/{handle}")).name)

    monkeypatch.setattr("switchgen.files.os.fsync", sync)
    with finished_folder(tmp_path / "folder") as part:
        (part / "deep").mkdir()
        for name in ("weights", "deep/config"):
            (part / name).write_text("x")
    assert synced == {"weights", "config"} and (tmp_path / "folder" / "deep").is_dir()


def test_a_folder_is_held_by_one_run(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from switchgen.files import lock
        with lock(Path(sys.argv[1])):
            print("held", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen(python(code, str(tmp_path)), stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match="another run is at work in this folder"), lock(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with lock(tmp_path), pytest.raises(StorageError, match="another run"), lock(tmp_path):
        pass


def test_file_systems_without_locks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some clusters' shared folders know none; two runs could not tell of each other there."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("switchgen.files.fcntl.flock", refuse)
    for hold_folder in (lock, lambda folder: at_work(folder, 0)):
        with pytest.raises(StorageError, match="cannot be locked .Function not implemented.; allowed: a --run-dir"):
            hold_folder(tmp_path).__enter__()


def test_a_stage_is_claimed_once(tmp_path: Path) -> None:
    settings = {"seed": 1, "pool": {"names": ["a", "b"], "top_p": 0.9}, "pair": (1, 2)}
    claim_stage(tmp_path / "rollout", "rollout", settings)
    claim_stage(tmp_path / "rollout", "rollout", settings)
    other = {"seed": 1, "pool": {"names": ["a", "c"], "temperature": 1.0}, "pair": (1, 2), "new": None}
    with pytest.raises(ConfigError) as caught:
        claim_stage(tmp_path / "rollout", "rollout", other)
    message = str(caught.value)
    assert f"{tmp_path / 'rollout'} was made by another recipe" in message
    assert "new: was not set, is None" in message and "pool.temperature: was not set, is 1.0" in message
    assert "pool.names.1: was 'b', is 'c'" in message and "pool.top_p: was 0.9, is not set" in message
    assert "seed" not in message and "pair" not in message
    assert "Use another --run-dir, go back to those settings, or delete that folder" in message


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"x": 1}', b"\xff"])
def test_a_broken_claim_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "stage.json").write_bytes(content)
    with pytest.raises(ConfigError, match="stage.json: not a stage file; delete"):
        claim_stage(tmp_path, "rollout", {})


# -- paths and provenance ----------------------------------------------------------------------------------------------


def test_paths_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes, work = tmp_path / "recipes", tmp_path / "work"
    (recipes / "models" / "base").mkdir(parents=True)
    (work / "models" / "aligned").mkdir(parents=True)
    (recipes / "my.yaml").write_text(
        "pool: [{name: base, model: models/base}, {name: aligned, model: models/aligned},\n"
        '  {name: hub, model: org/name}, {name: lab, model: "{lab}/aligned"}]\n'
        "switcher: {base: base}\n"
        "lab: {seed: 3}\n"
    )
    monkeypatch.chdir(work)
    run = open_run(str(recipes / "my.yaml"))
    models = {candidate.name: candidate.model for candidate in run.recipe.pool}
    assert models == {
        "base": str(recipes / "models" / "base"), "aligned": str(work / "models" / "aligned"), "hub": "org/name",
        "lab": str(work / "runs" / "my" / "lab" / "aligned"),
    }  # fmt: skip
    assert run.recipe.switcher.base == "base"
    assert (run.name, run.dir) == ("my", Path("runs") / "my")
    assert open_run(str(recipes / "my.yaml"), run_dir=tmp_path / "there").dir == tmp_path / "there"
    write_provenance(run)
    assert load_recipe(str(work / "runs" / "my" / "recipe.yaml")) == run.recipe
    versions = json.loads((work / "runs" / "my" / "run.json").read_text())["versions"]
    assert versions["torch"] and "switchgen" in versions


def test_the_shipped_ladder_is_used_where_it_is_the_same(tmp_path: Path) -> None:
    shipped = lab_folder(load_recipe("lab"), tmp_path)
    assert shipped == ROOT / "data" / "lab"
    for override in ("lab.seed=1", "lab.size=tiny", "lab.rebuild=true"):
        assert lab_folder(load_recipe("lab", [override]), tmp_path) == tmp_path / "lab"
    (tmp_path / "lab" / "aligned").mkdir(parents=True)
    assert lab_folder(load_recipe("lab"), tmp_path) == tmp_path / "lab"


def test_writing_is_not_slowed_by_syncing(tmp_path: Path) -> None:
    """Lines reach the system at once and the disk every two seconds: thousands a second, not dozens."""
    with Shard(tmp_path / "shard.jsonl") as shard:
        started = time.process_time()
        for index in range(2000):
            shard.append({"id": str(index)})
        assert time.process_time() - started < 1.0
    assert os.path.getsize(tmp_path / "shard.jsonl") > 2000 * 10
