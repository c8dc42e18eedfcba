"""Muon for a model's matrices and AdamW for the rest, as one optimizer that trainers accept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers behind one interface: schedules change this one's groups, and each step passes the rates on.

    (Sharing the group dictionaries is not enough: accelerate reloads an optimizer's state when it wraps it, which
    replaces them, and the parts would stay at the first warm-up rate for ever.)

    Muon's step is a chain of matrix products for each matrix, the same on every rank, since gradients are averaged
    before it. So each rank takes every n-th matrix and tells the others what came out.

    Args:
        matrices: what Muon trains.
        others: what AdamW trains.
        rank, world_size: which of how many data-parallel processes this is.
    """

    def __init__(
        self,
        matrices: list[torch.nn.Parameter],
        others: list[torch.nn.Parameter],
        matrix_lr: float,
        other_lr: float,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__([{"params": matrices, "lr": matrix_lr}, {"params": others, "lr": other_lr}], defaults={})
        self._shares = [matrices[owner::world_size] for owner in range(world_size)]
        self._rank = rank
        self.parts = (
            torch.optim.Muon(self._shares[rank], lr=matrix_lr, weight_decay=0.0),
            torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0),
        )

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of both."""
        loss = None if closure is None else closure()
        for own, part in zip(self.param_groups, self.parts, strict=True):
            part.param_groups[0]["lr"] = own["lr"]
            part.step()
        if len(self._shares) > 1:
            self._exchange()
        return loss

    @torch.no_grad()
    def _exchange(self) -> None:
        for owner, share in enumerate(self._shares):
            flat = torch.cat([matrix.flatten() for matrix in share])
            torch.distributed.broadcast(flat, owner)
            if owner != self._rank:
                for matrix, part in zip(share, flat.split([matrix.numel() for matrix in share]), strict=True):
                    matrix.copy_(part.view_as(matrix))


def muon_and_adamw(
    model: torch.nn.Module, matrix_lr: float, other_lr: float, *, rank: int = 0, world_size: int = 1
) -> MuonAndAdamW:
    """Muon on the matrices inside the blocks, AdamW on embeddings (tied to the head) and norms."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inside else others).append(parameter)
    return MuonAndAdamW(matrices, others, matrix_lr, other_lr, rank=rank, world_size=world_size)


def linear_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> LambdaLR:
    """Learning rates rise for `warmup` steps and then fall to zero at `steps`."""
    return LambdaLR(optimizer, lambda step: min((step + 1) / (warmup + 1), max(0.0, (steps - step) / (steps - warmup))))
