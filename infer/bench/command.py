"""The bench itself: cells, the check before them, interleaved repeats."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from infer.bench.cases import Bench, Cell
from infer.bench.check import check
from infer.bench.figures import CASES, Measured, ratios, table
from infer.bench.ladders import SIZES, make_ladder
from infer.bench.limit import Decoder, measure_rates
from infer.bench.memory import measure_memory
from infer.bench.released import released
from infer.bench.stopwatch import Taken
from switchgen.errors import ConfigError
from switchgen.loading import pick_device
from switchgen.loop import Loop
from switchgen.policies import FixedPolicy

logger = logging.getLogger("switchgen")

TABLE = (
    Cell("tiny", 16, 512, "abcdef", 2),
    *(Cell("tiny", 16, length, "de", 1, limited=False) for length in (1024, 2048)),
    *(Cell("tiny", 4, length, "ad", 1, limited=False, static=False) for length in (512, 1024, 2048, 4096)),
    Cell("small", 16, 512, "abd", 2),
    Cell("small", 64, 512, "d", 1, queries=96),
    Cell("small", 16, 2048, "d", 1, written=1536),
)
"""The whole CPU table, within an hour on one core. `--repeats` repeats more often."""
QUICK = (
    Cell("tiny", 16, 200, "abcdef", 1),
    *(Cell("tiny", 4, length, "ad", 1, limited=False, static=False) for length in (100, 200, 400)),
    Cell("small", 4, 100, "abd", 2),
)
"""The same in five minutes."""
CUDA = (
    Cell("8b", 64, 512, "abcd", 3, queries=192),
    Cell("8b", 192, 512, "d", 3, queries=384),  # 64 rows in flight a candidate
    Cell("8b", 1, 512, "a", 3),
)
"""On one GPU. Caches of 192 rows beside four models' weights want more than 80 GB; `--rows` asks for fewer."""


