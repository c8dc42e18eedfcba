"""Shares of a stage's work on a Ray cluster: one actor per replica of the pool (extra `ray`).

The machine or cluster is the one that RAY_ADDRESS names, else this machine. Actors write the same shards as local
workers do, so the run folder, the models and the project must be under the same paths on every node. Where an actor
is lost, or its node, it is killed (one that is only out of reach must not write beside its replacement), and another
takes its share over and goes on after its last finished line.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from switchgen.errors import ConfigError, SwitchgenError, one_line
from switchgen.workers import Losses, Report, Share, Spent, T, Work, failure, work_at

_POLL_SECONDS = 0.2
_STORE_BYTES = 200 * 2**20
"""What passes between processes is small; Ray's default takes a third of the memory."""


def do_on_ray(work: Work[T], shares: Sequence[Share[T]], *, name: str, folder: Path, report: Report) -> list[Spent]:
    """Do every share in an actor of its own; as many at a time as the cluster has room for.

    Args: see `workers.do_shares`.

    Raises:
        ConfigError: Ray is not installed.
        SwitchgenError: an actor met a user's mistake.
        WorkerError: an actor failed, or the actors of one share were lost again and again; what is finished is kept.
    """
    ray = _ray()
    with _cluster(ray, len(shares)):
        from ray.util.queue import Queue  # noqa: PLC0415
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

        # The reports wait on this node: it ends with the command, others may end before.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        reports = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        replica = ray.remote(Replica).options(num_cpus=1, num_gpus=min(1, ray.cluster_resources().get("GPU", 0)))

        def start(share: Share[T]) -> tuple[Any, Any]:
            actor = replica.remote(os.getcwd())
            return actor.do.remote(work, share, folder, reports), actor

        at_hand = {share.worker: (share, *start(share)) for share in shares}
        losses = Losses(name)
        spent: list[Spent] = []
        while at_hand:
            by_result = {result: worker for worker, (_, result, _) in at_hand.items()}
            ready, _ = ray.wait(list(by_result), timeout=_POLL_SECONDS)
            _drain(reports, report, losses)
            for result in ready:
                share, _, actor = at_hand.pop(by_result[result])
                try:
                    kind, content = ray.get(result)
                except ray.exceptions.RayActorError as error:
                    kind, content = "lost", one_line(error)
                # Its place is free for a share that waits; and one that is only out of reach ends.
                ray.kill(actor)
                if kind == "error":
                    raise failure(content, f"{name}-{share.worker}")
                if kind == "spent":
                    spent.append(content)
                else:
                    losses.lost(share.worker, content)
                    at_hand[share.worker] = (share, *start(share))
        _drain(reports, report, losses)
    return spent


class Replica:
    """An actor with the pool's models, in the command's working folder."""

    def __init__(self, working_folder: str) -> None:
        os.chdir(working_folder)

    def do(self, work: Work[Any], share: Share[Any], folder: Path, reports: Any) -> tuple[str, Any]:
        """Do a share; what went wrong comes back as it does from a local worker."""
        try:
            return "spent", work_at(work, share, folder, lambda content: reports.put((share.worker, content)))
        except SwitchgenError as error:
            return "error", error
        except Exception:
            # Whatever it was: the command fails with it.
            return "error", traceback.format_exc()


def _drain(reports: Any, report: Report, losses: Losses) -> None:
    while not reports.empty():
        for worker, content in reports.get_nowait_batch(reports.qsize()):
            losses.finished(worker)
            report(content)


def _ray() -> Any:
    try:
        import ray  # noqa: PLC0415
    except ImportError:
        raise ConfigError(
            "engine.executor: ray is not installed (pip install 'switchgen[ray]'); allowed without it: local"
        ) from None
    return ray


@contextmanager
def _cluster(ray: Any, workers: int) -> Iterator[None]:
    """The cluster that is there, or one of this machine for as long as the block works."""
    if ray.is_initialized():
        yield
        return
    settings: dict[str, Any] = {"configure_logging": False, "log_to_driver": False}
    if "RAY_ADDRESS" not in os.environ:
        # Not one that happens to run here; with as many places as workers were asked for, whatever the number of cores,
        # as with local processes.
        settings |= {
            "address": "local", "num_cpus": workers, "object_store_memory": _STORE_BYTES, "include_dashboard": False
        }  # fmt: skip
    ray.init(**settings)
    try:
        yield
    finally:
        ray.shutdown()
