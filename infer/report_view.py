"""From results to what is shown: the table's cells, the comparisons, who writes where, where switching loses.

Nothing here knows HTML; `report_page` and the Markdown twin both show these views. Values that are fractions are shown
in percent, others (rewards) as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from infer.report_data import RIGHT, Responses, Tally
from infer.stats import FloatArray, SolvedAlone, holm, solved_by_none_else
from switchgen.baselines import family_of

MEAN = "mean"
CLEAR = 0.05  # a corrected p up to here is called clear
_BLANK = "–"

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure with its interval, as text and as positions from 0 to 1 on its column's scale."""

    value: float | None
    text: str
    interval: str  # "31.2 to 38.4", empty where there is none
    at: tuple[float, float, float] | None  # low, value, high on the scale
    is_best: bool = False
    n: int | None = None


@dataclass(frozen=True, slots=True)
class TableRow:
    """One policy: its mean, its tasks, its price."""

    policy: str
    cells: tuple[Cell, ...]  # in the order of `Table.tasks`
    tokens: float | None  # per response
    seconds: float | None
    weights: float | None  # MB of the models that it needs


@dataclass(frozen=True, slots=True)
class Table:
    """Policies × tasks."""

    tasks: tuple[str, ...]  # the mean first, where there is one
    metrics: tuple[str, ...]
    groups: tuple[tuple[str, tuple[TableRow, ...]], ...]

    @property
    def rows(self) -> tuple[TableRow, ...]:
        """All rows, group by group."""
        return tuple(row for _, rows in self.groups for row in rows)

    def row(self, policy: str | None) -> TableRow | None:
        """The row of a policy."""
        return next((row for row in self.rows if row.policy == policy), None)


@dataclass(frozen=True, slots=True)
class Compared:
    """One comparison, as text."""

    policy: str
    against: str
    task: str
    difference: str
    interval: str
    effect: str  # Cohen's d_z
    p: str
    corrected: str  # Holm over the whole table
    verdict: str  # "better", "worse", or "not clear"
    at: tuple[float, float, float]  # low, difference, high on a scale whose middle is zero


@dataclass(frozen=True, slots=True)
class Panel:
    """Who writes where in the responses of one policy."""

    policy: str
    task: str | None  # None: all tasks
    num_responses: int
    share_BW: FloatArray  # by relative position; rows sum to 1
    overall_W: FloatArray  # share of tokens
    switches: float  # changes of writer per response

    @property
    def present(self) -> list[int]:
        """Who writes at all."""
        return [int(writer) for writer in np.flatnonzero(self.overall_W)]

    def thirds(self, writer: int) -> list[float]:
        """A writer's share of the responses' first, middle and last third."""
        edges = [round(len(self.share_BW) * i / 3) for i in range(4)]
        return [float(self.share_BW[a:b, writer].mean()) for a, b in pairwise(edges)]


@dataclass(frozen=True, slots=True)
class Outcomes:
    """The same questions under two policies."""

    task: str
    second: str
    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def total(self) -> int:
        """Questions times seeds that both policies answered."""
        return self.both + self.only_first + self.only_second + self.neither


def is_fraction(*values: float | None) -> bool:
    """Whether values are shares, to be shown in percent."""
    return all(value is None or 0 <= value <= 1 for value in values)


def shares_of(results: Row) -> dict[str, bool]:
    """Task → whether its values are shares under every policy, the mean's too: what the whole page shows it in."""
    values: dict[str, list[float | None]] = {}
    for row in results.get("rows") or []:
        values.setdefault(row["task"], []).extend(row.get(key) for key in ("value", "low", "high"))
    return {task: is_fraction(*own) for task, own in values.items()}


def number(value: float | None, percent: bool, sign: bool = False) -> str:
    """`53.8` for .538 in percent, `-6.91` for a reward."""
    if value is None:
        return _BLANK
    shown = f"{100 * value:+.1f}" if percent else f"{value:+.2f}"
    return (shown if sign else shown.removeprefix("+")).replace("-", "−")


def price(value: float | None) -> str:
    """Tokens or seconds of one response, or megabytes, to about three digits."""
    if value is None:
        return _BLANK
    return next((f"{value:.{digits}f}" for least, digits in ((100, 0), (10, 1), (1, 2), (0.1, 3)) if value >= least),
                f"{value:.4f}")  # fmt: skip


def p_text(p: float | None) -> str:
    """A p-value as people write it."""
    if p is None:
        return _BLANK
    if p < 0.0001:
        return "< .0001"
    return f"{p:.{4 if p < 0.01 else 3 if p < 0.1 else 2}f}".removeprefix("0")


