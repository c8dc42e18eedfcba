#!/usr/bin/env python3
"""What each choice in the recipe `lab` is worth, on the dev split of one ladder: one change at a time.

    python scripts/measure_lab_choices.py [a.b=c …] --ladder runs/lab/lab [--out runs/lab-choices] [--only base soft …]

Every variant is the recipe with a few settings changed: labels (its own, or those of `base` where only the fit or the
decoding differs), a switcher, and an evaluation of it on dev. Finished variants are not run again. Prints a table, and
one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from switchgen.commandline import parse_with_settings  # noqa: E402

FAMILIES = ("recall", "compositional", "arithmetic", "list", "open")


@dataclass(frozen=True)
class Variant:
    """One change of the recipe."""

    overrides: tuple[str, ...]
    labels: str | None = "base"
    """Whose labels it learns from; None: its own."""
    switcher: str | None = None
    """Whose switcher it decides with; None: its own."""
    policy: str = "switcher"


FINETUNED = '{name: finetuned, model: "{lab}/finetuned"}'
PRETRAINED = '{name: pretrained, model: "{lab}/pretrained", prompt: "Question: {query}\\nReply:\\n{trace}"}'
ALIGNED = '{name: aligned, model: "{lab}/aligned"}'
HALFWAY = '{name: halfway, model: "{lab}/halfway"}'

VARIANTS = {
    "base": Variant((), labels=None),
    # The fit.
    "argmax": Variant(("train.labels=argmax",)),
    "soft_wide": Variant(("train.tau=0.3",)),
    "margin": Variant(("train.min_margin=0.25",)),
    "released": Variant(("switcher.format=released",)),
    "rank_8": Variant(("train.lora.r=8", "train.lora.alpha=16")),
    "rank_64": Variant(("train.lora.r=64", "train.lora.alpha=128")),
    "slow_fit": Variant(("train.args.learning_rate=5.0e-4",)),
    "more_epochs": Variant(("train.args.num_train_epochs=8",)),
    "base_finetuned": Variant(("switcher.base=finetuned",)),
    "base_pretrained": Variant(("switcher.base=pretrained",)),
    # The choice at inference.
    "wide_nucleus": Variant(("switcher.top_p=0.9",), switcher="base"),
    "first_aligned": Variant(("decoding.first=aligned",), switcher="base"),
    "last_aligned": Variant(("decoding.last=aligned",), switcher="base"),
    # The labels.
    "completions_4": Variant(("rollout.completions=4",), labels=None),
    "completions_16": Variant(("rollout.completions=16",), labels=None),
    "queries_600": Variant(("rollout.queries=600",), labels=None),
    "fresh_branches": Variant(("rollout.branch=fresh",), labels=None),
    "racing": Variant(("rollout.budget=racing",), labels=None),
    "second_round": Variant(("rollout.policy=switcher", "switcher.adapter={base}/switcher"), labels=None),
    # The segment.
    "tokens_6": Variant(("decoding.segment=6",), labels=None),
    "tokens_12": Variant(("decoding.segment=12",), labels=None),
    "tokens_24": Variant(("decoding.segment=24",), labels=None),
    "tokens_96": Variant(("decoding.segment=96",), labels=None),
    # The pool.
    "pool_of_2_PA": Variant((f"pool=[{PRETRAINED}, {ALIGNED}]",), labels=None),
    "pool_of_2_FA": Variant((f"pool=[{FINETUNED}, {ALIGNED}]",), labels=None),
    "pool_of_2_PF": Variant((f"pool=[{PRETRAINED}, {FINETUNED}]", "switcher.base=finetuned"), labels=None),
    "pool_of_4": Variant((f"pool=[{PRETRAINED}, {FINETUNED}, {HALFWAY}, {ALIGNED}]",), labels=None),
    # What the choice is compared with.
    "random": Variant((), policy="random", switcher="base"),
    "untuned": Variant((), policy="untuned", switcher="base"),
    **{rung: Variant((), policy=rung, switcher="base") for rung in ("pretrained", "finetuned", "aligned")},
}


def run_variant(name: str, variant: Variant, arguments: argparse.Namespace) -> dict[str, float]:
    """Percent right by family on dev, and their mean over the exact ones; from a finished run if there is one."""
    folder = (arguments.out / name).resolve()
    figures = folder / "figures.json"
    if figures.exists():
        found: dict[str, float] = json.loads(figures.read_text(encoding="utf-8"))
        return found
    folder.mkdir(parents=True, exist_ok=True)
    base = (arguments.out / "base").resolve()
    _link(folder / "lab", arguments.ladder)
    overrides = [f"lab.seed={arguments.seed}", *(part.replace("{base}", str(base)) for part in variant.overrides),
                 *arguments.overrides]  # fmt: skip
    seconds = {}
    if variant.switcher is not None:
        overrides.append(f"switcher.adapter={(arguments.out / variant.switcher).resolve() / 'switcher'}")
    else:
        if variant.labels is None:
            seconds["rollout"] = _verb("rollout", folder, overrides)
        else:
            _link(folder / "rollout", (arguments.out / variant.labels).resolve() / "rollout")
        # A second round's labels are drawn with the first switcher; its own is fitted and evaluated.
        overrides = [part for part in overrides if not part.startswith(("switcher.adapter", "rollout.policy"))]
        seconds["train"] = _verb("train", folder, overrides)
    overrides += [f"evaluate.seeds=[{arguments.run_seed}]", f"evaluate.policies=[{variant.policy}]"]
    seconds["evaluate"] = _verb("evaluate", folder, [*overrides, "evaluate.split=dev"])
    results = json.loads((folder / "evaluation" / "results.json").read_text(encoding="utf-8"))
    rows = {row["task"]: row["value"] for row in results["rows"] if row["seed"] is None}
    scores = {family: round(100 * rows[family], 1) for family in FAMILIES}
    scores["mean"] = round(sum(scores[family] for family in FAMILIES[:4]) / 4, 1)
    scores |= {f"{stage}_s": round(value) for stage, value in seconds.items()}
    figures.write_text(json.dumps(scores) + "\n", encoding="utf-8")
    return scores


def _link(path: Path, target: Path) -> None:
    if not path.exists():
        path.symlink_to(target.resolve())


def _verb(verb: str, folder: Path, overrides: Sequence[str]) -> float:
    """Seconds that a verb took, starting Python included."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "switchgen", verb, "lab", *overrides, "--run-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"`{' '.join(command)}` ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - started


