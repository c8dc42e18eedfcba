"""Muon's matrices shared out among ranks: the same weights as one process has."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from train.optimizer import linear_schedule, muon_and_adamw

STEPS = 3


def _weights(folder: Path, rank: int, world_size: int) -> list[torch.Tensor]:
    """A few steps on gradients that all ranks have alike, as after the average over them."""
    torch.manual_seed(0)
    # Five matrices, so that the ranks' shares differ, and as many vectors for AdamW.
    model = torch.nn.Sequential(*[torch.nn.Linear(6, 6) for _ in range(5)]).double()
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    optimizer = muon_and_adamw(model, 0.02, 0.01, rank=rank, world_size=world_size)
    schedule = linear_schedule(optimizer, steps=STEPS, warmup=1)
    for _ in range(STEPS):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        schedule.step()
    if world_size > 1:
        dist.destroy_process_group()
    return [parameter.detach() for parameter in model.parameters()]


def _rank(rank: int, folder: Path, world_size: int) -> None:
    torch.set_num_threads(1)
    torch.save(_weights(folder, rank, world_size), folder / f"{rank}.pt")


def test_ranks_that_share_the_matrices_end_with_the_weights_of_one(tmp_path: Path) -> None:
    alone = _weights(tmp_path, 0, 1)
    torch.manual_seed(0)
    start = list(torch.nn.Sequential(*[torch.nn.Linear(6, 6) for _ in range(5)]).double().parameters())
    assert not any(torch.equal(after, before) for after, before in zip(alone, start, strict=True))
    processes.spawn(_rank, args=(tmp_path, 2), nprocs=2)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True)), rank
