"""Kill -9 at random instants of every stage, again and again: what is lost, what is done twice, does the end differ?

    ./scripts/torture --kills 50 --seed 0
    python scripts/torture.py --kills 5 --seed 1 --stages rollout infer --workers 2

A tiny ladder with random weights goes through rollout, train, distill, infer and evaluate in float64: once undisturbed,
then in as many run folders as it takes for all kills. Each stage's command is started, killed at an instant drawn
uniformly from the time that it took undisturbed, and started again, until one start comes through. After every kill and
at the end the finished lines of all files, finished fits and whole checkpoints are compared with those that were there
before.

A command is `switchgen`'s `main` in a fork of a process that has the libraries imported already, so that the instants
fall into the work. With several workers the victim is the command or one of its workers.

One JSON line last: `lost` counts finished records that were gone or changed later and checkpoints that were not gone on
from, `twice` records and fits whose work was done again; `equal` says whether final records and weights are the
undisturbed run's (texts and integers identical, floats to 1e-5; times and dates aside). Exit code 0 if nothing was
lost, nothing done twice and all is equal.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tqdm.std import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from ladders import save_ladder  # noqa: E402
from outcomes import (  # noqa: E402
    FITS,
    STAGES,
    Key,
    difference,
    final_state,
    record_files,
    repeated,
    unequal,
    whole_lines,
)

from switchgen.__main__ import main as switchgen  # noqa: E402

NAMES = ("base", "tuned", "aligned")
IMPORTS = ("peft", "trl", "rollout.stage", "train.switcher", "train.switcher_trainer", "train.distill", "infer.batch",
           "infer.evaluation")  # fmt: skip
"""What the commands import lazily: every fork has it."""
POLICIES = {"distill": "distilled", "train": "switcher"}
_KILLS_A_STAGE = 2
"""In one run folder; then the stage is left to finish, so that the kills spread over all stages."""


@dataclass
class Life:
    """One run folder, from the first start to the last."""

    folder: Path
    seen: dict[Key, bytes] = field(default_factory=dict)
    """Finished lines that were there once."""
    files: dict[Path, bytes] = field(default_factory=dict)
    """Finished lines of each file, in order: later ones come after them, or they were written anew."""
    fits: dict[str, int] = field(default_factory=dict)
    """Inodes of finished switchers and students: they are not trained again."""
    steps: dict[str, int] = field(default_factory=dict)
    """The step of a fit's last whole checkpoint at the latest kill."""
    lost: set[Key] = field(default_factory=set)
    twice: set[Key] = field(default_factory=set)

    def look(self, stage: str) -> None:
        """Compare what is finished now with what was, and note what is new."""
        now: dict[Key, bytes] = {}
        for kind, path in record_files(self.folder, stage):
            lines = whole_lines(path)
            if lines and not lines.startswith(self.files.get(path, b"")):
                self.twice.add((stage, path.name))
            self.files[path] = lines
            now |= {(kind, str(json.loads(line)["id"])): line for line in lines.splitlines()}
        self.lost |= {key for key, line in self.seen.items() if key[0].startswith(f"{stage}/") and now.get(key) != line}
        self.seen |= now
        if stage in FITS:
            self._look_at_fit(stage)

    def _look_at_fit(self, stage: str) -> None:
        folder = self.folder / FITS[stage]
        if not folder.is_dir():
            marks = self.folder.glob(f"{FITS[stage]}-checkpoints/checkpoint-*/complete")
            self.steps[stage] = max((int(mark.parent.name.partition("-")[2]) for mark in marks), default=0)
            return
        inode = folder.stat().st_ino
        if self.fits.setdefault(stage, inode) != inode:
            self.twice.add((stage, folder.name))
        resumed = json.loads((folder / "switchgen.json").read_text())["resumed_from"] or "checkpoint-0"
        if int(resumed.partition("-")[2]) < self.steps.get(stage, 0):
            self.lost.add((stage, f"checkpoint-{self.steps[stage]}"))


