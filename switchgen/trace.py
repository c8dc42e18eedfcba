"""The one noun that travels: a query and what has been written for it, each part signed by its writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from switchgen.scoring.voting import AnswerForm

CUE = -1
"""Writer index of a cue: text that the recipe inserts, written by no candidate."""

SegmentFinish = Literal["length", "boundary", "eos", "stop", "cue"]
TraceFinish = Literal["eos", "stop", "length", "context", "too_long", "cancelled"]


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked.

    Example: `Query("7", ({"role": "user", "content": "How old is Vudak?"},))`.
    """

    id: str
    """Unique within a file or task."""
    messages: tuple[Mapping[str, str], ...]
    """The conversation: optional system message, earlier turns, the last user message."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of the input line; they pass through to the output."""
    form: AnswerForm | None = None
    """How its answers stand in responses, where its task says so: what majority votes compare."""

    @property
    def text(self) -> str:
        """The conversation as plain text: a single user message as it is, longer ones one turn per paragraph."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in self.messages)

    @classmethod
    def from_text(cls, text: str, id: str = "0") -> Query:
        """A query of one user message."""
        return cls(id, ({"role": "user", "content": text},))


@dataclass(frozen=True, slots=True)
class Segment:
    """What one candidate wrote before the next choice."""

    writer: int
    """Index in the pool's ladder order, or `CUE`."""
    text: str
    """Whole characters; the segments' texts joined are the response."""
    ids: tuple[int, ...]
    """Tokens in the writer's vocabulary, without the end of text."""
    finish: SegmentFinish
    """Why the writer stopped here."""
    scores: tuple[float, ...] | None = None
    """The policy's probability of each candidate at this decision, if it has any."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Who writes next, and how much."""

    writer: int
    """Index in the pool's ladder order."""
    max_tokens: int
    """Upper bound of the segment, in tokens."""
    scores: tuple[float, ...] | None = None
    """Probability of each candidate, if the policy has any."""
    cue: str | None = None
    """Text to insert before the segment."""
    closes: bool = False
    """Whether the response ends with this segment, however it ends."""
    ends_trace: bool = True
    """Whether end-of-text by this writer ends the response (else only its segment)."""


@dataclass(slots=True)
class Trace:
    """A query plus the segments written so far."""

    query: Query
    seed: int
    """Seed of the row's random numbers (`ids.derive_seed`)."""
    segments: list[Segment] = field(default_factory=list)
    finish: TraceFinish | None = None
    """Why the response ended; None while it is being written."""
    drafts: list[Trace] = field(default_factory=list)
    """Responses that were written on the way and are not this one (`policies.responses`); their tokens are paid for."""

    @property
    def text(self) -> str:
        """The response."""
        return "".join(segment.text for segment in self.segments)

    @property
    def num_tokens(self) -> int:
        """Tokens written by candidates and cues, end of text not counted."""
        return sum(len(segment.ids) for segment in self.segments)

    @property
    def writers(self) -> tuple[int, ...]:
        """Who wrote each segment, cues left out."""
        return tuple(segment.writer for segment in self.segments if segment.writer != CUE)

    def signed(self) -> list[tuple[int, str]]:
        """(writer, text) of each segment, as the switcher reads them; cues are nobody's and carry the next writer's."""
        signed: list[tuple[int, str]] = []
        pending = ""
        for segment in self.segments:
            if segment.writer == CUE:
                pending += segment.text
            else:
                signed.append((segment.writer, pending + segment.text))
                pending = ""
        return signed


def writer_name(writer: int, names: Sequence[str]) -> str:
    """A writer's name in records: the candidate's, or `cue`."""
    return "cue" if writer == CUE else names[writer]
