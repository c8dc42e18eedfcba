"""The probe: its fit is the minimum, it learns from states, it decides as trained, whatever the batch."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import NAMES, label_records, make_run, write_labels

from infer.batch import main as infer
from switchgen.assembly import check_writers, load_writers
from switchgen.config import SwitcherConfig
from switchgen.errors import ConfigError, ModelError
from switchgen.policies import ProbePolicy
from switchgen.policies.probe import Probe
from switchgen.rows import Row
from switchgen.rundir import Run
from switchgen.trace import Query, Segment
from train.probe import fit_head
from train.switcher import main

PROBE: dict[str, Any] = {"kind": "probe", "base": "tuned"}
SHORT: dict[str, Any] = {"max_new_tokens": 24, "segment": 6}


def probe_run(folder: Path, count: int = 60, **changes: Any) -> Run:
    run = make_run(folder, {"held_out": 0.3, **changes.pop("train", {})}, switcher=PROBE, decoding=SHORT, **changes)
    write_labels(run.dir, label_records(count, ties=4))
    return run


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = probe_run(tmp_path_factory.mktemp("probe"))
    main(run)
    return run


def test_the_fit_is_the_minimum_and_finds_a_planted_rule() -> None:
    generator = torch.Generator().manual_seed(3)
    states = 5 + 3 * torch.randn(400, 12, generator=generator, dtype=torch.float64)
    planted = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    labels = ((states - 5) @ planted.T).argmax(dim=-1)
    targets = torch.nn.functional.one_hot(labels, 3).double()
    probe = fit_head(states[:300], targets[:300], 1e-3)
    assert (probe.logits(states[300:]).argmax(dim=-1) == labels[300:]).double().mean() > 0.93
    # At the minimum the derivative by each bias is nil: mean probabilities are mean targets.
    mean_p = torch.softmax(probe.logits(states[:300]), dim=-1).mean(dim=0)
    assert torch.allclose(mean_p, targets[:300].mean(dim=0), atol=1e-5)
    harder = fit_head(states[:300], targets[:300], 1.0)
    assert harder.weight_CH.abs().sum() < probe.weight_CH.abs().sum()


def test_numbers_that_never_change_get_no_weight() -> None:
    states = torch.tensor([[1.0, 0.0], [1.0, 1.0]] * 8, dtype=torch.float64)
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 8, dtype=torch.float64)
    probe = fit_head(states, targets, 0.01)
    assert probe.weight_CH[:, 0].abs().max() == 0 and torch.isfinite(probe.logits(states)).all()


def test_what_it_leaves(fitted: Run) -> None:
    folder = fitted.switcher_adapter
    assert {path.name for path in folder.iterdir()} == {
        "probe.safetensors",
        "switchgen.json",
        "stage.json",
        "README.md",
    }
    facts = json.loads((folder / "switchgen.json").read_text())
    assert (facts["kind"], facts["host"], facts["candidates"]) == ("probe", "tuned", list(NAMES))
    assert facts["parameters"] == 3 * 32 + 3
    labels = facts["labels"]
    assert labels["left_out"]["tie"] == 4
    assert labels["train"] + labels["held_out"] + 4 == labels["records"] == 60
    assert facts["n_held_out"] == labels["held_out"] > 0 and 0 <= facts["accuracy"] <= 1
    assert str(facts["penalty"]) in facts["validation_losses"]


def test_a_finished_probe_is_found_and_other_labels_are_refused(fitted: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.probe.fit_probe", None)
    assert main(fitted)["switcher"] == str(fitted.switcher_adapter)
    changed = fitted.recipe.train.model_copy(update={"labels": "soft"})
    other = Run(fitted.name, fitted.recipe.model_copy(update={"train": changed}), fitted.dir, fitted.source)
    with pytest.raises(ConfigError, match=r"train\.labels: was 'argmax', is 'soft'"):
        main(other)


def test_it_decides_by_what_its_host_reads(fitted: Run) -> None:
    """Scores are the head on the host's plain forward; batched is alone; asked again after growth, and of forks."""
    writer = load_writers(fitted, ["switcher"])["switcher"]
    policy, pool = writer.policy, writer.pool
    assert isinstance(policy, ProbePolicy) and policy.engine is None and policy.host == 1
    probe, host = Probe.load(fitted.switcher_adapter), pool.candidates[1]
    rows = [Row(pool, Query.from_text(f"List {index}: apples"), seed=index) for index in range(3)]

    def check(members: list[Row]) -> None:
        scores = policy.scores(members)
        for row, own in zip(members, scores, strict=True):
            ids = torch.tensor([row.context(1).ids])
            with torch.inference_mode():
                state = host.engine.model.base_model(  # type: ignore[attr-defined]
                    input_ids=ids, use_cache=False, attention_mask=torch.ones_like(ids)
                ).last_hidden_state[0, -1]
            assert torch.allclose(torch.softmax(probe.logits(state.double()), dim=-1), own, atol=1e-4)

    check(rows)
    for index, row in enumerate(rows):
        text = " apples and pears." * index
        row.append(Segment(0, text, tuple(pool.vocabularies[0].encode_text(text)), "length"))
    check(rows[1:])
    check(rows)
    forks = [rows[2].fork(seed) for seed in (7, 8)]
    forks[1].append(Segment(2, " plums", tuple(pool.vocabularies[0].encode_text(" plums")), "length"))
    check(forks)


