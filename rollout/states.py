"""States: where a trace is cut, and what became of each candidate's branch from there.

The paper cuts at a random token. Here a trace is cut at a segment border where the policy was asked: decisions happen
nowhere else, so every state is one that inference meets. The border is drawn uniformly among those whose share of the
trace's tokens lies in `rollout.prefix`; with a range from 0 the empty trace is as frequent as it is among inference's
decisions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rollout.questions import Question
from switchgen.config import DecodingConfig
from switchgen.rows import Row
from switchgen.sampling import Purpose, uniform
from switchgen.trace import CUE, Segment, Trace

Prefix = tuple[tuple[int, tuple[int, ...]], ...]
"""(writer, tokens) of each segment before a cut."""

TOO_LONG = "the question does not fit a context"
NO_BORDER = "no segment border in rollout.prefix"
REPEATED = "every border repeats an earlier state of the question"
NOT_SCORED = "a response does not fit the reward model's context"


def decision_borders(trace: Trace, decoding: DecodingConfig) -> Iterator[int]:
    """Borders of a finished trace at which its policy was asked who writes: border b stands before segment b.

    The first and the last writer's turns (`decoding.first`, `decoding.last`) are nobody's choice.
    """
    written = 0
    for border, segment in enumerate(trace.segments):
        if decoding.last is not None:
            ended = border > 0 and trace.segments[border - 1].finish == "eos"
            if ended or written >= decoding.max_new_tokens - decoding.segment.tokens:
                return
        if border > 0 or decoding.first is None:
            yield border
        written += len(segment.ids)


def shares(trace: Trace) -> list[float]:
    """For each segment, the share of the trace's tokens that stands before it; cues do not count."""
    counts = [0 if segment.writer == CUE else len(segment.ids) for segment in trace.segments]
    total = sum(counts) or 1
    return [sum(counts[:border]) / total for border in range(len(counts))]


def prefix_of(segments: Sequence[Segment]) -> Prefix:
    """What makes a state: who wrote what."""
    return tuple((segment.writer, segment.ids) for segment in segments)


def draw_border(
    trace: Trace, decoding: DecodingConfig, bounds: tuple[float, float], taken: Collection[Prefix]
) -> tuple[int, float] | str:
    """Where to cut a finished trace.

    Args:
        bounds: lowest and highest share of the trace's tokens before the cut.
        taken: prefixes of the question's earlier states; none is used twice.

    Returns:
        The border and its share; where there is none, the reason.
    """
    if trace.finish == "too_long":
        return TOO_LONG
    low, high = bounds
    share = shares(trace)
    eligible = [border for border in decision_borders(trace, decoding) if low <= share[border] <= high]
    if not eligible:
        return NO_BORDER
    fresh = [border for border in eligible if prefix_of(trace.segments[:border]) not in taken]
    if not fresh:
        return REPEATED
    number = uniform(torch.tensor([trace.seed]), Purpose.PREFIX_LENGTH, torch.tensor([0])).item()
    border = fresh[int(number * len(fresh))]
    return border, share[border]


@dataclass(eq=False)
class Branch:
    """What a candidate's turn after the prefix leads to."""

    writer: int
    twin_of: int | None = None
    """An earlier branch with the same segment, where completions do not depend on who wrote it: theirs are the same."""
    row: Row | None = None
    """The prefix and the candidate's segment, where all completions share it (`rollout.branch: shared`)."""
    responses: list[str] = field(default_factory=list)
    """Completed responses in the order of their index."""
    scores: list[float] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether the response ended with the shared segment: then it is the only one, and has one score."""
        return self.row is not None and self.row.trace.finish is not None


def find_twins(branches: Sequence[Branch]) -> None:
    """Note which branches repeat an earlier one, token by token in every vocabulary's terms: their text is the same.

    Branches share their random numbers, so close checkpoints often write the very same segment. Their completions share
    random numbers, too: where the policy does not look at who wrote what, they would be the same, and are written once.
    """
    first: dict[tuple[Any, ...], int] = {}
    for index, branch in enumerate(branches):
        assert branch.row is not None
        trace = branch.row.trace
        # No segment at all where a candidate's context has no room: that ends the response as it stands.
        key = (trace.finish, *((segment.text, segment.finish, segment.ids) for segment in trace.segments[-1:]))
        if key in first:
            branch.twin_of = first[key]
        else:
            first[key] = index


@dataclass(eq=False)
class State:
    """A prefix whose next writer is to be labelled."""

    id: str
    index: int
    """Which of its question's states."""
    question: Question
    prefix: Row
    border: int
    share: float
    tokens: int
    """New tokens that it cost so far, its trace included."""
    completion_tokens: int = 0
    """Those of them that completions cost; the rest is the same whatever their number."""
    branches: list[Branch] = field(default_factory=list)
    in_flight: int = 0
    """Rows that are being written for it."""
