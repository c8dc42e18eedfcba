"""Regret of labels against the tokens they cost: uniform with k = 2, 4, 8, 16, 32 completions, and racing beside it.

    python scripts/measure_labels.py --run-dir runs/lab-truth --states 200 --completions 512
    python scripts/measure_labels.py --run-dir runs/seed-7 --ladder runs/other/lab --world-seed 7
    python scripts/measure_labels.py --run-dir runs/lab-truth --states 20 --completions 32 --reps 5    # to see it work

The truth is one uniform rollout of many completions (in the run folder, gone on with if it is there); a candidate's
true mean is its mean over them, and regret is the best true mean minus the label's. Budgets are simulated on draws,
with replacement, of those completions, pair by pair, the same draws for every budget, so that no point generates
anything. Branches that write the same segment share their completions in both budgets; `paper_tokens` is what uniform
costs where they do not. Intervals (95%) are a bootstrap over states; differences are paired by state.
One JSON line last.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from rollout.budgets import Budget, RacingBudget, UniformBudget
from rollout.stage import main as rollout
from switchgen.commandline import parse_with_settings
from switchgen.config import RacingConfig
from switchgen.records import read_records
from switchgen.rundir import open_run

UNIFORM = (2, 4, 8, 16, 32)
BOOTSTRAP = 2000
TRUE_TIE = 0.05
VARIANTS: dict[str, dict[str, Any]] = {
    "racing, margin .1": {"margin": 0.1},
    "racing, margin .3": {"margin": 0.3},
    "racing, margin .45": {"margin": 0.45},
    **{
        f"racing, start 2, confidence {confidence}, margin {margin}": {
            "start": 2, "step": 1, "confidence": confidence, "margin": margin}
        for confidence in (0.9, 0.85, 0.8) for margin in (0.2, 0.25, 0.3, 0.35, 0.4, 0.45)
    },
    "racing, max 16": {"max": 16},
}  # fmt: skip
"""Beside the recipe's default: racing's curve goes by margin and confidence, as uniform's goes by k."""
Record = dict[str, Any]


def truth_records(arguments: argparse.Namespace) -> list[Record]:
    """The truth's label records; they are written first where they are not there."""
    overrides = [f"rollout.queries={-(-arguments.states // 2)}", "rollout.states=2", "rollout.budget=uniform",
                 f"rollout.completions={arguments.completions}", *arguments.overrides]  # fmt: skip
    if arguments.world_seed is not None:
        overrides.append(f"lab.seed={arguments.world_seed}")
    if arguments.ladder is not None and not (arguments.run_dir / "lab").exists():
        arguments.run_dir.mkdir(parents=True, exist_ok=True)
        (arguments.run_dir / "lab").symlink_to(arguments.ladder.resolve(), target_is_directory=True)
    run = open_run(arguments.recipe, overrides, arguments.run_dir)
    if not arguments.as_it_is:
        rollout(run, workers=arguments.workers)
    return list(read_records(sorted((run.dir / "rollout").glob("labels-*.jsonl"))))


def spend(budget: Budget, scores: list[list[float]], ended: list[bool]) -> tuple[int, int]:
    """(label, completions) of a budget on one state whose completions are there already."""
    seen = [list(own) if over else [] for own, over in zip(scores, ended, strict=True)]
    while any(more := budget.more(seen, ended)):
        seen = [own[: len(got) + count] if count else got
                for own, got, count in zip(scores, seen, more, strict=True)]  # fmt: skip
    return budget.verdict(seen, ended).label, sum(len(got) for got, over in zip(seen, ended, strict=True) if not over)


def simulate(budget: Budget, records: list[Record], longest: int, reps: int, seed: int) -> np.ndarray:
    """[states, 2]: regret and tokens of each state, means over `reps` draws; the same draws for every budget."""
    rng = random.Random(seed)
    figures = np.zeros((len(records), 2))
    for _ in range(reps):
        for index, record in enumerate(records):
            own = [branch for branch, twin in enumerate(record["twin_of"]) if twin is None]
            means, ended = ([record[key][branch] for branch in own] for key in ("means", "finished"))
            count = max(record["counts"])
            drawn = [rng.randrange(count) for _ in range(longest)]
            scores = [record["scores"][branch] if over else [record["scores"][branch][j] for j in drawn]
                      for branch, over in zip(own, ended, strict=True)]  # fmt: skip
            label, completions = spend(budget, scores, ended)
            figures[index] += max(record["means"]) - means[label], tokens_of(record, completions)
    return figures / reps


