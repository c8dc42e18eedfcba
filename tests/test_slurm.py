"""`scripts/slurm`: what it starts on how many nodes; Slurm's own programs are stood in for by scripts that say so."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {
    "scontrol": "echo node-a; echo node-b",
    "srun": 'echo "srun $*"',
    "python": "cat > /dev/null; sleep 0.3",
    "switchgen": 'echo "switchgen $* at $RAY_ADDRESS"',
}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """A job of two nodes with four GPUs each."""
    for name, line in PROGRAMS.items():
        program = tmp_path / name
        program.write_text(f"#!/usr/bin/env bash\n{line}\n")
        program.chmod(0o755)
    (tmp_path / "activate").write_text("")
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(ROOT), "SWITCHGEN_ACTIVATE": str(tmp_path / "activate"), "SWITCHGEN_PORT": "2222",
    }  # fmt: skip


def submit(job: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "slurm"), *words],
        env=job,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(("verb", "script"), [("train", "train/switcher.py"), ("distill", "train/distill.py")])
def test_fits_start_torchrun_on_every_node(job: dict[str, str], verb: str, script: str) -> None:
    done = submit(job, verb, "my.yaml", "train.seed=3", "--run-dir", "runs/x", "--deepspeed", "zero3")
    assert done.returncode == 0, done.stderr
    assert (
        "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-id 17 --rdzv-backend c10d --rdzv-endpoint node-a:2222 "
        f"{script} my.yaml train.seed=3 --run-dir runs/x --deepspeed zero3"
    ) in done.stdout
    assert (ROOT / script).is_file()


def test_rollouts_start_a_cluster_with_an_actor_a_gpu(job: dict[str, str]) -> None:
    done = submit(job, "rollout", "my.yaml", "--run-dir", "runs/x")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("srun --ntasks-per-node=1 bash -c") and any(
        line.endswith("node-a 2222") for line in lines
    )
    assert "switchgen rollout my.yaml --run-dir runs/x --executor ray --workers 8 at node-a:2222" in lines


def test_a_cluster_that_never_comes_up_ends_the_job(job: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/usr/bin/env bash\ncat > /dev/null; sleep 0.3; exit 1\n")
    done = submit(job, "rollout", "my.yaml")
    assert done.returncode == 1 and "the Ray cluster ended before it was whole" in done.stderr
    assert "switchgen rollout" not in done.stdout


def test_other_verbs_are_refused(job: dict[str, str]) -> None:
    done = submit(job, "report", "my.yaml")
    assert done.returncode == 2 and "got report; allowed: train, distill, rollout, evaluate, infer" in done.stderr
