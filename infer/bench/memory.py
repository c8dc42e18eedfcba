"""`switchgen bench --memory`: many short queries run in the memory of the rows in flight."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from infer.bench.ladders import SIZES, make_ladder, make_queries
from infer.bench.stopwatch import peak_mb, reset_peak
from switchgen.api import response_seed
from switchgen.config import DecodingConfig
from switchgen.loop import Loop
from switchgen.policies import SwitcherPolicy
from switchgen.rows import Row

_WARM_UP = 0.1
"""Share of the queries after which memory should not grow."""


def measure_memory(size: str, *, queries: int, rows: int, new_tokens: int, segment: int, device: str) -> dict[str, Any]:
    """Answer queries under the LM switcher; the peak after the first tenth of them, and at the end.

    Returns:
        The JSON line's content; `growth` is the end's peak ÷ the warm-up's - 1.
    """
    ladder = make_ladder(SIZES[size], device=device, max_slots=2 * rows)
    decoding = DecodingConfig.model_validate({"max_new_tokens": new_tokens, "segment": segment})
    loop = Loop(ladder.pool, SwitcherPolicy(ladder.switcher), decoding, max_rows=rows)
    place = ladder.engines[0].device

    def source() -> Iterator[Row]:
        for query in make_queries(ladder, queries):
            yield Row(ladder.pool, query, response_seed(0, query.id))

    warm, peaks, started = max(1, int(queries * _WARM_UP)), [], time.perf_counter()
    reset_peak(place)
    for done, _ in enumerate(loop.run(source()), start=1):
        if done in (warm, queries):
            peaks.append(peak_mb(place))
    return {
        "measure": "memory",
        "size": size,
        "queries": queries,
        "rows": rows,
        "new_tokens": new_tokens,
        "warm_mb": round(peaks[0], 1),
        "peak_mb": round(peaks[-1], 1),
        "growth": round(peaks[-1] / peaks[0] - 1, 4),
        "evicted_rows": sum(engine.stats.evicted_rows for engine in ladder.engines),
        "seconds": round(time.perf_counter() - started, 1),
    }
