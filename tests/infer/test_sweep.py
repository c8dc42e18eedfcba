"""`switchgen sweep` and `switchgen calibrate`: what is written, measured, summed up and chosen."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ladders import make_tokenizer
from transformers import BertConfig, BertModel

from infer.calibrate import calibration_table, choose, chosen_metric, compare
from infer.calibrate import main as calibrate
from infer.frontier import Plane, estimate, plane_scores, resample_counts
from infer.quality import mean_log_probs
from infer.report_sweep import sweep_table, sweep_view
from infer.sweep import main
from infer.sweep_methods import default_methods, kind_of, points_of
from infer.sweep_metrics import DIVERSITY, METRICS, PREFERRED_QUALITY, QUALITY, Measures, lexical_metrics
from infer.sweep_responses import Writers, load_prompts
from infer.sweep_results import split_document
from switchgen.candidates import Pool
from switchgen.config import SweepMethod
from switchgen.errors import ConfigError, ModelError
from switchgen.rundir import Run, open_run
from switchgen.trace import Query

NAMES = ("base", "tuned", "aligned")
JSON = dict[str, Any]
Make = Callable[..., Run]
METHODS: list[JSON] = [
    {"policy": "base"},
    {"policy": "aligned", "temperatures": [0.7, 1.2]},
    {"policy": "random"},
    {"policy": "response-rand", "gammas": [0.5]},
    {"policy": "nudging", "gammas": [0.2]},
    {"policy": "average", "gammas": [0.5]},
    {"policy": "baco-p", "gammas": [0.05, 0.2, float("inf")]},
    {"policy": "baco-punc"},
]


@pytest.fixture
def make(home: Path, tmp_path: Path) -> Make:
    """Opens a run over the tiny ladder and one task with a marker, dev and test prompts."""
    rows = [{"id": f"q{i}", "input": f"Name a number above {i}.", "answers": ["7", "8"]} for i in range(5)]
    task = {"name": "open", "task_type": "exact_match", "metric": "one_of", "marker": "Answer:", "strict": True,
            "dev": rows[:3], "test": rows[3:]}  # fmt: skip
    (tmp_path / "open.json").write_text(json.dumps(task))

    def make_run(name: str = "run", methods: list[JSON] = METHODS, **changes: Any) -> Run:
        recipe = {
            "pool": [{"name": n, "model": str(home / "ladder" / n), "dtype": "float64"} for n in NAMES],
            "decoding": {"max_new_tokens": 12, "segment": 4},
            "engine": {"max_rows": 8},
            "tasks": [{"file": str(tmp_path / "open.json")}],
            "sweep": {"methods": methods, "samples": 3, "resamples": 50, **changes},
        }
        source = tmp_path / f"{name}.yaml"
        source.write_text(yaml.safe_dump(recipe))
        return open_run(str(source), [], tmp_path / name)

    return make_run


@pytest.fixture
def swept(make: Make) -> tuple[Run, JSON]:
    run = make()
    return run, main(run)


def records(run: Run, split: str, key: str) -> list[JSON]:
    path = run.dir / "sweep" / "responses" / split / f"{key}.jsonl"
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda record: record["id"])


def test_the_document(swept: tuple[Run, JSON]) -> None:
    run, document = swept
    assert json.loads((run.dir / "sweep" / "results.json").read_text()) == json.loads(json.dumps(document))
    assert set(document["splits"]) == {"dev", "test"}
    assert document["absent"]["vendi_score"] == "sweep.embedding_model is not set"
    assert document["absent"]["reward"] == "sweep.reward_model is not set"
    for split, prompts in (("dev", 3), ("test", 2)):
        results = document["splits"][split]
        assert len(results["prompts"]) == prompts
        assert len(results["points"]) == 11
        assert {name for point in results["points"] for name in point["values"]} == set(METRICS) - set(
            document["absent"]
        )
        # 7 lexical metrics, clusters, their entropy; validity and likelihood.
        assert len(results["planes"]) == 9 * 2
        for point in results["points"]:
            own = records(run, split, f"{point['policy']}-t{point['temperature']:g}")
            assert len(own) == prompts * 3
            assert len({record["id"] for record in own}) == prompts * 3
            assert point["tokens"] == pytest.approx(np.mean([record["usage"]["new_tokens"] for record in own]))
            for index, prompt in enumerate(results["prompts"]):
                texts = [record["output"] for record in own if record["prompt"] == prompt]
                figures = {metric: values[index] for metric, values in point["per_prompt"].items()}
                tokens = [make_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts]
                expected = lexical_metrics(texts, tokens, len(make_tokenizer()))
                del expected["adjusted_distinct"]  # texts may need the spelling that only the vocabulary knows
                assert {metric: figures[metric] for metric in expected} == pytest.approx(expected)
                assert figures["num_clusters"] == len(
                    {record["extracted"] for record in own if record["prompt"] == prompt}
                )
    paragraphs = sweep_table(document).split("\n\n")
    assert [part.split(":")[0] for part in paragraphs[::2]] == ["Split dev", "Split test"]
    assert all(part.startswith("| method") and "| baco-p " in part for part in paragraphs[1::2])


def test_samples_differ_and_points_share_seeds(swept: tuple[Run, JSON]) -> None:
    """At γ = ∞ the router P is the base model alone, sample by sample; so its figures are the base's."""
    run, document = swept
    assert [r["output"] for r in records(run, "dev", "baco-p@inf-t0.7")] == [
        r["output"] for r in records(run, "dev", "base-t0.7")
    ]
    points = {point["policy"]: point for point in document["splits"]["dev"]["points"]}
    assert points["baco-p@inf"]["values"] == points["base"]["values"]
    assert len({r["output"] for r in records(run, "dev", "base-t0.7")}) > 6
    assert [r["output"] for r in records(run, "dev", "aligned-t0.7")] != [
        r["output"] for r in records(run, "dev", "aligned-t1.2")
    ]