@dataclass
class Torture:
    """The kills so far."""

    home: Path
    workers: int
    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0

    def command(self, stage: str, folder: Path) -> list[str]:
        words = [stage, str(self.home / "torture.yaml"), "--run-dir", str(folder)]
        if stage == "infer":
            words += ["--input", str(self.home / "queries.jsonl"), "--output", str(folder / "answers.jsonl")]
        return words if stage == "train" else [*words, "--workers", str(self.workers)]

    def start(self, stage: str, folder: Path) -> int:
        """The command in a process group of its own; what it says goes into the run folder's log."""
        self.starts += 1
        folder.mkdir(parents=True, exist_ok=True)
        child = os.fork()
        if child:
            return child
        try:
            os.setpgid(0, 0)
            own_lock_of_bars()
            log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os._exit(switchgen(self.command(stage, folder)))
        finally:
            os._exit(70)

    def undisturbed(self, stage: str, folder: Path) -> float:
        """Run a stage to its end; its seconds."""
        started = time.monotonic()
        child = self.start(stage, folder)
        check(os.waitpid(child, 0)[1] == 0, f"{stage} failed undisturbed", folder)
        return time.monotonic() - started

    def disturbed(self, stage: str, life: Life, seconds: float, chance: random.Random, kills: int) -> float:
        """Start a stage until it comes through; at most `kills` of the starts are killed.

        Returns:
            The stage's seconds, as far as they are known now: a machine is not always equally busy.
        """
        whole = True
        while True:
            started = time.monotonic()
            child = self.start(stage, life.folder)
            instant = chance.uniform(0, seconds) if kills else None
            ended = wait_until(child, instant)
            if ended is None:
                ended = self.kill(child, chance)
            life.look(stage)
            if ended == 0:
                return time.monotonic() - started if whole else seconds
            whole = False
            check(os.WIFSIGNALED(ended) or self.workers > 1, f"{stage} failed by itself", life.folder)
            check(kills > 0, f"{stage} failed without a kill", life.folder)
            kills -= 1
            self.kills[stage] += 1

    def kill(self, child: int, chance: random.Random) -> int:
        """Kill -9 the command or one of its workers; how the command ended."""
        victim = chance.choice([child, *children_of(child)])
        os.kill(victim, signal.SIGKILL)
        return os.waitpid(child, 0)[1]


def own_lock_of_bars() -> None:
    """Progress bars share one semaphore over forks: whoever is killed while it draws would hold it for all others."""
    tqdm.set_lock(threading.RLock())


def wait_until(child: int, seconds: float | None) -> int | None:
    """How the process ended; None if it is still at work after so many seconds."""
    if seconds is None:
        return os.waitpid(child, 0)[1]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, ended = os.waitpid(child, os.WNOHANG)
        if done:
            return ended
        time.sleep(0.002)
    return None


def children_of(process: int) -> list[int]:
    try:
        words = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    # The spawn method's resource tracker is no worker: it ends with its parent.
    return [int(word) for word in words if b"spawn_main" in Path(f"/proc/{word}/cmdline").read_bytes()]


def check(fine: bool, problem: str, folder: Path) -> None:
    if not fine:
        log = (folder / "log.txt").read_text(errors="replace")[-3000:]
        sys.exit(f"torture: {problem}; the end of {folder / 'log.txt'}:\n{log}")


# -- the runs ---------------------------------------------------------------------------------------------------------


