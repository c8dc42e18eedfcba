#!/usr/bin/env python3
"""Two worker processes against one: throughput of rollouts in steady state, and whether the records are equal.

    python scripts/measure_workers.py [--run-dir runs/workers] [--queries 300]

`switchgen rollout lab` in float64, one thread a process, with one worker and with two, each in a folder of its own. The
time is that of the work: loading the models is reported apart. One JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from switchgen.records import read_records  # noqa: E402

JSON = dict[str, Any]


def rollout(folder: Path, workers: int, queries: int) -> JSON:
    """The summary of a rollout, from a finished one if there is one."""
    summary = folder / "rollout" / "summary.json"
    if not summary.exists():
        command = [sys.executable, "-m", "switchgen", "rollout", "lab", f"rollout.queries={queries}",
                   *(f"pool.{index}.dtype=float64" for index in range(3)), "--workers", str(workers),
                   "--run-dir", str(folder)]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found: JSON = json.loads(summary.read_text(encoding="utf-8"))
    return found


def records_of(folder: Path) -> dict[str, JSON]:
    """Label records by id."""
    return {record["id"]: record for record in read_records(sorted((folder / "rollout").glob("labels-*.jsonl")))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs" / "workers", help="where the rollouts lie")
    parser.add_argument("--queries", type=int, default=300)
    arguments = parser.parse_args()
    folders = {workers: (arguments.run_dir / str(workers)).resolve() for workers in (1, 2)}
    commands = {workers: rollout(folder, workers, arguments.queries)["command"] for workers, folder in folders.items()}
    one, two = (records_of(folder) for folder in folders.values())
    unequal = [name for name in one.keys() | two.keys() if one.get(name) != two.get(name)]
    seconds = {workers: command["work_seconds"] for workers, command in commands.items()}
    figure = {
        "states": len(one),
        "unequal_records": len(unequal),
        "work_seconds": seconds,
        "load_seconds": {workers: command["load_seconds"] for workers, command in commands.items()},
        "throughput_ratio": round(seconds[1] / seconds[2], 3),
    }
    print(json.dumps(figure))
    return 0


if __name__ == "__main__":
    sys.exit(main())
