"""lm-evaluation-harness on a pool: a pool of one is its own `hf` model; likelihoods, stop strings, local tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ladders import CORPUS

from switchgen.errors import ConfigError, DataError
from switchgen.rundir import Run, open_run
from switchgen.trace import Query

pytest.importorskip("lm_eval")

MakeRun = Callable[..., Run]


@pytest.fixture(scope="session")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multiple-choice, a generative and a perplexity task over local JSON."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"How old is {name}?",
            "options": [" 17", " twenty two ", f"\n{name}"],
            "label": i % 3,
            "text": line,
        }
        for i, (name, line) in enumerate(zip(("Vudak", "Miro", "Größe", "a list"), CORPUS * 2, strict=False))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
            "test_split": "test"}  # fmt: skip
    choice = {**data, "task": "local_choice", "output_type": "multiple_choice", "doc_to_text": "{{question}} Answer: ",
              "doc_to_choice": "options", "doc_to_target": "label", "metric_list": [{"metric": "acc"}]}  # fmt: skip
    writing = {**data, "task": "local_writing", "output_type": "generate_until", "doc_to_text": "{{question}}\nAnswer:",
               "doc_to_target": "text", "metric_list": [{"metric": "exact_match"}],
               "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 24, "do_sample": False}}  # fmt: skip
    rolling = {**data, "task": "local_rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "",
               "doc_to_target": "text", "metric_list": [{"metric": "word_perplexity"}]}  # fmt: skip
    for task in (choice, writing, rolling):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder


def evaluate(model: Any, tasks_dir: Path, tasks: list[str], **arguments: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks_dir), include_defaults=False)
    found = simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **arguments)
    assert found is not None
    return dict(found)


def answers(results: dict[str, Any], task: str) -> list[Any]:
    return [sample["resps"] for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])]


def one_candidate(tmp_path: Path, home: Path) -> Run:
    recipe = {
        "pool": [{"name": "tuned", "model": str(home / "ladder" / "tuned"), "dtype": "float64",
                  "prompt": "{query}{trace}"}],
        "decoding": {"segment": 5},
    }  # fmt: skip
    source = tmp_path / "one.yaml"
    source.write_text(yaml.safe_dump(recipe))
    return open_run(str(source), (), tmp_path / "one")


def test_a_pool_of_one_is_the_harnesss_own_model(tmp_path: Path, home: Path, tasks_dir: Path) -> None:
    import lm_eval.models  # noqa: F401, the harness's own models by name

    from infer.harness_model import SwitchgenLM

    tasks = ["local_choice", "local_writing", "local_rolling"]
    ours = evaluate(SwitchgenLM(run=one_candidate(tmp_path, home), policy="tuned"), tasks_dir, tasks)
    arguments = {"pretrained": str(home / "ladder" / "tuned"), "dtype": "float64"}
    theirs = evaluate("hf", tasks_dir, tasks, model_args=arguments, device="cpu", batch_size=2)
    for task in ("local_choice", "local_rolling"):
        for mine, other in zip(answers(ours, task), answers(theirs, task), strict=True):
            flat = [(float(m[0]), float(o[0])) if isinstance(m, (tuple, list)) else (float(m), float(o))
                    for (m,), (o,) in zip(mine, other, strict=True)]  # fmt: skip
            assert [a for a, _ in flat] == pytest.approx([b for _, b in flat], abs=1e-6)
            if task == "local_choice":
                assert [str(m[0][1]) for m in mine] == [str(o[0][1]) for o in other]
    for ((mine,),), ((other,),) in zip(answers(ours, "local_writing"), answers(theirs, "local_writing"), strict=True):
        # At the limit of tokens we end a character that the harness leaves torn.
        torn = other.endswith("\ufffd")
        assert mine.startswith(other.rstrip("\ufffd")) if torn else mine == other
    assert ours["results"]["local_choice"]["acc,none"] == theirs["results"]["local_choice"]["acc,none"]


def request(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def test_a_pool_writes_and_scores(make_run: MakeRun) -> None:
    from infer.harness_model import SwitchgenLM

    run = make_run("run", "decoding.segment=8")
    model = SwitchgenLM(run=run, policy="random", mc=8)
    pairs = [request("How old is Vudak? ", "17"), request("", "A list"), request("x", " a" * 30)]
    scored = model.loglikelihood(pairs)
    assert all(log_prob < 0 for log_prob, _ in scored) and scored == model.loglikelihood(pairs)
    with pytest.raises(DataError, match="longer than one segment"):
        SwitchgenLM(run=run, policy="random").loglikelihood(pairs)
    with pytest.raises(ConfigError, match="whole documents is that of one candidate; allowed: base, tuned, aligned"):
        model.loglikelihood_rolling([request("a text")])
    kwargs = {"until": ["a"], "max_gen_toks": 12, "do_sample": True, "temperature": 0.8}
    texts = model.generate_until([request(f"Say {i}.", kwargs) for i in range(5)])
    assert len(texts) == 5 and not any("a" in text for text in texts)
    with pytest.raises(ConfigError, match="num_beams: 4; allowed: 1"):
        model.generate_until([request("x", {"num_beams": 4})])
    with pytest.raises(ConfigError, match="generation settings typical_p: allowed are do_sample, "):
        model.generate_until([request("x", {"typical_p": 0.4})])
    assert model.generate_until([request("Say 0.", {**kwargs, "num_beams": 1})]) == texts[:1]


LONG = "How old is Vudak? Miro has 17 apples, pears and plums. " * 120


def test_contexts_beyond_the_model_are_read_from_their_end(
    tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One document beyond the context ended the run of a whole task; now a pool of one gives what `hf` gives."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from infer.harness_model import SwitchgenLM

    ours = SwitchgenLM(run=one_candidate(tmp_path, home), policy="tuned")
    theirs = HFLM(pretrained=str(home / "ladder" / "tuned"), dtype="float64", device="cpu", batch_size=1)
    limit = ours.writer.pool.candidates[0].engine.max_positions
    assert theirs.max_length == limit < len(theirs.tok_encode(LONG))

    def asked(kind: Any, *arguments: Any) -> list[Any]:
        return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]

    pairs = asked("loglikelihood", (LONG, " 17"), ("How old?", " 17"), (LONG[:-1], " twenty two"))
    for mine, other in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-6) and mine[1] == other[1]
    assert "2 of 3 requests are beyond the context" in caplog.text
    caplog.clear()
    documents = asked("loglikelihood_rolling", (LONG,), ("A list",))
    assert ours.loglikelihood_rolling(documents) == pytest.approx(theirs.loglikelihood_rolling(documents), abs=1e-5)
    kwargs = {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False}
    (whole,) = theirs.generate_until(asked("generate_until", (LONG, kwargs)))
    stopped = {**kwargs, "until": [whole[len(whole) // 2 :][:2]]}
    asks = asked("generate_until", (LONG, stopped), (LONG, kwargs), ("How old?", stopped))
    found = ours.generate_until(asks)
    # Beyond the context the room for a character's end is taken from the response: up to 3 tokens.
    assert found[1] and whole.startswith(found[1].rstrip("\ufffd")) and len(found[1]) > len(whole) / 2
    others = theirs.generate_until([asks[0], asks[2]])
    assert [text.rstrip("\ufffd") for text in (found[0], found[2])] == [text.rstrip("\ufffd") for text in others]
    assert "2 of 3 requests are beyond the context" in caplog.text


@pytest.mark.parametrize("policy", ["random", "untuned", "prompted-routing", "baco-p@0.1", "majority@2"])
def test_nobody_is_kept_waiting_by_a_long_context(
    make_run: MakeRun, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    from infer.harness_model import SwitchgenLM

    model = SwitchgenLM(run=make_run("run", "decoding.segment=8"), policy=policy)
    kwargs = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    long, *short = model.generate_until([request(text, kwargs) for text in (LONG, "a", "b")])
    assert "1 of 3 requests are beyond the context" in caplog.text and "no answer" not in caplog.text
    assert long and short == model.generate_until([request("-", kwargs), *(request(x, kwargs) for x in "ab")])[1:]
    if policy.startswith(("random", "untuned", "prompted")):
        pairs = [request(LONG, " 17"), request("How old?", " 17")]
        scored = model.loglikelihood(pairs)
        assert scored[1] == pytest.approx(model.loglikelihood(pairs[1:])[0]) and scored[0][0] < 0


def test_a_merged_model_has_no_first_and_last_writer(make_run: MakeRun) -> None:
    """`decoding.first` named a candidate that a merged model's own pool has not."""
    from infer.choosing import chosen_options
    from infer.harness_model import SwitchgenLM
    from infer.merging import main as merge
    from switchgen.tasks import Example

    run = make_run("run", "decoding.first=tuned", "decoding.last=aligned", "decoding.max_new_tokens=30")
    merge(run, ["soup"])
    model = SwitchgenLM(run=run, policy="soup")
    kwargs = {"max_gen_toks": 4, "do_sample": False}
    assert model.loglikelihood([request("How old?", " 17 and " * 6)])[0][0] < 0
    assert len(model.generate_until([request("How old?", kwargs)])) == 1
    query = Query.from_text("Which one?")
    example = Example("0", tuple(map(dict, query.messages)), {"choices": {"A": "one", "B": "two"}})
    assert chosen_options(run, model.writer, [query], [example])[0]["output"] in ("A", "B")


