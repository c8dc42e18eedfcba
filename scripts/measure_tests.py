#!/usr/bin/env python3
"""Runs the tests behind one row of docs/figures.md and prints what they counted, one JSON line last.

python scripts/measure_tests.py equivalence|text|bad-input|wheel|imports
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = {
    "equivalence": ["tests/switchgen/test_loop.py", "tests/switchgen/test_engines.py", "tests/switchgen/test_slots.py",
                    "tests/switchgen/test_rows.py", "tests/switchgen/test_candidates.py",
                    "tests/switchgen/test_routers_in_loop.py", "tests/rollout", "tests/infer/test_batch.py"],
    "text": ["tests/switchgen/test_vocabulary.py", "tests/switchgen/test_prompts.py"],
    "bad-input": ["tests/test_bad_input.py"],
    "wheel": ["tests/test_wheel.py"],
    "imports": ["tests/test_imports.py"],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=ROWS)
    row = parser.parse_args().row
    started = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-m", "not gpu", "-rA", "--no-header", *ROWS[row]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-6000:])
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout[-400:])
    }
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({"row": row, **counts, "seconds": seconds, "exit": done.returncode}))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
