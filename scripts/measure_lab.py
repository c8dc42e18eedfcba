#!/usr/bin/env python3
"""The lab's figures on world seeds that nothing was developed on: whole runs from scratch, then the targets' rows.

    python scripts/measure_lab.py [a.b=c …] [--runs runs] --seeds 1006 1007 1008

For each world seed: `switchgen run lab lab.seed=S` in RUNS/lab-S (ladder, rollouts, switcher, student, evaluation on
all test questions, 3 run seeds), gone on with where it was stopped. Then, from its files: paired differences
(questions resampled, 95%), both tables of the single candidates (strict, and lenient: content without format),
questions solved by no single candidate, label skill on dev questions relabelled with many completions, distinct valid
answers in 20 samples along the ladder, the student's share of the gain, and seconds by stage. Prints one JSON line a
seed, and one of all last.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from infer.questions import Questions, load_questions  # noqa: E402
from infer.responses import responses_path  # noqa: E402
from infer.results import Cell  # noqa: E402
from infer.scores import saved_responses, scored_cells  # noqa: E402
from infer.stats import paired_difference_over_tasks, solved_by_none_else  # noqa: E402
from switchgen.commandline import parse_with_settings  # noqa: E402
from switchgen.rundir import Run, open_run  # noqa: E402

EXACT = ("recall", "compositional", "arithmetic", "list")
TAUGHT = ("arithmetic", "list", "open")
"""Families whose test knowledge the student's data can contain: procedures. The facts of the test people are in no
question of the train split, so recall and compositional questions about them cannot be learned from it."""
RUNGS = ("pretrained", "finetuned", "aligned")
STAGE = re.compile(r"^== (\w+): ([\d.]+) s$")

JSON = dict[str, Any]


def run_world(seed: int, folder: Path, extra: Sequence[str]) -> None:
    """`switchgen run lab` for one world seed; seconds by stage are added to RUN/seconds.jsonl."""
    command = [sys.executable, "-m", "switchgen", "run", "lab", f"lab.seed={seed}", *extra, "--run-dir", str(folder)]
    stages: dict[str, float] = {}
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if found := STAGE.match(line.strip().split("\r")[-1]):
            stages[found[1]] = float(found[2])
            print(f"[{seed}] {found[0]}", file=sys.stderr, flush=True)
    if process.wait():
        raise SystemExit(f"world seed {seed}: `{' '.join(command)}` ended with exit code {process.returncode}")
    with open(folder / "seconds.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"all": round(time.perf_counter() - started, 1), **stages}) + "\n")


def arrays_of(cells: Sequence[Cell], policy: str) -> dict[str, np.ndarray]:
    """Scores [seeds, questions] by task."""
    tasks = dict.fromkeys(cell.task for cell in cells)
    return {task: np.array([c.scores for c in cells if (c.policy, c.task) == (policy, task)], float) for task in tasks}


def rows_of(cells: Sequence[Cell]) -> JSON:
    """The rows that the evaluation's scores answer."""
    scores = {policy: arrays_of(cells, policy) for policy in dict.fromkeys(cell.policy for cell in cells)}
    means = {policy: {task: round(float(values.mean()), 4) for task, values in tasks.items()}
             for policy, tasks in scores.items()}  # fmt: skip
    singles = [policy for policy in RUNGS if policy in scores]

    def best(tasks: Sequence[str]) -> str:
        return max(singles, key=lambda name: np.mean([means[name][task] for task in tasks]))

    def against(other: str, tasks: Sequence[str], policy: str = "switcher") -> JSON:
        compared = paired_difference_over_tasks(
            {task: scores[policy][task] for task in tasks}, {task: scores[other][task] for task in tasks}
        )
        return {"against": other, **{k: round(getattr(compared, k), 4) for k in ("difference", "low", "high", "p")}}

    overall = best(EXACT)
    mean_of = {policy: round(float(np.mean([values[task] for task in EXACT])), 4) for policy, values in means.items()}
    families = {}
    for task in (*EXACT, "open"):
        ranked = sorted(singles, key=lambda name: -means[name][task])
        families[task] = {
            "best_single": ranked[0], "ahead_of_second_by": round(means[ranked[0]][task] - means[ranked[1]][task], 4),
            "switcher": against(ranked[0], [task]),
        }  # fmt: skip
    alone = {task: solved_by_none_else(scores["switcher"][task], {name: scores[name][task] for name in singles})
             for task in EXACT}  # fmt: skip
    return {
        "means": means,
        "mean_exact": mean_of,
        "ratio_to_best_single": round(mean_of["switcher"] / mean_of[overall], 3),
        "switcher_vs_best_single": against(overall, EXACT),
        "switcher_vs_random": against("random", EXACT),
        "switcher_vs_untuned": against("untuned", EXACT),
        "families": families,
        "solved_by_none_else": {
            task: {"share": round(value.observed, 4), "by_chance": round(value.by_chance, 4),
                   **{k: round(getattr(value.excess, k), 4) for k in ("difference", "low", "high")}}
            for task, value in alone.items()
        },
        "student_share_of_gain": {
            "taught": _share(means, TAUGHT), "all_exact": _share(means, EXACT),
            **{task: _share(means, [task]) for task in (*EXACT, "open")},
        },
    }  # fmt: skip