def train_halfway(ladder: Path, seed: int) -> None:
    """An intermediate checkpoint: alignment with half of its steps, beside the ladder's rungs."""
    from train.lab import SIZES, StageSteps  # noqa: PLC0415
    from train.ladder import load_rung, save_rung  # noqa: PLC0415
    from train.stages import align  # noqa: PLC0415
    from train.world import make_world  # noqa: PLC0415

    steps = SIZES["small"].aligned
    model, tokenizer = load_rung(ladder / "finetuned")
    half = StageSteps(steps.steps // 2, steps.batch, steps.matrix_lr, steps.other_lr)
    align(model, tokenizer, make_world(seed), half, lambda stage, done, total: None)
    save_rung(model, tokenizer, ladder / "halfway")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladder", type=Path, required=True, help="a built ladder's folder (RUN/lab)")
    parser.add_argument("--seed", type=int, default=0, help="its world seed")
    parser.add_argument("--run-seed", type=int, default=0, help="seed of the evaluation's sampling")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "lab-choices", help="one run folder a variant")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT",
                        help=f"default: all ({', '.join(VARIANTS)})")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings of the recipe, for all variants")
    arguments = parse_with_settings(parser)
    if "pool_of_4" in arguments.only and not (arguments.ladder / "halfway").exists():
        train_halfway(arguments.ladder, arguments.seed)
    table = {}
    print(f"| variant | {' | '.join(FAMILIES)} | mean of exact |\n|---|{'---|' * (len(FAMILIES) + 1)}", flush=True)
    for name in arguments.only:
        scores = table[name] = run_variant(name, VARIANTS[name], arguments)
        print(f"| {name} | {' | '.join(str(scores[f]) for f in FAMILIES)} | {scores['mean']} |", flush=True)
    print(json.dumps(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
