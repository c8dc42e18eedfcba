"""Rescoring saved answers: `switchgen evaluate --rescore` over more than 10,000 of them.

    SWITCHGEN_TEST_DATA=DIR python scripts/measure_rescoring.py [--questions 650]

DIR holds the scored .json task files. Answers are made from their gold answers (bare, marked, another row's, inside a
sentence) and scored as at generation, by the same call; then they are scored again from the files. Prints one JSON line
last: seconds, and whether every score and every extracted answer is identical.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import yaml  # noqa: E402

from infer.evaluation import main as evaluate  # noqa: E402
from infer.questions import Questions, load_questions, reference_text  # noqa: E402
from infer.responses import claim_responses, responses_path  # noqa: E402
from switchgen.config import DATA_DIR  # noqa: E402
from switchgen.files import Shard  # noqa: E402
from switchgen.rundir import Run, open_run  # noqa: E402
from switchgen.scoring import golds  # noqa: E402
from switchgen.tasks import Example  # noqa: E402

FILES = ("agieval_tiny", "arc_challenge", "bbh", "gsm8k", "math", "mmlu_redux", "popqa", "truthfulqa", "wikidyk")
PHRASES = ("{}", "The answer is {}.", "Let us see.\n\nAnswer: {}", "So \\boxed{{{}}}", "Well, {} it is.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=650, help="questions a file; each is answered twice")
    questions = parser.parse_args().questions
    data = os.environ.get("SWITCHGEN_TEST_DATA")
    if data is None:
        sys.exit("SWITCHGEN_TEST_DATA is not set; it names the folder of the task files")
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), Path(data), questions)
        tasks = load_questions(run)
        place = run.dir / "evaluation"
        claim_responses(run, place, tasks, saved_only=False)
        started = time.monotonic()
        written = sum(write_answers(run, place, task) for task in tasks)
        scoring = time.monotonic() - started
        before = read_scores(place)
        started, cpu = time.monotonic(), time.process_time()
        evaluate(run, rescore=True)
        seconds, cpu = time.monotonic() - started, time.process_time() - cpu
        report = {
            "answers": written,
            "tasks": len(tasks),
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
            "scored_at_first_seconds": round(scoring, 1),
            "identical": read_scores(place) == before,
        }
    print(json.dumps(report))


def make_run(folder: Path, data: Path, questions: int) -> Run:
    recipe = {
        "pool": [{"name": "pretrained", "model": str(DATA_DIR / "lab" / "pretrained")}],
        "tasks": [{"file": str(data / f"{name}.json")} for name in FILES],
        "evaluate": {"policies": ["pretrained"], "seeds": [0, 1], "limit": questions},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
    return open_run(str(folder / "run.yaml"), (), folder / "run")


def write_answers(run: Run, place: Path, questions: Questions) -> int:
    """Answers to a task in both run seeds, as `evaluate` keeps them; how many."""
    answers = [(golds(example.item) or ["nothing"])[0] for example in questions.examples]
    for seed in run.recipe.evaluate.seeds:
        with Shard(responses_path(place, "pretrained", questions.name, seed)) as shard:
            for index, example in enumerate(questions.examples):
                phrase = PHRASES[(index + seed) % len(PHRASES)]
                # Every fifth answer is another question's.
                output = phrase.format(answers[(index + (index % 5 == 0)) % len(answers)])
                shard.append(record_of(questions, example, seed, output))
    return len(answers) * len(run.recipe.evaluate.seeds)


def record_of(questions: Questions, example: Example, seed: int, output: str) -> dict[str, Any]:
    score, extracted = questions.score(example, output)
    usage = {"new_tokens": 9, "cue_tokens": 0, "by_writer": {"pretrained": 9}}
    segment = {"writer": "pretrained", "text": output, "num_tokens": 9, "finish": "eos", "scores": None}
    return {
        "schema": 1, "id": example.id, "task": questions.name, "policy": "pretrained", "seed": seed,
        "question": example.query, "reference": reference_text(example), "output": output, "segments": [segment],
        "finish": "eos", "usage": usage, "seconds": 0.01, "score": score, "extracted": extracted, "status": "ok",
    }  # fmt: skip


def read_scores(place: Path) -> dict[tuple[str, str], tuple[Any, Any]]:
    """(score, extracted answer) of every saved response."""
    found = {}
    for path in sorted((place / "responses").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found[path.name, record["id"]] = record["score"], record["extracted"]
    return found


if __name__ == "__main__":
    main()
