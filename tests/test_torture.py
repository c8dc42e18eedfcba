"""A short session of `scripts/torture`: kills at random instants, nothing lost, nothing twice, the end is the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from outcomes import difference, unequal

ROOT = Path(__file__).resolve().parents[1]


def torture(*words: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "scripts" / "torture.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


@pytest.mark.slow
def test_all_stages() -> None:
    figures = torture("--kills", "6", "--seed", "3", "--size", "6")
    assert figures["kills"] == 6 and figures["records"] > 60
    assert (figures["lost"], figures["twice"], figures["unequal"]) == (0, 0, 0)


@pytest.mark.slow
def test_workers_and_their_parents() -> None:
    figures = torture("--kills", "3", "--seed", "5", "--stages", "rollout", "infer", "--workers", "2", "--size", "6")
    assert figures["kills"] == 3
    assert (figures["lost"], figures["twice"], figures["unequal"]) == (0, 0, 0)


def test_what_counts_as_a_difference() -> None:
    record = {"text": "a", "scores": [1.0, 0.5], "seconds": 3.0}
    assert difference(record, {**record, "seconds": 9.0}) == 0
    assert difference(record, {**record, "scores": [1.0, 0.5 + 1e-7]}) == pytest.approx(1e-7)
    for other in (
        {**record, "text": "b"},
        {**record, "scores": [1.0]},
        {**record, "more": 1},
        {**record, "text": None},
    ):
        assert difference(record, other) == float("inf")
    assert unequal({"a": 1.0, "b": 2.0}, {"a": 1.0 + 1e-9, "c": 2.0}) == 2
