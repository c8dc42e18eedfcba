"""The switcher's fit where it takes a while: it learns, it survives a kill, it runs under launchers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import LAB_WORDS, label_records, make_run, write_labels
from safetensors.torch import load_file

from switchgen.rundir import Run
from train.switcher import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LORA = {"r": 8, "alpha": 16, "dropout": 0.0}


def facts_of(run: Run) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((run.switcher_adapter / "switchgen.json").read_text())
    return facts


@pytest.mark.parametrize("labels", ["argmax", "soft"])
def test_it_learns(tmp_path: Path, lab_ladder: Path, labels: str) -> None:
    """The best candidate depends on one word of the query: unseen queries are labelled right."""
    run = make_run(
        tmp_path,
        {
            "labels": labels, "held_out": 0.2,
            "lora": {"r": 16, "alpha": 32, "dropout": 0.0,
                     "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
            "args": {"learning_rate": 5e-3, "num_train_epochs": 4, "per_device_train_batch_size": 16,
                     "gradient_accumulation_steps": 1, "bf16": True},
        },
        ladder=lab_ladder,
        # As in the lab's recipe: its models have read rows of at most 128 tokens, and the released prompt is longer.
        switcher={"format": "compact"},
    )  # fmt: skip
    write_labels(run.dir, label_records(400, words=LAB_WORDS))
    summary = main(run)
    assert summary["n_held_out"] > 50
    assert summary["accuracy"] > 0.9 > 0.6 > summary["majority"]
    curve = facts_of(run)["learning_curve"]
    assert curve[0]["step"] == 0 and curve[0]["accuracy"] < 0.6, "it is the fit that did it"
    assert len(curve) == 5


def test_killed_and_started_again_it_ends_the_same(tmp_path: Path) -> None:
    arguments = {"learning_rate": 1e-3, "num_train_epochs": 3, "per_device_train_batch_size": 4,
                 "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 2}  # fmt: skip
    run = make_run(tmp_path, {"args": arguments, "lora": {**LORA, "dropout": 0.1}, "held_out": 0.2})
    write_labels(run.dir, label_records(40))
    whole = make_run(tmp_path, run.recipe.train.model_dump())
    whole = type(whole)(whole.name, whole.recipe, tmp_path / "whole", whole.source)
    write_labels(whole.dir, label_records(40))
    main(whole)
    command = [sys.executable, str(ROOT / "train" / "switcher.py"), str(run.source), "--run-dir", str(run.dir)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    checkpoints = run.dir / "switcher-checkpoints"
    deadline = time.monotonic() + 600
    while not list(checkpoints.glob("checkpoint-*/complete")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not run.switcher_adapter.exists()
    main(run)
    assert facts_of(run)["resumed_from"].startswith("checkpoint-")
    assert not checkpoints.exists()
    one, two = (load_file(r.switcher_adapter / "adapter_model.safetensors") for r in (whole, run))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert facts_of(run)["accuracy"] == facts_of(whole)["accuracy"]


def start(words: list[str], cwd: Path) -> None:
    """Run a launcher from a folder that is not the project's; its ranks end with it."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.Popen(
        words, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        # The first deepspeed run on a machine compiles an extension.
        output, _ = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output[-6000:]


def launch_run(folder: Path) -> Run:
    arguments = {"learning_rate": 1e-3, "max_steps": 4, "per_device_train_batch_size": 2,
                 "gradient_accumulation_steps": 1, "lr_scheduler_type": "constant", "warmup_steps": 0}  # fmt: skip
    run = make_run(folder, {"args": arguments, "lora": LORA, "held_out": 0.2})
    write_labels(run.dir, label_records(32))
    return run


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same fit as the launched ones: one process, twice the rows a step."""
    run = launch_run(tmp_path_factory.mktemp("one"))
    settings = run.recipe.train
    both = settings.model_copy(update={"args": {**settings.args, "per_device_train_batch_size": 4}})
    run = type(run)(run.name, run.recipe.model_copy(update={"train": both}), run.dir, run.source)
    main(run)
    return run


def check_equal(launched: Run, single: Run) -> None:
    assert facts_of(launched)["processes"] == 2
    assert facts_of(launched)["n_held_out"] == facts_of(single)["n_held_out"]
    one, two = (load_file(run.switcher_adapter / "adapter_model.safetensors") for run in (single, launched))
    assert one.keys() == two.keys()
    # The B matrices start at zero: all that is in them was learned.
    learned = [name for name in one if "lora_B" in name]
    difference = sum(((one[name] - two[name]) ** 2).sum() for name in learned) ** 0.5
    size = sum((one[name] ** 2).sum() for name in learned) ** 0.5
    assert size > 0 and difference / size < 1e-3, "the same rows a step, the same adapter"
    assert not (launched.dir / "switcher-checkpoints").exists()


@pytest.mark.needs("g++", "python-headers", "ninja")
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed(tmp_path: Path, one_process: Run, stage: str) -> None:
    pytest.importorskip("deepspeed")
    run = launch_run(tmp_path)
    program = str(Path(sys.executable).with_name("deepspeed"))
    start(
        [program, "--num_accelerators", "2", "--master_port", "29613", str(ROOT / "train" / "switcher.py"),
         str(run.source), "train.seed=0", "--run-dir", str(run.dir),
         "--deepspeed", str(ROOT / "configs" / "deepspeed" / f"{stage}.json")],
        tmp_path,
    )  # fmt: skip
    check_equal(run, one_process)


def test_torchrun(tmp_path: Path, one_process: Run) -> None:
    run = launch_run(tmp_path)
    program = str(Path(sys.executable).with_name("torchrun"))
    start(
        [program, "--standalone", "--nproc-per-node", "2", str(ROOT / "train" / "switcher.py"), str(run.source),
         "--run-dir", str(run.dir)],
        tmp_path,
    )  # fmt: skip
    check_equal(run, one_process)


@pytest.mark.needs("g++", "python-headers", "ninja")
def test_the_front_doors_launcher(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    run = launch_run(tmp_path)
    summary = main(run, launcher="deepspeed", num_gpus=2, command=[str(run.source)])
    assert summary["labels"]["records"] == 32
    assert facts_of(run)["processes"] == 2