def test_methods_are_scored_as_the_planes_say(swept: tuple[Run, JSON]) -> None:
    results = swept[1]["splits"]["dev"]
    points = results["points"]
    x, y = results["planes"].index(["self_bleu", "likelihood"]), results["planes"].index(["distinct_1", "likelihood"])
    for place, metric, sign in ((x, "self_bleu", -1), (y, "distinct_1", 1)):
        plane = Plane(
            sign * np.array([point["per_prompt"][metric] for point in points]),
            np.array([point["per_prompt"]["likelihood"] for point in points]),
        )
        methods: dict[str, list[int]] = {}
        for index, point in enumerate(points):
            methods.setdefault(point["method"], []).append(index)
        areas, shares = plane_scores(plane, methods, resample_counts(3, 50))
        for index, method in enumerate(results["methods"]):
            assert method["by_plane"][place] == pytest.approx([areas[0, index], shares[0, index]])
    assert sum(method["dominance"]["value"] for method in results["methods"]) == pytest.approx(1)
    for method in results["methods"]:
        mean = np.mean([area for area, _ in method["by_plane"]])
        assert method["coverage"]["value"] == pytest.approx(mean)
        assert 0 <= method["coverage"]["low"] <= method["coverage"]["high"] <= 1
    kinds = {method["name"]: method["kind"] for method in results["methods"]}
    assert kinds == {"base": "response", "aligned": "response", "random": "segment", "response-rand": "response",
                     "nudging": "token", "average": "token", "baco-p": "token", "baco-punc": "token"}  # fmt: skip


def test_a_killed_sweep_goes_on(swept: tuple[Run, JSON], make: Make, caplog: pytest.LogCaptureFixture) -> None:
    run, document = swept
    path = run.dir / "sweep" / "responses" / "dev" / "nudging@0.2-t0.7.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    (run.dir / "sweep" / "responses" / "test" / "average@0.5-t0.7.jsonl").unlink()
    (run.dir / "sweep" / "results.json").unlink()
    again = main(run)
    assert [line for line in path.read_bytes().splitlines(keepends=True)][:4] == lines[:4]

    def without_times(results: JSON) -> JSON:
        points = [{key: value for key, value in p.items() if key != "seconds"} for p in results["points"]]
        return {**results, "points": points}

    for split in ("dev", "test"):
        assert without_times(again["splits"][split]) == without_times(document["splits"][split])
    caplog.set_level("INFO", "switchgen")
    before = {file: file.stat().st_mtime_ns for file in (run.dir / "sweep").rglob("*.jsonl")}
    main(run)
    assert {file: file.stat().st_mtime_ns for file in (run.dir / "sweep").rglob("*.jsonl")} == before
    assert caplog.text.count("are written already") == 2
    with pytest.raises(ConfigError, match="made by another recipe"):
        main(make("run", seed=1))


