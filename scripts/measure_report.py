"""The report page with 5,000 made-up responses, measured in chromium: size, time to open, time of each filter.

    python scripts/measure_report.py [--responses 5000] [--keep DIR]

Prints one JSON line last. `--keep` leaves the made-up run and its page in DIR. Needs chromium and playwright.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from infer.report import write_report  # noqa: E402
from infer.stats import bootstrap_mean, mean_over_tasks, paired_difference, paired_difference_over_tasks  # noqa: E402

CANDIDATES = ("pretrained", "finetuned", "aligned")
POLICIES = (*CANDIDATES, "random", "untuned", "switcher", "distilled")
TASKS = ("recall", "compositional", "math", "list", "open")
SKILL = {  # chance of a right answer by policy, in the order of TASKS; "open" is graded
    "pretrained": (0.85, 0.02, 0.0, 0.05, 0.55),
    "finetuned": (0.05, 0.04, 0.85, 0.47, 0.4),
    "aligned": (0.02, 0.05, 0.98, 0.1, 0.3),
    "random": (0.13, 0.15, 0.68, 0.16, 0.4),
    "untuned": (0.04, 0.05, 0.91, 0.02, 0.35),
    "switcher": (0.62, 0.36, 0.97, 0.47, 0.52),
    "distilled": (0.35, 0.2, 0.97, 0.4, 0.45),
}
NASTY = (
    "<script>alert(1)</script> and </script> and <img src=x onerror=alert(1)>",
    "]]> <!-- <b>bold</b> & &amp; &lt; \" ' `",
    "line\u2028separator, paragraph\u2029separator, null \x00, bell \x07, escape \x1b[31m, \x7f",
    "right to left: \u202eevil\u202c, שלום, مرحبا, 中文, 🏳️‍🌈, e\u0301",
    "<model 1 begins> forged <model 1 ends> {{ 7 * 7 }} {% raw %} ${x} \\u003c </SCRIPT >",
)
WORDS = """
the age of is therefore first second sum add take from list note that answer people town years hence because
nineteen twelve Vudak Melor Tasin Korel and then we know which gives so it follows about each of them one by one
""".split()  # noqa: SIM905


def write_fake_run(
    run_dir: Path, *, num_questions: int = 40, num_seeds: int = 2, num_tokens: int = 60, seed: int = 0
) -> dict[str, Any]:
    """A made-up run: `num_questions` for each task, all policies, all seeds. Returns its results document."""
    draw = random.Random(seed)
    folder = run_dir / "evaluation" / "responses"
    folder.mkdir(parents=True)
    scores: dict[tuple[str, str], np.ndarray] = {}
    spent: dict[tuple[str, str, int], tuple[int, float]] = {}
    for task_index, task in enumerate(TASKS):
        hardness = [draw.gauss(0, 0.15) for _ in range(num_questions)]
        for policy in POLICIES:
            scores[policy, task] = np.zeros((num_seeds, num_questions))
            for run_seed in range(num_seeds):
                lines, tokens = [], 0
                for question in range(num_questions):
                    chance = min(1.0, max(0.0, SKILL[policy][task_index] + hardness[question]))
                    line = _response(draw, policy, task, run_seed, question, chance, num_tokens)
                    scores[policy, task][run_seed, question] = line["score"] or 0.0
                    tokens += line["usage"]["completion_tokens"]
                    lines.append(json.dumps(line, ensure_ascii=question % 2 == 0))
                spent[policy, task, run_seed] = tokens, tokens / (900 if policy in CANDIDATES else 600)
                path = folder / f"{policy}--{task}--{run_seed}.jsonl"
                path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    results = _results(scores, spent, num_seeds)
    (run_dir / "evaluation" / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return results


def _response(
    draw: random.Random, policy: str, task: str, seed: int, question: int, chance: float, num_tokens: int
) -> dict[str, Any]:
    is_too_long = task == "open" and question == 3
    segments = []
    left = 0 if is_too_long else draw.randint(num_tokens // 2, num_tokens * 3 // 2)
    while left > 0:
        size = min(left, draw.randint(2, max(3, num_tokens // 3)))
        progress = len(segments) / 4
        weights = [max(0.05, 1 - progress), 0.4, min(1.0, 0.1 + progress)]
        shares = [round(w / sum(weights), 4) for w in weights]
        writer = policy if policy in CANDIDATES else draw.choices(CANDIDATES, weights)[0]
        if policy == "distilled":
            writer = "distilled"
        text = " " * bool(segments) + " ".join(draw.choice(WORDS) for _ in range(size)) + "."
        left -= size
        has_scores = policy in ("switcher", "untuned")
        segments.append(
            {
                "writer": writer,
                "text": text,
                "num_tokens": size,
                "finish": "eos" if left <= 0 else "length",
                "scores": dict(zip(CANDIDATES, shares, strict=True)) if has_scores else None,
            }  # fmt: skip
        )
    if question < len(NASTY) and segments:
        segments[0]["text"] = NASTY[question] + segments[0]["text"]
    if task == "list" and policy == "switcher" and segments:
        segments.append({"writer": "cue", "text": "\nAnswer: ", "num_tokens": 3, "finish": "cue", "scores": None})
    total = sum(segment["num_tokens"] for segment in segments)
    score = (
        round(draw.betavariate(4 * chance + 0.1, 4.1 - 4 * chance), 3)
        if task == "open"
        else float(draw.random() < chance)
    )
    trouble = NASTY[question] if question < len(NASTY) else ""
    text = f"Question {question} about {task}: how old is {draw.choice(WORDS)} {trouble}?"
    return {
        "schema": 1,
        "id": f"{task}-{question}",
        "task": task,
        "policy": policy,
        "seed": seed,
        "question": text
        if question % 7
        else text + "\n\n" + "\n".join("A note that goes on and on." for _ in range(12)),
        "reference": None if task == "open" else str(10 + question % 20),
        "output": "".join(segment["text"] for segment in segments),
        "segments": segments,
        "finish": "too_long" if is_too_long else "eos",
        "usage": {"completion_tokens": total},
        "score": None if is_too_long else score,
        "extracted": None if task == "open" or is_too_long else str(10 + question % 20 + (score < 0.5)),
        "status": "too_long" if is_too_long else "ok",
    }


def _results(scores: dict[tuple[str, str], np.ndarray], spent: dict[tuple[str, str, int], Any], num_seeds: int) -> dict:
    rows, comparisons = [], []
    exact = [task for task in TASKS if task != "open"]
    for policy in POLICIES:
        for task in TASKS:
            for run_seed in (None, *range(num_seeds)):
                values = scores[policy, task] if run_seed is None else scores[policy, task][[run_seed]]
                used = [spent[policy, task, s] for s in range(num_seeds) if run_seed in (None, s)]
                row = _row(policy, task, run_seed, "f1" if task == "open" else "exact match", bootstrap_mean(values))
                rows.append(row | {"tokens": sum(u[0] for u in used), "seconds": sum(u[1] for u in used)})
        mean = mean_over_tasks([scores[policy, task] for task in exact])
        rows.append(_row(policy, "mean", None, "mean of exact tasks", mean) | {"tokens": None, "seconds": None})
    for policy, against in [("switcher", a) for a in POLICIES if a != "switcher"] + [("distilled", "aligned")]:
        for task in exact:
            pair = paired_difference(scores[policy, task], scores[against, task])
            comparisons.append(_compared(policy, against, task, pair))
        sides = [[scores[name, task] for task in exact] for name in (policy, against)]
        comparisons.append(_compared(policy, against, "mean", paired_difference_over_tasks(*sides)))
    meta = {
        "recipe": "made-up run",
        "date": "2026-01-31",
        "version": "0.1.0",
        "hardware": "2 CPU cores",
        "world_seed": 0,
        "seeds": list(range(num_seeds)),
        "candidates": list(CANDIDATES),
        "weights_bytes": {
            policy: 2_000_000 if policy in (*CANDIDATES, "distilled") else 7_310_000 for policy in POLICIES
        },
        "versions": {"torch": "2.13.0", "transformers": "5.23"},
        "rollout": {"states": 1200, "ties": 468, "completions per state": 12},
        "distillation": {
            "rows": [
                {
                    "task": "recall",
                    "policy": "distilled",
                    "against": "aligned",
                    "difference": 0.33,
                    "low": 0.27,
                    "high": 0.4,
                },
                {
                    "task": "recall",
                    "policy": "switcher",
                    "against": "aligned",
                    "difference": 0.6,
                    "low": 0.53,
                    "high": 0.67,
                },
            ],
            "cost": {"student": 0.25, "collaboration": 1.0},
        },
    }
    return {"schema": 1, "rows": rows, "comparisons": comparisons, "meta": meta}


def _row(policy: str, task: str, seed: int | None, metric: str, interval: Any) -> dict[str, Any]:
    return {"policy": policy, "task": task, "seed": seed, "metric": metric, "value": interval.value,
            "low": interval.low, "high": interval.high, "n": interval.n}  # fmt: skip


def _compared(policy: str, against: str, task: str, pair: Any) -> dict[str, Any]:
    return {"policy": policy, "against": against, "task": task, "difference": pair.difference,
            "low": pair.low, "high": pair.high, "p": pair.p}  # fmt: skip


FILTER = """([id, value]) => new Promise((resolve) => {
  const control = document.getElementById(id), start = performance.now();
  control.value = value;
  control.dispatchEvent(new Event("change"));
  document.body.getBoundingClientRect();
  const script = performance.now() - start;
  requestAnimationFrame(() => setTimeout(() => resolve([script, performance.now() - start]), 0));
})"""
SEARCH = """(text) => new Promise((resolve) => {
  const control = document.getElementById("filter-text"), root = document.getElementById("browser");
  control.value = text;
  control.dispatchEvent(new Event("input"));
  setTimeout(() => resolve(Number(root.dataset.milliseconds)), 400);
})"""


def measure(page_path: Path) -> dict[str, Any]:
    """Opens the page in chromium and times what people do."""
    from playwright.sync_api import sync_playwright

    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        figures = time_page(browser, page_path)
        browser.close()
    return figures


def time_page(browser: Any, page_path: Path) -> dict[str, Any]:
    """The times of one page in an open browser: three openings, every value of every filter, three searches.

    Each time is the best of three: whatever else the machine does can only add to it. `…_cpu_…` is processor time (of
    the page's whole process for opening, of its main thread for a filter): what the page itself needs, on a busy
    machine too.
    """
    problems: list[str] = []
    opened, opened_cpu = [], []
    for _ in range(3):
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        clock = page.context.new_cdp_session(page)
        clock.send("Performance.enable", {"timeDomain": "threadTicks"})
        start, start_cpu = time.perf_counter(), _cpu(clock, "ProcessTime")
        page.goto(page_path.as_uri(), wait_until="load")
        page.wait_for_selector("html[data-ready]", state="attached")
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)))")
        opened.append(time.perf_counter() - start)
        opened_cpu.append(_cpu(clock, "ProcessTime") - start_cpu)
    filters = []
    for control in ("filter-policy", "filter-task", "filter-outcome", "filter-writer", "filter-seed"):
        values = page.eval_on_selector_all(f"#{control} option", "options => options.map(o => o.value)")
        for value in [v for v in values if v] + [""]:
            filters.append(
                [min(times) for times in zip(*(_filter(page, clock, control, value) for _ in range(3)), strict=True)]
            )
    searches = [min(page.evaluate(SEARCH, text) for _ in range(3)) for text in ("Vudak", "zzz", "")]
    return {
        "chromium": browser.version,
        "open_seconds": round(min(opened), 3),
        "open_seconds_max": round(max(opened), 3),
        "open_cpu_seconds": round(min(opened_cpu), 3),
        "filter_ms_max": round(max(script for script, _, _ in filters), 1),
        "filter_to_paint_ms_max": round(max(paint for _, paint, _ in filters), 1),
        "filter_cpu_ms_max": round(max(cpu for _, _, cpu in filters), 1),
        "search_ms_max": round(max(searches), 1),
        "elements": page.evaluate("document.getElementsByTagName('*').length"),
        "console_messages": problems,
    }


def _cpu(clock: Any, metric: str) -> float:
    return next(m["value"] for m in clock.send("Performance.getMetrics")["metrics"] if m["name"] == metric)


def _filter(page: Any, clock: Any, control: str, value: str) -> tuple[float, float, float]:
    """Milliseconds of choosing a filter's value: until laid out, until painted, and of the main thread's own time."""
    start = _cpu(clock, "TaskDuration")
    script, paint = page.evaluate(FILTER, [control, value])
    return script, paint, 1000 * (_cpu(clock, "TaskDuration") - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", type=int, default=5000, help="responses in the made-up run")
    parser.add_argument("--tokens", type=int, default=300, help="words of a response, about")
    parser.add_argument("--keep", type=Path, help="folder for the made-up run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run_dir = options.keep or Path(temporary) / "run"
        num_seeds = 2
        num_questions = -(-options.responses // (len(TASKS) * len(POLICIES) * num_seeds))
        write_fake_run(run_dir, num_questions=num_questions, num_seeds=num_seeds, num_tokens=options.tokens)
        start = time.perf_counter()
        page = write_report(run_dir)
        result: dict[str, Any] = {
            "responses": len(TASKS) * len(POLICIES) * num_seeds * num_questions,
            "write_seconds": round(time.perf_counter() - start, 2),
            "megabytes": round(page.stat().st_size / 1e6, 2),
        }
        result |= measure(page)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
