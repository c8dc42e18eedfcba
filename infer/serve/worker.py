"""The one thread that writes: requests put rows in, the loops' batches take them as room becomes free.

Rows of all requests share the batches, whatever their policies (a row brings its own terms). Token routers have loops
of their own, one for each policy and way of drawing; loops that have rows take turns, round by round.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from infer.serve.protocol import ApiError
from switchgen.api import make_loop
from switchgen.assembly import Writer, check_writers, is_own_model, load_writers, make_run_policy
from switchgen.errors import ConfigError, ServerError
from switchgen.loop import Loop
from switchgen.policies.responses import is_response_policy
from switchgen.policies.routers import RouterPolicy
from switchgen.rows import Row
from switchgen.rundir import Run
from switchgen.token_loop import TokenLoop

logger = logging.getLogger("switchgen")

Result = TypeVar("Result")


@dataclass(eq=False)
class Ticket:
    """A row that somebody waits for."""

    row: Row
    policy: str
    finish: Callable[[], None]
    """Called on the writing thread when the row has ended (or was cancelled)."""
    fail: Callable[[Exception], None]
    """Called instead when it cannot be written."""


class Lane:
    """A loop and the rows that go through it.

    Args:
        left: called for every ticket that leaves, before its owner is told.
    """

    def __init__(self, loop: Loop | TokenLoop, left: Callable[[], None]) -> None:
        self._left = left
        self.waiting: deque[Ticket] = deque()
        self.flying: dict[Row, Ticket] = {}
        self._rounds = loop.rounds(self._source(), live=True)

    @property
    def busy(self) -> bool:
        """Whether anybody waits here."""
        return bool(self.waiting or self.flying)

    def _source(self) -> Iterator[Row | None]:
        while True:
            if not self.waiting:
                yield None
                continue
            ticket = self.waiting.popleft()
            self.flying[ticket.row] = ticket
            yield ticket.row

    def step(self) -> None:
        """One round; tells whose rows have ended."""
        # Who left before the row was begun need not be written for.
        for ticket in [ticket for ticket in self.waiting if ticket.row.cancelled]:
            self.waiting.remove(ticket)
            ticket.row.trace.finish = "cancelled"
            self._left()
            ticket.finish()
        for row in next(self._rounds):
            self._left()
            self.flying.pop(row).finish()

    def abandon(self, error: Exception) -> None:
        """Tell everybody here that it failed."""
        for ticket in [*self.waiting, *self.flying.values()]:
            self._left()
            ticket.fail(error)


class Worker:
    """Owns the models; everything that touches them happens on its thread.

    Args:
        max_waiting: rows that may wait for a place beside those in flight.
    """

    def __init__(self, run: Run, *, max_waiting: int) -> None:
        self.run = run
        self.max_waiting = max_waiting
        self._writers = load_writers(run, [run.recipe.infer.policy])
        self._lanes: dict[Hashable, Lane] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._num_rows = 0
        self._thread = threading.Thread(target=self._work, name="switchgen-writer", daemon=True)

    @property
    def allowed(self) -> int:
        """Rows that may be in flight and wait."""
        return self.max_waiting + self.run.recipe.engine.max_rows

    # -- called by requests ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def stop(self) -> None:
        """Let the round that is being written end, and no other begin."""
        self._inbox.put(None)
        self._thread.join()

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Run a function on the thread that owns the models, between two rounds."""
        future: Future[Result] = Future()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:  # whoever waits for the result gets it
                    future.set_exception(error)

        self._inbox.put(work)
        return future

    # -- on the thread that writes --------------------------------------------------------------------------------

    def writer(self, policy: str) -> Writer:
        """A policy with its pool, loaded when it is first asked for.

        Raises:
            SwitchgenError: there is no such policy, or it cannot work here.
        """
        if policy not in self._writers:
            check_writers(self.run, [policy])
            if is_response_policy(policy):
                raise ConfigError(f"policy {policy!r} writes several responses to choose from; it is not served")
            pools = [writer.pool for name, writer in self._writers.items() if not is_own_model(name)]
            if is_own_model(policy) or not pools:
                self._writers.update(load_writers(self.run, [policy]))
            else:
                self._writers[policy] = Writer(policy, pools[0], make_run_policy(self.run, policy, pools[0]))
        return self._writers[policy]

    def enter(self, tickets: list[Ticket]) -> None:
        """Put a request's rows in the queue, all or none.

        Raises:
            ApiError: 429, too many rows wait already.
        """
        if self._num_rows + len(tickets) > self.allowed:
            raise ApiError(
                429, f"{self._num_rows} answers are being written or wait, {self.allowed} may; try again later",
                code="queue_full",
            )  # fmt: skip
        for ticket in tickets:
            self._num_rows += 1
            try:
                self._lane(ticket).waiting.append(ticket)
            except Exception as error:  # whoever waits for the row is told; the thread goes on
                self._leave()
                ticket.fail(error)

    def _lane(self, ticket: Ticket) -> Lane:
        writer, terms = self.writer(ticket.policy), ticket.row.terms
        assert terms is not None
        routed = isinstance(writer.policy, RouterPolicy)
        key: Hashable = (writer.name, terms.decoding.model_dump_json()) if routed else id(writer.pool)
        if key not in self._lanes:
            rows = self.run.recipe.engine.max_rows
            loop = make_loop(writer.pool, writer.policy, terms.decoding, max_rows=rows)
            self._lanes[key] = Lane(loop, self._leave)
        return self._lanes[key]

    def _leave(self) -> None:
        self._num_rows -= 1

    def _work(self) -> None:
        while self._take_jobs():
            for key, lane in list(self._lanes.items()):
                self._step(key, lane)
        for lane in self._lanes.values():
            lane.abandon(ApiError(503, "the server is stopping", code="stopping"))

    def _take_jobs(self) -> bool:
        """Do what requests have put in; waits for the first one where nothing is being written. False: stop."""
        going = True
        wait = not self._lanes
        while wait or not self._inbox.empty():
            job = self._inbox.get()
            going = going and job is not None
            if job is not None:
                job()
            wait = False
        return going

    def _step(self, key: Hashable, lane: Lane) -> None:
        try:
            lane.step()
        except Exception as error:
            # One request must not take the server down with it; those whose rows were in the same batch are told.
            logger.exception("serve: a round failed; its %d answers are given up", len(lane.flying))
            del self._lanes[key]
            # A candidate's own server, if not a fault of this one.
            status = 502 if isinstance(error, ServerError) else 500
            lane.abandon(ApiError(status, f"writing failed: {type(error).__name__}: {error}", code="writing_failed"))
            self._forget()
            return
        if not lane.busy:
            del self._lanes[key]

    def _forget(self) -> None:
        """Drop all caches: a round that failed may have left them half-written. Other rows read theirs again."""
        for writer in self._writers.values():
            engines = [candidate.engine for candidate in writer.pool]
            if writer.policy.engine is not None:
                engines.append(writer.policy.engine)
            for engine in engines:
                engine.clear()
