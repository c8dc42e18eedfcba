"""The lab's figures on BACo, from run folders: Coverage and Dominance, and the calibrated operating point on test.

    switchgen sweep lab; switchgen calibrate lab --quality 0.95 sweep.prompts=60
    python scripts/measure_baco.py runs/lab
    python scripts/measure_baco.py runs/lab runs/seed-1 runs/seed-2 --evaluate

Each folder is one world seed, with a finished `sweep` (dev and test) and `calibrate`. The router is chosen on dev (the
highest Coverage, mean over the folders), everything else is read on test; the calibrated point and the aligned model
alone write on `--prompts` test prompts first. Differences are paired by prompt and bootstrapped over the prompts of
each folder; means over folders weigh each the same. With `--evaluate` the exact families are answered under `aligned`
and under the calibrated policy first (`switchgen evaluate`, into RUN/calibrated). One JSON line last.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from infer.calibrate import calibration_points, compare, records_of
from infer.frontier import FloatArray, estimate
from infer.sweep_results import planes_of, score_methods

JSON = dict[str, Any]
RESAMPLES = 2000
LEXICAL_AND_CLUSTERS = ("distinct_1", "distinct_2", "distinct_3", "adjusted_distinct", "self_bleu", "ngram_overlap",
                        "compression_ratio", "num_clusters")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--evaluate", action="store_true", help="evaluate the exact families at the calibrated γ, too")
    parser.add_argument("--calibrated-only", action="store_true", help="no Coverage and Dominance: no sweep is needed")
    parser.add_argument("--recipe", default="lab", help="the folders' recipe")
    parser.add_argument("--prompts", type=int, default=120, help="test prompts for the calibrated point")
    parser.add_argument("--limit", type=int, default=120, help="questions a family for --evaluate")
    arguments = parser.parse_args()
    figure: JSON = {"world_seeds": len(arguments.runs)}
    if not arguments.calibrated_only:
        figure |= coverage_and_dominance(arguments.runs)
    figure["calibrated"] = [calibrated(run.resolve(), arguments.recipe, arguments.prompts) for run in arguments.runs]
    if arguments.evaluate:
        figure["exact"] = [
            exact_families(run, entry["policy"], arguments.recipe, arguments.limit)
            for run, entry in zip(arguments.runs, figure["calibrated"], strict=True)
        ]
    print(json.dumps(figure))


def coverage_and_dominance(runs: Sequence[Path]) -> JSON:
    """Of the router that dev chooses, on test, and its differences to every baseline."""
    sweeps = [json.loads((run / "sweep" / "results.json").read_text()) for run in runs]
    dev = mean_scores([sweep["splits"]["dev"] for sweep in sweeps])
    test = mean_scores([sweep["splits"]["test"] for sweep in sweeps])
    is_baco = {m["name"]: m["is_baco"] for m in sweeps[0]["splits"]["test"]["methods"]}
    router = max((name for name in dev if is_baco[name]), key=lambda name: dev[name]["coverage"][0])
    baselines = [name for name in test if not is_baco[name]]
    figure: JSON = {"router": router}
    for key in ("coverage", "dominance"):
        own = test[router][key]
        print(f"\n{key} of {router} (chosen on dev) on test: {shown(estimate(own))}")
        figure[key] = rounded(estimate(own))
        figure[f"{key}_minus"] = {}
        for name in sorted(baselines, key=lambda name: -test[name][key][0]):
            difference = estimate(own - test[name][key])
            figure[f"{key}_minus"][name] = rounded(difference)
            print(f"  {name:16} {test[name][key][0]:.3f}   difference {shown(difference)}")
    return figure


def mean_scores(splits: list[JSON]) -> dict[str, dict[str, FloatArray]]:
    """Coverage and Dominance of each method per resample: means over planes, then over the folders."""
    found: dict[str, dict[str, list[FloatArray]]] = {}
    for seed, split in enumerate(splits):
        points = split["points"]
        planes = [(x, y) for x, y in planes_of(points) if x in LEXICAL_AND_CLUSTERS and y != "reward"]
        names, areas, shares = score_methods(points, planes, RESAMPLES, seed)
        for index, name in enumerate(names):
            entry = found.setdefault(name, {"coverage": [], "dominance": []})
            entry["coverage"].append(areas[:, :, index].mean(axis=0))
            entry["dominance"].append(shares[:, :, index].mean(axis=0))
    return {name: {key: np.mean(values, axis=0) for key, values in entry.items()} for name, entry in found.items()}


def calibrated(run: Path, recipe: str, prompts: int) -> JSON:
    """The point that `calibrate` chose, on test, against the aligned model alone; more prompts than a sweep has."""
    from switchgen.rundir import open_run

    chosen = json.loads((run / "calibration.json").read_text())
    settings = [f"sweep.prompts={prompts}", f"decoding.temperature={chosen['temperature']}"]
    opened = open_run(recipe, settings, run)
    aligned, *routers = calibration_points(opened)
    own = next((point for point in (*routers, aligned) if point.policy == chosen["policy"]), None)
    if own is None:
        raise SystemExit(f"{run}: {chosen['policy']}, which was chosen, is no point of the sweep of recipe {recipe}")
    records, ids = records_of(opened, "test", [aligned, own] if own is not aligned else [aligned])
    pair = [records[0], records[-1]]
    entry = compare(pair, chosen["diversity"]["metric"], chosen["quality"]["metric"], RESAMPLES)[1]
    print(f"\n{run}: calibrated on dev for {chosen['wanted']}: {chosen['policy']}")
    found: JSON = {"policy": chosen["policy"], "wanted": chosen["wanted"], "prompts": len(ids)}
    for axis in ("quality", "diversity"):
        ratio = entry[axis]
        print(
            f"  test {chosen[axis]['metric']} ÷ aligned: {ratio['ratio']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        )
        found[axis] = {"metric": chosen[axis]["metric"], **{k: round(ratio[k], 4) for k in ("ratio", "low", "high")}}
    return found


def exact_families(run: Path, policy: str, recipe: str, limit: int) -> JSON:
    """Accuracy of the calibrated policy minus the aligned model's, by exact family, in points."""
    from infer.evaluation import main as evaluate
    from switchgen.rundir import open_run

    folder = run / "calibrated"
    folder.mkdir(exist_ok=True)
    if (run / "lab").is_dir() and not (folder / "lab").exists():
        (folder / "lab").symlink_to((run / "lab").resolve())
    aligned = open_run(recipe, [], folder).recipe.names[-1]
    overrides = [f"evaluate.policies=[{aligned}, {policy}]", f"evaluate.limit={limit}"]
    document = evaluate(open_run(recipe, overrides, folder))
    value = {(row["policy"], row["task"]): row["value"] for row in document["rows"] if row["seed"] is None}
    tasks = [task for name, task in value if name == policy and task not in ("mean", "open")]
    found = {task: round(100 * (value[policy, task] - value[aligned, task]), 1) for task in tasks}
    print(f"  exact families, {policy} − {aligned}, points: {found}")
    return found


def shown(figure: Any) -> str:
    return f"{figure.value:+.3f} [{figure.low:+.3f}, {figure.high:+.3f}]"


def rounded(figure: Any) -> list[float]:
    return [round(value, 4) for value in (figure.value, figure.low, figure.high)]


if __name__ == "__main__":
    main()
