"""A run folder with a tiny ladder and label records whose label depends on a word of the query."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml
from ladders import save_ladder

from switchgen.records import label_record
from switchgen.rundir import Run, open_run
from switchgen.trace import Query

NAMES = ("base", "tuned", "aligned")
WORDS = ("apples", "pears", "plums")
LAB_WORDS = ("age", "height", "weight")
"""The lab's models know these; of other words they have hardly seen the letters."""


def label_records(
    count: int, *, seed: int = 0, states: int = 1, ties: int = 0, words: tuple[str, str, str] = WORDS
) -> list[dict[str, Any]]:
    """States whose best candidate is the index of the word that the query names."""
    rng = random.Random(seed)
    records = []
    for index in range(count):
        word = rng.randrange(3)
        query = Query.from_text(f"List {index}: {words[word]} and {rng.randrange(99)}", id=f"q{index}")
        for state in range(states):
            prefix = [(rng.randrange(3), f" {rng.choice('abc')} {rng.randrange(99)}.") for _ in range(rng.randrange(3))]
            scores = [[1.0, 1.0] if writer == word else [0.0, rng.choice([0.0, 1.0])] for writer in range(3)]
            if index < ties:
                scores = [[0.5, 0.5]] * 3
            records.append(
                label_record(
                    state_id=f"q{index}/{state}",
                    query=query,
                    task="fruit",
                    prefix=prefix,
                    names=NAMES,
                    scores=scores,
                    tokens=10,
                )  # fmt: skip
            )
    return records


def write_labels(run_dir: Path, records: list[dict[str, Any]], shard: str = "0") -> None:
    """As a rollout leaves them."""
    path = run_dir / "rollout" / f"labels-{shard}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_run(folder: Path, train: dict[str, Any], *, ladder: Path | None = None, **sections: Any) -> Run:
    """A recipe over a tiny ladder, opened, its run folder beside it; random models in `folder` where none are given."""
    if ladder is None:
        ladder = folder / "ladder"
        if not ladder.is_dir():
            save_ladder(ladder, NAMES)
    models = [ladder / name for name in NAMES] if (ladder / NAMES[0]).is_dir() else [ladder / "aligned"] * 3
    recipe = {
        "pool": [{"name": name, "model": str(model)} for name, model in zip(NAMES, models, strict=True)],
        "train": train,
        **sections,
    }
    path = folder / "fruit.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return open_run(str(path), [], folder / "run")