def table_of(results: Row) -> Table:
    """The result table, from the rows over all run seeds (of a single run seed where there is only one)."""
    rows = _over_seeds(results["rows"])
    policies = list(dict.fromkeys(policy for policy, _ in rows))
    found = list(dict.fromkeys(task for _, task in rows))
    tasks = tuple(([MEAN] if MEAN in found else []) + [task for task in found if task != MEAN])
    meta = results.get("meta") or {}
    candidates, sizes = list(meta.get("candidates") or []), meta.get("weights_bytes") or {}
    scales = {task: _scale([row for (_, t), row in rows.items() if t == task]) for task in tasks}
    best = {task: _highest([row for (_, t), row in rows.items() if t == task]) for task in tasks}
    lines: dict[str, list[TableRow]] = {}
    for policy in _ordered(policies, candidates):
        cells = tuple(_cell(rows.get((policy, task)), scales[task], best[task]) for task in tasks)
        tokens, seconds = (_price(results["rows"], policy, key) for key in ("tokens", "seconds"))
        weights = sizes[policy] / 1e6 if sizes.get(policy) else None
        row = TableRow(policy, cells, tokens, seconds, weights)
        lines.setdefault(family_of(policy, candidates), []).append(row)
    metrics = tuple(_metric([row for (_, t), row in rows.items() if t == task]) for task in tasks)
    return Table(tasks, metrics, tuple((title, tuple(group)) for title, group in lines.items()))


def focus_and_rival(table: Table, candidates: Sequence[str]) -> tuple[str | None, str | None]:
    """The policy the page is about (the switcher, else the best that is no candidate) and the best single candidate."""

    def first_value(row: TableRow) -> float:
        value = row.cells[0].value if row.cells else None
        return float("-inf") if value is None else value

    singles = [row for row in table.rows if row.policy in candidates]
    others = [row for row in table.rows if row.policy not in candidates]
    rival = max(singles, key=first_value).policy if singles else None
    named = next((row.policy for row in others if row.policy == "switcher"), None)
    focus = named or (max(others, key=first_value).policy if others else None)
    return focus, rival


def rivals_of(table: Table, candidates: Sequence[str]) -> dict[str, str]:
    """The best single candidate of each task; the earlier one where two are as good."""
    rivals = {}
    for column, task in enumerate(table.tasks):
        values = {row.policy: row.cells[column].value for row in table.rows if row.policy in candidates}
        known = {policy: value for policy, value in values.items() if value is not None}
        if known and task != MEAN:
            rivals[task] = max(known, key=lambda policy: known[policy])
    return rivals


def comparisons_of(results: Row) -> list[Compared]:
    """The comparisons with Holm's correction over all of them."""
    rows = [row for row in results.get("comparisons") or [] if row["difference"] is not None]
    tested = [row for row in rows if row.get("p") is not None]
    corrected = dict(zip([id(row) for row in tested], holm([row["p"] for row in tested]), strict=True))
    shares = shares_of(results)
    reach: dict[bool, float] = {}
    in_percent = []
    for row in rows:
        ends = [abs(row[key]) for key in ("difference", "low", "high") if row.get(key) is not None]
        # A small difference of rewards is no share: the task's values decide.
        percent = shares.get(row["task"], max(ends) <= 1)
        in_percent.append(percent)
        reach[percent] = max([reach.get(percent, 0.0), *ends])
    compared = []
    for row, percent in zip(rows, in_percent, strict=True):
        low, high = (row["difference"] if row.get(key) is None else row[key] for key in ("low", "high"))
        p = corrected.get(id(row))
        clear = p is not None and p <= CLEAR
        scale = 2 * (reach[percent] or 1.0)
        compared.append(
            Compared(
                row["policy"],
                row["against"],
                row["task"],
                number(row["difference"], percent, sign=True),
                _interval(row, percent, sign=True),
                number(row.get("effect"), percent=False, sign=True),
                p_text(row.get("p")),
                p_text(p),
                ("better" if row["difference"] > 0 else "worse") if clear else "not clear",
                (0.5 + low / scale, 0.5 + row["difference"] / scale, 0.5 + high / scale),
            )
        )
    return compared


def panels_of(responses: Responses) -> list[tuple[Panel, list[Panel]]]:
    """For each policy with several writers: all tasks together, and each task."""
    panels = []
    for policy in responses.policies:
        by_task = {task: tally for (p, task), tally in responses.tallies.items() if p == policy}
        ordered = [(task, by_task[task]) for task in responses.tasks if task in by_task]
        whole = _panel(policy, None, [tally for _, tally in ordered], len(responses.writers))
        if whole is None or np.count_nonzero(whole.overall_W) < 2:
            continue
        parts = [_panel(policy, task, [tally], len(responses.writers)) for task, tally in ordered]
        panels.append((whole, [part for part in parts if part is not None] if len(parts) > 1 else []))
    return panels


def outcomes_of(responses: Responses, first: str, rivals: Mapping[str, str]) -> list[Outcomes]:
    """Task by task, how often both, one or neither is right: a policy and the task's rival; rewards are left out."""
    outcomes = []
    for task, second in rivals.items():
        a, b = responses.tallies.get((first, task)), responses.tallies.get((second, task))
        pairs = _pairs(a, b) if a and b else []
        if pairs and is_fraction(*(value for pair in pairs for value in pair)):
            right = [(x >= RIGHT, y >= RIGHT) for x, y in pairs]
            counts = [right.count(case) for case in ((True, True), (True, False), (False, True), (False, False))]
            outcomes.append(Outcomes(task, second, *counts))
    return outcomes


