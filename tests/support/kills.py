"""Kills a worker of this process once its shards hold some lines."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def lines_in(folder: Path, pattern: str) -> int:
    """Finished lines of the files there."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(pattern))


@contextmanager
def worker_killed(folder: Path, pattern: str, *, after: int) -> Iterator[None]:
    """Kill -9 the first worker process when `after` lines are there; fails if nothing was killed."""
    killed = threading.Event()
    over = threading.Event()

    def watch() -> None:
        deadline = time.monotonic() + 300
        while not over.is_set() and time.monotonic() < deadline:
            children = multiprocessing.active_children()
            if children and lines_in(folder, pattern) >= after:
                os.kill(children[0].pid or 0, signal.SIGKILL)
                killed.set()
                return
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert killed.is_set(), "the work was done before a worker could be killed"