def run(
    cells: Sequence[Cell], *, device: str = "cpu", compiled: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Check the sizes, measure the cells, print a line per case.

    Args:
        compiled: decode steps by `torch.compile`.

    Returns:
        The JSON line's content: `cases`, `ratios`, `checked`, and the machine.
    """
    measured: list[Measured] = []
    checked: dict[str, int] = {}
    for size in dict.fromkeys(cell.size for cell in cells):
        # In a function of its own, so that its models are gone before the next ladder is built.
        checked[size] = check(SIZES[size], device, compiled=compiled)
        logger.info("bench: size %s: %d tokens equal to those of the plain loop (float64)", size, checked[size])
        of_size = [cell for cell in cells if cell.size == size]
        bench = Bench(make_ladder(SIZES[size], device=device, max_slots=_slots(of_size), compiled=compiled))
        for cell in of_size:
            found = measure(bench, cell)
            measured += found
            for line in table(found):
                say(line)
    return {
        "cases": [entry.record() for entry in measured],
        "ratios": ratios(measured),
        "checked_tokens": checked,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "compiled": compiled,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _slots(cells: Sequence[Cell]) -> int:
    """Rows whose caches are kept: a rollout's prefixes, branches and completions, or read rows and their forks."""
    return max(
        2 * cell.rows + 64 if "f" in cell.cases else 2 * (cell.total if cell.written else cell.rows) for cell in cells
    )


def measure(bench: Bench, cell: Cell) -> list[Measured]:
    """A cell's cases, interleaved: every repeat runs each of them once, and the rates between.

    Where the faster of two counts ((a)'s forms, the decoders of L), the first repeat finds it and others repeat it.
    """
    names = [name for name in CASES if name[0] in cell.cases and (cell.static or name != "a-static")]
    measured = {name: Measured(name, cell) for name in names}
    _warm_up(bench, cell)
    for repeat in range(cell.repeats):
        for name in names:
            taken = _one(bench, cell, name)
            measured[name].runs.append(taken)
            if name in ("c", "d") and cell.limited:
                rates = measured[name].rates
                decoders: tuple[Decoder, ...] = (rates[0].decoder,) if rates else ("a", "b")
                rates.append(measure_rates(bench, cell, max(1, round(taken.mean_batch)), decoders))
        if repeat == 0 and "a-static" in names:
            names.remove(max(("a", "a-static"), key=lambda name: measured[name].median("wall_s")))
    return list(measured.values())


def _warm_up(bench: Bench, cell: Cell) -> None:
    """Everything once, briefly: allocators, kernels, lazily built tables."""
    short = replace(cell, new_tokens=cell.segment + 10, written=0, rows=2, queries=0)
    pool = bench.ladder.pool
    # Each candidate: what is compiled is compiled at its first token.
    for writer, name in enumerate(pool.names):
        list(Loop(pool, FixedPolicy(writer, name), bench.decoding(short)).run(bench.rows(short)))
    bench.ours(short, "d")
    # On CUDA a preallocated cache brings a compiled forward with it, for its own shape.
    bench.alone(cell if bench.device.type == "cuda" else short, static=True)


def _one(bench: Bench, cell: Cell, name: str) -> Taken:
    if name[0] == "a":
        return bench.alone(cell, static=name == "a-static")
    if name == "e":
        return released(bench, cell)
    if name == "f":
        return bench.rollouts(cell)
    return bench.ours(cell, name)


def cells_of(
    *,
    sizes: Sequence[str] = (),
    quick: bool = False,
    cases: str | None = None,
    rows: int | None = None,
    new_tokens: Sequence[int] = (),
    written: int = 0,
    queries: int | None = None,
    repeats: int | None = None,
    limited: bool = True,
) -> list[Cell]:
    """The cells that the command line means: a part of the table, or one of its own.

    Raises:
        ConfigError: settings that make no cell.
    """
    own = rows is not None or bool(new_tokens)
    if not own and (written or queries):
        raise ConfigError("bench: --written and --queries are for a cell of your own: give --rows or --new-tokens, too")
    if own and quick:
        raise ConfigError("bench: --quick is a table of its own; leave it out beside --rows and --new-tokens")
    if not own:
        known: tuple[Cell, ...] = QUICK if quick else TABLE + (CUDA if "8b" in sizes else ())
        chosen = [cell for cell in known if not sizes or cell.size in sizes]
    else:
        chosen = [Cell(size, rows or 16, length, "abd", 3, written, queries or 0)
                  for size in sizes or ("tiny",) for length in new_tokens or (512,)]  # fmt: skip
    if cases is not None:
        unknown = sorted(set(cases) - {name[0] for name in CASES})
        if unknown:
            raise ConfigError(
                f"bench: unknown case {unknown[0]!r}; allowed: {', '.join(sorted({name[0] for name in CASES}))}"
            )
        chosen = [replace(cell, cases=cases) for cell in chosen]
    chosen = [replace(cell, repeats=repeats or cell.repeats, limited=limited and cell.limited) for cell in chosen]
    for cell in chosen:
        # Rates are measured by writing a segment and reading one; rollouts need a prefix, a branch and a rest.
        least = cell.written + (2 + ("f" in cell.cases)) * cell.segment
        if cell.new_tokens < least:
            raise ConfigError(f"bench: {cell.new_tokens} new tokens; cases {cell.cases} need at least {least}")
    return chosen


def main(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """`switchgen bench`; returns the JSON line's content.

    Raises:
        ConfigError: settings that make no cell, or a device that is not here.
    """
    cells = (
        []
        if arguments.memory
        else cells_of(
            sizes=arguments.size,
            quick=arguments.quick,
            cases=arguments.cases,
            rows=arguments.rows,
            new_tokens=arguments.new_tokens,
            written=arguments.written,
            queries=arguments.queries,
            repeats=arguments.repeats,
            limited=not arguments.no_limit,
        )
    )
    if arguments.compile and any("f" in cell.cases for cell in cells):
        raise ConfigError("bench: case f counts what its models are fed, which compiled steps do not tell; allowed "
                          "with --compile: --cases abcde")  # fmt: skip
    torch.set_num_threads(arguments.threads)
    device = arguments.device or ("cuda" if "8b" in arguments.size else "cpu")
    pick_device("bench", device)
    if arguments.memory:
        return measure_memory(
            (arguments.size or ["tiny"])[0],
            queries=arguments.queries or 10_000,
            rows=arguments.rows or 64,
            new_tokens=(arguments.new_tokens or [16])[0],
            segment=8,
            device=device,
        )
    return run(cells, device=device, compiled=arguments.compile, say=say)