def surplus_of(responses: Responses, focus: str, candidates: Sequence[str]) -> dict[str, SolvedAlone]:
    """Task by task, what only switching solves; empty where seeds, candidates or scores are missing."""
    surplus = {}
    for task in responses.tasks:
        tallies = {name: responses.tallies.get((name, task)) for name in (focus, *candidates)}
        if len(tallies) < 2 or any(tally is None for tally in tallies.values()):
            continue
        keys = set.intersection(*(set(tally.scores) for tally in tallies.values() if tally))
        seeds = sorted({seed for _, seed in keys})
        ids = sorted(id for id in {id for id, _ in keys} if all((id, seed) in keys for seed in seeds))
        scores = {
            name: [[tally.scores[id, seed] for id in ids] for seed in seeds] for name, tally in tallies.items() if tally
        }
        values = [value for rows in scores.values() for row in rows for value in row]
        if len(seeds) < 2 or not ids or None in values or not is_fraction(*values):
            continue
        focus_SQ = np.array(scores.pop(focus), dtype=float)
        surplus[task] = solved_by_none_else(focus_SQ, {n: np.array(v, dtype=float) for n, v in scores.items()})
    return surplus


def _over_seeds(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """The row over all seeds of each policy and task; a lone seed's row stands in for it."""
    chosen: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row["policy"], row["task"]
        if key not in chosen or (row.get("seed") is None and chosen[key].get("seed") is not None):
            chosen[key] = row
    return chosen


def _ordered(policies: Sequence[str], candidates: Sequence[str]) -> list[str]:
    singles = [name for name in candidates if name in policies]
    return singles + [name for name in policies if name not in candidates]


def _scale(rows: Sequence[Row]) -> tuple[float, float]:
    """The range of a column's axis: 0 to 1 for shares, else what is there."""
    ends = [row[key] for row in rows for key in ("value", "low", "high") if row.get(key) is not None]
    if not ends or is_fraction(*ends):
        return 0.0, 1.0
    return min(ends), max(max(ends), min(ends) + 1e-9)


def _highest(rows: Sequence[Row]) -> float | None:
    return max((row["value"] for row in rows if row["value"] is not None), default=None)


def _cell(row: Row | None, scale: tuple[float, float], best: float | None) -> Cell:
    if row is None or row["value"] is None:
        return Cell(None, _BLANK, "", None)
    low, value, high = (row["value"] if row.get(key) is None else row[key] for key in ("low", "value", "high"))
    percent = scale == (0.0, 1.0)
    at = tuple((end - scale[0]) / (scale[1] - scale[0]) for end in (low, value, high))
    return Cell(
        value, number(value, percent), _interval(row, percent), (at[0], at[1], at[2]), value == best, row.get("n")
    )


def _interval(row: Row, percent: bool, sign: bool = False) -> str:
    if row.get("low") is None or row.get("high") is None:
        return ""
    return f"{number(row['low'], percent, sign)} to {number(row['high'], percent, sign)}"


def _metric(rows: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(str(row["metric"]).replace("_", " ") for row in rows if row.get("metric")))


def _price(rows: Sequence[Row], policy: str, key: str) -> float | None:
    """Tokens or seconds of one response, over all tasks: a row holds the sum over its responses."""
    priced = [row for row in rows if row["policy"] == policy and row["task"] != MEAN and row.get(key) is not None]
    # rows of single seeds where there are any: their n is the number of responses, whatever `n` is over all seeds
    used = [row for row in priced if row.get("seed") is not None] or priced
    count = sum(row.get("n") or 0 for row in used)
    return sum(row[key] for row in used) / count if count else None


def _panel(policy: str, task: str | None, tallies: Sequence[Tally], num_writers: int) -> Panel | None:
    share_BW = sum((_widened(tally.share_BW, num_writers) for tally in tallies), np.zeros((1, num_writers)))
    totals_B = share_BW.sum(axis=1, keepdims=True)
    count = sum(tally.num_responses for tally in tallies)
    tokens_W = sum((_widened(tally.tokens_W[None], num_writers)[0] for tally in tallies), np.zeros(num_writers))
    if not tokens_W.sum():
        return None
    switches = sum(tally.num_switches for tally in tallies) / count
    return Panel(policy, task, count, share_BW / totals_B, tokens_W / tokens_W.sum(), switches)


def _widened(counts: FloatArray, num_writers: int) -> FloatArray:
    return np.pad(counts, ((0, 0), (0, num_writers - counts.shape[1])))


def _pairs(a: Tally, b: Tally) -> list[tuple[float, float]]:
    """Scores of the same question and seed; a policy with one seed stands for itself in all."""
    pairs = []
    single = {id: score for (id, _), score in b.scores.items()} if len({s for _, s in b.scores}) == 1 else {}
    for (id, seed), score in a.scores.items():
        other = b.scores.get((id, seed), single.get(id))
        if score is not None and other is not None:
            pairs.append((float(score), float(other)))
    return pairs
