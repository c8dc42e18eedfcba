"""Sessions of fixed logits: what a model says is looked up, so that every decision can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from switchgen.engines.base import Context


class FixedLogits:
    """A session whose rows' next-token logits are a function of the tokens so far.

    Args:
        look_up: logits [V] after these tokens.
    """

    def __init__(self, contexts: Sequence[Context], look_up: Callable[[list[int]], torch.Tensor]) -> None:
        self.order = list(range(len(contexts)))
        self.contexts = list(contexts)
        self.look_up = look_up

    def logits(self, ids_N: torch.Tensor | None = None) -> torch.Tensor:
        return torch.stack([self.look_up(context.ids) for context in self.contexts])

    def keep(self, rows: list[int]) -> list[int]:
        self.contexts = [self.contexts[row] for row in rows]
        return rows
