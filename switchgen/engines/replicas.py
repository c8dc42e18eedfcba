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
"""Seconds that a server which keeps failing is left out at most."""


@dataclass(eq=False)
class _Replica:
    """One server."""

    url: str
    in_flight: int = 0
    failures: int = 0
    """In a row."""
    out_until: float = 0.0
    """On the monotonic clock: it is asked nothing before."""
    reported: bool = False
    """Whether anybody was told that it fails."""


class Replicas:
    """POSTs JSON to one of several servers that hold the same model.

    A server that does not answer in time, breaks off, or says that it is overloaded or broken (408, 425, 429, 5xx) is
    left out for a while, twice as long each time; the request goes to another one, or waits where there is none.

    Args:
        name: the candidate's, for messages.
        urls: base URLs, such as http://127.0.0.1:8000/v1.
        timeout: seconds for one request.
        retries: how often a request is sent again before it is given up.
        pause: seconds that a server is left out after its first failure.
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
        self._stopped = threading.Event()
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        # The number of requests in flight is limited by who sends them.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.Client(timeout=timeout, headers=headers, limits=limits)
        self._broken: type[Exception] = httpx.TransportError

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer's JSON.

        Raises:
            Refused: a server says that the request is wrong (4xx).
            ServerError: no server answered, names the last one and what went wrong.
        """
        problem = ""
        for _ in range(self.retries + 1):
            replica = self._take()
            try:
                response = self._client.post(f"{replica.url}/{path}", json=body)
                problem = f"{replica.url}: {response.status_code} {_short(response.text)}"
                failed = response.status_code in _RETRIED
            except self._broken as error:
                problem, failed = f"{replica.url}: {type(error).__name__} {_short(str(error))}", True
            self._give_back(replica, problem if failed else None)
            if failed:
                continue
            if response.status_code >= 400:
                raise Refused(f"{self.name}: {problem}")
            try:
                answer: dict[str, Any] = response.json()
            except ValueError:
                raise ServerError(
                    f"{self.name}: {replica.url}: the answer is no JSON: {_short(response.text)}"
                ) from None
            return answer
        raise ServerError(f"{self.name}: no server answered in {self.retries + 1} tries; the last one: {problem}")

    def _take(self) -> _Replica:
        """The least busy server that is not left out; waits for the first to come back where all are.

        Raises:
            ServerError: nobody waits for the answer any more.
        """
        wait = 0.0
        while not self._stopped.wait(wait):
            with self._lock:
                now = time.monotonic()
                there = [replica for replica in self._replicas if replica.out_until <= now]
                if there:
                    replica = min(there, key=lambda one: one.in_flight)
                    replica.in_flight += 1
                    return replica
                wait = max(0.01, min(replica.out_until for replica in self._replicas) - now)
        raise ServerError(f"{self.name}: the command was stopped")

    def stop(self) -> None:
        """Send nothing any more: a command that was stopped ends when what is on its way has been answered."""
        self._stopped.set()

    def _give_back(self, replica: _Replica, problem: str | None) -> None:
        with self._lock:
            replica.in_flight -= 1
            if problem is None:
                replica.failures = 0
                return
            now = time.monotonic()
            # Many requests fail at once when a server dies: that is one failure.
            if replica.out_until > now:
                return
            replica.failures += 1
            pause = min(_LONGEST_PAUSE, self.pause * 2 ** (replica.failures - 1))
            replica.out_until = now + pause
            level = logging.INFO if replica.reported else logging.WARNING
            replica.reported = True
        logger.log(level, "%s: %s; it is left out for %.1f s", self.name, problem, pause)


class Refused(ServerError):
    """A server says that a request is wrong."""


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:200] + " …"
