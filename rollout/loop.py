"""The core's loop with branches: rows whose next segment is a named candidate's, whatever the policy says."""

from __future__ import annotations

from typing import Any

from switchgen.loop import Loop
from switchgen.rows import Row


class BranchingLoop(Loop):
    """A loop in which traces, branches and completions are written side by side, so that batches stay full."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.branch_writers: dict[Row, int] = {}
        """Who writes a row's next segment; the policy is asked again after it."""
        self.pausing: set[Row] = set()
        """Rows that stop after their next segment."""

    def next_writer(self, row: Row) -> int | None:
        """The branch's writer, once; else as in any loop."""
        writer = self.branch_writers.pop(row, None)
        return super().next_writer(row) if writer is None else writer

    def pauses(self, row: Row) -> bool:
        """Whether the row is a branch."""
        return row in self.pausing