def test_responses_do_not_depend_on_the_batch(fitted: Run, tmp_path: Path) -> None:
    """In float64, whatever else is in flight; every decision has scores; reading is the host's and is counted."""
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(json.dumps({"input": f"List {index}: pears"}) + "\n" for index in range(6)))
    outputs = []
    for rows in (1, 6):
        pool = [config.model_copy(update={"dtype": "float64"}) for config in fitted.recipe.pool]
        engine = fitted.recipe.engine.model_copy(update={"max_rows": rows})
        recipe = fitted.recipe.model_copy(update={"pool": pool, "engine": engine})
        recipe = recipe.model_copy(update={"switcher": SwitcherConfig(**PROBE, adapter=str(fitted.switcher_adapter))})
        run = Run(fitted.name, recipe, tmp_path / f"run-{rows}", fitted.source)
        infer(run, input=queries, output=tmp_path / f"{rows}.jsonl", policy="switcher")
        outputs.append((tmp_path / f"{rows}.jsonl").read_text())
    assert outputs[0] == outputs[1]
    lines = [json.loads(line) for line in outputs[0].splitlines()]
    assert all(set(segment["scores"]) == set(NAMES) for line in lines for segment in line["segments"])
    assert len({segment["writer"] for line in lines for segment in line["segments"]}) > 1


def test_what_is_refused(fitted: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="'untuned' is the switcher's model without its adapter"):
        check_writers(fitted, ["untuned"])
    with pytest.raises(ConfigError, match="no candidate is called 'elsewhere'; allowed: base, tuned, aligned"):
        make_run(tmp_path, {}, switcher={"kind": "probe", "base": "elsewhere"})
    with pytest.raises(ConfigError, match="fitted in one process"):
        main(fitted, launcher="torchrun")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds no probe\.safetensors"):
        Probe.load(tmp_path / "empty")
    run = probe_run(tmp_path, train={"args": {"max_steps": 2}})
    with caplog.at_level(logging.WARNING, logger="switchgen"):
        main(run)
    assert "train.args and train.lora have no effect" in caplog.text


def test_soft_labels_of_a_probe(tmp_path: Path) -> None:
    run = probe_run(tmp_path, train={"labels": "soft", "tau": 0.3})
    summary = main(run)
    assert summary["labels"]["left_out"]["tie"] == 4 and summary["n_held_out"] > 0
