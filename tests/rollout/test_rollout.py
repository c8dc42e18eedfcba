"""The whole stage on a tiny ladder: what records hold, and that they equal what plain, unshared rows would give."""

from __future__ import annotations

import json
import shutil
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollout.budgets import UniformBudget
from rollout.labelling import Labelling
from rollout.loop import BranchingLoop
from rollout.questions import load_tasks, pick_questions
from rollout.scoring import Scorer
from rollout.stage import main
from rollout.states import NO_BORDER, NOT_SCORED, REPEATED, TOO_LONG, State, decision_borders, shares
from switchgen.assembly import load_writers
from switchgen.candidates import Pool
from switchgen.engines.base import EngineStats
from switchgen.errors import ConfigError
from switchgen.ids import derive_seed
from switchgen.loop import Loop
from switchgen.policies import FixedPolicy, RandomPolicy
from switchgen.rows import Row
from switchgen.rundir import Run

NAMES = ("base", "tuned", "aligned")
Labels = dict[str, dict[str, Any]]
ReadLabels = Callable[[Run], Labels]


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def finished(make_run: Any, shared_folder: Path) -> Run:
    """A finished run, made once."""
    run = make_run()
    run = Run(run.name, run.recipe, shared_folder / "run", run.source)
    main(run)
    return run


def _row(pool: Pool, labelled: dict[str, Any], state: int, *purpose: str | int) -> Row:
    from switchgen.records import query_of

    query = query_of(labelled)
    return Row(pool, query, derive_seed(0, query.id, state, *purpose))


def test_records(finished: Run, labels_of: ReadLabels) -> None:
    labels = labels_of(finished)
    summary = json.loads((finished.dir / "rollout" / "summary.json").read_text())
    assert summary["asked_states"] == 12
    assert summary["states"] == len(labels) == 12 - sum(summary["left_out"].values())
    assert len(labels) >= 10
    for name, record in labels.items():
        assert name == record["id"] and name.startswith(record["query_id"] + "/")
        assert record["query_id"].startswith(record["task"] + "/")
        assert record["candidates"] == ["base", "tuned", "aligned"]
        assert len(record["scores"]) == 3, "every candidate branches in every state"
        for scores, count, mean, done in zip(
            record["scores"], record["counts"], record["means"], record["finished"], strict=True
        ):
            assert len(scores) == count == (1 if done else 4)
            assert mean == pytest.approx(statistics.fmean(scores))
        best = max(record["means"])
        assert record["means"][record["label"]] == best
        assert record["tie"] == (record["means"].count(best) > 1)
        assert record["border"] == len(record["segments"])
        assert 0 <= record["share"] <= 0.9
        assert 0 < record["completion_tokens"] < record["tokens"] or all(record["finished"])
        assert record["tokens"] > 0
    assert {record["task"] for record in labels.values()} == {"ages", "tales"}
    tales = [record for record in labels.values() if record["task"] == "tales"]
    assert any(not record["tie"] for record in tales)
    assert all(len(set(scores)) > 1 for record in tales for scores in record["scores"] if len(scores) > 1), (
        "completions of a branch are different responses"
    )
    prefixes = [(record["query_id"], json.dumps(record["segments"])) for record in labels.values()]
    assert len(set(prefixes)) == len(prefixes), "two states of a question are the same"


def test_summary_agrees_with_the_records(finished: Run, labels_of: ReadLabels) -> None:
    labels = labels_of(finished)
    summary = json.loads((finished.dir / "rollout" / "summary.json").read_text())
    assert summary["ties"] == sum(record["tie"] for record in labels.values())
    assert sum(summary["labels"].values()) == len(labels) - summary["ties"]
    assert summary["tokens"] == sum(record["tokens"] for record in labels.values())
    command = summary["command"]
    assert command["decoded_tokens"] >= summary["tokens"], "ends of text are drawn but are no tokens of a response"
    assert command["decoded_tokens"] == sum(engine["decoded_tokens"] for engine in command["engines"].values())
    assert set(command["engines"]) == {"base", "tuned", "aligned"}


