"""Processes that share a stage's work, and what happens when one of them dies.

A worker owns the queries whose ids hash to it and the shards that carry its number. A worker that is killed is replaced
by another, which goes on after the last line of its shards. It ends when its parent does, however that ends; a new run
waits for such leftovers before it looks at what is done. What depends on all the work (an output file, a summary) is
made by the parent.

    <stage's folder>/.workers             held by every worker at work
    <stage's folder>/.worker-<worker>     held by the one process that does this worker's share
    <stage's folder>/shards/<worker>/…    a worker's finished lines, until they are gathered into the stage's own files
"""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, cast

from switchgen.errors import ConfigError, SwitchgenError, WorkerError
from switchgen.files import Shard, StorageError, hold, storage
from switchgen.ids import share_of
from switchgen.ranks import do_jobs, is_launched, world_size
from switchgen.records import read_records
from switchgen.rundir import Run

logger = logging.getLogger("switchgen")

_LEFTOVER_SECONDS = 20.0
"""How long to wait for processes that are lost and yet at work: a killed run's, those out of a cluster's reach."""
REPLACEMENTS = 3
"""How often a worker is replaced that has finished nothing since: what kills every one of them is no accident."""
_SHARDS = "shards"

T = TypeVar("T")

Report = Callable[[Any], None]
"""Tells the parent of one finished piece of work, after it is safe; what is told must pass between processes."""


@dataclass(frozen=True)
class Share(Generic[T]):
    """One worker's part of a stage's work."""

    run: Run
    worker: int
    """Its number; also in the names of its shards."""
    folder: Path
    """Where its shards go."""
    work: T
    """What there is to do, in the stage's own terms."""


@dataclass(frozen=True)
class Spent:
    """What a worker spent."""

    load_seconds: float = 0.0
    work_seconds: float = 0.0
    """Seconds after loading."""
    cpu_seconds: float = 0.0
    """The processor's seconds of work."""
    engines: dict[str, dict[str, float]] | None = None
    """What each engine did, by name (`EngineStats`)."""


class Stopwatch:
    """Times a worker's loading and its work apart."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._loaded, self._loaded_cpu = self._started, time.process_time()

    def loaded(self) -> None:
        """The models are there; the work begins."""
        self._loaded, self._loaded_cpu = time.perf_counter(), time.process_time()

    def spent(self, engines: dict[str, dict[str, float]] | None = None) -> Spent:
        """The work is done."""
        return Spent(
            self._loaded - self._started,
            time.perf_counter() - self._loaded,
            time.process_time() - self._loaded_cpu,
            engines,
        )


Work = Callable[[Share[T], Report], Spent]
"""Does a share; a function of a module, so that another process can find it."""


def log_spent(stage: str, count: int, spent: Sequence[Spent]) -> None:
    """One line on what a stage's workers did; the slowest one's seconds."""
    loading, writing = (max(getattr(part, key) for part in spent) for key in ("load_seconds", "work_seconds"))
    workers = f"{len(spent)} worker{'' if len(spent) == 1 else 's'}"
    logger.info("%s: %d responses by %s, %.1f s to load, %.1f s to write", stage, count, workers, loading, writing)


def num_workers_of(configured: int, asked: int | None) -> int:
    """Processes to start: as the command asks, else as the recipe says. Under a launcher they are there: its ranks.

    Raises:
        ConfigError: less than one; or the command asks for others than the launcher's.
    """
    if is_launched():
        if asked not in (None, world_size()):
            raise ConfigError(f"workers: got {asked}, started by a launcher in {world_size()} ranks, which are the "
                              "workers; allowed: no --workers")  # fmt: skip
        return world_size()
    number = configured if asked is None else asked
    if number < 1:
        raise ConfigError(f"workers: got {number}; allowed: 1 or more processes")
    return number


def split(items: Iterable[T], query_id: Callable[[T], str], num_workers: int) -> list[list[T]]:
    """Each worker's items, in their order: all of a query go to one worker, whatever else there is to do."""
    parts: list[list[T]] = [[] for _ in range(num_workers)]
    for item in items:
        parts[share_of(query_id(item), num_workers)].append(item)
    return parts


