"""Cost of a token router: its processor time per token ÷ that of one model alone, in the same loop.

    python scripts/measure_router_cost.py
    python scripts/measure_router_cost.py --size tiny --rows 16 --tokens 128 --routers baco-p@0.3 baco-h-punc@2

Both candidates have the same shape and random weights; every row writes the same number of tokens. Runs alternate
(alone, router, alone, router, …), so that a machine that is busy with other things is as busy for both; the figure is
the median of the pairs' ratios. Two forwards per token are the floor: 2 less what is done once per token. One JSON line
last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from infer.bench.ladders import SIZES, BenchLadder, make_ladder, make_queries
from infer.bench.stopwatch import ForwardClock, timed
from switchgen import DecodingConfig, generate
from switchgen.trace import Query


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--routers", nargs="+", default=["baco-p-punc@0.3", "baco-h-fc@2.0"])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ladder = make_ladder(SIZES[arguments.size], device=arguments.device, max_slots=arguments.rows)
    clock = ForwardClock(ladder.models)
    queries = list(make_queries(ladder, arguments.rows))
    run(ladder, clock, queries, ladder.pool.names[-1], 8)
    run(ladder, clock, queries, arguments.routers[0], 8)
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in ("alone", *arguments.routers)}
    started = time.monotonic()
    for _ in range(arguments.repeats):
        for name, runs in taken.items():
            policy = ladder.pool.names[-1] if name == "alone" else name
            runs.append(run(ladder, clock, queries, policy, arguments.tokens))
            print(f"{name:16} {json.dumps(runs[-1])}", flush=True)
    ratios = {
        name: statistics.median(
            own["cpu_ms_per_token"] / alone["cpu_ms_per_token"]
            for own, alone in zip(taken[name], taken["alone"], strict=True)
        )
        for name in arguments.routers
    }
    figure = {
        "rows": arguments.rows,
        "tokens": arguments.tokens,
        "size": arguments.size,
        "repeats": arguments.repeats,
        "ratio": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "outside_forwards": {
            name: round(statistics.median(r["outside_forwards"] for r in runs), 4) for name, runs in taken.items()
        },
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(figure))


def run(ladder: BenchLadder, clock: ForwardClock, queries: list[Query], policy: str, tokens: int) -> dict[str, Any]:
    """One run: processor milliseconds per token of the response, the share of time outside forwards, switches."""
    decoding = DecodingConfig(max_new_tokens=tokens, segment=tokens)
    device = ladder.models[0].device
    with timed(clock, device) as taken:
        traces = generate(ladder.pool, queries, policy, decoding=decoding, max_rows=len(queries))
    written = sum(trace.num_tokens for trace in traces)
    seconds = taken.cpu_s if device.type == "cpu" else taken.wall_s
    return {
        "cpu_ms_per_token": round(1000 * seconds / written, 4),
        "outside_forwards": round(1 - taken.forward_s / taken.wall_s, 4),
        "tokens": written,
        "segments": sum(len(trace.segments) for trace in traces),
    }


if __name__ == "__main__":
    main()
