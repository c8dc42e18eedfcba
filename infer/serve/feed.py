"""From tokens to pieces of text that can be sent while a response is still being written."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from switchgen.records import segment_record
from switchgen.rows import Row

_INTERVAL = 0.1
"""Seconds: text is held back at most that long (and while it might turn out to be a stop string)."""


@dataclass(frozen=True)
class Piece:
    """Something new of a response."""

    text: str
    segments: list[dict[str, Any]] = field(default_factory=list)
    """Segments that have ended since the last piece."""
    finished: bool = False


class Feed:
    """Listens to a row and sends its text in pieces; joined they are the response.

    Args:
        stops: strings that end the response, of which nothing may be sent.
        send: takes a piece; called on the thread that writes.
    """

    def __init__(self, row: Row, stops: list[str], send: Callable[[Piece], None]) -> None:
        self.row = row
        self._stops = stops
        self._send = send
        self._raw = b""
        self._num_signed = 0
        self._signed_text = ""
        self._sent_text = 0
        self._sent_segments = 0
        self._sent_at = 0.0

    def hear(self, index: int, raw: bytes) -> None:
        """A token of the current segment: its index there, and its bytes."""
        # A batch that did not fit in memory begins its segments again, with the same tokens.
        self._raw = raw if index == 0 else self._raw + raw
        if time.monotonic() - self._sent_at >= _INTERVAL:
            self._flush()

    def _flush(self) -> None:
        trace = self.row.trace
        if len(trace.segments) != self._num_signed:
            self._num_signed, self._signed_text = len(trace.segments), trace.text
        text = self._signed_text + codecs.utf_8_decode(self._raw, "replace", False)[0]
        self._post(text[: self._safe_length(text)], finished=False)

    def _safe_length(self, text: str) -> int:
        """Characters that are part of the response whatever follows."""
        safe = len(text)
        for stop in self._stops:
            # What was signed stands, but a stop string may begin in it.
            found = text.find(stop, max(0, len(self._signed_text) - len(stop) + 1))
            if found >= 0:
                safe = min(safe, found)
            for count in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:count]):
                    safe = min(safe, len(text) - count)
                    break
        return safe

    def _post(self, text: str, *, finished: bool) -> None:
        new = text[self._sent_text :]
        signed = self.row.trace.segments[self._sent_segments :]
        if not new and not finished:
            return
        self._sent_at = time.monotonic()
        self._sent_text += len(new)
        self._sent_segments += len(signed)
        names = self.row.pool.names
        self._send(Piece(new, [segment_record(segment, names) for segment in signed], finished))

    def finish(self) -> None:
        """The row has ended: send the rest."""
        self._post(self.row.trace.text, finished=True)
