"""One row under a token router while it is written, and the segments that its tokens become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from switchgen.engines.base import Context
from switchgen.rows import Row
from switchgen.stops import cut
from switchgen.trace import Segment, SegmentFinish, TraceFinish
from switchgen.vocabulary import Vocabulary


@dataclass(slots=True)
class TokenPen:
    """A row's tokens so far, each with its writer."""

    row: Row
    contexts: tuple[Context, ...]
    """What the base and the aligned model read."""
    ids: list[int] = field(default_factory=list)
    writers: list[int] = field(default_factory=list)
    """Who wrote each token; 0 is the base, 1 the aligned model."""
    text: bytes = b""

    def sign(self, vocabulary: Vocabulary, places: Sequence[int], stop: Sequence[bytes]) -> None:
        """Turn runs of one writer into segments; a run is not cut inside a character.

        Args:
            places: of the base and the aligned model on the ladder.
            stop: strings that ended the response, if it holds one.
        """
        trace = self.row.trace
        start = 0
        for end in range(1, len(self.writers) + 1):
            same = end < len(self.writers) and self.writers[end] == self.writers[start]
            if end < len(self.writers) and (same or vocabulary.ends_inside_character(self.ids[start:end])):
                continue
            text = vocabulary.decode(self.ids[start:end])
            finish: SegmentFinish = "boundary" if end < len(self.writers) else _segment_finish(trace.finish)
            writer = places[self.writers[start]]
            trace.segments.append(Segment(writer, text, tuple(self.ids[start:end]), finish))
            start = end
        found = [place for place in map(self.text.find, stop) if place >= 0]
        if found:
            # Counted as the response's text has it: bytes that are no UTF-8 stand there as U+FFFD.
            cut(self.row, len(self.text[min(found) :].decode("utf-8", errors="replace").encode()))


def _segment_finish(finish: TraceFinish | None) -> SegmentFinish:
    return finish if finish == "eos" or finish == "stop" else "length"
