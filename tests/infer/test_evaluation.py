"""`switchgen evaluate`: what is written, how it is scored, going on, and scoring again without generating."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from infer.claims import weights_bytes
from infer.evaluation import main
from infer.report import write_report
from infer.report_data import check_results
from switchgen.errors import ConfigError, DataError, ModelError
from switchgen.rundir import Run
from switchgen.scoring import RewardModelScorer
from switchgen.tasks import load_task

MakeRun = Callable[..., Run]
JSON = dict[str, Any]
TASKS = ("ages", "facts", "letters")
OFFLINE_FIELDS = {"seconds"}


def responses(run: Run) -> dict[str, list[JSON]]:
    """Responses by file name, in the files' order, without their times."""
    return {
        path.name: [
            {key: value for key, value in json.loads(line).items() if key not in OFFLINE_FIELDS}
            for line in path.read_text().splitlines()
        ]
        for path in sorted((run.dir / "evaluation" / "responses").glob("*.jsonl"))
    }


def figures(document: JSON) -> list[JSON]:
    """Rows and comparisons without their times."""
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in document["rows"]]
    return [*rows, *document["comparisons"]]


def test_document_and_responses(make_run: MakeRun, home: Path) -> None:
    run = make_run(tasks=TASKS)
    document = main(run)
    assert json.loads((run.dir / "evaluation" / "results.json").read_text()) == document
    check_results(document)
    cells = {(row["policy"], row["task"], row["seed"]): row for row in document["rows"]}
    wanted = [
        (policy, task, seed) for policy in ("base", "aligned", "random") for task in (*TASKS, "mean")
        for seed in (0, 1, None)
    ]  # fmt: skip
    assert list(cells) == wanted
    written = responses(run)
    assert list(written) == sorted(
        f"{policy}--{task}--{seed}.jsonl" for policy, task, seed in wanted if task != "mean" and seed is not None
    )
    for name in TASKS:
        task = load_task({"file": str(home / f"{name}.json")})
        examples = {example.id: example for example in task.examples[:4]}
        for policy in ("base", "aligned", "random"):
            for seed in (0, 1):
                lines = written[f"{policy}--{name}--{seed}.jsonl"]
                assert sorted(line["id"] for line in lines) == sorted(examples)
                scores = [task.score(line["output"], examples[line["id"]]) for line in lines]
                assert [line["score"] for line in lines] == [score.value for score in scores]
                assert [line["extracted"] for line in lines] == [score.extracted for score in scores]
                row = cells[policy, name, seed]
                assert row["value"] == pytest.approx(sum(score.value for score in scores) / 4)
                assert row["tokens"] == sum(line["usage"]["new_tokens"] for line in lines)
                assert (row["n"], row["questions"], row["metric"]) == (4, 4, task.metric)
                assert row["low"] <= row["value"] <= row["high"]
            both = cells[policy, name, None]
            assert both["value"] == pytest.approx(sum(cells[policy, name, seed]["value"] for seed in (0, 1)) / 2)
            assert (both["n"], both["questions"]) == (8, 4)
            assert both["seconds"] == pytest.approx(sum(cells[policy, name, s]["seconds"] for s in (0, 1)), abs=2e-3)
    line = written["random--letters--1.jsonl"][0]
    assert line["reference"] in ("A: one", "B: two") and line["question"].startswith("Which one")
    assert (line["policy"], line["task"], line["seed"], line["status"], line["schema"]) == (
        "random",
        "letters",
        1,
        "ok",
        1,
    )
    assert "".join(segment["text"] for segment in line["segments"]) == line["output"]
    assert written["random--ages--0.jsonl"] != written["random--ages--1.jsonl"]
    assert document["meta"]["candidates"] == ["base", "tuned", "aligned"]
    assert document["meta"]["tasks"]["facts"]["metric"] == "f1"
    assert document["meta"]["versions"]["torch"]


def test_f1_is_not_part_of_the_mean(make_run: MakeRun) -> None:
    cells = {
        (row["task"], row["seed"]): row
        for row in main(make_run("run", "evaluate.policies=[base]", tasks=TASKS))["rows"]
    }
    for seed in (0, 1, None):
        expected = (cells["ages", seed]["value"] + cells["letters", seed]["value"]) / 2
        assert cells["mean", seed]["value"] == pytest.approx(expected)