def test_what_is_measured_otherwise_is_measured_anew(make: Make, home: Path, tmp_path: Path) -> None:
    """Other accepted answers, another aligned model: figures used to stay as they were."""
    run = make("run", [{"policy": "base"}], splits=["dev"])
    main(run)
    path = run.dir / "sweep" / "responses" / "dev" / "base-t0.7.jsonl"
    said = [
        {**json.loads(line), "output": f"Answer: {5 + i % 3}"} for i, line in enumerate(path.read_text().splitlines())
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in said))
    task = json.loads((tmp_path / "open.json").read_text())
    for rows in (task["dev"], task["test"]):
        for row in rows:
            row["answers"] = ["5"]
    (tmp_path / "open.json").write_text(json.dumps(task))
    (point,) = main(run)["splits"]["dev"]["points"]
    assert point["values"]["validity"] == pytest.approx(1 / 3)
    assert {record["extracted"] for record in records(run, "dev", "base-t0.7")} == {"5", "6", "7"}

    prompts = load_prompts(run, "dev")
    before = Measures(run, prompts, Writers(run, [])).fingerprint
    shutil.copytree(home / "ladder" / "aligned", tmp_path / "other")
    (tmp_path / "other" / "added.json").write_text("{}")
    aligned = run.recipe.pool[-1].model_copy(update={"model": str(tmp_path / "other")})
    changed = run.recipe.model_copy(update={"pool": [*run.recipe.pool[:-1], aligned]})
    other = replace(run, recipe=changed)
    assert Measures(other, prompts, Writers(other, [])).fingerprint != before


def test_every_metric_with_encoder_reward_model_and_own_equivalence(make: Make, home: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    changes = {"splits": ["dev"], "embedding_model": str(tmp_path / "encoder"), "reward_model": str(home / "judge")}
    methods = [{"policy": "aligned"}, {"policy": "baco-rand", "gammas": [0.5]}]
    found = {}
    for equivalence in ("embedding", "operator:eq"):
        document = main(make(equivalence[:4], methods, equivalence=equivalence, **changes))
        assert document["absent"] == {}
        points = document["splits"]["dev"]["points"]
        assert all(set(point["values"]) == set(METRICS) for point in points)
        assert len(document["splits"]["dev"]["planes"]) == len(DIVERSITY) * len(QUALITY) == 33
        found[equivalence] = [point["values"]["num_clusters"] for point in points]
    assert found["operator:eq"] == [3.0, 3.0]


def test_likelihood_against_plain_forwards(home: Path, make: Make) -> None:
    pool = Pool.from_recipe(make().recipe)
    candidate = pool.candidates[-1]
    queries = [Query.from_text(text) for text in ("How old is Vudak?", "Hi", "How old is Vudak?", "x")]
    outputs = ["17, I think.", "", "Größe: 東京", "word " * 2000]
    found = mean_log_probs(candidate, queries, outputs)
    assert found[1] is None and found[3] is None
    for index in (0, 2):
        prompt, ids = candidate.prompt_ids(queries[index]), candidate.vocabulary.encode_text(outputs[index])
        logits = candidate.engine.model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0]
        log_probs = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
        expected = log_probs[range(len(ids)), ids].mean().item()
        assert found[index] == pytest.approx(expected, abs=1e-9)


# -- calibrate ----------------------------------------------------------------


def test_calibrate_uses_what_the_sweep_has_written(swept: tuple[Run, JSON]) -> None:
    run, document = swept
    before = {file: file.stat().st_mtime_ns for file in (run.dir / "sweep").rglob("*.jsonl")}
    chosen = calibrate(run, quality=0.9, quality_metric="likelihood", diversity_metric="distinct_2")
    assert {file: file.stat().st_mtime_ns for file in (run.dir / "sweep").rglob("*.jsonl")} == before
    assert json.loads((run.dir / "calibration.json").read_text()) == json.loads(json.dumps(chosen))
    points = {point["policy"]: point["per_prompt"] for point in document["splits"]["dev"]["points"]
              if point["temperature"] == 0.7}  # fmt: skip
    allowed = ["aligned", "baco-p@0.05", "baco-p@0.2", "baco-p@inf", "baco-punc"]
    assert [entry["policy"] for entry in chosen["considered"]] == allowed
    quality = {name: np.exp(points[name]["likelihood"]).mean() for name in allowed}
    meeting = [entry for entry in chosen["considered"] if entry["quality"]["low"] >= 0.9]
    assert chosen["diversity"]["low"] == max(entry["diversity"]["low"] for entry in meeting)
    entry = next(entry for entry in chosen["considered"] if entry["policy"] == "baco-punc")
    assert entry["quality"]["ratio"] == pytest.approx(quality["baco-punc"] / quality["aligned"])
    assert "◀ chosen" in calibration_table(chosen)


