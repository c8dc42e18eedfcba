"""Taking a stop string off a response's end."""

from __future__ import annotations

import codecs
from dataclasses import replace

from switchgen.rows import Row
from switchgen.trace import CUE, Segment


def cut(row: Row, num_bytes: int) -> None:
    """Take the stop string and what follows it off the response's end; ids keep every token that has text left.

    Args:
        num_bytes: how much of the response's text, as UTF-8.
    """
    segments = row.trace.segments
    room = len(row.trace.text.encode()) - num_bytes
    kept: list[Segment] = []
    for segment in segments:
        raw = segment.text.encode()[:room]
        if room <= 0 and kept:
            break
        text = raw.decode("utf-8", errors="ignore")
        kept.append(replace(segment, text=text, ids=_ids_of(row, segment, len(raw))))
        room -= len(raw)
    kept[-1] = replace(kept[-1], finish="stop")
    segments[:] = kept


def _ids_of(row: Row, segment: Segment, num_bytes: int) -> tuple[int, ...]:
    """The segment's first tokens that together hold the first `num_bytes` bytes of its text."""
    if segment.writer == CUE or num_bytes == 0:
        return segment.ids if num_bytes else ()
    vocabulary = row.pool.candidates[segment.writer].vocabulary
    raw = b""
    for count, index in enumerate(segment.ids, start=1):
        raw += vocabulary.token_bytes[index]
        # Bytes that are no UTF-8 stand in the text as U+FFFD.
        if len(codecs.utf_8_decode(raw, "replace", False)[0].encode()) >= num_bytes:
            return segment.ids[:count]
    return segment.ids