def test_questions_beyond_the_context_count_as_wrong(make_run: MakeRun, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run("run", "evaluate.policies=[base]", "evaluate.seeds=[0]", tasks=("with-long",))
    document = main(run)
    lines = {line["id"]: line for line in responses(run)["base--with-long--0.jsonl"]}
    assert [lines[name]["status"] for name in ("age-0", "long", "age-1")] == ["ok", "too_long", "ok"]
    assert (lines["long"]["output"], lines["long"]["score"], lines["long"]["segments"]) == (None, 0.0, [])
    row = document["rows"][0]
    assert (row["n"], row["not_answered"]) == (3, 1)
    assert row["value"] == pytest.approx(sum(line["score"] for line in lines.values()) / 3)
    assert document["meta"]["not_answered"] == {"with-long": ["long"]}
    assert "task with-long: 1 questions beyond the context, counted as wrong: long" in caplog.text


def test_questions_beyond_the_context_have_no_reward(
    make_run: MakeRun, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning used to say that they count as wrong."""
    run = make_run("run", "evaluate.policies=[base]", "evaluate.seeds=[0]", "tasks.0.metric=reward_model",
                   f"evaluate.reward_model={home / 'judge'}", tasks=("with-long",))  # fmt: skip
    document = main(run)
    assert [row["questions"] for row in document["rows"]] == [2, 2]
    assert document["meta"]["notes"][0] == "with-long: 1 questions left out, a response to them has no score"
    assert "with-long: 1 questions beyond the context, left out for every policy: long" in caplog.text


def test_second_start_writes_nothing(make_run: MakeRun, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run()
    first = main(run)
    files = {path: path.stat().st_mtime_ns for path in (run.dir / "evaluation" / "responses").iterdir()}
    caplog.set_level("INFO", "switchgen")
    assert main(run) == first
    assert "all responses are written already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (run.dir / "evaluation" / "responses").iterdir()} == files


def test_interrupted_and_resumed(make_run: MakeRun) -> None:
    """What a kill leaves: files with fewer lines, one torn, one missing."""
    whole, run = make_run("whole", tasks=TASKS), make_run("run", tasks=TASKS)
    expected = main(whole)
    main(run)
    folder = run.dir / "evaluation" / "responses"
    lines = (folder / "random--ages--0.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "random--ages--0.jsonl").write_bytes(lines[0] + lines[1][:40])
    (folder / "base--letters--1.jsonl").write_bytes(b"")
    (folder / "aligned--facts--0.jsonl").unlink()
    (run.dir / "evaluation" / "results.json").unlink()
    assert figures(main(run)) == figures(expected)
    ours, theirs = responses(run), responses(whole)
    assert ours.keys() == theirs.keys()
    for name in ours:
        by_id = {line["id"]: line for line in ours[name]}
        assert len(by_id) == len(ours[name])
        assert by_id == {line["id"]: line for line in theirs[name]}


def test_more_questions_policies_and_seeds_go_on(make_run: MakeRun) -> None:
    small = ("evaluate.policies=[random]", "evaluate.seeds=[1]", "evaluate.limit=2")
    run = make_run("run", *small)
    main(run)
    kept = responses(run)["random--ages--1.jsonl"]
    expected = main(make_run("whole"))
    assert figures(main(make_run("run"))) == figures(expected)
    assert responses(run)["random--ages--1.jsonl"][:2] == kept
    # Fewer questions than were answered: figures of these alone.
    again = main(make_run("run", *small))
    assert {row["n"] for row in again["rows"]} == {2}


def test_the_report_counts_what_the_results_count(make_run: MakeRun) -> None:
    """After an evaluation of more questions and seeds the page used to count all that was saved."""
    main(make_run("run", "evaluate.policies=[base, random]"))
    run = make_run("run", "evaluate.policies=[base, random]", "evaluate.seeds=[1]", "evaluate.limit=1")
    assert {row["n"] for row in main(run)["rows"]} == {1}
    page = write_report(run.dir).read_text(encoding="utf-8")
    (data,) = re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)
    shown = json.loads(data)
    assert [question[1] for question in shown["questions"]] == ["age-0"]
    assert [(policy, seed) for _, policy, seed, *_ in shown["responses"]] == [(0, 1), (1, 1)]


def test_rescoring_is_identical_and_needs_no_models(make_run: MakeRun, home: Path, tmp_path: Path) -> None:
    ladder = shutil.copytree(home / "ladder", tmp_path / "ladder")
    run = make_run(tasks=TASKS, ladder=ladder)
    document = main(run)
    sizes = document["meta"]["weights_bytes"]
    assert sizes["random"] == sum(path.stat().st_size for path in ladder.glob("*/*.safetensors"))
    before = {path.name: path.read_bytes() for path in (run.dir / "evaluation" / "responses").iterdir()}
    shutil.rmtree(ladder)
    again = main(run, rescore=True)
    assert figures(again) == figures(document) and again["meta"]["weights_bytes"] == sizes
    (run.dir / "evaluation" / "results.json").unlink()
    assert set(main(run, rescore=True)["meta"]["weights_bytes"].values()) == {None}
    for path in (run.dir / "evaluation" / "responses").iterdir():
        assert path.read_bytes() == before[path.name]
        lines = [
            {**json.loads(line), "score": 0.123, "extracted": "nonsense"} for line in path.read_text().splitlines()
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    spoilt = main(run, rescore=True)
    assert figures(spoilt) == figures(document)
    assert {path.name: path.read_bytes() for path in (run.dir / "evaluation" / "responses").iterdir()} == before
    with pytest.raises(ModelError):
        main(run)


def test_the_size_of_weights_that_are_elsewhere(
    make_run: MakeRun, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A switcher that is gone used to end --rescore after it had rewritten the responses' files."""
    run = make_run("run")
    assert weights_bytes(run, "switcher") is None
    size = sum(path.stat().st_size for path in (home / "ladder").glob("*/*.safetensors"))
    (run.dir / "switcher").mkdir(parents=True)
    (run.dir / "switcher" / "adapter_model.safetensors").write_bytes(b"0123456789")
    assert weights_bytes(run, "switcher") == size + 10
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = make_run("hub", "pool.0.model=org/model", "pool.0.revision=v1")
    assert weights_bytes(hub, "base") is None
    place = tmp_path / "hub" / "models--org--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "v1").write_text("0" * 40)
    shutil.copytree(home / "ladder" / "base", place / "snapshots" / ("0" * 40))
    assert weights_bytes(hub, "base") == weights_bytes(run, "base")
    assert weights_bytes(hub, "random") == size


def test_rescoring_by_another_metric(make_run: MakeRun) -> None:
    main(make_run("run", "evaluate.policies=[base]"))
    changed = make_run("run", "evaluate.policies=[base]", "tasks.0.metric=f1")
    document = main(changed, rescore=True)
    assert document["rows"][0]["metric"] == "f1"
    assert not any(row["task"] == "mean" for row in document["rows"])


def test_scores_that_were_made_otherwise_are_given_anew(
    make_run: MakeRun, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Other answers, another metric: old scores used to stay, and more questions made one cell of two metrics."""
    caplog.set_level("INFO", "switchgen")
    task = json.loads((home / "ages.json").read_text())
    (tmp_path / "ages.json").write_text(json.dumps(task))
    settings = (f"tasks.0.file={tmp_path / 'ages.json'}", "evaluate.policies=[base]", "evaluate.seeds=[0]")
    run = make_run("run", *settings)
    main(run)
    path = run.dir / "evaluation" / "responses" / "base--ages--0.jsonl"
    said = [{**json.loads(line), "output": "It is 1."} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in said))
    assert main(run, rescore=True)["rows"][0]["value"] == 0.25  # age-1
    task["test"][2]["output"] = task["test"][3]["output"] = "1"
    (tmp_path / "ages.json").write_text(json.dumps(task))
    assert main(run)["rows"][0]["value"] == 0.75
    assert "task ages: 2 responses were scored with another metric, other answers" in caplog.text
    assert sorted(line["reference"] for line in responses(run)[path.name]) == ["0", "1", "1", "1"]
    caplog.clear()
    main(run)
    assert "scored again" not in caplog.text
    for more in ("tasks.0.strict=true", "tasks.0.metric=f1"):
        changed = make_run("run", *settings, "evaluate.limit=6", "tasks.0.marker='Answer:'", more)
        document = main(changed)
        assert document["rows"][0]["n"] == 6
        task_now = load_task(changed.task_specs("test")[0])
        examples = {example.id: example for example in task_now.examples}
        for line in responses(run)[path.name]:
            assert line["score"] == task_now.score(line["output"], examples[line["id"]]).value


def test_rescoring_what_is_not_there(make_run: MakeRun) -> None:
    with pytest.raises(DataError, match="base--ages--.*no responses"):
        main(make_run(), rescore=True)
    main(make_run("run", "evaluate.limit=2"))
    with pytest.raises(DataError, match="2 of 4 responses are not there .the first: 'age-2'"):
        main(make_run("run"), rescore=True)


def test_responses_of_another_recipe(make_run: MakeRun, home: Path) -> None:
    run = make_run("run", "evaluate.policies=[base]")
    main(run)
    kept = responses(run)
    with pytest.raises(ConfigError, match="made by another recipe") as caught:
        main(make_run("run", "evaluate.policies=[base]", "decoding.temperature=0.2"))
    assert "decoding" in str(caught.value) and "responses/base--ages--*" in str(caught.value)
    with pytest.raises(ConfigError, match="made by another recipe"):
        main(make_run("run", "evaluate.policies=[base]", "decoding.temperature=0.2"), rescore=True)
    with pytest.raises(ConfigError, match="questions: was"):
        main(make_run("run", "evaluate.policies=[base]", "tasks.0.prompt='Say: {input}'"))
    assert responses(run) == kept
    shutil.rmtree(run.dir / "evaluation" / "claims")
    with pytest.raises(ConfigError, match="nothing says how these responses were made"):
        main(run)


def test_a_vote_depends_on_how_answers_are_read(make_run: MakeRun) -> None:
    """Another marker only asks for other scores, except where drafts were chosen by it."""
    small = ("evaluate.policies=[base, majority@2]", "evaluate.seeds=[0]", "evaluate.limit=1")
    run = make_run("run", *small)
    main(run)
    shutil.rmtree(run.dir / "evaluation" / "claims" / "majority@2--ages")
    (run.dir / "evaluation" / "responses" / "majority@2--ages--0.jsonl").unlink()
    main(make_run("run", *small, "tasks.0.marker='The age:'"))
    with pytest.raises(ConfigError, match=r"answers\.1: was 'The age:'|answers: was") as caught:
        main(run)
    assert "base--ages" not in str(caught.value)


def test_the_message_about_another_recipe_s_responses_is_a_command(make_run: MakeRun) -> None:
    """All of them at once: after the command the same evaluation goes through, and what was not stale is kept."""
    settings = ("evaluate.policies=[base, random]", "evaluate.seeds=[0]", "evaluate.limit=2")
    run = make_run("run", *settings, tasks=("ages", "facts"))
    main(run)
    other = make_run("run", *settings, "decoding.temperature=0.2", tasks=("ages", "facts"))
    with pytest.raises(ConfigError, match="3 more sets of responses are not this recipe's") as caught:
        main(other)
    command = str(caught.value).splitlines()[-1].strip()
    assert command.split()[2:] == [f"{run.dir}/evaluation/*/{name}--*" for name in ("base", "random")]
    (run.dir / "evaluation" / "responses" / "kept--ages--0.jsonl").touch()
    subprocess.run(["bash", "-c", command], check=True)
    assert [path.name for path in (run.dir / "evaluation" / "responses").iterdir()] == ["kept--ages--0.jsonl"]
    main(other)
    asked = make_run("run", *settings, "decoding.temperature=0.2", "tasks.0.prompt='Say: {input}'",
                     tasks=("ages", "facts"))  # fmt: skip
    with pytest.raises(ConfigError, match="questions: was") as caught:
        main(asked)
    subprocess.run(["bash", "-c", str(caught.value).splitlines()[-1].strip()], check=True)
    assert not list(run.dir.glob("evaluation/*/base--ages*")) and list(run.dir.glob("evaluation/*/base--facts*"))


def test_reward_model_scores(make_run: MakeRun, home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.reward_model is not set.*tales"):
        main(make_run("run", tasks=("tales",)))
    with pytest.raises(ModelError, match=r"evaluate\.reward_model: no model folder at .*nowhere"):
        main(make_run("run", f"evaluate.reward_model={home / 'nowhere'}", tasks=("tales",)))
    judge = f"evaluate.reward_model={home / 'judge'}"
    run = make_run("run", judge, "evaluate.policies=[base, random]", tasks=("tales", "ages"))
    document = main(run)
    lines = responses(run)["random--tales--1.jsonl"]
    scorer = RewardModelScorer(str(home / "judge"))
    messages = [[{"role": "user", "content": line["question"]}] for line in lines]
    assert [line["score"] for line in lines] == pytest.approx(
        scorer.score_batch(messages, [line["output"] for line in lines])
    )
    assert {row["metric"] for row in document["rows"] if row["task"] == "tales"} == {"reward_model"}
    assert {row["task"] for row in document["rows"]} == {"tales", "ages", "mean"}
    assert [row["questions"] for row in document["rows"] if row["task"] == "mean"] == [4] * 6
    assert figures(main(run, rescore=True)) == figures(document)
    # Another reward model in the same folder.
    shutil.copytree(home / "judge", tmp_path / "judge")
    weights = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    torch.nn.init.zeros_(weights.score.weight)
    weights.save_pretrained(tmp_path / "judge")
    other = make_run("run", f"evaluate.reward_model={tmp_path / 'judge'}", "evaluate.policies=[base, random]",
                     tasks=("tales", "ages"))  # fmt: skip
    assert {row["value"] for row in main(other)["rows"] if row["task"] == "tales"} == {0.0}


def test_tasks_without_scores_have_responses_and_a_note(make_run: MakeRun) -> None:
    run = make_run("run", "evaluate.policies=[random]", tasks=("open", "ages"))
    document = main(run)
    assert {row["task"] for row in document["rows"]} == {"ages", "mean"}
    assert document["meta"]["notes"][0] == "open: its responses have no scores, so there are no figures"
    assert len(responses(run)["random--open--0.jsonl"]) == 4


def test_greedy_candidates_need_one_seed(make_run: MakeRun) -> None:
    run = make_run("run", "decoding.temperature=0", "evaluate.policies=[base, random]")
    document = main(run)
    assert [(row["policy"], row["seed"]) for row in document["rows"] if row["task"] == "ages"] == [
        ("base", 0), ("base", None), ("random", 0), ("random", 1), ("random", None),
    ]  # fmt: skip
    assert document["comparisons"][0]["n"] == 4


def test_distillation_table(make_run: MakeRun, home: Path) -> None:
    run = make_run(
        "run", "evaluate.policies=[aligned, random, distilled]", "distill.policy=random", tasks=("ages", "letters")
    )
    shutil.copytree(home / "ladder" / "tuned", run.dir / "distilled")
    document = main(run)
    table = document["meta"]["distillation"]
    assert [row["task"] for row in table["student_minus_aligned"]] == ["ages", "letters", "mean"]
    assert [row["task"] for row in table["random_minus_aligned"]] == ["ages", "letters", "mean"]
    assert [row["policy"] for row in table["cost"]] == ["aligned", "random", "distilled"]
    assert {row["writer"] for line in responses(run)["distilled--ages--0.jsonl"] for row in line["segments"]} == {
        "student"
    }
    pairs = {(c["policy"], c["against"], c["task"]) for c in document["comparisons"]}
    assert ("distilled", "aligned", "mean") in pairs and ("random", "aligned", "mean") in pairs


def test_settings_that_cannot_work(make_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match="evaluate.against: 'tuned' is not evaluated; allowed: base, aligned, random"):
        main(make_run("run", "evaluate.against=tuned"))
    with pytest.raises(ConfigError, match="two tasks are called ages"):
        main(make_run("run", tasks=("ages", "ages")))
    with pytest.raises(ConfigError, match="a task is called 'mean'"):
        main(make_run("run", "tasks.0.name=mean"))
    with pytest.raises(ConfigError, match="lists no tasks"):
        main(make_run("run", tasks=()))


def test_damaged_responses_are_named(make_run: MakeRun) -> None:
    run = make_run("run", "evaluate.policies=[base]", "evaluate.seeds=[0]")
    main(run)
    path = run.dir / "evaluation" / "responses" / "base--ages--0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"oops\n" + lines[1])
    for rescore in (False, True):
        with pytest.raises(DataError, match=r"base--ages--0\.jsonl, line 2: not a finished record.*oops"):
            main(run, rescore=rescore)
    path.write_bytes(b"".join(lines[:2]))
    assert main(run)["rows"][0]["n"] == 4


def test_split_of_a_task_has_no_effect(make_run: MakeRun, caplog: pytest.LogCaptureFixture) -> None:
    main(make_run("run", "tasks.0.split=dev", "evaluate.policies=[base]", "evaluate.seeds=[0]"))
    assert "task ages: its split 'dev' has no effect; evaluate.split is 'test'" in caplog.text


def test_odd_names_are_files_all_the_same(make_run: MakeRun) -> None:
    run = make_run("run", "evaluate.policies=[base]", "evaluate.seeds=[0]", "tasks.0.name='../a--b/ü?'")
    assert main(run)["rows"][0]["task"] == "../a--b/ü?"
    (name,) = responses(run)
    assert name.startswith("base--_a-b___-") and name.endswith("--0.jsonl")
