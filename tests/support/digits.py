"""A ladder with random weights, a task and queries, and the part of a recipe that names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ladders import save_ladder

NAMES = ("base", "tuned", "aligned")


def save_digits(folder: Path, train: int, test: int, queries: int) -> dict[str, Any]:
    """Write `ladder/`, `digits.json` with so many rows, and `queries.jsonl`; a recipe over them, in float64."""
    save_ladder(folder / "ladder", NAMES)
    rows = [{"id": str(i), "input": f"{i}: which digit?", "output": str(i % 10)} for i in range(train)]
    task = {"name": "digits", "task_type": "exact_match", "train": rows, "test": rows[:test]}
    (folder / "digits.json").write_text(json.dumps(task))
    (folder / "queries.jsonl").write_text("".join(json.dumps({"input": f"Query {i}?"}) + "\n" for i in range(queries)))
    return {
        "pool": [{"name": name, "model": str(folder / "ladder" / name), "dtype": "float64"} for name in NAMES],
        "decoding": {"max_new_tokens": 32, "segment": 8},
        "engine": {"max_rows": 8, "threads": 1},
        "tasks": [{"file": str(folder / "digits.json")}],
    }
