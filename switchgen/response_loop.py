"""The loop for policies that combine whole responses (`policies.responses`): drafts first, then one response a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from switchgen.candidates import Pool
from switchgen.config import DecodingConfig
from switchgen.engines.base import Engine
from switchgen.loop import Loop
from switchgen.policies.fixed import FixedPolicy
from switchgen.policies.responses import Ask, ResponsePolicy
from switchgen.rows import Reader, Row
from switchgen.trace import Trace


class ResponseLoop:
    """Writes rows with a policy over whole responses; same contract as `loop.Loop`.

    A draft is what its candidate writes alone under the same decoding settings, with the draft's seed.
    """

    def __init__(self, pool: Pool, policy: ResponsePolicy, decoding: DecodingConfig, *, max_rows: int = 64) -> None:
        self.pool = pool
        self.policy = policy
        self.max_rows = max_rows
        self._loops = {
            writer: Loop(pool, FixedPolicy(writer, pool.names[writer]), decoding, max_rows=max_rows)
            for writer in policy.writers(len(pool))
        }

    @property
    def readers(self) -> list[tuple[Reader, Engine]]:
        """Every engine that may hold caches of a row."""
        return [(index, candidate.engine) for index, candidate in enumerate(self.pool.candidates)]

    def run(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Write every row to its end, `max_rows` at a time; yields rows as they finish."""
        source = iter(rows)
        while batch := list(islice(source, self.max_rows)):
            self.policy.respond(batch, self._write)
            yield from batch

    def _write(self, asks: Sequence[Ask]) -> list[Trace]:
        """The drafts that are asked for, in their order."""
        rows = [Row(self.pool, ask.query, ask.seed) for ask in asks]
        for writer, loop in self._loops.items():
            own = [row for row, ask in zip(rows, asks, strict=True) if ask.writer == writer]
            for _ in loop.run(own):
                pass
        return [row.trace for row in rows]
