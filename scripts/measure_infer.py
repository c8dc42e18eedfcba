"""`infer` on 800 real instructions: all lines there, in order, joined segments = output; seconds and tokens per second.

    SWITCHGEN_TEST_DATA=DIR python scripts/measure_infer.py [--policies random switcher] [--rows 800] [--tokens 256]

DIR holds input_sample.jsonl. The ladder is the recipe's (default: lab); a policy `switcher` without a trained switcher
in the run folder is measured as `untuned`, and the line says so. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from infer.batch import main as infer  # noqa: E402
from switchgen.commandline import parse_with_settings  # noqa: E402
from switchgen.rundir import Run, open_run  # noqa: E402


def check(source: Path, output: Path, rows: int) -> dict[str, Any]:
    """What the output must be: every line of the input, in its order, its segments joined."""
    asked = [json.loads(line) for line in source.read_text(encoding="utf-8").split("\n") if line][:rows]
    written = [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n") if line]
    answered = [line for line in written if line["output"] is not None]
    return {
        "lines": len(written),
        "order_kept": [line["input"] for line in asked] == [line["input"] for line in written],
        "joined": all("".join(s["text"] for s in line["segments"]) == line["output"] for line in answered),
        "not_answered": len(written) - len(answered),
        "segments": sum(len(line["segments"]) for line in written),
        "finish": {reason: sum(line["finish"] == reason for line in written)
                   for reason in sorted({line["finish"] for line in written})},
    }  # fmt: skip


def measure(run: Run, source: Path, policy: str, rows: int, folder: Path) -> dict[str, Any]:
    """One policy over the whole file, and a second start over its finished work."""
    used = policy
    if policy == "switcher" and run.recipe.switcher.adapter is None and not run.switcher_adapter.is_dir():
        used = "untuned"
    output = folder / f"{policy}.jsonl"
    started, busy = time.monotonic(), time.process_time()
    summary = infer(run, input=source, output=output, policy=used, limit=rows)
    seconds, busy = time.monotonic() - started, time.process_time() - busy
    started = time.monotonic()
    again = infer(run, input=source, output=output, policy=used, limit=rows)
    return {
        "policy": used,
        **check(source, output, rows),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(busy, 1),
        "writing_seconds": summary["seconds"],
        "new_tokens": summary["new_tokens"],
        "tokens_per_second": summary["tokens_per_second"],
        "by_writer": summary["by_writer"],
        "second_start": {"written": again["written"], "seconds": round(time.monotonic() - started, 2)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="lab")
    parser.add_argument("--run-dir", type=Path, help="a run with a trained switcher (default: a new folder)")
    parser.add_argument("--policies", nargs="+", default=["random", "switcher"])
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    arguments = parse_with_settings(parser)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    data = os.environ.get("SWITCHGEN_TEST_DATA")
    if not data:
        print("SWITCHGEN_TEST_DATA is not set; it names the folder of input_sample.jsonl", file=sys.stderr)
        return 2
    source = Path(data) / "input_sample.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"decoding.max_new_tokens={arguments.tokens}", *arguments.overrides]
        run = open_run(arguments.recipe, overrides, arguments.run_dir or Path(folder) / "run")
        results = [measure(run, source, policy, arguments.rows, Path(folder)) for policy in arguments.policies]
        import torch

        line = {
            "measure": "infer",
            "rows": arguments.rows,
            "max_new_tokens": arguments.tokens,
            "results": results,
            "passed": all(r["lines"] == arguments.rows and r["order_kept"] and r["joined"] for r in results),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": [round(value, 1) for value in os.getloadavg()],
        }
    print(json.dumps(line, ensure_ascii=False))
    return 0 if line["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
