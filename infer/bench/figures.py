"""What runs come to: a record per case, the ratios between cases, the printed table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal

from infer.bench.cases import Cell
from infer.bench.limit import ClockedRates, growth_exponent, limit_seconds
from infer.bench.stopwatch import Taken

CASES = {
    "a": "one candidate alone, generate",
    "a-static": "one candidate alone, preallocated cache",
    "b": "our loop, one candidate",
    "c": "our loop, random choice",
    "d": "our loop, LM switcher",
    "e": "the released algorithm's way",
    "f": "rollouts",
}


@dataclass
class Measured:
    """A case of a cell over its repeats."""

    case: str
    cell: Cell
    runs: list[Taken] = field(default_factory=list)
    rates: list[ClockedRates] = field(default_factory=list)
    """Measured in each repeat, for L."""

    def median(self, name: str) -> float:
        """A quantity's median over the repeats."""
        return statistics.median(getattr(run, name) for run in self.runs)

    def record(self) -> dict[str, Any]:
        """The case as the JSON line holds it."""
        walls = [run.wall_s for run in self.runs]
        last = self.runs[-1]
        line = {
            "case": self.case[0],
            "form": CASES[self.case],
            "size": self.cell.size,
            "rows": self.cell.rows,
            "queries": self.cell.total,
            "new_tokens": self.cell.new_tokens,
            "written": self.cell.written,
            "repeats": len(walls),
            "wall_s": statistics.median(walls),
            "wall_min_s": min(walls),
            "wall_max_s": max(walls),
            "cpu_s": self.median("cpu_s"),
            "tokens_per_s": statistics.median(run.new_tokens / run.wall_s for run in self.runs),
            "limit_s": statistics.median(self.limits("wall")) if self.rates else None,
            "over_limit": self.over_limit("wall"),
            "over_limit_cpu": self.over_limit("cpu"),
            "overhead_share": statistics.median((run.wall_s - run.forward_s) / run.wall_s for run in self.runs),
            "decode_share": self._share(lambda run, step_s: step_s),
            "read_share": self._share(lambda run, step_s: run.forward_s - step_s),
            "switcher_share": statistics.median(run.switcher_s / run.wall_s for run in self.runs),
            "read_tokens": last.read_tokens,
            "decoded_tokens": last.decoded_tokens,
            "mean_batch": last.mean_batch,
            "batch_share": last.mean_batch / self.cell.rows,
            "refilled_batch_share": None if last.refilled_batch is None else last.refilled_batch / self.cell.rows,
            "peak_mb": max(run.peak_mb for run in self.runs),
        }
        if self.rates:
            line["decode_rate"] = statistics.median(rates.wall.decode for rates in self.rates)
            line["read_rate"] = statistics.median(rates.wall.read for rates in self.rates)
            line["decoder"] = self.rates[-1].decoder
        line = {name: round(value, 4) if isinstance(value, float) else value for name, value in line.items()}
        return {**line, **last.notes}

    def _share(self, part: Callable[[Taken, float], float]) -> float | None:
        """A part of the wall's seconds, the median over the repeats; None where no engine's decode steps were timed."""
        parts = [part(run, run.step_s) / run.wall_s for run in self.runs if run.step_s is not None]
        return statistics.median(parts) if parts else None

    def limits(self, clock: Literal["wall", "cpu"]) -> list[float]:
        """L of each repeat, with that repeat's rates."""
        return [
            limit_seconds(run.decoded_tokens, run.read_tokens, getattr(rates, clock))
            for run, rates in zip(self.runs, self.rates, strict=True)
        ]

    def over_limit(self, clock: Literal["wall", "cpu"]) -> float | None:
        """Seconds ÷ L, the median over repeats that each have their own rates."""
        if not self.rates:
            return None
        seconds = [getattr(run, f"{clock}_s") for run in self.runs]
        return statistics.median(took / limit for took, limit in zip(seconds, self.limits(clock), strict=True))


