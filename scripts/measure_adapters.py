"""Candidates as LoRA adapters over one base: weights in memory, equality with merged weights, and mixed batches.

    python scripts/measure_adapters.py [--size small] [--rows 16 64] [--steps 30]

Three candidates and a switcher, r = 16 on the attention's projections, random weights. Prints: bytes of all weights
that are loaded ÷ bytes of one model; the tokens of a collaboration with adapters and with merged weights (float64,
tiny shapes: they must be the same); seconds of a decode step of all rows in one forward with an adapter per row
(peft's `adapter_names`), against one forward per candidate with its adapter switched on. One JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel  # noqa: E402

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


def step_seconds(model: PeftModel, rows: int, steps: int, names: list[str] | None) -> float:
    """Processor seconds of a decode step, median; `names` mixes adapters in one forward."""
    cache = DynamicCache(config=model.config)
    arguments: dict[str, Any] = {} if names is None else {"adapter_names": names}
    ids = torch.randint(5, 1000, (rows, 64))
    seconds = []
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1, **arguments)
        for _ in range(steps):
            started = time.process_time()
            model(input_ids=ids[:, :1], past_key_values=cache, **arguments)
            seconds.append(time.process_time() - started)
    return statistics.median(seconds)


def compare_batches(folder: Path, rows: int, steps: int) -> dict[str, Any]:
    """One forward of all rows with an adapter each, against one forward per candidate."""
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    model = PeftModel.from_pretrained(base, folder / f"adapter-{NAMES[0]}", adapter_name=NAMES[0]).eval()
    for name in NAMES[1:]:
        model.load_adapter(folder / f"adapter-{name}", adapter_name=name)
    model.eval()
    parts = [rows // 3 + (index < rows % 3) for index in range(3)]
    names = [name for name, part in zip(NAMES, parts, strict=True) for _ in range(part)]
    mixed, switched = [], []
    for _ in range(3):
        mixed.append(step_seconds(model, rows, steps, names))
        one_by_one = 0.0
        for name, part in zip(NAMES, parts, strict=True):
            model.set_adapter(name)
            one_by_one += step_seconds(model, part, steps, None)
        switched.append(one_by_one)
    return {"rows": rows, "mixed_ms": round(1e3 * statistics.median(mixed), 2),
            "switched_ms": round(1e3 * statistics.median(switched), 2),
            "mixed_over_switched": round(statistics.median(mixed) / statistics.median(switched), 3)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=["tiny", "small"])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--steps", type=int, default=30)
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
        del pool, switcher
        batches = [compare_batches(folder, rows, arguments.steps) for rows in arguments.rows]
    line = {
        "measure": "adapters",
        "size": arguments.size,
        "weights_over_one_model": round(ratio, 4),
        "segments": segments,
        "segments_differing_from_merged": differing,
        "decode_steps": batches,
        "passed": ratio <= 1.2 and differing == 0,
    }
    print(json.dumps(line))
    return 0 if line["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
