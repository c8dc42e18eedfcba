"""Every scored task file of the test data, evaluated: the first min(50, rows) test rows of each.

    SWITCHGEN_TEST_DATA=DIR python scripts/measure_tasks.py [--rows 50] [--policies random] [a.b=c ...]

DIR holds the .json task files. Files scored by a reward model or over all responses together (diversity) need more than
answers and are left out, by name. Rows beyond the ladder's context are listed and counted as wrong. The ladder is the
recipe's (default: lab); what it answers is not the point, that every file is read, asked, answered and scored is.
Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from infer.evaluation import main as evaluate  # noqa: E402
from switchgen.commandline import parse_with_settings  # noqa: E402
from switchgen.rundir import open_run  # noqa: E402
from switchgen.scoring import METRICS  # noqa: E402
from switchgen.tasks import load_task  # noqa: E402


def scored_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Files whose responses are scored one by one, and why others are not among them."""
    scored, others = [], []
    for path in sorted(folder.glob("*.json")):
        metric = load_task({"file": str(path)}).metric
        if METRICS[metric].score is None:
            others.append(f"{path.name}: {metric}")
        else:
            scored.append(path)
    return scored, others


def summary_of(run_dir: Path, document: dict[str, Any], files: list[Path], rows: int) -> list[dict[str, Any]]:
    """One entry per file: rows asked, answered, beyond the context, and the values."""
    entries = []
    for path in files:
        task = load_task({"file": str(path)})
        cells = [r for r in document["rows"] if r["task"] == task.name and r["seed"] is None]
        lines = [
            json.loads(line)
            for part in (run_dir / "evaluation" / "responses").glob(f"*--{task.name}--*.jsonl")
            for line in part.read_text(encoding="utf-8").split("\n")
            if line
        ]
        entries.append(
            {
                "file": path.name,
                "metric": task.metric,
                "rows": min(rows, len(task.examples)),
                "responses": len(lines),
                "scored": sum(line["score"] is not None for line in lines),
                "beyond_context": document["meta"]["not_answered"].get(task.name, []),
                "value": {cell["policy"]: round(cell["value"], 4) for cell in cells},
            }
        )
    return entries


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="lab")
    parser.add_argument("--policies", nargs="+", default=["random"])
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    arguments = parse_with_settings(parser)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    data = os.environ.get("SWITCHGEN_TEST_DATA")
    if not data:
        print("SWITCHGEN_TEST_DATA is not set; it names the folder of task files", file=sys.stderr)
        return 2
    files, others = scored_files(Path(data))
    with tempfile.TemporaryDirectory() as folder:
        tasks = yaml.safe_dump([{"file": str(path)} for path in files], default_flow_style=True, width=10**6).strip()
        overrides = [f"tasks={tasks}", f"evaluate.policies=[{', '.join(arguments.policies)}]", "evaluate.seeds=[0]",
                     f"evaluate.limit={arguments.rows}", *arguments.overrides]  # fmt: skip
        run = open_run(arguments.recipe, overrides, Path(folder) / "run")
        started, busy = time.monotonic(), time.process_time()
        document = evaluate(run)
        seconds, busy = time.monotonic() - started, time.process_time() - busy
        started = time.monotonic()
        again = evaluate(run, rescore=True)
        rescoring = time.monotonic() - started
        entries = summary_of(run.dir, document, files, arguments.rows)
    wanted = [entry["rows"] * len(arguments.policies) for entry in entries]
    line = {
        "measure": "tasks",
        "policies": arguments.policies,
        "files": entries,
        "left_out": others,
        "responses": sum(entry["responses"] for entry in entries),
        "beyond_context": sum(len(entry["beyond_context"]) for entry in entries),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(busy, 1),
        "rescoring_seconds": round(rescoring, 2),
        "rescored_equal": again["rows"] == document["rows"],
        "passed": [entry["scored"] for entry in entries] == wanted,
        "load": [round(value, 1) for value in os.getloadavg()],
    }
    print(json.dumps(line, ensure_ascii=False))
    return 0 if line["passed"] and line["rescored_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
