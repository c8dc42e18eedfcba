"""`build_lab` on the size `tiny`: it resumes, refuses wrong sizes, and its ladder behaves like one."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tqdm import tqdm
from transformers import GenerationConfig

from switchgen.errors import ConfigError
from switchgen.files import StorageError, lock
from switchgen.rundir import SHIPPED_LAB, open_run
from train import lab
from train.ladder import chat_tokenizer, load_rung, new_model, save_rung, train_tokenizer
from train.launch import launch
from train.stages import StageSteps, align, answer_sampler
from train.world import make_world
from train.world_tasks import FAMILIES, family_items

FORMAT = re.compile(r"Answer: \d+$")


@dataclass
class Config:
    seed: int = 5
    size: str = "tiny"
    workers: int = 1


def test_an_unknown_size_is_named_with_those_allowed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lab.size: got 'huge', allowed are small, tiny"):
        lab.build_lab(Config(size="huge"), tmp_path)


@pytest.mark.slow
def test_no_bars_of_the_libraries_while_a_rung_is_made(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Ours stay."""
    world, shape = make_world(5), lab.SIZES["tiny"].shape
    tokenizer = chat_tokenizer(train_tokenizer(world, shape))
    save_rung(new_model(shape, tokenizer, seed=0), tokenizer, tmp_path / "finetuned")
    capfd.readouterr()
    with lab._quiet_libraries():
        align(tmp_path / "finetuned", world, StageSteps(1, 2, 0.02, 3e-3), lambda *_: None)
    list(tqdm([1], desc="ours"))
    shown = capfd.readouterr().err
    bars = [line for line in shown.replace("\r", "\n").split("\n") if "%|" in line]
    assert bars and all(line.startswith("ours") for line in bars), shown


def test_the_shipped_ladder_is_of_this_recipe() -> None:
    """Its settings, its kind of model, and the texts that its stages read."""
    shipped = json.loads((SHIPPED_LAB / "lab.json").read_text(encoding="utf-8"))
    identity = json.loads(json.dumps(lab._identity(Config(seed=0, size="small"))))
    assert {key: shipped.get(key) for key in identity} == identity
    assert json.loads((SHIPPED_LAB / "aligned" / "config.json").read_text())["model_type"] == identity["model"]


def test_a_ladder_is_built_once_at_a_time(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(StorageError, match="another run is at work in this folder"):
        lab.build_lab(Config(), tmp_path)


def test_processes_that_cannot_share_a_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lab.workers: got 3 processes; allowed: 1, 2, 4 or 8"):
        lab.main(open_run("lab", ["lab.size=tiny", "lab.seed=5", "lab.workers=3"], tmp_path))


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows in the same order and the same step: losses agree until roundings (bfloat16) have grown."""
    losses = {}
    launched = []
    monkeypatch.setattr(lab, "launch", lambda *given, **more: (launched.append(more), launch(*given, **more)))
    for workers in (1, 2):
        settings = ["lab.size=tiny", "lab.seed=5", f"lab.workers={workers}"]
        folder = tmp_path / str(workers)
        lab.main(open_run("lab", settings, folder))
        assert lab.is_built(Config(), folder / "lab")
        losses[workers] = json.loads((folder / "lab" / "lab.json").read_text(encoding="utf-8"))["losses"]
    assert launched == [{"num_gpus": 2}]
    for rung in lab.RUNGS:
        one, two = losses[1][rung], losses[2][rung]
        assert len(one) == len(two) and two[-1] == pytest.approx(one[-1], rel=0.1), rung
    assert losses[2]["pretrained"][0] == pytest.approx(losses[1]["pretrained"][0], rel=1e-3)


def _format_share_of_base(folder: Path, questions: list[str]) -> float:
    """How often the base, asked in plain text, ends its answer in the format."""
    model, tokenizer = load_rung(folder)
    torch.manual_seed(0)
    right = 0
    for question in questions:
        ids = tokenizer(f"Question: {question}\nReply:\n", return_tensors="pt", add_special_tokens=False)
        settings = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=56, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
        )
        with torch.inference_mode():
            written = model.generate(**ids, generation_config=settings)[0, ids["input_ids"].shape[1] :]
        right += bool(FORMAT.search(tokenizer.decode(written, skip_special_tokens=True)))
    return right / len(questions)


@pytest.mark.slow
def test_a_tiny_ladder_behaves(tmp_path: Path) -> None:
    """Losses fall on every rung; tuned models answer in the format and the base seldom does; a rebuild resumes."""
    seen: list[tuple[str, int, int]] = []
    lab.build_lab(Config(), tmp_path, lambda *step: seen.append(step))
    summary = json.loads((tmp_path / "lab.json").read_text(encoding="utf-8"))
    for rung in lab.RUNGS:
        losses = summary["losses"][rung]
        assert losses[-1] < 0.8 * losses[0], rung
        assert any(stage == rung and done == total for stage, done, total in seen)
    assert sorted(path.stem for path in (tmp_path / "tasks").iterdir()) == sorted(FAMILIES)

    questions = [item["input"] for item in family_items(make_world(5), "open", "dev")[:60]]
    answered = {}
    for rung in lab.RUNGS[1:]:
        answers = answer_sampler(tmp_path / rung)(questions, questions)
        answered[rung] = sum(bool(FORMAT.search(answer)) for answer in answers) / len(answers)
    base = _format_share_of_base(tmp_path / "pretrained", questions)
    assert min(answered.values()) > 0.6, answered
    assert min(answered.values()) > base + 0.3, (answered, base)

    times = {rung: (tmp_path / rung / "model.safetensors").stat().st_mtime_ns for rung in lab.RUNGS}
    (tmp_path / "aligned.partial").mkdir()  # what a killed build leaves
    shutil.rmtree(tmp_path / "aligned")
    lab.build_lab(Config(), tmp_path)
    again = {rung: (tmp_path / rung / "model.safetensors").stat().st_mtime_ns for rung in lab.RUNGS}
    assert again["pretrained"] == times["pretrained"] and again["finetuned"] == times["finetuned"]
    assert not (tmp_path / "aligned.partial").exists()
