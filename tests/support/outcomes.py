"""What a run folder holds: finished records of every stage, weights, results; and whether two folders hold the same."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

STAGES = ("rollout", "train", "distill", "infer", "evaluate")
FITS = {"train": "switcher", "distill": "distilled"}
VOLATILE = frozenset({"seconds", "date", "tokens_per_second"})
TOLERANCE = 1e-5
Record = dict[str, Any]
Key = tuple[str, str]


def record_files(folder: Path, stage: str) -> Iterator[tuple[str, Path]]:
    """(kind, file) of a stage's record files; shards of several workers are of one kind."""
    patterns = {
        "rollout": "rollout/*.jsonl", "train": "", "distill": "distill-data/**/*.jsonl", "infer": "infer/**/rows.jsonl",
        "evaluate": "evaluation/**/*.jsonl",
    }  # fmt: skip
    for path in sorted(folder.glob(patterns[stage])) if patterns[stage] else []:
        kind = path.name.partition("-")[0] if stage == "rollout" else path.name
        yield f"{stage}/{kind}", path


def whole_lines(path: Path) -> bytes:
    """A file without a torn last line; empty where it was gathered and removed since it was listed."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return b""
    return content[: content.rfind(b"\n") + 1]


def records_of(folder: Path, stage: str) -> Iterator[tuple[Key, Record]]:
    """Finished records with what they are known by."""
    for kind, path in record_files(folder, stage):
        for line in whole_lines(path).splitlines():
            record = json.loads(line)
            yield (kind, str(record["id"])), record


def repeated(folder: Path) -> int:
    """Records that stand in the finished files more than once."""
    counts = Counter(key for stage in STAGES for key, _ in records_of(folder, stage))
    return sum(count - 1 for count in counts.values())


def difference(one: Any, other: Any) -> float:
    """The largest difference of floats; infinite where anything else differs."""
    if isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        return max((difference(one[key], other[key]) for key in one if key not in VOLATILE), default=0.0)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return max((difference(x, y) for x, y in zip(one, other, strict=True)), default=0.0)
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other)
    return 0.0 if one == other and type(one) is type(other) else float("inf")


def final_state(folder: Path, stages: list[str]) -> dict[str, Any]:
    """Everything that a finished run is judged by: records by id, answers in order, results, weights."""
    from safetensors.numpy import load_file

    state: dict[str, Any] = {}
    for stage in stages:
        state |= {"/".join(key): record for key, record in records_of(folder, stage)}
    if "infer" in stages:
        state["answers"] = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    if "evaluate" in stages:
        results = json.loads((folder / "evaluation" / "results.json").read_text())
        state["results"] = [{key: value for key, value in row.items() if key not in VOLATILE}
                            for row in (*results["rows"], *results["comparisons"])]  # fmt: skip
    for stage, name in FITS.items():
        for path in sorted((folder / name).glob("*.safetensors")) if stage in stages else []:
            state |= {f"{name}/{key}": value.ravel().tolist() for key, value in load_file(path).items()}
    return state


def unequal(whole: Mapping[str, Any], end: Mapping[str, Any]) -> int:
    """Records that only one of two runs has, or that differ."""
    return sum(
        key not in whole or key not in end or not difference(whole[key], end[key]) <= TOLERANCE
        for key in {*whole, *end}
    )