def shard_folder(folder: Path, target: Path, worker: int, num_workers: int) -> Path:
    """Where a worker's shards go: a folder of its own, or the stage's where it is the only one."""
    return target if num_workers == 1 else folder / _SHARDS / str(worker)


def gather_shards(folder: Path, target: Path) -> None:
    """Bring the workers' finished lines into the stage's files of the same names, each once, and remove the shards.

    A kill in between leaves a shard whose lines are there already; the next call removes it.
    """
    shards = folder / _SHARDS
    for path in sorted(shards.glob("*/*.jsonl")):
        with Shard(path):  # cuts off a torn last line
            pass
        with Shard(target / path.name) as stage:
            for record in read_records([path]):
                if str(record["id"]) not in stage.done:
                    stage.append(record)
        path.unlink()
    with storage(shards):
        shutil.rmtree(shards, ignore_errors=True)


class Losses:
    """How often the workers of a stage were lost since they last finished something."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._lost: Counter[int] = Counter()

    def finished(self, worker: int) -> None:
        """The worker gets on."""
        self._lost.pop(worker, None)

    def lost(self, worker: int, how: str) -> None:
        """The worker is gone without a word; another may take its share over.

        Raises:
            WorkerError: too many were lost before it.
        """
        self._lost[worker] += 1
        name = f"{self._stage}-{worker}"
        if self._lost[worker] > REPLACEMENTS:
            raise WorkerError(
                f"{name} was lost {self._lost[worker]} times without finishing anything ({how}); what is finished is "
                "kept: start the same command again to go on"
            )
        logger.warning("%s was lost (%s); another takes its place", name, how)


def do_shares(work: Work[T], shares: Sequence[Share[T]], *, name: str, folder: Path, report: Report) -> list[Spent]:
    """Do every share: a single one in this process, several in processes of their own; or on Ray, where the recipe
    says so (`engine.executor`); or one by each rank of a launch (`switchgen.ranks`). A share that is done again goes on
    after the lines that its shards hold: so does the process that replaces a killed one.

    Args:
        name: the stage, for the processes' names and for messages.
        folder: the stage's folder, held by the processes.
        report: called in this process, once for each finished piece of work.

    Returns:
        What each share spent; of a share whose worker was replaced, what the last one spent.

    Raises:
        SwitchgenError: a worker met a user's mistake (a full disk, a missing model).
        WorkerError: a worker failed, or was killed again and again; what is finished is kept.
    """
    if not shares:
        return []
    if is_launched():
        return _do_on_ranks(work, shares, name, folder, report)
    if shares[0].run.recipe.engine.executor == "ray":
        from switchgen.ray_workers import do_on_ray  # noqa: PLC0415

        return do_on_ray(work, shares, name=name, folder=folder, report=report)
    if len(shares) == 1:
        return [work(shares[0], report)]
    return _do_in_processes(work, shares, name, folder, report)


def _do_on_ranks(work: Work[T], shares: Sequence[Share[T]], name: str, folder: Path, report: Report) -> list[Spent]:
    if shares[0].run.recipe.engine.executor == "ray":
        raise ConfigError("engine.executor: ray starts processes of its own; allowed under a launcher: local")
    spent = []
    jobs = [partial(work_at, work, share, folder) for share in shares]
    for number, (kind, content, _) in enumerate(do_jobs(jobs, report)):
        if kind == "error":
            raise failure(content, f"{name}, rank {number}")
        if kind == "done":
            spent.append(content)
    return spent


def work_at(work: Work[T], share: Share[T], folder: Path, report: Report) -> Spent:
    """Do a share as the one process that does it."""
    with at_work(folder, share.worker):
        take_place(share)
        return work(share, report)


def _do_in_processes(work: Work[T], shares: Sequence[Share[T]], name: str, folder: Path, report: Report) -> list[Spent]:
    spawn = multiprocessing.get_context("spawn")
    workers: dict[Connection, tuple[Share[T], Any]] = {}

    def start(share: Share[T]) -> None:
        receiver, sender = spawn.Pipe(duplex=False)
        process = spawn.Process(
            target=_work_in_process, args=(work, share, folder, sender), name=f"{name}-{share.worker}"
        )
        process.start()
        sender.close()
        workers[receiver] = share, process

    losses = Losses(name)
    spent = []
    try:
        for share in shares:
            start(share)
        while workers:
            for ready in wait(list(workers)):
                receiver = cast(Connection, ready)
                share, process = workers[receiver]
                kind, content = _receive(receiver)
                if kind == "finished":
                    losses.finished(share.worker)
                    report(content)
                    continue
                if kind == "error":
                    raise failure(content, process.name)
                del workers[receiver]
                process.join()
                if kind == "spent":
                    spent.append(content)
                elif process.exitcode >= 0:
                    raise failure(f"it ended by itself, with exit code {process.exitcode}", process.name)
                else:
                    losses.lost(share.worker, f"process {process.pid} was killed by signal {-process.exitcode}")
                    start(share)
    finally:
        for _, process in workers.values():
            process.terminate()
            process.join()
    return spent


def _receive(receiver: Connection) -> tuple[str, Any]:
    """A worker's message: what it has finished, spent, or met with; `lost` where it is gone without one."""
    try:
        message: tuple[str, Any] = receiver.recv()
        return message
    except (EOFError, OSError):
        return "lost", None


