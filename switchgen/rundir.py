"""Run folders: the resolved recipe, where things came from, durable shards, and going on after a kill.

RUN/
  recipe.yaml         the recipe of the latest command, resolved
  run.json            versions and machine
  <stage>/stage.json  which settings the stage's files were made with
  <stage>/*.jsonl     shards: one line per finished piece of work, appended at once
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from io import FileIO
from pathlib import Path
from typing import IO, Any

from switchgen.baselines import all_policies
from switchgen.config import DATA_DIR, LabConfig, Recipe, dump_recipe, find_recipe, load_recipe
from switchgen.errors import ConfigError, DataError, SwitchgenError

logger = logging.getLogger("switchgen")

SHIPPED_LAB = DATA_DIR / "lab"
_SYNC_SECONDS = 2.0
_LINE_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
_REFUSALS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG,
    errno.EDQUOT, errno.EFBIG,
}  # fmt: skip


class StorageError(SwitchgenError):
    """A file cannot be written or read: full disk, missing rights, another run at work."""


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn the system's refusals into messages that say where and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StorageError(
                f"{path}: the disk is full. What is finished is kept; make room and start the same command again"
            ) from None
        if error.errno in _REFUSALS:
            raise StorageError(
                f"{path}: cannot be written ({error.strerror}); allowed: a path in a folder that you may write to"
            ) from None
        raise


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that it is either there as a whole or not at all."""
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with open(part, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def json_line(record: Mapping[str, Any]) -> bytes:
    """A record as one line of a JSONL file, also for readers that take U+0085, U+2028 and U+2029 for line breaks."""
    text = json.dumps(record, ensure_ascii=False)
    return text.translate(_LINE_BREAKS).encode() + b"\n"


@contextmanager
def finished_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when the block has succeeded; an older one is replaced."""
    part, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    with storage(path):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        # A power cut must not leave the name without what the files hold.
        for file in part.rglob("*"):
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
        # Two renames: no kill falls into the time that deleting a large folder takes.
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
        shutil.rmtree(old, ignore_errors=True)


class Shard:
    """An append-only JSONL file of finished work.

    A line counts once its line break is there; a torn last line is cut off when the shard is opened again. Lines go
    to the system at once (a killed process loses nothing) and to the disk every two seconds (a power cut loses
    little).
    """

    def __init__(self, path: Path, *, key: str = "id") -> None:
        self.path = path
        self.done: set[str] = set()
        with storage(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream: FileIO = open(path, "ab", buffering=0)  # noqa: SIM115
            raw = path.read_bytes()
            whole = raw.rfind(b"\n") + 1
            if whole < len(raw):
                logger.warning("%s: the last line was cut off by a kill; its work is done again", path)
                self._stream.truncate(whole)
        for number, line in enumerate(raw[:whole].splitlines(), start=1):
            try:
                self.done.add(str(json.loads(line)[key]))
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
                self._stream.close()
                raise DataError(
                    f"{path}, line {number}: not a finished record with {key!r}: {line[:80]!r}; delete the line (its "
                    "work is done again) or the file"
                ) from None
        self._key = key
        self._synced = time.monotonic()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one finished record; after this call a kill does not lose it."""
        line = json_line(record)
        start = self._stream.seek(0, os.SEEK_END)
        with storage(self.path):
            try:
                written = 0
                while written < len(line):
                    written += self._stream.write(line[written:]) or 0
            except OSError:
                self._stream.truncate(start)
                raise
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._stream.fileno())
                self._synced = time.monotonic()
        self.done.add(str(record[self._key]))

    def close(self) -> None:
        """Bring everything to the disk."""
        with storage(self.path):
            if not self._stream.closed:
                os.fsync(self._stream.fileno())
                self._stream.close()

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hold(stream: IO[str], mode: int, folder: Path) -> None:
    """Lock an open file of a folder; the system lets go when the process ends, however it ends.

    Args:
        mode: of `fcntl.flock`.

    Raises:
        BlockingIOError: another process holds it, and the mode says not to wait.
        StorageError: the file system knows no locks.
    """
    try:
        fcntl.flock(stream, mode)
    except BlockingIOError:
        raise
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be locked ({error.strerror}); allowed: a --run-dir on a file system with locks (flock)"
        ) from None


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder for one run; the system releases it when the process ends, however it ends.

    Raises:
        StorageError: another process holds it.
    """
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stream = open(folder / ".lock", "w")  # noqa: SIM115
    try:
        try:
            hold(stream, fcntl.LOCK_EX | fcntl.LOCK_NB, folder)
        except BlockingIOError:
            raise StorageError(
                f"{folder}: another run is at work in this folder; wait for it, or use another --run-dir"
            ) from None
        yield
    finally:
        stream.close()


def claim_stage(
    folder: Path,
    stage: str,
    settings: Mapping[str, Any],
    *,
    may_grow: Collection[str] = (),
    noted_since: Collection[str] = (),
) -> None:
    """Note the settings that a stage's files depend on, or see that they are still the same.

    Args:
        may_grow: paths of numbers that may be raised: more work is asked for, what is there stays as it is.
        noted_since: settings that older folders do not note; they are taken to be what they are now.

    Raises:
        ConfigError: the folder holds work made with other settings.
    """
    path = folder / "stage.json"
    wanted = json.loads(json.dumps({"schema": 1, "stage": stage, "settings": settings}))
    if not path.is_file():
        write_json(path, wanted)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        raise ConfigError(f"{path}: not a stage file; delete {folder} to start this stage anew") from None
    differences = []
    grown = False
    for line, old, new in _differences(found, wanted["settings"]):
        place = line.partition(":")[0]
        if place in noted_since and place not in found:
            grown = True
        elif place not in may_grow:
            differences.append(line)
        elif isinstance(old, int) and isinstance(new, int) and new > old:
            grown = True
        else:
            differences.append(f"{line} (it may be raised)")
    if differences:
        raise ConfigError(
            f"{folder} was made by another recipe:\n"
            + "\n".join(f"  {line}" for line in differences[:12])
            + "\nUse another --run-dir, go back to those settings, or delete that folder to start this stage anew"
        )
    if grown:
        write_json(path, wanted)


def _differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(in words, old value, new value) of every key that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            path = f"{where}.{key}" if where else key
            if key not in old:
                yield f"{path}: was not set, is {new[key]!r}", None, new[key]
            elif key not in new:
                yield f"{path}: was {old[key]!r}, is not set", old[key], None
            else:
                yield from _differences(old[key], new[key], path)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, after, f"{where}.{index}")
    elif old != new:
        yield f"{where}: was {old!r}, is {new!r}", old, new


@dataclass(frozen=True)
class Run:
    """One command's run: the recipe with its paths resolved, and its folder."""

    name: str
    recipe: Recipe
    dir: Path
    source: Path
    """The recipe's file."""
    round: int = 0
    """Which round of labels, switcher and evaluation this is (`rollout.rounds`), from 1; 0 where there is but one."""

    def task_specs(self, split: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """The recipe's tasks as `switchgen.tasks.load_task` takes them, with another split or limit if given."""
        specs = []
        for task in self.recipe.tasks:
            spec = task.model_dump(exclude_none=True)
            if split is not None:
                spec["split"] = split
            if limit is not None:
                spec["limit"] = min(limit, spec.get("limit", limit))
            specs.append(spec)
        return specs

    @property
    def switcher_adapter(self) -> Path:
        """Where `train` leaves the switcher."""
        return self.dir / "switcher"


def open_run(recipe: str, overrides: list[str] | tuple[str, ...] = (), run_dir: str | Path | None = None) -> Run:
    """Load a recipe and resolve its paths against its own folder, the working folder and the run folder.

    `{lab}` becomes RUN/lab if that is there, else the shipped ladder where it is the same (world seed 0, size small).

    Raises:
        ConfigError: the recipe is wrong.
    """
    source = find_recipe(recipe)
    loaded = load_recipe(recipe, overrides)
    name = source.stem
    folder = Path(run_dir) if run_dir is not None else Path("runs") / name
    lab = lab_folder(loaded, folder)

    def place(text: str | None) -> str | None:
        if text is None:
            return None
        if "{lab}" in text:
            return text.replace("{lab}", str(lab))
        for base in (source.parent, Path.cwd()):
            candidate = base / Path(text).expanduser()
            if candidate.exists():
                return str(candidate.resolve())
        return text

    data = loaded.model_dump()
    for candidate in data["pool"]:
        candidate["model"], candidate["adapter"] = place(candidate["model"]), place(candidate["adapter"])
    if loaded.evaluate.baselines:
        data["evaluate"]["policies"] = all_policies(loaded.names, loaded.evaluate.policies)
    for policy in loaded.evaluate.leave_one_out:
        left = [policy, *(f"{policy}~{name}" for name in loaded.names)]
        listed = data["evaluate"]["policies"]
        data["evaluate"]["policies"] = [*listed, *(name for name in left if name not in listed)]
    switcher = data["switcher"]
    switcher["adapter"] = place(switcher["adapter"])
    if switcher["base"] not in (None, *loaded.names):
        switcher["base"] = place(switcher["base"])
    if data["router"]["judge"] not in (None, *loaded.names):
        data["router"]["judge"] = place(data["router"]["judge"])
    for key in ("embedding_model", "reward_model"):
        data["sweep"][key] = place(data["sweep"][key])
    for section in ("evaluate", "rollout", "baselines"):
        data[section]["reward_model"] = place(data[section]["reward_model"])
    for task in data["tasks"]:
        task["file"] = place(task["file"])
    return Run(name, Recipe.model_validate(data), folder, source)


def lab_folder(recipe: Recipe, run_dir: Path) -> Path:
    """The lab ladder's folder: RUN/lab once it is built, or the shipped one where it is the one the recipe asks for."""
    built = run_dir / "lab"
    settings = recipe.lab
    if (built / "aligned").is_dir() or settings is None:
        return built.resolve()
    return SHIPPED_LAB if shipped_lab_fits(settings) else built.resolve()


def check_lab(run: Run) -> None:
    """See that the lab ladder is there, where the pool is of it.

    Raises:
        ConfigError: it is not built yet.
    """
    folder = lab_folder(run.recipe, run.dir)
    models = [Path(candidate.model) for candidate in run.recipe.pool]
    if any(model.is_relative_to(folder) and not model.is_dir() for model in models):
        raise ConfigError(f"the small ladder is not in {folder}; `switchgen lab` with the same recipe, settings and "
                          "--run-dir builds it")  # fmt: skip


def shipped_lab_fits(settings: LabConfig) -> bool:
    """Whether the ladder that is shipped is the one that these settings ask for."""
    return settings.seed == 0 and settings.size == "small" and not settings.rebuild


def write_provenance(run: Run) -> None:
    """Leave the resolved recipe and the versions in the run folder."""
    write_atomic(run.dir / "recipe.yaml", dump_recipe(run.recipe))
    write_json(run.dir / "run.json", provenance(run))


def provenance(run: Run) -> dict[str, Any]:
    """What a run depends on beside its recipe."""
    packages = ("switchgen", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "schema": 1,
        "recipe": run.name,
        "versions": versions,
        "python": platform.python_version(),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cpus": os.cpu_count()},
    }
