"""`switchgen doctor`'s memory estimate against the peak of the run it speaks of.

    python scripts/measure_doctor.py [--rows 16] [--tokens 64]

A pool of random models of 67 M parameters (three models and a switcher over the last one; the same as adapters over one
base) is saved to a temporary folder; `doctor` estimates, `infer` runs with the untuned switcher, and the peak of its
resident memory is what the system counted. One JSON line last; `passed` is within 15%.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
UNITS = {"MiB": 1.0, "GiB": 1024.0}


def save_pool(folder: Path, rows: int, tokens: int, *, adapters: bool) -> Path:
    """Models, questions and the recipe."""
    import torch
    import yaml
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from infer.bench.ladders import NAMES, SIZES, make_tokenizer

    shape = SIZES["small"]
    tokenizer = make_tokenizer(shape.vocab_size)(chat=True)
    pool: list[dict[str, Any]] = []
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        if seed == 0 or not adapters:
            model = AutoModelForCausalLM.from_config(shape.config())
            # Nothing ends a response early: the estimate is of full lengths.
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
            path = str(folder / name)
        entry = {"name": name, "model": path}
        if adapters:
            projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
            base = AutoModelForCausalLM.from_pretrained(path)
            get_peft_model(base, LoraConfig(r=16, target_modules=projections)).save_pretrained(folder / f"over-{name}")
            entry["adapter"] = str(folder / f"over-{name}")
        pool.append(entry)
    question = " ".join(["bado"] * 34)
    with open(folder / "questions.jsonl", "w", encoding="utf-8") as stream:
        for row in range(rows):
            stream.write(json.dumps({"input": f"{question} {row}"}) + "\n")
    recipe = {
        "pool": pool,
        "switcher": {"base": str(folder / NAMES[0])} if adapters else {},
        "decoding": {"max_new_tokens": tokens, "segment": 16, "eos": "segment"},
        "engine": {"max_rows": rows, "threads": 1},
    }
    path = folder / "pool.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def estimate(recipe: Path, arrangement: str) -> float:
    """What doctor says, in MiB."""
    text = subprocess.run(
        [sys.executable, "-m", "switchgen", "doctor", str(recipe)], text=True, capture_output=True, check=True, cwd=ROOT
    ).stdout
    found = re.search(rf"{re.escape(arrangement)}: peak ([\d.]+) (MiB|GiB)", text)
    assert found is not None, text
    return float(found[1]) * UNITS[found[2]]


def peak(recipe: Path, folder: Path) -> float:
    """The largest resident memory of a real run, in MiB."""
    files = ["--input", str(folder / "questions.jsonl"), "--output", str(folder / "out.jsonl")]
    command = [sys.executable, "-m", "switchgen", "infer", str(recipe), *files, "--policy", "untuned"]
    command += ["--run-dir", str(folder / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, status
    return usage.ru_maxrss / 1024


def measure(rows: int, tokens: int, *, adapters: bool) -> dict[str, Any]:
    """One arrangement."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = save_pool(folder, rows, tokens, adapters=adapters)
        estimated, measured = estimate(recipe, "all on one device"), peak(recipe, folder)
    return {
        "arrangement": "adapters over one base" if adapters else "all on one device",
        "estimated_mib": round(estimated),
        "measured_mib": round(measured),
        "estimated_over_measured": round(estimated / measured, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    results = [measure(arguments.rows, arguments.tokens, adapters=adapters) for adapters in (False, True)]
    line = {
        "measure": "doctor",
        "rows": arguments.rows,
        "new_tokens": arguments.tokens,
        "results": results,
        "passed": all(abs(result["estimated_over_measured"] - 1) <= 0.15 for result in results),
    }
    print(json.dumps(line))
    return 0 if line["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
