"""Multiple choice by likelihood, and a judge's ratings, in an evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from infer.evaluation import main as evaluate
from switchgen.assembly import load_writers
from switchgen.errors import ConfigError
from switchgen.likelihood import likelihoods
from switchgen.rundir import Run
from switchgen.scoring.judge import JudgeScorer
from switchgen.trace import Query

MakeRun = Callable[..., Run]
PROMPT = "{input}\n\n{choices}\n\nAnswer:"


def records(run: Run, policy: str, seed: int = 0) -> list[dict]:  # type: ignore[type-arg]
    path = run.dir / "evaluation" / "responses" / f"{policy}--letters--{seed}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_likeliest_option_is_the_answer(make_run: MakeRun) -> None:
    """Cloze: the option's text after the query, per byte; listed options: the letter."""
    settings = ("tasks.0.metric=choice_likelihood", "evaluate.policies=[base, random]")
    run = make_run("run", *settings, tasks=("letters",))
    results = evaluate(run)
    base = load_writers(run, ["base"])["base"].pool.candidates[0]
    for record in records(run, "base"):
        query = Query.from_text(record["question"])
        per_byte = {}
        for label, text in (("A", " one"), ("B", " two")):
            found = likelihoods(base, [(base.prompt_ids(query), base.vocabulary.encode_text(text))])[0]
            assert found is not None and record["options"][label] == pytest.approx(found.log_prob, abs=1e-5)
            per_byte[label] = found.log_prob / 4
        assert record["output"] == max(per_byte, key=lambda label: per_byte[label]) == record["extracted"]
        assert record["segments"] == [] and record["usage"]["new_tokens"] == 0
    assert {row["metric"] for row in results["rows"] if row["task"] == "letters"} == {"choice_likelihood"}
    assert all(row["seconds"] > 0 and row["tokens"] == 0 for row in results["rows"]), "reading takes time, too"
    assert evaluate(run, rescore=True)["rows"] == results["rows"]
    listed = make_run("listed", *settings, f"tasks.0.prompt={json.dumps(PROMPT)}", tasks=("letters",))
    evaluate(listed)
    (first, *_) = records(listed, "base")
    found = likelihoods(
        base, [(base.prompt_ids(Query.from_text(first["question"])), base.vocabulary.encode_text(" A"))]
    )
    assert found[0] is not None and first["options"]["A"] == pytest.approx(found[0].log_prob, abs=1e-5)
    mixed = records(run, "random")[0]["options"]["A"]
    parts = [records(evaluated(make_run, name), name)[0]["options"]["A"] for name in ("base", "tuned", "aligned")]
    assert mixed == pytest.approx(math.log(sum(map(math.exp, parts)) / 3), abs=1e-5)


def evaluated(make_run: MakeRun, name: str) -> Run:
    settings = ("tasks.0.metric=choice_likelihood", f"evaluate.policies=[{name}]", "evaluate.seeds=[0]")
    run = make_run(f"alone-{name}", *settings, tasks=("letters",))
    evaluate(run)
    return run


def test_chosen_labels_are_no_written_answers(make_run: MakeRun, home: Path, tmp_path: Path) -> None:
    """The prompt is the same, so the labels used to be scored as if they had been written, and the other way round."""
    task = json.loads((home / "letters.json").read_text())
    (tmp_path / "letters.json").write_text(json.dumps(task))
    settings = (f"tasks.0.file={tmp_path / 'letters.json'}", f"tasks.0.prompt={json.dumps(PROMPT)}",
                "evaluate.policies=[base]", "evaluate.seeds=[0]", "evaluate.limit=2")  # fmt: skip
    chosen = (*settings, "tasks.0.metric=choice_likelihood")
    evaluate(make_run("run", *chosen, tasks=("letters",)))
    for rescore in (False, True):
        with pytest.raises(ConfigError, match="answers: was 'chosen by likelihood .*, is not set"):
            evaluate(make_run("run", *settings, tasks=("letters",)), rescore=rescore)
    evaluate(make_run("written", *settings, tasks=("letters",)))
    with pytest.raises(ConfigError, match="answers: was not set, is 'chosen by likelihood"):
        evaluate(make_run("written", *chosen, tasks=("letters",)))


def test_policies_without_a_likelihood_are_refused(make_run: MakeRun) -> None:
    run = make_run("run", "tasks.0.metric=choice_likelihood", "evaluate.policies=[refine]", tasks=("letters",))
    with pytest.raises(ConfigError, match="which policy 'refine' has not; use metric multiple_choice"):
        evaluate(run)


def test_a_judge_scores_once(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint has tests of its own; here: who is asked what, and that ratings are kept."""
    asked: list[str] = []

    def rate(self: JudgeScorer, messages: list, responses: list[str], references: list) -> list[float | None]:  # type: ignore[type-arg]
        asked.extend(responses)
        return [0.25 if index else None for index in range(len(responses))]

    monkeypatch.setattr(JudgeScorer, "score_batch", rate)
    run = make_run("run", "tasks.0.metric=judge", "evaluate.policies=[base]", "evaluate.seeds=[0]", tasks=("tales",))
    with pytest.raises(ConfigError, match="evaluate.judge is not set, and a judge scores tales"):
        evaluate(run)
    run = make_run("run", "tasks.0.metric=judge", "evaluate.policies=[base]", "evaluate.seeds=[0]",
                   "evaluate.judge={url: 'http://x', model: m, prompt: '{query} {response}'}",
                   tasks=("tales",))  # fmt: skip
    results = evaluate(run)
    assert len(asked) == 4 and [row["value"] for row in results["rows"]] == [0.25, 0.25]
    assert "1 questions left out" in str(results["meta"]["notes"])
    evaluate(run)
    assert len(asked) == 5  # only the one without a rating is asked for again
    evaluate(make_run("run", "tasks.0.metric=judge", "evaluate.policies=[base]", "evaluate.seeds=[0]",
                      "evaluate.judge={url: 'http://y', model: m, prompt: '{query} {response}', timeout: 7}",
                      tasks=("tales",)))  # fmt: skip
    assert len(asked) == 9  # another judge
    assert Path(run.dir / "evaluation" / "results.json").is_file()