def _share(means: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> JSON | None:
    """(student − aligned) ÷ (switcher − aligned), means over tasks."""
    if "distilled" not in means:
        return None
    student, base, switcher = (
        float(np.mean([means[policy][task] for task in tasks])) for policy in ("distilled", "aligned", "switcher")
    )
    gain = switcher - base
    return {"kept": round(student - base, 4), "gain": round(gain, 4),
            "share": round((student - base) / gain, 3) if gain > 0 else None}  # fmt: skip


def lenient_table(run: Run, tasks: Sequence[Questions]) -> JSON:
    """Share of responses in which some sentence ends with a right answer: content without format, generously."""
    table: JSON = {}
    for policy in RUNGS:
        for questions in tasks:
            right = []
            for seed in run.recipe.evaluate.seeds:
                records = saved_responses(
                    responses_path(run.dir / "evaluation", policy, questions.name, seed), questions
                )
                for example in questions.examples:
                    answers = set(example.item.get("answers") or [example.item["output"]])
                    said = re.findall(r"(\d+)(?=\.(?:\s|$)|\s*$)", records[example.id]["output"] or "")
                    right.append(any(number in answers for number in said))
            table.setdefault(policy, {})[questions.name] = round(float(np.mean(right)), 4)
    return table


def label_skill(run: Run, folder: Path, seed: int, queries: int, completions: int) -> JSON:
    """The switcher's choices on states of dev questions, against labels of many completions."""
    from rollout.stage import main as rollout
    from switchgen.assembly import load_writers
    from switchgen.records import query_of, read_records
    from switchgen.rows import Row
    from switchgen.trace import Segment

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "lab").exists():
        (folder / "lab").symlink_to((run.dir / "lab").resolve())
    overrides = [f"lab.seed={seed}", "rollout.split=dev", f"rollout.queries={queries}", "rollout.states=2",
                 f"rollout.completions={completions}", f"switcher.adapter={run.dir / 'switcher'}"]  # fmt: skip
    check = open_run("lab", overrides, folder)
    rollout(check)
    records = [r for r in read_records(sorted((folder / "rollout").glob("labels-*.jsonl")))]
    kept = [record for record in records if not record["tie"]]
    writer = load_writers(check, ["switcher"])["switcher"]
    chosen: list[int] = []
    for start in range(0, len(kept), 32):
        rows = []
        for record in kept[start : start + 32]:
            row = Row(writer.pool, query_of(record), seed=0)
            for segment in record["segments"]:
                vocabulary = writer.pool.candidates[segment["writer"]].vocabulary
                ids = tuple(vocabulary.encode_text(segment["text"]))
                row.append(Segment(segment["writer"], segment["text"], ids, "length"))
            rows.append(row)
        chosen += writer.policy.scores(rows).argmax(dim=-1).tolist()
        for row in rows:
            row.release([("switcher", writer.policy.engine)])

    def skill(margin: float) -> JSON:
        part = [(record, choice) for record, choice in zip(kept, chosen, strict=True) if record["margin"] >= margin]
        labels = [record["label"] for record, _ in part]
        hits = np.array([choice == record["label"] for record, choice in part], float)
        majority = max(labels.count(label) for label in set(labels)) / len(labels)
        regret = float(np.mean([max(record["means"]) - record["means"][choice] for record, choice in part]))
        return {"states": len(part), "accuracy": round(float(hits.mean()), 4), "majority": round(majority, 4),
                "skill": round((float(hits.mean()) - majority) / (1 - majority), 3),
                "regret": round(regret, 4)}  # fmt: skip

    return {"asked": len(records), "ties": len(records) - len(kept), "completions": completions, **skill(0.0),
            "margin_0.05": skill(0.05)}  # fmt: skip


