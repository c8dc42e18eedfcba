"""The limit L of a run, and how a cost grows with the length.

L = decoded tokens / decode rate at the run's mean batch + every token read / read rate on chunks of one segment: what
the run would take if each token were decoded once by its writer, read once by each model that needs it, and nothing
else were done. Rates are measured at the run's own context lengths, between its repeats.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from infer.bench.cases import SOLO, Bench, Cell
from infer.bench.ladders import random_ids
from infer.bench.stopwatch import wait_for
from switchgen.engines.base import WriteItem
from switchgen.sampling import SamplingParams
from switchgen.segmentation import SegmentRule

Decoder = Literal["a", "b"]
"""Who decodes at the rate of the limit: the cases (a), with a preallocated cache, and (b)."""


@dataclass(frozen=True)
class Rates:
    """Tokens per second."""

    decode: float
    """By a batch of the run's mean size, the faster of (a) and (b)."""
    read: float
    """In chunks of one segment."""


@dataclass(frozen=True)
class ClockedRates:
    """Rates by the clock on the wall, and by the processor seconds of this process."""

    wall: Rates
    cpu: Rates
    decoder: Decoder = "b"
    """Whose decode rate it is."""


def limit_seconds(decoded_tokens: int, read_tokens: int, rates: Rates) -> float:
    """L of a run."""
    return decoded_tokens / rates.decode + read_tokens / rates.read


def growth_exponent(lengths: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log seconds over log length, by least squares: 1 grows like the length, 2 like its square."""
    x, y = [math.log(value) for value in lengths], [math.log(value) for value in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def measure_rates(bench: Bench, cell: Cell, batch: int, decoders: Collection[Decoder] = ("a", "b")) -> ClockedRates:
    """Decode and read rates at the cell's context lengths with a batch of that many rows.

    Args:
        decoders: whose decode rates are measured; the fastest counts.
    """
    wrote, read = _our_rates(bench, cell, batch, write="b" in decoders)
    decoded: dict[Decoder, Work] = {"b": wrote} if "b" in decoders else {}
    if "a" in decoders:
        taken = bench.alone(cell, static=True, rows=batch)
        # The first token comes out of reading the prompts.
        tokens = batch * (cell.new_tokens - cell.written - 1)
        decoded["a"] = Work(tokens, taken.decode_s, taken.decode_cpu_s)
    return ClockedRates(
        wall=Rates(max(work.tokens / work.wall_s for work in decoded.values()), read.tokens / read.wall_s),
        cpu=Rates(max(work.tokens / work.cpu_s for work in decoded.values()), read.tokens / read.cpu_s),
        decoder=max(decoded, key=lambda name: decoded[name].tokens / decoded[name].wall_s),
    )


@dataclass
class Work:
    """Tokens, and the seconds they took."""

    tokens: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    @contextmanager
    def doing(self, tokens: int, wait: Callable[[], None]) -> Iterator[None]:
        wait()
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        wait()
        self.wall_s += time.perf_counter() - wall
        self.cpu_s += time.process_time() - cpu
        self.tokens += tokens


@torch.inference_mode()
def _our_rates(bench: Bench, cell: Cell, batch: int, *, write: bool) -> tuple[Work, Work]:
    """Walk through the cell's lengths in chunks of a segment; where writing counts, too, every other one is written."""
    engine = bench.ladder.engines[SOLO]
    contexts = [row.context(SOLO) for row in bench.rows(cell)[:batch]]
    engine.read(contexts, leave=1)
    wait, draw = wait_for(bench.device), random.Random(0)
    wrote, read = Work(), Work()
    params, rule = SamplingParams(), SegmentRule()
    for index, start in enumerate(range(cell.written, cell.new_tokens, cell.segment)):
        count = min(cell.segment, cell.new_tokens - start)
        if write and index % 2 == 0:
            items = [WriteItem(context, count, row, start) for row, context in enumerate(contexts)]
            with wrote.doing(batch * count, wait):
                engine.write(items, params, rule)
            continue
        for context in contexts:
            context.ids.extend(random_ids(bench.ladder, draw, count))
        with read.doing(batch * count, wait):
            engine.read(contexts, leave=1)
    for context in contexts:
        engine.release(context)
    return wrote, read
