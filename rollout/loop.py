"""The core's loop with branches: rows whose next segment is a named candidate's, whatever the policy says."""

from __future__ import annotations

from typing import Any

from switchgen.loop import Loop
from switchgen.rows import Row
from switchgen.trace import Decision


class BranchingLoop(Loop):
    """A loop in which traces, branches and completions are written side by side, so that batches stay full."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.next_writers: dict[Row, int] = {}
        """Who writes a row's next segment; the policy is asked again after it."""
        self.pausing: set[Row] = set()
        """Rows that stop after their next segment."""

    def _forced_decision(self, row: Row) -> Decision | None:
        writer = self.next_writers.pop(row, None)
        if writer is None:
            return super()._forced_decision(row)
        tokens = min(self.decoding.segment.tokens, self._open_budget(row))
        return Decision(writer, tokens, ends_trace=self._ends(row, writer))

    def _paused(self, row: Row) -> bool:
        return row in self.pausing
