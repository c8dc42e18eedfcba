"""How far a stage is: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

logger = logging.getLogger("switchgen")

LINE_SECONDS = 60.0
"""How often a log gets a line."""


@contextmanager
def progress(label: str, *, total: int, done: int, unit: str) -> Iterator[Callable[[int], None]]:
    """One bar for all workers; yields what advances it by one, given the tokens that were written for it."""
    with tqdm(total=total, initial=done, unit=unit, desc=label, disable=None) as bar:
        finished, tokens = done, 0
        started: float | None = None
        told = time.monotonic()
        if bar.disable:
            logger.info("%s: %d of %d %ss are there", label, done, total, unit)

        def advance(count: int) -> None:
            nonlocal finished, tokens, started, told
            now = time.monotonic()
            finished += 1
            speed = ""
            if started is None:
                started = now
            else:
                tokens += count
                speed = f"{tokens / max(now - started, 1e-9):.0f} tokens/s"
                bar.set_postfix_str(speed, refresh=False)
            bar.update()
            if bar.disable and now - told >= LINE_SECONDS:
                told = now
                logger.info("%s: %d of %d %ss, %s", label, finished, total, unit, speed)

        yield advance