def distinct_answers(run: Run, intervals: int, samples: int = 20) -> JSON:
    """Mean number of distinct valid answers in `samples` samples at temperature 1, along the ladder (open family)."""
    from switchgen.api import generate
    from switchgen.candidates import Pool
    from switchgen.trace import Query

    pool = Pool.from_recipe(run.recipe)
    decoding = run.recipe.decoding.model_copy(update={"temperature": 1.0, "top_p": 1.0})
    task = next(questions for questions in load_questions(run) if questions.name == "open")
    examples = task.examples[:intervals]
    figures = {}
    for rung in RUNGS:
        queries = [
            Query(f"{example.id}/{sample}", example.messages) for example in examples for sample in range(samples)
        ]
        traces = generate(pool, queries, rung, decoding=decoding, max_rows=192)
        counts = []
        for index, example in enumerate(examples):
            texts = [trace.text for trace in traces[index * samples : (index + 1) * samples]]
            scored = [task.score(example, text) for text in texts]
            counts.append(len({extracted for value, extracted in scored if value == 1.0}))
        figures[rung] = round(float(np.mean(counts)), 2)
    return figures


def measure(seed: int, folder: Path, extra: Sequence[str], arguments: argparse.Namespace) -> JSON:
    """All figures of one world seed."""
    run_world(seed, folder, extra)
    run = open_run("lab", [f"lab.seed={seed}", *extra], folder)
    tasks = load_questions(run)
    cells = scored_cells(run, folder / "evaluation", tasks, rescore=False)
    seconds = [json.loads(line) for line in (folder / "seconds.jsonl").read_text(encoding="utf-8").splitlines()]
    figures = {
        "world_seed": seed,
        "questions": {questions.name: len(questions.examples) for questions in tasks},
        "run_seeds": run.recipe.evaluate.seeds,
        "seconds_from_scratch": seconds[0],
        "starts": len(seconds),
        **rows_of(cells),
        "lenient": lenient_table(run, tasks),
        "label_skill": label_skill(
            run, folder / "relabelled", seed, arguments.relabelled_queries, arguments.relabel_completions
        ),
        "distinct_valid_answers_in_20": distinct_answers(run, intervals=40),
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures), flush=True)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1006, 1007, 1008], help="world seeds")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the run folders lie")
    parser.add_argument("--relabelled-queries", type=int, default=150, help="dev questions for the label skill")
    parser.add_argument("--relabel-completions", type=int, default=64, help="completions of each of their branches")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings of the recipe")
    arguments = parse_with_settings(parser)
    worlds = [measure(s, (arguments.runs / f"lab-{s}").resolve(), arguments.overrides, arguments)
              for s in arguments.seeds]  # fmt: skip
    print(json.dumps({"worlds": {
        str(world["world_seed"]): {
            "compositional": world["families"]["compositional"]["switcher"],
            "furthest_below_best_single": min(world["families"][task]["switcher"]["difference"] for task in EXACT),
            "ratio": world["ratio_to_best_single"],
            "mean_difference": world["switcher_vs_best_single"],
            "vs_random": world["switcher_vs_random"],
            "vs_untuned": world["switcher_vs_untuned"],
            "solved_by_none_else_compositional": world["solved_by_none_else"]["compositional"],
            "label_skill": world["label_skill"]["skill"],
            "student_share_taught": (world["student_share_of_gain"]["taught"] or {}).get("share"),
            "best_single_by_family": {t: [f["best_single"], f["ahead_of_second_by"]]
                                      for t, f in world["families"].items()},
            "seconds_from_scratch": world["seconds_from_scratch"]["all"],
        }
        for world in worlds
    }}))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