def tokens_of(record: Record, completions: int) -> float:
    """Tokens that a state costs: its trace and branches, and so many completions of its mean length."""
    written = [count for count, twin, over in zip(record["counts"], record["twin_of"], record["finished"], strict=True)
               if twin is None and not over]  # fmt: skip
    each = record["completion_tokens"] / max(1, sum(written))
    return float(record["tokens"] - record["completion_tokens"] + completions * each)


def interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """Mean, low, high: bootstrap over states."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (BOOTSTRAP, len(values)))].mean(axis=1)
    return [round(float(value), 5) for value in (values.mean(), *np.quantile(means, [0.025, 0.975]))]


def ratio(tokens: np.ndarray, others: np.ndarray, seed: int = 0) -> list[float]:
    """Ratio of mean tokens, low, high: bootstrap over states."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(tokens), (BOOTSTRAP, len(tokens)))
    ratios = tokens[drawn].mean(axis=1) / others[drawn].mean(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return [round(float(value), 4) for value in (tokens.mean() / others.mean(), low, high)]


def paper_tokens(records: list[Record], k: int) -> float:
    """Tokens a state of uniform k where every branch writes its own completions, repeated or not."""
    return float(np.mean([tokens_of(record, k * record["finished"].count(False)) for record in records]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="lab")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--ladder", type=Path, help="a built ladder's folder (default: the shipped one)")
    parser.add_argument("--world-seed", type=int, help="the ladder's (default: the recipe's)")
    parser.add_argument("--as-it-is", action="store_true", help="use the states that are there, write none")
    parser.add_argument("--states", type=int, default=200)
    parser.add_argument("--completions", type=int, default=512)
    parser.add_argument("--reps", type=int, default=20, help="draws of completions a state")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    arguments = parse_with_settings(parser)
    records = truth_records(arguments)
    racing = RacingConfig()
    budgets: dict[str, Budget] = {f"uniform {k}": UniformBudget(k) for k in UNIFORM}
    budgets |= {"racing": RacingBudget(racing)}
    budgets |= {name: RacingBudget(racing.model_copy(update=changes)) for name, changes in VARIANTS.items()}
    longest = max(*UNIFORM, racing.max)
    found = {name: simulate(budget, records, longest, arguments.reps, seed=1) for name, budget in budgets.items()}
    rows = {}
    print(f"{'budget':<46} {'regret [95%]':<32} tokens a state   of uniform 32's")
    for name, figures in found.items():
        share = figures[:, 1].mean() / found["uniform 32"][:, 1].mean()
        rows[name] = {"regret": interval(figures[:, 0]), "tokens": round(float(figures[:, 1].mean()), 1),
                      "share_of_uniform_32": round(float(share), 3)}  # fmt: skip
        print(f"{name:<46} {rows[name]['regret']!s:<32} {rows[name]['tokens']:<16} {share:.1%}")
    means = np.array([record["means"] for record in records])
    print(json.dumps({
        "states": len(records),
        "completions": max(max(record["counts"]) for record in records),
        "true_ties": round(float(np.mean(np.sort(means)[:, -1] - np.sort(means)[:, -2] < TRUE_TIE)), 3),
        "world_seed": arguments.world_seed or 0,
        "budgets": rows,
        "minus_uniform": {name: {k: {
            "regret": interval(figures[:, 0] - found[f"uniform {k}"][:, 0]),
            "spend_ratio": ratio(figures[:, 1], found[f"uniform {k}"][:, 1]),
        } for k in UNIFORM} for name, figures in found.items() if name.startswith("racing")},
        "paper_tokens": {f"uniform {k}": round(paper_tokens(records, k), 1) for k in UNIFORM},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
