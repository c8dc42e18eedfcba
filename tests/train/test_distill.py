"""Distillation on tiny models with random weights: whose answers become data, what is filtered, what the student is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fits import NAMES
from ladders import make_tokenizer, save_ladder
from transformers import AutoModelForCausalLM

from switchgen.assembly import load_writers
from switchgen.candidates import Pool
from switchgen.config import CandidateConfig
from switchgen.errors import ConfigError, DataError
from switchgen.records import read_records
from switchgen.rundir import Run, open_run
from switchgen.scoring import RewardModelScorer
from switchgen.trace import Query
from switchgen.vocabulary import Vocabulary
from train.distill import main
from train.responses import REASONS, _score, read_responses, student_data, training_questions, write_responses

TRAIN = {"learning_rate": 1e-3, "max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


def save_task(path: Path, **changes: Any) -> None:
    """Questions whose answer is a digit: now and then a random model says it."""
    splits = {
        split: [{"id": f"{split}{index}", "input": f"{split} question {index}: which digit?", "output": str(index % 2)}
                for index in range(12)]
        for split in ("train", "test")
    }  # fmt: skip
    path.write_text(json.dumps({"name": path.stem, "task_type": "exact_match", **splits, **changes}))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    save_ladder(folder / "ladder", NAMES)
    save_task(folder / "digits.json")
    save_task(folder / "more.json", train=[{"input": f"Another {index}", "output": "1"} for index in range(12)])
    return folder


def make_run(home: Path, run_dir: Path, *overrides: str, **distill: Any) -> Run:
    recipe = {
        "pool": [{"name": name, "model": str(home / "ladder" / name)} for name in NAMES],
        # Random weights hardly ever end a text: a stop string does.
        "decoding": {"max_new_tokens": 24, "segment": 6, "temperature": 1.0, "stop": ["a", "e"]},
        "engine": {"max_rows": 8},
        "tasks": [{"file": str(home / "digits.json")}, {"file": str(home / "more.json")}],
        "distill": {"policy": "random", "queries": 8, "samples": 3, "min_score": 0.0, "args": TRAIN, **distill},
    }
    path = run_dir / "digits.yaml"
    run_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe))
    return open_run(str(path), overrides, run_dir / "run")


@pytest.fixture(scope="module")
def distilled(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_run(home, tmp_path_factory.mktemp("run"))
    main(run)
    return run


def facts_of(run: Run) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((run.dir / "distilled" / "switchgen.json").read_text())
    return facts


def records_of(run: Run) -> list[dict[str, Any]]:
    return list(read_records([run.dir / "distill-data" / "responses.jsonl"]))


def test_responses_are_kept_with_their_scores(distilled: Run) -> None:
    records = records_of(distilled)
    assert len({record["id"] for record in records}) == len(records) == 8 * 3
    assert {record["task"] for record in records} == {"digits", "more"}
    assert all(record["query_id"].startswith(record["task"] + "/") for record in records)
    assert all(record["score"] in (0.0, 1.0) for record in records if record["output"] is not None)
    assert len({record["output"] for record in records}) > 8, "samples of one question differ"


def test_the_student_is_a_whole_model_like_its_base(distilled: Run) -> None:
    folder = distilled.dir / "distilled"
    base_folder = Path(distilled.recipe.pool[-1].model)
    there = {path.name for path in folder.iterdir()}
    assert there >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert not [name for name in there if name.endswith(".bin")]
    student, base = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, base_folder))
    assert student.dtype == base.dtype
    assert student.generation_config.eos_token_id == base.generation_config.eos_token_id
    assert student.config.eos_token_id == base.config.eos_token_id
    assert student.config.use_cache == base.config.use_cache
    moved = [name for name, weight in base.state_dict().items() if not torch.equal(weight, student.state_dict()[name])]
    assert moved
    assert not (distilled.dir / "distilled-checkpoints").exists()


def test_the_student_writes_as_a_policy(distilled: Run) -> None:
    from switchgen.api import generate

    writer = load_writers(distilled, ["distilled"])["distilled"]
    traces = generate(writer.pool, ["Which digit?"], writer.policy, decoding=distilled.recipe.decoding)
    assert traces[0].finish is not None and set(traces[0].writers) <= {0}


def test_counts_add_up(distilled: Run) -> None:
    facts = facts_of(distilled)
    counts = facts["responses"]
    assert counts["written"] == 24 == counts["kept"] + sum(counts["left_out"].values())
    assert set(counts["by_task"]) == {"digits", "more"}
    for task in counts["by_task"].values():
        assert task["written"] == task["kept"] + sum(task[reason] for reason in REASONS)
    assert facts["tokens"] == sum(record["usage"]["new_tokens"] for record in records_of(distilled)) > 0
    assert (facts["policy"], facts["adapter"], facts["base_name"]) == ("random", False, "aligned")
    unfinished = sum(record["finish"] not in ("eos", "stop") for record in records_of(distilled))
    assert counts["left_out"]["unfinished"] == unfinished


def test_a_second_start_finds_it_finished(distilled: Run) -> None:
    shard = distilled.dir / "distill-data" / "responses.jsonl"
    weights = distilled.dir / "distilled" / "model.safetensors"
    before = shard.stat().st_mtime_ns, weights.stat().st_mtime_ns
    main(distilled)
    assert (shard.stat().st_mtime_ns, weights.stat().st_mtime_ns) == before


def test_responses_of_other_settings_are_not_mixed_in(distilled: Run) -> None:
    other = open_run(str(distilled.source), ["distill.policy=aligned"], distilled.dir)
    with pytest.raises(ConfigError, match=r"policy: was 'random', is 'aligned'"):
        main(other)
    with pytest.raises(ConfigError, match=r"distill\.args\.learning_rate: was 0\.001, is 0\.1"):
        main(open_run(str(distilled.source), ["distill.args.learning_rate=0.1"], distilled.dir))


def test_resumed_responses_equal_uninterrupted_ones(home: Path, distilled: Run, tmp_path: Path) -> None:
    run = make_run(home, tmp_path)
    kept = [line + "\n" for line in (distilled.dir / "distill-data" / "responses.jsonl").read_text().splitlines()[:5]]
    run.dir.joinpath("distill-data").mkdir(parents=True)
    shard = run.dir / "distill-data" / "responses.jsonl"
    shard.write_text("".join(kept) + '{"id": "torn')
    main(run)
    assert shard.read_text().startswith("".join(kept)), "finished work is not done again"

    def texts(of: Run) -> dict[str, Any]:
        return {record["id"]: record["output"] for record in records_of(of)}

    assert texts(run).keys() == texts(distilled).keys()
    same = sum(texts(run)[name] == text for name, text in texts(distilled).items())
    assert same >= 23, "float32: a draw next to a border may flip, not more"


def test_two_workers_write_what_one_writes(home: Path, tmp_path: Path) -> None:
    exact = [f"pool.{index}.dtype=float64" for index in range(3)]
    runs = [make_run(home, tmp_path / str(workers), *exact, f"distill.workers={workers}") for workers in (1, 2)]
    for run in runs:
        questions = training_questions(run)
        write_responses(run, questions, workers=run.recipe.distill.workers)
    one, two = ({record["id"]: record for record in records_of(run)} for run in runs)
    assert len(two) == len(records_of(runs[1])) == 24
    assert two == one
    assert not (runs[1].dir / "distill-data" / "shards").exists()


def test_an_adapter_instead_of_a_whole_model(home: Path, tmp_path: Path) -> None:
    run = make_run(home, tmp_path, lora={"r": 4, "alpha": 8, "dropout": 0.0})
    summary = main(run)
    folder = run.dir / "distilled"
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    assert facts_of(run)["adapter"] and summary["responses"]["written"] == 24
    assert load_writers(run, ["distilled"])["distilled"].pool.names == ["student"]


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["distill.split=test"], DataError, r"8 of 8 questions are evaluation questions .*must not see them"),
        (["distill.split=dev"], DataError, r"no split 'dev'"),
        (["tasks=[]"], ConfigError, "the recipe lists none"),
        (["distill.args.learning_rte=1"], ConfigError, "did you mean 'learning_rate'"),
        (["distill.policy=switcher"], ConfigError, "run `switchgen train` first"),
        (["distill.policy=swticher"], ConfigError, "did you mean 'switcher'"),
        (["pool.2.adapter=/x/y", "distill.lora={}"], ConfigError, "is itself an adapter"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_is_written(
    home: Path, tmp_path: Path, overrides: list[str], error: type[Exception], message: str
) -> None:
    run = make_run(home, tmp_path, *overrides)
    with pytest.raises(error, match=message):
        main(run)
    assert not (run.dir / "distill-data" / "responses.jsonl").exists()


def test_a_filter_that_leaves_nothing(home: Path, tmp_path: Path) -> None:
    run = make_run(home, tmp_path, min_score=7.0)
    with pytest.raises(DataError, match=r"none of 24 responses is left to learn from: .*'low_score': "):
        main(run)
    assert not (run.dir / "distilled").exists()
    # The responses are there; a threshold that something passes needs no new ones.
    again = make_run(home, tmp_path, min_score=0.0)
    before = (run.dir / "distill-data" / "responses.jsonl").read_bytes()
    main(again)
    assert (run.dir / "distill-data" / "responses.jsonl").read_bytes() == before


def test_an_evaluation_question_hidden_in_the_training_split(home: Path, tmp_path: Path) -> None:
    """The same words under another id, in another task, with other spaces and case."""
    rows = [{"id": "new", "input": " TEST question  3: which digit? ", "output": "1"}]
    rows += [{"id": str(index), "input": f"Harmless {index}", "output": "1"} for index in range(3)]
    save_task(tmp_path / "leaky.json", train=rows)
    run = make_run(home, tmp_path, queries=50)
    recipe = yaml.safe_load(run.source.read_text())
    recipe["tasks"].append({"file": str(tmp_path / "leaky.json")})
    run.source.write_text(yaml.safe_dump(recipe))
    with pytest.raises(DataError, match=r"leaky/new is asked in the evaluation as digits/test3"):
        main(open_run(str(run.source), [], run.dir))


def test_a_file_without_splits_is_the_evaluations(home: Path, tmp_path: Path) -> None:
    (tmp_path / "flat.jsonl").write_text('{"input": "Which?", "output": "1"}\n')
    run = make_run(home, tmp_path, f"tasks=[{{file: {tmp_path / 'flat.jsonl'}}}]")
    with pytest.raises(DataError, match="1 of 1 questions are evaluation questions"):
        main(run)


def test_questions_are_spread_over_the_tasks(home: Path, tmp_path: Path) -> None:
    questions = training_questions(make_run(home, tmp_path, queries=7))
    assert [question.task.name for question in questions] == ["digits"] * 4 + ["more"] * 3
    more = training_questions(make_run(home, tmp_path, queries=12))
    assert {question.query.id for question in questions} < {question.query.id for question in more}


def hand_made(output: str | None, finish: str = "eos", score: float | None = 1.0, query: str = "q") -> dict[str, Any]:
    return {"id": f"{query}/{output}", "query_id": query, "task": "t", "output": output, "finish": finish,
            "score": score, "messages": [{"role": "user", "content": "Say <|end|> it"}],
            "usage": {"new_tokens": 5}}  # fmt: skip


def test_what_the_student_reads_and_what_it_learns(home: Path) -> None:
    vocabulary = Vocabulary(make_tokenizer(), "test")
    config = CandidateConfig(name="aligned", model=str(home / "ladder" / "aligned"))
    end_id = vocabulary.tokenizer.eos_token_id
    records = [
        hand_made("good"), hand_made("good"), hand_made("good", query="other"), hand_made("bad", score=0.5),
        hand_made("nan", score=float("nan")), hand_made("cut off", finish="length"), hand_made(None, "too_long", None),
        hand_made("long " * 60), hand_made("<|end|> is text"),
    ]  # fmt: skip
    data = student_data(records, config, vocabulary, end_id, min_score=0.75, max_length=90)
    assert dict(data.by_task["t"]) == {
        "written": 9, "kept": 3, "repeated": 1, "low_score": 2, "unfinished": 1, "not_answered": 1, "too_long": 1,
    }  # fmt: skip
    assert data.tokens == 45
    candidate = Pool.load([config]).candidates[0]
    prompt = candidate.prompt_ids(Query("q", tuple(records[0]["messages"])))
    for row, text in zip(data.rows, ("good", "good", "<|end|> is text"), strict=True):
        answer = [*vocabulary.encode_text(text), end_id]
        assert row["input_ids"] == [*prompt, *answer], "the tokens that the student reads as a candidate"
        assert row["labels"] == [*[-100] * len(prompt), *answer]
        assert row["input_ids"].count(end_id) == prompt.count(end_id) + 1, "written control tokens are text"


def test_a_plain_base_learns_in_its_own_prompt(home: Path) -> None:
    vocabulary = Vocabulary(make_tokenizer(chat=False), "test")
    config = CandidateConfig(name="base", model="x", prompt="Question: {query}\nAnswer:\n{trace}")
    data = student_data([hand_made("good")], config, vocabulary, 0, min_score=0, max_length=200)
    assert vocabulary.decode(data.rows[0]["input_ids"]) == "Question: Say <|end|> it\nAnswer:\ngood"


def test_a_reward_model_without_a_score_leaves_none(distilled: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its context a reward model scores NaN, for which JSON has no number."""
    question = training_questions(distilled)[0]
    judged = replace(question, task=replace(question.task, metric="reward_model"))
    monkeypatch.setattr(RewardModelScorer, "score_batch", lambda *_: [float("nan")])
    assert _score(judged, "a long one", RewardModelScorer("judge", too_long="nan")) is None
    assert _score(judged, None, None) is None


def test_read_responses_come_in_the_questions_order(distilled: Run) -> None:
    questions = training_questions(distilled)
    read = read_responses(distilled, questions)
    assert [record["query_id"] for record in read[::3]] == [question.query.id for question in questions]
