"""Servers of one model: requests go to the one that has the fewest, and past the ones that fail."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from switchgen.errors import ServerError

logger = logging.getLogger("switchgen")

_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_PAUSE = 30.0
"""Seconds that a server which keeps failing is left out at most, where it fails at once."""
_LONGEST_HANG = 8
"""How many times as long as its failed request took one that hangs is left out at most."""
_LOOK = 0.1
"""Seconds between looks at whether a server that is being tried is back."""


@dataclass(eq=False)
class _Replica:
    """One server."""

    url: str
    in_flight: int = 0
    failures: int = 0
    """In a row."""
    failed: int = 0
    """Failures in all."""
    out_until: float = 0.0
    """On the monotonic clock: it is asked nothing before."""
    reported: bool = False
    """Whether anybody was told that it fails."""

    def takes(self, now: float) -> bool:
        """Whether a request may go there: one that failed is tried with a single request before others follow."""
        return self.out_until <= now and (self.failures == 0 or self.in_flight == 0)


class Replicas:
    """POSTs JSON to one of several servers that hold the same model.

    A server that does not answer in time, breaks off, or says that it is overloaded or broken (408, 425, 429, 5xx) is
    left out for a while, twice as long each time; the request goes to another one, or waits where there is none. Then
    a single request tries it.

    Args:
        name: the candidate's, for messages.
        urls: base URLs, such as http://127.0.0.1:8000/v1.
        timeout: seconds for one request.
        retries: how often a request is sent again before it is given up, and how often every server may fail meanwhile.
        pause: seconds that a server is left out after its first failure. While another one answers, at least as long
            as the failed request took.
    """

    def __init__(
        self, name: str, urls: Sequence[str], *, timeout: float, retries: int, api_key: str | None, pause: float = 0.5
    ) -> None:
        import httpx  # noqa: PLC0415

        self.name = name
        self.retries = retries
        self.pause = pause
        self._replicas = [_Replica(url.rstrip("/")) for url in urls]
        self._lock = threading.Lock()
        self._problem = ""
        """What went wrong last."""
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        # The number of requests in flight is limited by who sends them.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.Client(timeout=timeout, headers=headers, limits=limits)
        self._broken: type[Exception] = httpx.HTTPError

    def post(self, path: str, body: Mapping[str, Any], given_up: threading.Event) -> dict[str, Any]:
        """The answer's JSON.

        Args:
            given_up: set once nobody waits for the answer any more.

        Raises:
            Refused: a server says that the request is wrong (4xx).
            ServerError: no server answered, names the last one and what went wrong.
        """
        before = [replica.failed for replica in self._replicas]
        for _ in range(self.retries + 1):
            replica = self._take(before, given_up)
            started = time.monotonic()
            try:
                response = self._client.post(f"{replica.url}/{path}", json=body)
            except self._broken as error:
                problem = f"{replica.url}: {type(error).__name__} {_short(str(error))}"
                self._give_back(replica, problem, time.monotonic() - started)
                continue
            problem = f"{replica.url}: {response.status_code} {_short(response.text)}"
            if response.status_code in _RETRIED:
                self._give_back(replica, problem, time.monotonic() - started)
                continue
            self._give_back(replica)
            if response.status_code >= 400:
                raise Refused(f"{self.name}: {problem}")
            try:
                answer: dict[str, Any] = response.json()
            except ValueError:
                raise ServerError(
                    f"{self.name}: {replica.url}: the answer is no JSON: {_short(response.text)}"
                ) from None
            return answer
        raise self._nobody()

    def _take(self, before: Sequence[int], given_up: threading.Event) -> _Replica:
        """The least busy server that is not left out; waits for the first to come back where all are.

        Args:
            before: each server's failures when the request began.

        Raises:
            ServerError: nobody waits for the answer any more, or all servers have failed too often.
        """
        wait = 0.0
        while not given_up.wait(wait):
            with self._lock:
                now = time.monotonic()
                there = [replica for replica in self._replicas if replica.takes(now)]
                if there:
                    replica = min(there, key=lambda one: one.in_flight)
                    replica.in_flight += 1
                    return replica
                failed = [replica.failed - count for replica, count in zip(self._replicas, before, strict=True)]
                if min(failed) > self.retries:
                    raise self._nobody()
                waits = [replica.out_until - now for replica in self._replicas]
                wait = min(max(seconds, 0.01) if seconds > 0 else _LOOK for seconds in waits)
        raise ServerError(f"{self.name}: the command was stopped")

    def _give_back(self, replica: _Replica, problem: str | None = None, seconds: float = 0.0) -> None:
        """A request has come back.

        Args:
            problem: what went wrong, if anything did.
            seconds: how long that took.
        """
        with self._lock:
            replica.in_flight -= 1
            if problem is None:
                replica.failures = 0
                return
            self._problem = problem
            now = time.monotonic()
            # Many requests fail at once when a server dies: that is one failure.
            if replica.out_until > now:
                return
            replica.failures += 1
            replica.failed += 1
            pause, longest = self.pause, _LONGEST_PAUSE
            if any(one.failures == 0 for one in self._replicas):
                # To try it again may hold all rows up for as long; where no other answers they wait anyway.
                pause, longest = max(pause, seconds), max(longest, _LONGEST_HANG * seconds)
            pause = min(longest, pause * 2 ** (replica.failures - 1))
            replica.out_until = now + pause
            level = logging.INFO if replica.reported else logging.WARNING
            replica.reported = True
        logger.log(level, "%s: %s; it is left out for %.1f s", self.name, problem, pause)

    def _nobody(self) -> ServerError:
        return ServerError(
            f"{self.name}: no server answered in {self.retries + 1} tries; the last one: {self._problem}"
        )


class Refused(ServerError):
    """A server says that a request is wrong."""


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:200] + " …"
