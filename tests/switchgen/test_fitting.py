"""Batches that do not fit: allocations that really fail, in a process whose address space is limited."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from switchgen.engines.fitting import in_batches, out_of_memory

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, logging, resource, sys
import torch
from reference import collaborate, make_ladder
from switchgen.config import DecodingConfig
from switchgen.trace import Query

torch.set_num_threads(1)
warnings = []
class Record(logging.Handler):
    def emit(self, record):
        warnings.append((record.levelname, record.getMessage()))
logging.getLogger("switchgen").addHandler(Record())
logging.getLogger("switchgen").setLevel(logging.INFO)

ladder = make_ladder(["llama"], max_slots=64, max_positions=60_000)
queries = [Query.from_text(f"How old is Vudak? {row} " * 20, id=str(row)) for row in range(24)]
# Once they outgrow their first size, caches are sized for responses of this length; a sentence ends them long before.
decoding = DecodingConfig(max_new_tokens=int(sys.argv[2]), segment={"tokens": 12, "end": "sentence"}, stop=["."])
if sys.argv[1] != "all":
    used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
    limit = used * 1024 + int(sys.argv[1]) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
traces = collaborate(ladder, queries, 0, decoding)
print(json.dumps({
    "traces": [[(segment.writer, segment.ids) for segment in trace.segments] for trace in traces],
    "slots": ladder.pool.candidates[0].engine.max_slots,
    "warnings": warnings,
}))
"""


def run(limit: str, tokens: int) -> Any:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]),
                   "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}  # fmt: skip
    process = subprocess.run([sys.executable, "-c", PROGRAM, limit, str(tokens)], env=environment, text=True,
                             capture_output=True, check=False)  # fmt: skip
    if process.returncode:
        return process.stderr
    return json.loads(process.stdout.strip().split("\n")[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address-space limits are Linux's")
def test_a_batch_that_does_not_fit_is_halved() -> None:
    """24 rows of 50,000 positions are 700 MB; with room for less, fewer rows at a time, and the same tokens."""
    free = run("all", 50_000)
    assert free["slots"] == 64 and not [text for _, text in free["warnings"] if "fit" in text]
    tight = run("600", 50_000)
    assert tight["slots"] < 24
    assert tight["traces"] == free["traces"]
    said = [level for level, text in tight["warnings"] if "do not fit in memory" in text]
    assert said[0] == "WARNING" and set(said[1:]) <= {"INFO"}, "one warning"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address-space limits are Linux's")
def test_a_single_row_that_does_not_fit_is_an_error() -> None:
    said = run("1", 50_000)
    assert "not even one row" in said and "a smaller engine.max_rows" in said


class Engine:
    name = "engine"
    halved = False
    max_slots = 8

    def clear(self) -> None:
        pass


def test_only_failed_allocations_are_tried_again() -> None:
    def fail(_: Any) -> list[int]:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        in_batches(Engine(), [1, 2], [], fail)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert out_of_memory(caught.value)
