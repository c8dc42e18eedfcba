"""Merged models: the tensors by hand, made once, in safetensors; and a policy's name in an evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ladders import make_model, make_tokenizer
from safetensors.torch import load_file

from infer.evaluation import main as evaluate
from infer.merging import main as merge
from switchgen import merges
from switchgen.assembly import check_writers, load_writers
from switchgen.errors import ConfigError, ModelError
from switchgen.merges import check_merge, combination, is_merged, merged_folder
from switchgen.rundir import Run

MakeRun = Callable[..., Run]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def test_soup_and_extrapolation_tensor_by_tensor(make_run: MakeRun, home: Path) -> None:
    run = make_run()
    merge(run, ["soup", "expo@0.5"])
    base, tuned, aligned = (tensors(home / "ladder" / name) for name in ("base", "tuned", "aligned"))
    soup, expo = (tensors(merged_folder(run, name)) for name in ("soup", "expo@0.5"))
    assert set(soup) == set(expo) == set(aligned)
    for key, last in aligned.items():
        torch.testing.assert_close(soup[key], (base[key] + tuned[key] + last) / 3)
        torch.testing.assert_close(expo[key], last + 0.5 * (last - tuned[key]))
        assert soup[key].dtype == last.dtype
    writers = load_writers(run, ["soup", "aligned"])
    assert writers["soup"].pool.names == ["merged"] and writers["soup"].pool.candidates[0].prompt == "chat"


def test_a_merge_is_made_once_and_anew_for_other_candidates(make_run: MakeRun, home: Path, tmp_path: Path) -> None:
    run = make_run()
    with pytest.raises(ConfigError, match="run `switchgen merge` with soup first"):
        check_writers(run, ["soup"])
    merge(run, ["soup"])
    made = (merged_folder(run, "soup") / "model.safetensors").stat().st_mtime_ns
    merge(run, ["soup"])
    assert (merged_folder(run, "soup") / "model.safetensors").stat().st_mtime_ns == made
    other = make_run("run", f"pool.1.model={home / 'ladder' / 'aligned'}")
    assert is_merged(run, "soup") and not is_merged(other, "soup")
    with pytest.raises(ConfigError, match="or one of other candidates"):
        check_writers(other, ["soup"])


def test_dare_ties_keeps_what_agrees() -> None:
    """At density 1 nothing is dropped: TIES alone, where signs agree a mean, where they differ the larger side."""
    base = torch.tensor([1.0, 1.0, 1.0])
    one, other = torch.tensor([3.0, 0.0, 1.0]), torch.tensor([2.0, 4.0, 1.0])
    merged = combination("dare-ties@1", 3, 0)("w", [base, one, other])
    # Task vectors (2, -1, 0) and (1, 3, 0): the mean 1.5; 3 against -1: 3 stays alone; nothing.
    torch.testing.assert_close(merged, base + torch.tensor([1.5, 3.0, 0.0]))
    big = [torch.zeros(2000), torch.ones(2000), torch.ones(2000)]
    half = combination("dare-ties@0.5", 3, 0)("w", big)
    assert 0.2 < float((half == 0).float().mean()) < 0.3  # both dropped
    torch.testing.assert_close(half[half != 0], torch.full_like(half[half != 0], 2.0))  # rescaled by 1 / 0.5
    assert torch.equal(half, combination("dare-ties@0.5", 3, 0)("w", big))
    assert not torch.equal(half, combination("dare-ties@0.5", 3, 0)("v", big))
    assert not torch.equal(half, combination("dare-ties@0.5", 3, 1)("w", big))


def test_a_greedy_soup_never_falls_on_dev(make_run: MakeRun) -> None:
    run = make_run("run", "baselines.dev_questions=3", tasks=("with-dev",))
    merge(run, ["greedy-soup"])
    facts = json.loads((merged_folder(run, "greedy-soup") / "switchgen.json").read_text())
    scores = [trial["score"] for trial in facts["trials"]]
    assert len(scores) == 3 and facts["dev_score"] == max(scores)
    assert facts["members"] == [t["members"] for t in facts["trials"] if t["score"] == max(scores)][-1]
    assert "trial" not in facts


def test_large_models_are_written_in_shards(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    monkeypatch.setattr(merges, "_SHARD_BYTES", 20_000)
    merge(run, ["soup"])
    folder = merged_folder(run, "soup")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1 and set(index) == set(tensors(folder))
    assert load_writers(run, ["soup"])["soup"].pool.names == ["merged"]


def test_models_that_cannot_be_merged(make_run: MakeRun, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    make_model("llama", len(tokenizer), 1, torch.float32, hidden_size=64).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    with pytest.raises(ModelError, match=r"weights differ in shape: .* is base \(.*tuned \("):
        merge(make_run("wide-run", f"pool.1.model={tmp_path / 'wide'}"), ["soup"])
    make_model("llama", len(tokenizer), 1, torch.float32, num_hidden_layers=1).save_pretrained(tmp_path / "flat")
    with pytest.raises(ModelError, match="tuned and aligned are not of one shape: only one of them has the tensor"):
        merge(make_run("flat-run", f"pool.1.model={tmp_path / 'flat'}"), ["soup"])


@pytest.mark.parametrize(
    ("name", "message"),
    [("soup@2", "soup has no number"), ("expo", "e.g. expo@0.3"), ("dare-ties@1.5", "at most 1, e.g. dare-ties@0.5")],
)
def test_names_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_merge(name, ["a", "b"])
    with pytest.raises(ConfigError, match="merges candidates; the pool has only 'a'"):
        check_merge("soup", ["a"])


def test_other_names_are_refused(make_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match="'stew' is no merged model; allowed: soup, greedy-soup, dare-ties@0.5"):
        merge(make_run(), ["stew"])


def test_every_baseline_in_one_evaluation(make_run: MakeRun, home: Path) -> None:
    """Each has a figure with an interval, its tokens and its seconds, and what its weights take."""
    policies = "[prompted-routing, cascade@0.5, best-of@2, majority@3, refine, soup, dare-ties@0.5]"
    run = make_run("run", f"evaluate.policies={policies}", "evaluate.limit=2", "switcher.base=aligned")
    results = evaluate(run)
    rows = {row["policy"]: row for row in results["rows"] if row["seed"] is None and row["task"] == "ages"}
    assert list(rows) == run.recipe.evaluate.policies
    assert all(row["low"] <= row["value"] <= row["high"] and row["tokens"] > 0 for row in rows.values())
    size = sum(path.stat().st_size for path in (home / "ladder" / "aligned").glob("*.safetensors"))
    weights = results["meta"]["weights_bytes"]
    assert weights["soup"] == weights["best-of@2"] == size and 1.9 < weights["refine"] / size < 2.1
    assert 2.9 < weights["majority@3"] / size < 3.1
    lines = (run.dir / "evaluation/responses/majority@3--ages--0.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert all(len(record["drafts"]) == 2 for record in records)
    assert evaluate(run, rescore=True)["rows"] == results["rows"]
