"""The ranks of a launcher (torchrun, deepspeed, accelerate) as a stage's workers.

    torchrun --standalone --nproc-per-node 4 -m switchgen rollout RECIPE

Rank 0 is the command: it checks, splits the work as it would for `--workers`, does a share itself and makes what
depends on all of it. The other ranks only wait for shares. A rank that dies takes the launch with it; the same command
goes on after the last finished lines, as after any kill.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

from switchgen.errors import SwitchgenError

_PATIENCE = timedelta(days=30)
"""How long ranks wait for each other: as long as a share takes."""

Job = Callable[[Callable[[Any], None]], Any]
Outcome = tuple[str, Any, list[Any]]
"""What became of a rank's job: `done`, its result and its reports; or `error` and what it was; `idle` without a job."""


def world_size() -> int:
    """Processes of this launch; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among them; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this process writes the files."""
    return rank() == 0


def is_launched() -> bool:
    """Whether a launcher started this process as one of its ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def lead(command: Callable[[], None]) -> None:
    """Run a command whose jobs all ranks share: rank 0 runs it, the others do jobs until it ends."""
    import torch.distributed as dist  # noqa: PLC0415

    # Objects of this size need no GPU's network.
    dist.init_process_group("gloo", timeout=_PATIENCE)
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        if rank() == 0:
            stack.callback(_hand_out, None)
            command()
        else:
            while (jobs := _received()) is not None:
                dist.gather_object(_do(jobs))


def do_jobs(jobs: Sequence[Job], report: Callable[[Any], None]) -> list[Outcome]:
    """Have a job done by each rank; called by rank 0, under `lead`.

    Args:
        jobs: at most one a rank; functions that can be pickled, which are given what to report to.
        report: called in this process; with the other ranks' reports when all jobs are done.
    """
    import torch.distributed as dist  # noqa: PLC0415

    assert len(jobs) <= world_size()
    _hand_out(jobs)
    own = _do(jobs, report)
    outcomes: list[Any] = [None] * world_size()
    dist.gather_object(own, outcomes)
    for _, _, reports in outcomes[1:]:
        for content in reports:
            report(content)
    return outcomes


def _hand_out(jobs: Sequence[Job] | None) -> None:
    """Give every rank the list of jobs; None ends their waiting."""
    import torch.distributed as dist  # noqa: PLC0415

    dist.broadcast_object_list([jobs])


def _received() -> Sequence[Job] | None:
    import torch.distributed as dist  # noqa: PLC0415

    found: list[Any] = [None]
    dist.broadcast_object_list(found)
    jobs: Sequence[Job] | None = found[0]
    return jobs


def _do(jobs: Sequence[Job], report: Callable[[Any], None] | None = None) -> Outcome:
    """This rank's job."""
    reports: list[Any] = []
    try:
        if rank() >= len(jobs):
            return "idle", None, []
        return "done", jobs[rank()](report or reports.append), reports
    except SwitchgenError as error:
        return "error", error, reports
    except Exception:
        # Whatever it was: the command fails with it, on rank 0.
        return "error", traceback.format_exc(), reports