def make_home(home: Path, size: int, stages: list[str]) -> None:
    """A ladder, a task, queries and a recipe."""
    save_ladder(home / "ladder", NAMES)
    rows = {
        split: [{"id": f"{split}-{i}", "input": f"{split} {i}: which digit?", "output": str(i % 10)} for i in range(40)]
        for split in ("train", "test")
    }
    (home / "digits.json").write_text(json.dumps({"name": "digits", "task_type": "exact_match", **rows}))
    (home / "queries.jsonl").write_text("".join(json.dumps({"input": f"Query {i}?"}) + "\n" for i in range(4 * size)))
    fit = {"learning_rate": 1e-3, "max_steps": size, "per_device_train_batch_size": 2, "save_strategy": "steps",
           "gradient_accumulation_steps": 1, "save_steps": 2, "save_total_limit": 2}  # fmt: skip
    lora = {"r": 2, "alpha": 4, "dropout": 0.1}
    policies = ["aligned", "random", *[policy for stage, policy in POLICIES.items() if stage in stages]]
    recipe = {
        "pool": [{"name": name, "model": str(home / "ladder" / name), "dtype": "float64"} for name in NAMES],
        # Random weights never end a text; a stop string does.
        "decoding": {"max_new_tokens": 24, "segment": 6, "stop": ["e", "1"]},
        "engine": {"max_rows": 8, "threads": 1},
        "tasks": [{"file": str(home / "digits.json")}],
        "rollout": {
            "queries": size,
            "states": 2,
            "budget": "racing",
            "racing": {"start": 2, "step": 1, "max": 4, "margin": 0.5},
        },
        "train": {"keep_ties": True, "held_out": 0.2, "lora": lora, "args": fit},
        "distill": {"queries": size, "samples": 2, "min_score": 0.0, "lora": lora, "args": fit},
        "evaluate": {"policies": policies, "seeds": [0, 1], "limit": size},
        "infer": {"policy": policies[-1]},
    }
    (home / "torture.yaml").write_text(yaml.safe_dump(recipe))


def torture(home: Path, *, kills: int, seed: int, stages: list[str], workers: int, size: int) -> dict[str, Any]:
    """All of it; see the module."""
    make_home(home, size, stages)
    run, chance = Torture(home, workers), random.Random(seed)
    started = time.monotonic()
    seconds = {stage: run.undisturbed(stage, home / "whole") for stage in stages}
    whole = final_state(home / "whole", stages)
    found: Counter[str] = Counter()
    worst = 0.0
    while run.kills.total() < kills:
        life = Life(home / f"life-{found['lives']}")
        before = run.kills.total()
        for stage in stages:
            left = min(kills - run.kills.total(), _KILLS_A_STAGE)
            seconds[stage] = run.disturbed(stage, life, seconds[stage], chance, left)
        for stage in stages:
            life.look(stage)
        end = final_state(life.folder, stages)
        twice = repeated(life.folder) + len(life.twice)
        found.update(lives=1, lost=len(life.lost), twice=twice, unequal=unequal(whole, end))
        for what, which in (("lost", life.lost), ("done twice", life.twice)):
            if which:
                print(f"{life.folder.name}: {what}: {sorted(which)[:20]}")
        worst = max(worst, difference(whole, end) if whole.keys() == end.keys() else float("inf"))
        print(f"life {found['lives']}: {run.kills.total() - before} kills; so far {dict(run.kills)}", flush=True)
    return {
        "kills": run.kills.total(),
        "by_stage": {stage: run.kills[stage] for stage in stages},
        "lives": found["lives"],
        "starts": run.starts,
        "records": len(whole),
        "lost": found["lost"],
        "twice": found["twice"],
        "unequal": found["unequal"],
        "equal": found["unequal"] == 0,
        "largest_difference": worst,
        "stage_seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "seconds": round(time.monotonic() - started),
        "seed": seed,
        "workers": workers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--workers", type=int, default=1, help="worker processes of the stages that have them")
    parser.add_argument("--size", type=int, default=12, help="questions, and steps of the fits")
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it (default: a temporary one)")
    arguments = parser.parse_args()
    options = {key: getattr(arguments, key) for key in ("kills", "seed", "stages", "workers", "size")}
    own_lock_of_bars()  # before any bar, so that all kinds of them have it
    for module in IMPORTS:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as scratch:
        home = arguments.keep or Path(scratch)
        home.mkdir(parents=True, exist_ok=True)
        figures = torture(home.resolve(), **options)
    print(json.dumps(figures))
    if figures["lost"] or figures["twice"] or not figures["equal"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
