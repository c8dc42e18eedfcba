"""Who waits for what: rows for a place in flight, rows in flight for their writer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from switchgen.rows import Row
from switchgen.trace import Decision

# How much more a row counts that has more left to write, once no other row comes for its place.
_LAST_ROWS = 4
# Rounds after which a queue goes next whoever else waits, where somebody waits for its rows.
_PATIENCE = 4


class Waiting:
    """Rows that wait for a place in flight.

    Args:
        rows: None stands for "nobody waits at the moment".
    """

    def __init__(self, rows: Iterable[Row | None]) -> None:
        self._source = iter(rows)
        self._ahead: Row | None = None
        self._over = False

    @property
    def more(self) -> bool:
        """Whether a row waits or may still come; looks one row ahead."""
        if self._ahead is None and not self._over:
            try:
                self._ahead = next(self._source)
            except StopIteration:
                self._over = True
        return not self._over

    def take(self) -> Row | None:
        """The next row, if one waits."""
        row = self._ahead if self.more else None
        self._ahead = None
        return row


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A row that waits for the writer of its next segment."""

    row: Row
    decision: Decision
    left: int
    """Tokens that the response may still get."""


class Queues:
    """Rows in flight by the candidate that writes their next segment.

    Args:
        families: candidates that write together.
        live: whether somebody waits for each row: no queue is left behind for more than a few rounds.
    """

    def __init__(self, families: Sequence[Sequence[int]], *, live: bool = False) -> None:
        self._families = families
        self._live = live
        self._waited = [0] * len(families)
        """Rounds for which each family's rows have waited."""
        self._turns: dict[int, list[Turn]] = {index: [] for group in families for index in group}

    def add(self, turn: Turn) -> None:
        """Let a row wait."""
        self._turns[turn.decision.writer].append(turn)

    def take(self, *, refilled: bool) -> Mapping[int, list[Turn]]:
        """The turns to be written next, by candidate.

        While other rows take the places of those that finish, the fullest queue is best: the most tokens a step. When
        none will, the rows that finish last set how many steps it takes, and a row counts for more the more it has left
        to write (the weighted majority merge for short common supersequences, Branke, Middendorf and Schneider 1998;
        here every row is a sequence of writers, and each step serves one of them).

        Args:
            refilled: whether rows come for the places of those that finish.
        """

        def weight(family: int) -> tuple[int, int, int]:
            turns = [turn for index in self._families[family] for turn in self._turns[index]]
            overdue = self._waited[family] if self._live and self._waited[family] >= _PATIENCE else 0
            return overdue, 0 if refilled else sum(turn.left**_LAST_ROWS for turn in turns), len(turns)

        chosen = max(range(len(self._families)), key=weight)
        writers = self._families[chosen]
        taken = {index: self._turns[index] for index in writers if self._turns[index]}
        self._turns.update({index: [] for index in writers})
        self._waited = [
            waited + 1 if any(self._turns[index] for index in family) else 0
            for waited, family in zip(self._waited, self._families, strict=True)
        ]
        return taken