def failure(content: SwitchgenError | str, worker: str) -> Exception:
    """What a worker met with, as the stage's error: a user's mistake as it is, anything else in the worker's words."""
    if isinstance(content, SwitchgenError):
        return content
    return WorkerError(f"{worker} failed; what is finished is kept\n{content}")


def _work_in_process(work: Work[T], share: Share[T], folder: Path, sender: Connection) -> None:
    """A worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    _end_with_parent()
    try:
        sender.send(("spent", work_at(work, share, folder, lambda content: sender.send(("finished", content)))))
    except SwitchgenError as error:
        sender.send(("error", error))
    except Exception:
        # Whatever it was: the parent fails with it.
        sender.send(("error", traceback.format_exc()))


def take_place(share: Share[Any]) -> None:
    """One torch thread for each worker unless the recipe says otherwise; workers take turns over the GPUs."""
    import torch  # noqa: PLC0415

    torch.set_num_threads(share.run.recipe.engine.threads or 1)
    if torch.cuda.is_available():
        # What a recipe's `auto` becomes; a device that it names is kept.
        torch.cuda.set_device(share.worker % torch.cuda.device_count())


def _end_with_parent() -> None:
    """A worker whose parent was killed must not write on."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def at_work(folder: Path, worker: int) -> Iterator[None]:
    """Hold a stage's folder as one of its workers, and the worker's share as the only process that does it.

    Raises:
        StorageError: another process, lost to its command, still does the share.
    """
    with open(folder / ".workers", "w") as stage, open(folder / f".worker-{worker}", "w") as share:
        hold(stage, fcntl.LOCK_SH, folder)
        _hold_alone(share, folder)
        yield


def wait_for_leftovers(folder: Path) -> None:
    """Wait until no worker of an earlier, killed run writes in the folder.

    Raises:
        StorageError: one still does.
    """
    with storage(folder), open(folder / ".workers", "w") as stream:
        _hold_alone(stream, folder)


def _hold_alone(stream: IO[str], folder: Path) -> None:
    """Wait for an open file of a folder until nobody else holds it."""
    deadline = time.monotonic() + _LEFTOVER_SECONDS
    while True:
        try:
            return hold(stream, fcntl.LOCK_EX | fcntl.LOCK_NB, folder)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{folder}: a worker that was given up is still writing here; end it, or use another --run-dir"
                ) from None
            time.sleep(0.1)
