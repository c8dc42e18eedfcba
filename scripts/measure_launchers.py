#!/usr/bin/env python3
"""The switcher's fit in one process against two ranks under deepspeed and torchrun: the same fit, also after a kill.

    python scripts/measure_launchers.py [--run-dir runs/launchers] [--launches zero2 zero3 torchrun] [--steps 20]

Labels are those of `switchgen rollout lab` in RUN/labels, made if they are not there. Each launch fits the lab's
switcher on them: float32, no dropout, the same rows a step in the same order. One process takes twice the rows, and
the steps end within the first epoch, since two ranks fill an epoch's last batch up with rows from its beginning.

Printed for each optimizer and launch: the largest difference of a step's training loss to the one process, and the
relative difference (Frobenius norm) of what the adapters learned. With `--kill`, all processes of one more AdamW fit of
each launch get SIGKILL once a checkpoint is whole; started again, it is compared with the undisturbed one. One JSON
line last.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from switchgen.rundir import open_run  # noqa: E402

OPTIMIZERS = {"adamw": ("adamw_torch", 1e-3), "sgd": ("sgd", 0.1)}
LAUNCHES = ("zero2", "zero3", "torchrun")

JSON = dict[str, Any]


def settings_of(optimizer: str, rows: int, steps: int) -> list[str]:
    """The recipe's settings for one fit with `rows` rows a step and process."""
    name, rate = OPTIMIZERS[optimizer]
    arguments = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1, "max_steps": steps,
                 "learning_rate": rate, "optim": name, "logging_steps": 1, "lr_scheduler_type": "constant",
                 "warmup_steps": 0, "save_strategy": "steps", "save_steps": 5}  # fmt: skip
    return ["train.lora.dropout=0.0", f"train.args={json.dumps(arguments)}"]


def command_of(launch: str, folder: Path, settings: Sequence[str]) -> list[str]:
    """One process (`launch` one), or two ranks."""
    programs = Path(sys.executable).parent
    fit = [str(ROOT / "train" / "switcher.py"), "lab", *settings, "--run-dir", str(folder)]
    if launch == "one":
        return [sys.executable, *fit]
    if launch == "torchrun":
        return [str(programs / "torchrun"), "--standalone", "--nproc-per-node", "2", *fit]
    return [str(programs / "deepspeed"), "--num_accelerators", "2", "--master_port", "29617", *fit,
            "--deepspeed", str(ROOT / "configs" / "deepspeed" / f"{launch}.json")]  # fmt: skip


def fit(launch: str, folder: Path, labels: Path, settings: Sequence[str], *, kill: bool = False) -> JSON:
    """Fit in `folder`, unless it is there already; returns the adapter's facts.

    Args:
        kill: send SIGKILL to all processes once a checkpoint is whole, and start again.
    """
    adapter = folder / "switcher"
    if not adapter.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "rollout").exists():
            (folder / "rollout").symlink_to((labels / "rollout").resolve())
        if kill:
            _run(command_of(launch, folder, settings), until=folder / "switcher-checkpoints")
            if adapter.exists():
                raise SystemExit(f"{folder}: the fit ended before the kill; nothing was shown")
        _run(command_of(launch, folder, settings))
    facts: JSON = json.loads((adapter / "switchgen.json").read_text(encoding="utf-8"))
    return facts


def _run(command: Sequence[str], until: Path | None = None) -> None:
    """Run to its end, or kill launcher and ranks once a folder holds a whole checkpoint."""
    log = Path(command[command.index("--run-dir") + 1]) / "fit.log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(log, "ab") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            while process.poll() is None:
                if until is not None and list(until.glob("checkpoint-*/complete")):
                    break
                time.sleep(0.05)
        finally:
            # Ranks may lead sessions of their own (torchrun's do): killing the launcher's group would leave them.
            everybody = _descendants(process.pid)
            for member in everybody:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(everybody)
            process.wait()
    if until is None and process.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"`{' '.join(command)}` ended with exit code {process.returncode}:\n{tail}")


def _descendants(pid: int) -> list[psutil.Process]:
    """A process and all that it started; none if it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def compared(one: Path, other: Path) -> JSON:
    """Largest difference of a step's loss, and relative difference of the learned matrices."""
    from safetensors.torch import load_file

    losses = [json.loads((folder / "switcher" / "switchgen.json").read_text(encoding="utf-8"))["training_losses"]
              for folder in (one, other)]  # fmt: skip
    if [entry["step"] for entry in losses[0]] != [entry["step"] for entry in losses[1]]:
        raise SystemExit(f"{one} and {other} logged different steps")
    a, b = (load_file(folder / "switcher" / "adapter_model.safetensors") for folder in (one, other))
    # The B matrices start at zero: all that is in them was learned.
    learned = [name for name in a if "lora_B" in name]
    difference = float(sum(((a[name] - b[name]).double() ** 2).sum() for name in learned)) ** 0.5
    size = float(sum((a[name].double() ** 2).sum() for name in learned)) ** 0.5
    if size == 0:
        raise SystemExit(f"{one}: nothing was learned")
    gaps = [abs(x["loss"] - y["loss"]) for x, y in zip(*losses, strict=True)]
    return {"steps": len(gaps), "loss": max(gaps), "adapter": difference / size}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs" / "launchers", help="where the fits lie")
    parser.add_argument("--launches", nargs="+", choices=LAUNCHES, default=list(LAUNCHES))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--queries", type=int, default=300, help="questions of the rollout whose labels are learned")
    parser.add_argument("--kill", action="store_true", help="also: kill -9 in mid-fit, and start again")
    arguments = parser.parse_args()
    root = arguments.run_dir.resolve()
    labels = root / "labels"
    if not (labels / "rollout" / "summary.json").exists():
        from rollout.stage import main as rollout

        rollout(open_run("lab", [f"rollout.queries={arguments.queries}"], labels))
    figures: JSON = {}
    for optimizer in arguments.optimizers:
        single = root / f"{optimizer}-one"
        facts = fit("one", single, labels, settings_of(optimizer, 8, arguments.steps))
        if facts["labels"]["train"] < 8 * arguments.steps:
            raise SystemExit(
                f"{labels}: {facts['labels']['train']} rows to train on do not last {arguments.steps} steps "
                "of 8; allowed: more --queries, fewer --steps"
            )
        for launch in arguments.launches:
            folder = root / f"{optimizer}-{launch}"
            settings = settings_of(optimizer, 4, arguments.steps)
            facts = fit(launch, folder, labels, settings)
            row = {"processes": facts["processes"], **compared(single, folder)}
            if arguments.kill and optimizer == "adamw":
                killed = root / f"{optimizer}-{launch}-killed"
                row["resumed_from"] = fit(launch, killed, labels, settings, kill=True)["resumed_from"]
                if row["resumed_from"] is None:
                    raise SystemExit(f"{killed}: the fit after the kill began anew; nothing was shown")
                row["killed"] = compared(folder, killed)
            figures[f"{optimizer} {launch}"] = row
            print(f"{optimizer:6} {launch:9} {json.dumps(row)}", flush=True)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