def test_a_finished_run_is_not_begun_again(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("models were loaded")

    monkeypatch.setattr("rollout.workers.load_writers", refuse)
    before = json.loads((finished.dir / "rollout" / "summary.json").read_text())
    assert main(finished) == before
    (finished.dir / "rollout" / "summary.json").unlink()
    again = main(finished)
    assert {key: value for key, value in again.items() if key != "command"} == {
        key: value for key, value in before.items() if key != "command"
    }


def test_a_summary_of_fewer_states_is_made_anew(make_run: Any) -> None:
    """More was asked for, and the kill came between the last state and its summary: the old one is not the answer."""
    main(make_run("run", "rollout.queries=1"))
    run = make_run("run", "rollout.queries=3")
    path = run.dir / "rollout" / "summary.json"
    old = path.read_text()
    whole = main(run)
    path.write_text(old)
    again = main(run)
    assert {key: value for key, value in again.items() if key != "command"} == {
        key: value for key, value in whole.items() if key != "command"
    }
    assert json.loads(path.read_text()) == again


def test_scores_equal_those_of_rows_that_share_nothing(finished: Run, labels_of: ReadLabels) -> None:
    _assert_equal_alone(finished, labels_of(finished))


def test_segments_that_end_where_the_writer_is_unsure(make_run: Any, labels_of: ReadLabels) -> None:
    """A border read off logits is the same in a fork, alone, and where a killed run writes its rows once more."""
    segment = {"tokens": 5, "end": "p@0.2", "min_tokens": 2}
    settings: dict[str, Any] = {"decoding": {"max_new_tokens": 32, "segment": segment}}
    run = make_run("run", "rollout.queries=4", **settings)
    main(run)
    labels = labels_of(run)
    finishes = _assert_equal_alone(run, labels)
    assert finishes["boundary"] > finishes["length"] > 0
    path = run.dir / "rollout" / "labels-0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + lines[2][:30])
    assert main(run)["command"]["states"] == len(lines) - 2
    assert labels_of(run) == labels


def _assert_equal_alone(run: Run, labels: dict[str, dict[str, Any]]) -> Counter[str]:
    """Each trace, branch and completion is written again alone, by the core's plain loop, without forks.

    Returns:
        How many of the branches' segments ended in which way.
    """
    recipe = run.recipe
    pool = Pool.from_recipe(recipe)
    scorer = Scorer(recipe.rollout.reward_model)
    picked = pick_questions(load_tasks(run), recipe.rollout.queries, 0)
    questions = {question.query.id: question for question in picked}
    random = RandomPolicy()
    finishes: Counter[str] = Counter()
    for name, record in labels.items():
        if record["task"] != "tales":
            continue
        question, state = questions[record["query_id"]], int(name.rsplit("/", 1)[1])
        border = record["border"]
        [trace] = Loop(pool, random, recipe.decoding).run([_row(pool, record, state, "prefix")])
        prefix = trace.trace.segments[:border]
        assert [(segment.writer, segment.text) for segment in prefix] == [
            (segment["writer"], segment["text"]) for segment in record["segments"]
        ]
        assert border in decision_borders(trace.trace, recipe.decoding)
        assert record["share"] == shares(trace.trace)[border]
        for writer in range(3):
            alone = _row(pool, record, state, "branch")
            for segment in prefix:
                alone.append(segment)
            [branch] = Loop(pool, FixedPolicy(writer, ""), recipe.decoding, max_segments=border + 1).run([alone])
            assert (branch.trace.finish is not None) == record["finished"][writer]
            finishes[branch.trace.segments[-1].finish] += 1
            rows = []
            for index in range(record["counts"][writer]):
                row = _row(pool, record, state, "completion", index)
                for segment in branch.trace.segments:
                    row.append(segment)
                rows.append(row)
            if not record["finished"][writer]:
                rows = [next(Loop(pool, random, recipe.decoding).run([row])) for row in rows]
            scores = scorer.scores(question, [row.trace.text for row in rows])
            assert scores == pytest.approx(record["scores"][writer], abs=1e-9)
    return finishes


def test_fresh_branches(make_run: Any, labels_of: ReadLabels) -> None:
    """With `branch: fresh` each completion writes its own first segment; again equal to rows that share nothing."""
    run = make_run("run", "rollout.branch=fresh", "rollout.queries=4")
    main(run)
    pool = Pool.from_recipe(run.recipe)
    scorer = Scorer(run.recipe.rollout.reward_model)
    questions = {question.query.id: question for question in pick_questions(load_tasks(run), 4, 0)}
    labels = labels_of(run)
    assert all(record["counts"] == [4, 4, 4] and not any(record["finished"]) for record in labels.values())
    for name, record in labels.items():
        state, border = int(name.rsplit("/", 1)[1]), record["border"]
        [trace] = Loop(pool, RandomPolicy(), run.recipe.decoding).run([_row(pool, record, state, "prefix")])
        for writer in range(3):
            rows = []
            for index in range(4):
                row = _row(pool, record, state, "completion", index)
                for segment in trace.trace.segments[:border]:
                    row.append(segment)
                [row] = Loop(pool, FixedPolicy(writer, ""), run.recipe.decoding, max_segments=border + 1).run([row])
                if row.trace.finish is None:
                    [row] = Loop(pool, RandomPolicy(), run.recipe.decoding).run([row])
                rows.append(row)
            scores = scorer.scores(questions[record["query_id"]], [row.trace.text for row in rows])
            assert scores == pytest.approx(record["scores"][writer], abs=1e-9)


def test_rows_in_flight_change_nothing(finished: Run, make_run: Any, labels_of: ReadLabels) -> None:
    few = make_run("few", "engine.max_rows=3")
    main(few)
    many = make_run("many", "engine.max_rows=200")
    main(many)
    assert labels_of(few) == labels_of(finished)
    assert labels_of(many) == labels_of(finished)


def test_no_model_reads_anything_twice(make_run: Any) -> None:
    """Counted exactly: one state, its prefix one segment, its completions one segment after the branch.

    Of its prompt and the prefix model j reads what it has not met in the trace, but for the last token, with which its
    branch begins to decode; and once each other model's branch, except that branch's last token, with which its
    completions begin. It reads nothing twice, the trace included, however many branches and completions there are.
    """
    run = make_run(
        "run", "decoding.max_new_tokens=24", "rollout.prefix=[0.3, 0.4]", "rollout.completions=24", "engine.max_rows=64"
    )
    writer = load_writers(run, ["random"])["random"]
    engines = [candidate.engine for candidate in writer.pool]
    for engine in engines:
        engine.stop_ids = frozenset()  # every segment is written to its length
    question = pick_questions(load_tasks(run), 1, 0)[0]
    settings = run.recipe.rollout.model_copy(update={"states": 1})
    states: list[State] = []
    records: list[dict[str, Any]] = []

    seen: list[int] = []

    class Spy(Labelling):
        def _branch(self, state: State) -> None:
            contexts = state.prefix.contexts
            seen[:] = [contexts[index].cached if index in contexts else 0 for index in range(len(engines))]
            super()._branch(state)

        def _record(self, state: State) -> dict[str, Any]:
            states.append(state)
            return super()._record(state)

    def label(done: set[str]) -> list[tuple[int, int]]:
        """Tokens read and drawn by each model."""
        for engine in engines:
            engine.stats = EngineStats()
        loop = BranchingLoop(writer.pool, writer.policy, run.recipe.decoding, max_rows=64)
        spy = Spy(
            loop, settings, Scorer(None), UniformBudget(24), done=done, emit=records.append, leave_out=records.append
        )
        spy.run([question])
        return [(engine.stats.read_tokens, engine.stats.decoded_tokens) for engine in engines]

    trace_alone = label(set(question.state_ids(1)))
    assert not records, "a state that is done is not labelled again"
    whole = label(set())
    [state], [record] = states, records
    assert record["border"] == 1 and record["counts"] == [24, 24, 24]
    prefix = state.prefix.num_written
    lengths = [branch.row.num_written - prefix for branch in state.branches]
    for index, candidate in enumerate(writer.pool):
        prompt = len(candidate.prompt_ids(question.query))
        others = sum(length - 1 for writer, length in enumerate(lengths) if writer != index)
        assert whole[index][0] - trace_alone[index][0] == prompt + prefix - seen[index] + others
        assert engines[index].stats.evicted_rows == 0
        assert not any(engines[index].table.owners), "every row is released"
    assert record["tokens"] == sum(drawn for _, drawn in whole), "a state costs what was drawn for it"


def test_engines_forget_every_row(make_run: Any) -> None:
    run = make_run()
    writer = load_writers(run, ["random"])["random"]
    loop = BranchingLoop(writer.pool, writer.policy, run.recipe.decoding, max_rows=16)
    records: list[dict[str, Any]] = []
    labelling = Labelling(
        loop, run.recipe.rollout, Scorer(run.recipe.rollout.reward_model), UniformBudget(2), done=(),
        emit=records.append, leave_out=records.append,
    )  # fmt: skip
    labelling.run(pick_questions(load_tasks(run), 6, 0))
    assert len(records) == 12
    assert not loop.branch_writers and not loop.pausing and not labelling._then
    for candidate in writer.pool:
        assert not any(candidate.engine.table.owners)


@pytest.mark.parametrize(
    "decoding",
    [
        {"first": "base"},
        {"last": "aligned", "cue": " So:"},
        {"first": "aligned", "last": "aligned"},
        {"eos": "segment"},
        {"segment": {"tokens": 8, "end": "sentence"}, "stop": ["e"]},
    ],
    ids=str,
)
def test_wrappers_act_as_in_inference(make_run: Any, labels_of: ReadLabels, decoding: dict[str, Any]) -> None:
    run = make_run("run", "rollout.queries=3", decoding={"max_new_tokens": 32, "segment": 8, **decoding})
    summary = main(run)
    labels = labels_of(run)
    assert labels and summary["states"] == len(labels)
    assert set(summary["left_out"]) <= {NO_BORDER, REPEATED}
    for record in labels.values():
        if "first" in decoding:
            first = record["candidates"].index(decoding["first"])
            assert record["segments"][0]["writer"] == first, "the first writer's turn is no decision"
        if "last" in decoding:
            assert not any(record["finished"]), "after any branch the last writer has its turn"


def test_a_later_round_s_policy(make_run: Any, labels_of: ReadLabels, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    run = make_run("run", "rollout.policy=switcher", "rollout.queries=2", "switcher.top_p=1.0")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(run.recipe.pool[-1].model), LoraConfig(r=2, target_modules=["q_proj"])
    )
    model.save_pretrained(run.switcher_adapter)
    summary = main(run)
    assert summary["command"]["scored_tokens"] > 0
    labels = labels_of(run)
    assert labels
    untuned = make_run("untuned", "rollout.policy=untuned", "rollout.queries=2", "switcher.top_p=1.0")
    main(untuned)
    # A fresh LoRA changes nothing, so both policies are the same model.
    assert {name: record["scores"] for name, record in labels_of(untuned).items()} == {
        name: record["scores"] for name, record in labels.items()
    }


def test_one_adapter_s_labels_are_not_another_s(make_run: Any) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    run = make_run("run", "rollout.policy=switcher", "rollout.queries=1", "rollout.states=1")
    for rank in (2, 3):
        model = AutoModelForCausalLM.from_pretrained(run.recipe.pool[-1].model)
        get_peft_model(model, LoraConfig(r=rank, target_modules=["q_proj"])).save_pretrained(run.switcher_adapter)
        if rank == 2:
            main(run)
    with pytest.raises(ValueError, match="switcher.weights"):
        main(run)


def test_labels_of_candidates_that_were_trained_anew(make_run: Any, home: Path, tmp_path: Path) -> None:
    """The same folders with other weights: the labels are not these models'."""
    ladder = shutil.copytree(home / "ladder", tmp_path / "ladder")
    small = (
        "rollout.queries=1",
        "rollout.states=1",
        *(f"pool.{i}.model={ladder / name}" for i, name in enumerate(NAMES)),
    )
    run = make_run("run", *small)
    main(run)
    stage = run.dir / "rollout" / "stage.json"
    assert set(json.loads(stage.read_text())["settings"]["weights"]) == set(NAMES), "every candidate's"
    main(run)
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(ladder / "aligned" / name, ladder / "tuned" / name)
    with pytest.raises(ConfigError, match=r"weights\.tuned: was"):
        main(run)


def test_states_that_come_to_nothing_are_counted(make_run: Any, home: Path, labels_of: ReadLabels) -> None:
    rows = [{"id": "long", "input": "very " * 1200, "output": "1"}, {"id": "short", "input": "Hello?", "output": "1"}]
    task = home / "lengths.json"
    task.write_text(json.dumps({"name": "lengths", "task_type": "exact_match", "train": rows, "test": rows}))
    run = make_run(
        tasks=[{"file": str(task)}],
        decoding={"max_new_tokens": 16, "segment": 8},
        rollout={"queries": 2, "states": 4, "completions": 1},
    )
    summary = main(run)
    # A response of at most two segments has two borders; the empty prefix can be a state only once.
    assert summary["left_out"][TOO_LONG] == 4
    assert summary["states"] + summary["left_out"].get(REPEATED, 0) == 4
    assert summary["empty_prefixes"] <= 1
    assert summary["asked_states"] == summary["states"] + sum(summary["left_out"].values())
    assert main(run) == summary, "what came to nothing is not tried again"


def test_no_border_in_range(make_run: Any) -> None:
    run = make_run("run", "rollout.prefix=[0.1, 0.9]", decoding={"max_new_tokens": 8, "segment": 8})
    summary = main(run)
    assert summary["states"] == 0 and summary["left_out"] == {NO_BORDER: 12}
    assert summary["tie_share"] is None


def test_responses_beyond_the_reward_model_s_context(make_run: Any, home: Path, tmp_path: Path) -> None:
    import shutil

    judge = tmp_path / "short-judge"
    shutil.copytree(home / "judge", judge)
    config = json.loads((judge / "config.json").read_text())
    (judge / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    run = make_run("run", f"rollout.reward_model={judge}", tasks=[{"file": str(home / "tales.json")}])
    summary = main(run)
    assert summary["left_out"].get(NOT_SCORED, 0) > 0
    assert summary["states"] + sum(summary["left_out"].values()) == 12


def test_settings_that_labels_depend_on(finished: Run, make_run: Any) -> None:
    def again(*overrides: str) -> Run:
        return Run("run", make_run("run", *overrides).recipe, finished.dir, finished.source)

    main(again("rollout.workers=2", "engine.max_rows=3", "pool.0.device=cpu", "train.seed=7"))
    for override, word in (
        ("rollout.seed=1", "rollout.seed"),
        ("decoding.temperature=0.5", "decoding.temperature"),
        ("pool.0.prompt=plain", "pool"),
        ("tasks.0.marker=Answer", "tasks.ages"),
        ("tasks.0.limit=5", "tasks.ages"),
    ):
        with pytest.raises(ValueError, match=word):
            main(again(override))
