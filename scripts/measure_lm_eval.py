"""A pool of one through lm-evaluation-harness against the harness's own `hf` model.

    python scripts/measure_lm_eval.py [--documents 100] [--model FOLDER]

Local YAML tasks over the lab's test questions, offline: multiple choice (the answer and three others), writing with
stop strings, and perplexity of the texts. Both read the same model in float64, greedily. Prints the differences, last
as one JSON line.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from switchgen.config import DATA_DIR  # noqa: E402

TASKS = ("lab_choice", "lab_writing", "lab_text")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=100, help="documents a task")
    parser.add_argument("--model", type=Path, default=DATA_DIR / "lab" / "finetuned")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_tasks(place, arguments.documents)
        started = time.monotonic()
        ours = evaluate(our_model(place, arguments.model), place)
        own_seconds, started = time.monotonic() - started, time.monotonic()
        settings = {"pretrained": str(arguments.model), "dtype": "float64"}
        theirs = evaluate("hf", place, model_args=settings, device="cpu", batch_size=8)
        their_seconds = time.monotonic() - started
    report: dict[str, Any] = {"documents": arguments.documents, "seconds": round(own_seconds, 1),
                              "hf_seconds": round(their_seconds, 1)}  # fmt: skip
    for task in TASKS:
        mine, other = answers(ours, task), answers(theirs, task)
        if task == "lab_writing":
            report[task] = {"texts": len(mine), "different": sum(a != b for a, b in zip(mine, other, strict=True))}
        else:
            differences = [abs(a - b) for a, b in zip(numbers(mine), numbers(other), strict=True)]
            report[task] = {"likelihoods": len(differences), "largest_difference": max(differences)}
        print(task, report[task])
    print(json.dumps(report))


def write_tasks(folder: Path, count: int) -> None:
    """Three tasks over the lab's arithmetic questions."""
    import yaml

    rows = json.loads((DATA_DIR / "lab" / "tasks" / "arithmetic.json").read_text())["test"][:count]
    documents = []
    for row in rows:
        right = int(row["output"])
        options = [f" Answer: {right + shift}" for shift in (0, 1, -1, 10)]
        documents.append({"question": row["input"], "options": options, "label": 0,
                          "text": f"{row['input']} Answer: {right}"})  # fmt: skip
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    texts = {"doc_to_text": "{{question}}", "doc_to_target": "label"}
    tasks = [
        {"task": "lab_choice", "output_type": "multiple_choice", **texts, "doc_to_choice": "options",
         "metric_list": [{"metric": "acc"}]},
        {"task": "lab_writing", "output_type": "generate_until", **texts, "metric_list": [{"metric": "exact_match"}],
         "generation_kwargs": {"until": [".", "\n\n"], "max_gen_toks": 48, "do_sample": False}},
        {"task": "lab_text", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
         "metric_list": [{"metric": "word_perplexity"}]},
    ]  # fmt: skip
    for task in tasks:
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**source, **task}))


def our_model(folder: Path, model: Path) -> Any:
    """A pool of one that reads what `hf` reads."""
    import yaml

    from infer.harness_model import SwitchgenLM
    from switchgen.rundir import open_run

    candidate = {"name": "one", "model": str(model), "dtype": "float64", "prompt": "{query}{trace}"}
    (folder / "one.yaml").write_text(yaml.safe_dump({"pool": [candidate]}))
    return SwitchgenLM(run=open_run(str(folder / "one.yaml"), (), folder / "run"), policy="one")


def evaluate(model: Any, folder: Path, **arguments: Any) -> dict[str, Any]:
    import lm_eval.models  # noqa: F401, the harness's own models by name
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, **arguments)
    return dict(found or {})


def answers(results: dict[str, Any], task: str) -> list[Any]:
    """What was answered, in the documents' order."""
    return [sample["resps"] for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])]


def numbers(answers: list[Any]) -> list[float]:
    """The likelihoods in answers."""
    flat = [answer for document in answers for (answer,) in document]
    return [float(one[0]) if isinstance(one, tuple | list) else float(one) for one in flat]


if __name__ == "__main__":
    main()