def test_arguments_of_the_harnesss_command(make_run: MakeRun) -> None:
    from lm_eval.api.registry import get_model

    from infer.harness_model import SwitchgenLM

    run = make_run()
    text = f"recipe={run.source},policy=base,seed=3,mc=2,overrides=decoding.segment=7;engine.max_rows=3"
    model = get_model("switchgen").create_from_arg_string(text, {"batch_size": 1, "device": "cuda:0"})
    assert isinstance(model, SwitchgenLM) and (model.policy, model.seed, model.samples) == ("base", 3, 2)
    assert model.run.recipe.decoding.segment.tokens == 7 and model.run.recipe.engine.max_rows == 3
    with pytest.raises(ConfigError, match="model_args needs a recipe"):
        SwitchgenLM()


def test_what_the_verb_refuses(make_run: MakeRun, tmp_path: Path) -> None:
    from infer.harness import main

    with pytest.raises(ConfigError, match="no tasks; name them"):
        main(make_run())
    with pytest.raises(ConfigError, match="no such folder"):
        main(make_run(), tasks=["x"], include_path=tmp_path / "none")


@pytest.mark.slow
def test_the_verb(make_run: MakeRun, tasks_dir: Path) -> None:
    from infer.harness import main

    run = make_run("run", "decoding.segment=40")
    table, path = main(
        run, policy="random", tasks=["local_choice", "local_writing"], include_path=tasks_dir, limit=2, log_samples=True
    )
    assert "local_choice" in table and "acc" in table
    results = json.loads(path.read_text())
    # Other tasks' results stand beside it.
    assert path == run.dir / "lm-eval" / "random--local_choice+local_writing.json"
    assert len(results["samples"]["local_writing"]) == 2
    with pytest.raises(ConfigError, match="unknown task 'local_nothing'"):
        main(run, tasks=["local_nothing"], include_path=tasks_dir)
