"""Strikes at a stage at work, once its shards hold some lines."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from switchgen.errors import ConfigError
from switchgen.files import Shard
from switchgen.workers import Report, Share, Spent


def lines_in(folder: Path, pattern: str) -> int:
    """Finished lines of the files there."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(pattern))


@contextmanager
def once_lines_are_there(folder: Path, pattern: str, count: int, strike: Callable[[], bool]) -> Iterator[None]:
    """Strike, from another thread, when the files hold `count` lines; fails if the work was done before.

    Args:
        strike: says whether it struck; it is called again until it has.
    """
    struck, over = threading.Event(), threading.Event()

    def watch() -> None:
        deadline = time.monotonic() + 500
        while not over.is_set() and time.monotonic() < deadline:
            if lines_in(folder, pattern) >= count and strike():
                struck.set()
                return
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert struck.is_set(), "the work was done before anything could be lost"


def worker_killed(folder: Path, pattern: str, *, after: int) -> AbstractContextManager[None]:
    """Kill -9 the first worker of this process when `after` lines are there; fails if nothing was killed."""

    def kill() -> bool:
        children = multiprocessing.active_children()
        if children:
            os.kill(children[0].pid or 0, signal.SIGKILL)
        return bool(children)

    return once_lines_are_there(folder, pattern, after, kill)


# Work for `do_shares`: functions of a module that other processes can import.


def one_piece_a_life(share: Share[list[str]], report: Report) -> Spent:
    """Finish one of the share's pieces and be killed, until none is left."""
    with Shard(share.folder / f"{share.worker}.jsonl") as shard:
        for piece in share.work:
            if piece not in shard.done:
                shard.append({"id": piece})
                report(piece)
                os.kill(os.getpid(), signal.SIGKILL)
    return Spent()


def killed_at_once(share: Share[list[str]], report: Report) -> Spent:
    """Be killed before anything is finished."""
    os.kill(os.getpid(), signal.SIGKILL)
    return Spent()


def ends_by_itself(share: Share[list[str]], report: Report) -> Spent:
    """End without a word, and not by a signal."""
    os._exit(7)


def a_user_s_mistake(share: Share[list[str]], report: Report) -> Spent:
    """Meet with wrong input."""
    raise ConfigError("no such thing")
