"""Candidates as LoRA adapters over one base: weights in memory, equality with merged weights, and mixed batches.

    python scripts/measure_adapters.py [--size small] [--rows 16 64] [--repeats 3]

Three candidates and a switcher, r = 16 on the attention's projections, random weights. Prints: bytes of all weights
that are loaded ÷ bytes of one model; the tokens of a collaboration with adapters and with merged weights (float64,
tiny shapes: they must be the same); processor seconds of a collaboration (random choice, LM switcher) whose candidates
write in one batch ÷ seconds with a batch for each, medians. One JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from operator import truediv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from infer.bench.ladders import NAMES, SIZES, make_tokenizer  # noqa: E402
from switchgen.api import generate  # noqa: E402
from switchgen.candidates import Pool  # noqa: E402
from switchgen.config import CandidateConfig, DecodingConfig, SwitcherConfig  # noqa: E402

MEMBERS = (*NAMES, "switcher")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def save_family(folder: Path, size: str, dtype: torch.dtype) -> None:
    """A base, four adapters over it, and the four merged models."""
    shape = SIZES[size]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(shape.config(), dtype=dtype)
    tokenizer = make_tokenizer(shape.vocab_size)(chat=True)
    base.config.eos_token_id = base.generation_config.eos_token_id = tokenizer.eos_token_id
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for seed, name in enumerate(MEMBERS):
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
        tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS))
        torch.manual_seed(seed + 1)
        with torch.no_grad():
            for key, weight in tuned.named_parameters():
                if "lora_B" in key:
                    weight.normal_(std=0.05)
        tuned.save_pretrained(folder / f"adapter-{name}")
        tuned.merge_and_unload().save_pretrained(folder / f"merged-{name}")
        tokenizer.save_pretrained(folder / f"merged-{name}")


def load(folder: Path, *, merged: bool, dtype: str) -> tuple[Pool, Any]:
    """The pool and its switcher, as adapters over the base or as models of their own."""
    if merged:
        configs = [CandidateConfig(name=name, model=str(folder / f"merged-{name}"), dtype=dtype) for name in NAMES]
        settings = SwitcherConfig(base=str(folder / "merged-switcher"), dtype=dtype)
    else:
        base = str(folder / "base")
        configs = [
            CandidateConfig(name=name, model=base, adapter=str(folder / f"adapter-{name}"), dtype=dtype)
            for name in NAMES
        ]
        settings = SwitcherConfig(base=base, adapter=str(folder / "adapter-switcher"), dtype=dtype)
    pool = Pool.load(configs)
    return pool, pool.load_switcher(settings)


def weight_bytes(pool: Pool, switcher: Any) -> int:
    """Bytes of all loaded weights, shared ones once."""
    storages = {}
    for engine in [*(candidate.engine for candidate in pool), switcher.engine]:
        for weight in engine.model.parameters():
            storage = weight.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def same_tokens(folder: Path) -> tuple[int, int]:
    """Segments that differ between adapters and merged weights, and how many there are."""
    decoding = DecodingConfig.model_validate({"max_new_tokens": 40, "segment": 8})
    written = []
    for merged in (False, True):
        pool, switcher = load(folder, merged=merged, dtype="float64")
        queries = [f"What is {row}?" for row in range(8)]
        traces = generate(pool, queries, "switcher", switcher=switcher, decoding=decoding)
        written.append([(segment.writer, segment.ids) for trace in traces for segment in trace.segments])
    ours, theirs = written
    return sum(a != b for a, b in zip(ours, theirs, strict=True)), len(ours)


def compare_batches(pool: Pool, switcher: Any, rows: int, repeats: int) -> dict[str, Any]:
    """A collaboration whose candidates write in one batch, against one batch for each of them; interleaved."""
    decoding = DecodingConfig.model_validate({"max_new_tokens": 100, "segment": 50})
    queries = [f"What is {row}? " * 8 for row in range(rows)]
    family = pool.candidates[0].engine.family  # type: ignore[attr-defined]
    line: dict[str, Any] = {"rows": rows}
    for policy in ("random", "switcher"):
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(repeats):
            for together in (True, False):
                family.together = together
                started = time.process_time()
                generate(pool, queries, policy, switcher=switcher, decoding=decoding)
                seconds[together].append(time.process_time() - started)
        line[policy] = round(statistics.median(map(truediv, seconds[True], seconds[False])), 3)
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=["tiny", "small"])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, exact = Path(name) / "family", Path(name) / "exact"
        save_family(folder, arguments.size, torch.float32)
        save_family(exact, "tiny", torch.float64)
        differing, segments = same_tokens(exact)
        pool, switcher = load(folder, merged=False, dtype="float32")
        one = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        ratio = weight_bytes(pool, switcher) / one
        batches = [compare_batches(pool, switcher, rows, arguments.repeats) for rows in arguments.rows]
    line = {
        "measure": "adapters",
        "size": arguments.size,
        "weights_over_one_model": round(ratio, 4),
        "segments": segments,
        "segments_differing_from_merged": differing,
        "seconds_together_over_alone": batches,
        "passed": ratio <= 1.2 and differing == 0,
    }
    print(json.dumps(line))
    return 0 if line["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