def ratios(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """What the targets are about: cases against each other in the same repeats, and the growth with the length.

    Seconds a token are compared: (a) writes a response a row, the others one a query.
    `b/a` is by the clock on the wall, `b/a cpu` by processor seconds: the two differ where others used the core.
    """
    found: list[dict[str, Any]] = []
    for cell in dict.fromkeys(entry.cell for entry in measured):
        of_cell = {entry.case: entry for entry in measured if entry.cell == cell}
        alone = [of_cell[name] for name in ("a", "a-static") if name in of_cell]
        line: dict[str, Any] = {"size": cell.size, "rows": cell.rows, "new_tokens": cell.new_tokens}
        clocks: tuple[Literal["wall", "cpu"], ...] = ("wall", "cpu")
        for clock in clocks:
            mark = "" if clock == "wall" else " cpu"
            seconds = {
                name: [getattr(run, f"{clock}_s") / run.new_tokens for run in entry.runs]
                for name, entry in of_cell.items()
            }
            if alone:
                # The slower form need not have been repeated.
                found_s = zip_longest(*(seconds[entry.case] for entry in alone), fillvalue=math.inf)
                fastest = [min(forms) for forms in found_s]
                for case in ("b", "c", "d", "e"):
                    if case in of_cell:
                        line[f"{case}/a{mark}"] = _ratio(seconds[case], fastest)
            if "e" in of_cell and "d" in of_cell:
                line[f"e/d{mark}"] = _ratio(seconds["e"], seconds["d"])
            if "d" in of_cell:
                line[f"d/L{mark}"] = of_cell["d"].over_limit(clock)
        found.append({name: round(value, 3) if isinstance(value, float) else value for name, value in line.items()})
    return [*found, *_exponents(measured)]


def _ratio(over: Sequence[float], under: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def _exponents(measured: Sequence[Measured]) -> Iterator[dict[str, Any]]:
    """The growth exponent of each case that was measured at three or more lengths with the same rows."""
    groups: dict[tuple[str, int, str], dict[int, float]] = {}
    for entry in measured:
        if not entry.cell.written and entry.cell.total == entry.cell.rows:
            group = groups.setdefault((entry.cell.size, entry.cell.rows, entry.case[0]), {})
            length = entry.cell.new_tokens
            # Processor seconds: others on the machine change a slope as little as can be.
            group[length] = min(group.get(length, float("inf")), entry.median("cpu_s"))
    for (size, rows, case), seconds in groups.items():
        if len(seconds) >= 3:
            exponent = growth_exponent(list(seconds), list(seconds.values()))
            yield {"size": size, "rows": rows, "case": case, "exponent": round(exponent, 3)}


_HEAD = f"{'case':<9}{'size':>6}{'rows':>6}{'new':>6}{'wall s':>9}{'(min–max)':>16}{'cpu s':>8}{'tok/s':>8}" \
        f"{'L s':>8}{'/L':>6}{'cpu':>6}{'other':>7}{'switch':>7}{'batch':>7}{'MB':>7}"  # fmt: skip


def table(measured: Sequence[Measured]) -> Iterator[str]:
    yield _HEAD
    for entry in measured:
        line = entry.record()
        limit, over, over_cpu = (
            "" if line[name] is None else f"{line[name]:.2f}" for name in ("limit_s", "over_limit", "over_limit_cpu")
        )
        yield (
            f"{entry.case:<9}{line['size']:>6}{line['rows']:>6}{line['new_tokens']:>6}{line['wall_s']:>9.2f}"
            f"{line['wall_min_s']:>8.2f}–{line['wall_max_s']:<7.2f}{line['cpu_s']:>8.2f}{line['tokens_per_s']:>8.0f}"
            f"{limit:>8}{over:>6}{over_cpu:>6}"
            f"{line['overhead_share']:>7.1%}{line['switcher_share']:>7.1%}{line['mean_batch']:>7.2f}"
            f"{line['peak_mb']:>7.0f}"
        )