def test_calibrate_writes_what_is_missing(make: Make) -> None:
    run = make("fresh")
    chosen = calibrate(run, quality=0.5, quality_metric="likelihood")
    written = {path.name for path in (run.dir / "sweep" / "responses").rglob("*.jsonl")}
    assert written == {f"{p}-t0.7.jsonl" for p in ("aligned", "baco-p@0.05", "baco-p@0.2", "baco-p@inf", "baco-punc")}
    assert chosen["split"] == "dev" and chosen["prompts"] == 3 and chosen["samples"] == 3


def entry(policy: str, quality: float, diversity: float, spread: float = 0.0) -> JSON:
    def figure(ratio: float) -> JSON:
        return {"ratio": ratio, "low": ratio - spread, "high": ratio + spread}

    return {"policy": policy, "quality": figure(quality), "diversity": figure(diversity)}


CONSIDERED = [
    entry("aligned", 1.0, 1.0),
    entry("a", 0.96, 1.4),
    entry("b", 0.97, 1.4),
    entry("c", 0.94, 2.0),
    entry("d", 0.5, 3.0),
    entry("lucky", 0.96, 3.3, spread=0.5),
]


@pytest.mark.parametrize(
    ("quality", "diversity", "expected"),
    [(0.95, None, "b"), (0.9, None, "c"), (1.0, None, "aligned"), (0.1, None, "d"), (None, 1.2, "b"), (None, 2.5, "d")],
)
def test_choices_by_hand(quality: float | None, diversity: float | None, expected: str) -> None:
    assert choose(CONSIDERED, quality, diversity)["policy"] == expected


def test_an_unreachable_wish() -> None:
    with pytest.raises(ConfigError, match=r"no router is known to reach 4 times .* nearest is d, 3\.000 \[3"):
        choose(CONSIDERED, None, 4.0)


def test_ratios_by_hand() -> None:
    made = [
        {"policy": "aligned", "gamma": None, "per_prompt": {"validity": [1.0, 0.6], "self_bleu": [0.8, 0.4]}},
        {"policy": "r", "gamma": 0.3, "per_prompt": {"validity": [0.8, 0.6], "self_bleu": [0.2, 0.4]}},
    ]
    found = compare(made, "self_bleu", "validity", 200)
    assert found[1]["quality"]["ratio"] == pytest.approx(1.4 / 1.6)
    # Half the self-BLEU is twice the diversity.
    assert found[1]["diversity"]["ratio"] == pytest.approx(2.0)
    counts = resample_counts(2, 200)
    expected = estimate((counts @ [0.8, 0.6]) / (counts @ [1.0, 0.6]))
    assert (found[1]["quality"]["low"], found[1]["quality"]["high"]) == pytest.approx((expected.low, expected.high))
    made[0]["per_prompt"]["validity"] = [0.0, 0.5]
    found = compare(made, "self_bleu", "validity", 200)
    # A quarter of the resamples hold the first prompt alone: there the ratio is without bounds.
    assert found[1]["quality"]["ratio"] == pytest.approx(1.4 / 0.5)
    assert found[1]["quality"]["low"] == 0.0 and found[1]["quality"]["high"] is None
    assert [found[0][axis][end] for axis in ("quality", "diversity") for end in ("low", "high")] == [1.0] * 4
    made[0]["per_prompt"]["validity"] = [0.0, 0.0]
    with pytest.raises(ConfigError, match="not above 0"):
        compare(made, "self_bleu", "validity", 10)
    made[0]["per_prompt"]["validity"], made[1]["per_prompt"]["self_bleu"] = [1.0, 1.0], [0.0, 0.0]
    with pytest.raises(ConfigError, match="self_bleu of r is not above 0"):
        compare(made, "self_bleu", "validity", 10)
    made[1]["per_prompt"]["self_bleu"], made[0]["per_prompt"]["self_bleu"] = [None, 0.5], [0.5, None]
    with pytest.raises(ConfigError, match="no prompt has self_bleu at every point"):
        compare(made, "self_bleu", "validity", 10)


