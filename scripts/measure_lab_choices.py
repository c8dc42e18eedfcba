#!/usr/bin/env python3
"""What each choice in the recipe `lab` is worth, on the dev split of one ladder: one change at a time.

    python scripts/measure_lab_choices.py [a.b=c …] --ladder runs/lab/lab [--out runs/lab-choices] [--only base soft …]
    python scripts/measure_lab_choices.py rollout.queries=150 --ladder runs/lab/lab --out runs/few-labels --only base \
        racing uniform_32 argmax two_rounds
    python scripts/measure_lab_choices.py --ladder data/lab --run-seeds 0 1 2 --against uniform_32 --only racing

Every variant is the recipe with a few settings changed: labels (its own, or those of `base` where only the fit or the
decoding differs), a switcher, and an evaluation of it on dev. Finished variants are not run again. Prints a table:
percent right by family, their mean over the exact ones, the difference of that mean to `base` (or another variant,
`--against`) on the same questions (points, 95%), and the tokens that its labels cost, rollouts of all rounds together.
One JSON line last.
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
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from infer.questions import load_questions  # noqa: E402
from infer.scores import scored_cells  # noqa: E402
from infer.stats import paired_difference_over_tasks  # noqa: E402
from switchgen.commandline import parse_with_settings  # noqa: E402
from switchgen.pipeline import learn_to_switch  # noqa: E402
from switchgen.rundir import open_run  # noqa: E402

JSON = dict[str, Any]
FloatArray = npt.NDArray[np.float64]
EXACT = ("recall", "compositional", "arithmetic", "list")
FAMILIES = (*EXACT, "open")


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
EXPERT = '{name: expert, model: "{lab}/expert"}'

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
    "uniform_32": Variant(("rollout.completions=32",), labels=None),
    "half_the_queries": Variant(("rollout.queries={half}",), labels=None),
    "fresh_branches": Variant(("rollout.branch=fresh",), labels=None),
    "racing": Variant(("rollout.budget=racing",), labels=None),
    "racing_coarse": Variant(
        ("rollout.budget=racing", "rollout.racing={start: 2, step: 1, margin: 0.25, confidence: 0.8}"), labels=None
    ),
    "two_rounds": Variant(("rollout.rounds=2", "rollout.queries={half}"), labels=None),  # as many labels as `base`
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
    "pool_of_4_expert": Variant((f"pool=[{PRETRAINED}, {FINETUNED}, {EXPERT}, {ALIGNED}]",), labels=None),
    # The student.
    "student": Variant((), policy="distilled", switcher="base"),
    "student_unfiltered": Variant(("distill.min_score=0",), policy="distilled", switcher="base"),
    "student_half_the_questions": Variant(("distill.queries=300",), policy="distilled", switcher="base"),
    "student_lora": Variant(
        (
            "distill.lora={r: 32, alpha: 64, dropout: 0.0, target_modules: all-linear}",
            "distill.args.learning_rate=2.0e-3",
        ),
        policy="distilled",
        switcher="base",
    ),
    "student_of_finetuned": Variant(("distill.base=finetuned",), policy="distilled", switcher="base"),
    "student_of_random": Variant(("distill.policy=random",), policy="distilled", switcher="base"),
    # What the choice is compared with.
    "random": Variant((), policy="random", switcher="base"),
    "untuned": Variant((), policy="untuned", switcher="base"),
    **{rung: Variant((), policy=rung, switcher="base") for rung in ("pretrained", "finetuned", "aligned")},
}


def run_variant(name: str, variant: Variant, arguments: argparse.Namespace) -> JSON:
    """Percent right by family on dev, their mean over the exact ones, and what it cost; from a finished run if any."""
    folder = (arguments.out / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    _link(folder / "lab", arguments.ladder)
    shared = [f"lab.seed={arguments.seed}", *arguments.overrides]
    half = open_run("lab", shared, folder).recipe.rollout.queries // 2
    own = [part.replace("{half}", str(half)) for part in variant.overrides]
    if variant.switcher is not None:
        own.append(f"switcher.adapter={(arguments.out / variant.switcher).resolve() / 'switcher'}")
    wanted = [f"evaluate.policies=[{variant.policy}]", f"evaluate.seeds={arguments.run_seeds}", "evaluate.split=dev"]
    # The rounds choose the best of them on dev as well; what is chosen is then evaluated as any other switcher.
    overrides = [*shared, *(part for part in own if not part.startswith("rollout.rounds")), *wanted]
    figures = folder / "figures.json"
    if figures.exists():
        found: JSON = json.loads(figures.read_text(encoding="utf-8"))
        if found["overrides"] != overrides or not (folder / "lab").samefile(arguments.ladder):
            raise SystemExit(
                f"{folder} was made with other settings or another ladder: delete it, or name another --out"
            )
        return found
    started = time.perf_counter()
    if "rollout.rounds=2" in own:
        learn_to_switch(open_run("lab", [*shared, *own], folder))
    elif variant.switcher is None:
        if variant.labels is None:
            _verb("rollout", folder, overrides)
        else:
            _link(folder / "rollout", (arguments.out / variant.labels).resolve() / "rollout")
        _verb("train", folder, overrides)
    if variant.policy == "distilled":
        _verb("distill", folder, overrides)
    _verb("evaluate", folder, overrides)
    scores = {task: values.mean() for task, values in _scores(folder, overrides).items()}
    found = {family: round(100 * float(scores[family]), 1) for family in FAMILIES}
    found["mean"] = round(sum(100 * float(scores[family]) for family in EXACT) / len(EXACT), 1)
    summaries = sorted(folder.glob("rounds/*/rollout/summary.json")) or sorted(folder.glob("rollout/summary.json"))
    found["label_tokens"] = sum(json.loads(path.read_text(encoding="utf-8"))["tokens"] for path in summaries) or None
    found |= {"overrides": overrides, "seconds": round(time.perf_counter() - started)}
    figures.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def _scores(folder: Path, overrides: Sequence[str]) -> dict[str, FloatArray]:
    """Scores [run seeds, questions] by family, of the one policy that a variant evaluates."""
    run = open_run("lab", overrides, folder)
    cells = scored_cells(run, folder / "evaluation", load_questions(run), rescore=False)
    return {family: np.array([cell.scores for cell in cells if cell.task == family], float) for family in FAMILIES}


def difference(name: str, found: JSON, other_name: str, other_found: JSON, arguments: argparse.Namespace) -> JSON:
    """Of the means over the exact families, paired by question, in points with a 95% interval."""
    own, other = (
        {family: _scores((arguments.out / variant).resolve(), figures["overrides"])[family] for family in EXACT}
        for variant, figures in ((name, found), (other_name, other_found))
    )
    compared = paired_difference_over_tasks(own, other)
    return {key: round(100 * getattr(compared, key), 1) for key in ("difference", "low", "high")}


def _link(path: Path, target: Path) -> None:
    if not path.exists():
        path.symlink_to(target.resolve())


def _verb(verb: str, folder: Path, overrides: Sequence[str]) -> None:
    command = [sys.executable, "-m", "switchgen", verb, "lab", *overrides, "--run-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"`{' '.join(command)}` ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")


def train_halfway(ladder: Path, seed: int) -> None:
    """An intermediate checkpoint: alignment with half of its steps, beside the ladder's rungs."""
    from train.lab import SIZES, StageSteps  # noqa: PLC0415
    from train.ladder import save_rung  # noqa: PLC0415
    from train.stages import align  # noqa: PLC0415
    from train.world import make_world  # noqa: PLC0415

    steps = SIZES["small"].aligned
    half = StageSteps(steps.steps // 2, steps.batch, steps.matrix_lr, steps.other_lr)
    model, tokenizer, _ = align(ladder / "finetuned", make_world(seed), half, lambda stage, done, total: None)
    save_rung(model, tokenizer, ladder / "halfway")


def train_expert(ladder: Path, seed: int) -> None:
    """An expert: the pretrained model finetuned on sums and lists alone, with half of the steps."""
    from train import ladder_texts  # noqa: PLC0415
    from train.lab import SIZES, StageSteps  # noqa: PLC0415
    from train.ladder import chat_tokenizer, load_rung, save_rung  # noqa: PLC0415
    from train.stages import finetune  # noqa: PLC0415
    from train.world import make_world  # noqa: PLC0415

    steps = SIZES["small"].finetuned
    model, tokenizer = load_rung(ladder / "pretrained")
    tokenizer = chat_tokenizer(tokenizer)
    half = StageSteps(steps.steps // 2, steps.batch, steps.matrix_lr, steps.other_lr)
    shares = {ladder_texts.arithmetic_chat: 0.5, ladder_texts.list_chat: 0.5}
    finetune(model, tokenizer, make_world(seed), half, lambda stage, done, total: None, shares)
    save_rung(model, tokenizer, ladder / "expert")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladder", type=Path, required=True, help="a built ladder's folder (RUN/lab)")
    parser.add_argument("--seed", type=int, default=0, help="its world seed")
    parser.add_argument("--run-seeds", type=int, nargs="+", default=[0], help="seeds of the evaluation's sampling")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "lab-choices", help="one run folder a variant")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT",
                        help=f"default: all ({', '.join(VARIANTS)})")  # fmt: skip
    parser.add_argument("--against", choices=VARIANTS, default="base", metavar="VARIANT",
                        help="what the others are compared with (default: base)")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings of the recipe, for all variants")
    arguments = parse_with_settings(parser)
    if "pool_of_4" in arguments.only and not (arguments.ladder / "halfway").exists():
        train_halfway(arguments.ladder, arguments.seed)
    if "pool_of_4_expert" in arguments.only and not (arguments.ladder / "expert").exists():
        train_expert(arguments.ladder, arguments.seed)
    columns = (*FAMILIES, "mean of exact", f"− {arguments.against}", "label tokens")
    table: dict[str, JSON] = {}
    print(f"| variant | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}", flush=True)
    for name in dict.fromkeys(("base", arguments.against, *arguments.only)):
        table[name] = found = run_variant(name, VARIANTS[name], arguments)
        if arguments.against not in table:  # `base`, whose labels or switcher the others may use
            continue
        compared = difference(name, found, arguments.against, table[arguments.against], arguments)
        found[f"minus_{arguments.against}"] = compared
        cells = [found[family] for family in (*FAMILIES, "mean")]
        cells.append(f"{compared['difference']:+} [{compared['low']}, {compared['high']}]")
        print(f"| {name} | {' | '.join(str(cell) for cell in (*cells, found['label_tokens'] or ''))} |", flush=True)
    print(json.dumps(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