def test_a_plane_without_a_common_prompt_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Each point has distinct-3 for a prompt, none for the same one: nothing to compare there."""

    def point(policy: str, distinct_3: list[float | None]) -> JSON:
        per_prompt = {"distinct_1": [0.5, 0.7], "distinct_3": distinct_3, "likelihood": [-1.0, -2.0]}
        return {"method": policy, "policy": policy, "kind": "token", "per_prompt": per_prompt}

    with caplog.at_level(logging.WARNING, "switchgen"):
        found = split_document([point("a", [0.5, None]), point("b", [None, 0.5])], ["1", "2"], [], 20)
    assert found["planes"] == [["distinct_1", "likelihood"]]
    assert "1 of 2 planes are left out" in caplog.text and "distinct_3 x likelihood" in caplog.text
    assert all(method["coverage"]["value"] == 1.0 for method in found["methods"])


# -- what is refused ----------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "changes", "part"),
    [
        ([{"policy": "aligned", "gammas": [0.3]}], {}, "takes no `gammas`"),
        ([{"policy": "baco-p"}], {}, "has no γ: write it after @"),
        ([{"policy": "baco-q", "gammas": [0.1]}], {}, "baco-q"),
        ([{"policy": "aligned"}, {"policy": "aligned", "temperatures": [1.0]}], {}, "two methods are called aligned"),
        ([{"policy": "aligned"}, {"policy": "aligned", "name": "again"}], {}, "the same point: aligned-t0.7"),
        ([{"policy": "aligned"}], {"tasks": ["closed"]}, "no task is called closed; allowed: open"),
        ([{"policy": "aligned"}], {"equivalence": "nowhere:same"}, "cannot be imported"),
    ],
)
def test_wrong_sweeps(make: Make, methods: list[JSON], changes: JSON, part: str) -> None:
    with pytest.raises(ConfigError) as raised:
        main(make("wrong", methods, **changes))
    assert part in str(raised.value)


@pytest.mark.parametrize("key", ["embedding_model", "reward_model"])
def test_what_measures_is_looked_for_before_anything_is_written(make: Make, key: str) -> None:
    run = make("wrong", [{"policy": "aligned"}], **{key: "./nowhere"})
    with pytest.raises(ModelError, match=rf"sweep\.{key}: no model folder at './nowhere'"):
        main(run)
    assert not (run.dir / "sweep" / "responses").exists()


def test_a_reward_without_shares_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    made = [
        {"policy": name, "gamma": None, "per_prompt": {"reward": [-1.0, reward], "likelihood": [-2.0, -1.0]}}
        for name, reward in (("aligned", 0.5), ("r", 3.0))
    ]
    assert chosen_metric(made, None, PREFERRED_QUALITY, "--quality-metric") == "likelihood"
    assert "the aligned model's reward is -0.25, and shares of it mean nothing" in caplog.text
    assert chosen_metric(made, "reward", PREFERRED_QUALITY, "--quality-metric") == "reward"
    made[0]["per_prompt"]["reward"] = [1.0, 0.5]
    assert chosen_metric(made, None, PREFERRED_QUALITY, "--quality-metric") == "reward"


def test_the_report_shows_intervals(swept: tuple[Run, JSON]) -> None:
    _, document = swept
    view = sweep_view(json.loads(json.dumps(document)))
    assert view is not None
    for row in view["operating"]:
        assert row["quality"].low <= row["quality"].value <= row["quality"].high
        assert row["diversity"].low <= row["diversity"].value <= row["diversity"].high
    assert {name for name, _ in view["main"].crosses} <= {"token", "segment", "response"} and view["main"].crosses
    assert not any(plot.crosses for plot in view["planes"])


def test_wrong_calibrations(make: Make) -> None:
    with pytest.raises(ConfigError, match="either --quality"):
        calibrate(make(), quality=0.9, diversity=1.2)
    with pytest.raises(ConfigError, match="no BACo router"):
        calibrate(make("none", [{"policy": "aligned"}]), quality=0.9)


def test_default_methods(make: Make) -> None:
    methods = default_methods(NAMES)
    points = points_of(make("default", []))
    assert len({point.key for point in points}) == len(points)
    assert {method.policy for method in methods} >= {"base", "aligned", "nudging", "average", "random", "baco-p-punc"}
    assert {kind_of(point.policy, NAMES) for point in points} == {"token", "segment", "response"}


def test_a_recipe_adds_methods(make: Make) -> None:
    run = make("also", [])
    added = SweepMethod(policy="switcher", temperatures=[0.7, 1.3])
    settings = run.recipe.sweep.model_copy(update={"also": [added]})
    more = points_of(replace(run, recipe=run.recipe.model_copy(update={"sweep": settings})))
    assert [point.key for point in more if point not in points_of(run)] == ["switcher-t0.7", "switcher-t1.3"]


@pytest.mark.parametrize(
    ("kind", "policies"),
    [
        ("token", ["baco-p@0.3", "nudging@0.5", "average@0.5"]),
        ("segment", ["switcher", "random", "segment-rand@0.3"]),
        ("response", ["base", "response-rand@0.3", "routing", "best-of@3", "soup", "distilled"]),
    ],
)
def test_grains(kind: str, policies: list[str]) -> None:
    assert {kind_of(policy, NAMES) for policy in policies} == {kind}
