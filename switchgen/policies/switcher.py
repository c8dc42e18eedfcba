"""The switcher: an LM reads the signed trace and its label tokens' logits say who writes next."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from switchgen.candidates import Switcher
from switchgen.engines.base import Engine
from switchgen.errors import no_number
from switchgen.policies.base import Choice
from switchgen.policies.fixed import writer_numbers
from switchgen.rows import Row
from switchgen.sampling import choose_nucleus


class SwitcherPolicy:
    """p = softmax over the label tokens' logits; the writer is drawn from p's nucleus (arXiv 2510.09913, inference).

    Args:
        temperature: divides the logits before the softmax.
        top_p: mass of the nucleus; anything below the largest p makes the choice an argmax.
    """

    def __init__(self, switcher: Switcher, *, temperature: float = 1.0, top_p: float = 0.9, name: str = "switcher"):
        self.switcher = switcher
        self.temperature = temperature
        self.top_p = top_p
        self.name = name

    @property
    def engine(self) -> Engine:
        """The switcher's engine."""
        return self.switcher.engine

    def writers(self, num_candidates: int) -> Sequence[int]:
        """All."""
        return range(num_candidates)

    def scores(self, rows: Sequence[Row]) -> torch.Tensor:
        """p of each candidate, shape [rows, candidates], float64.

        Raises:
            ModelError: the labels' logits are no numbers.
        """
        prompt = self.switcher.prompt
        contexts = [row.switcher_context(prompt.query_ids, prompt.segment_ids) for row in rows]
        logits_NC = self.engine.label_logits(contexts, prompt.question_ids, prompt.label_ids)
        if logits_NC.isnan().any():
            raise no_number(self.engine.name)
        return torch.softmax(logits_NC / self.temperature, dim=-1)

    def choose(self, rows: Sequence[Row]) -> Choice:
        """A candidate drawn from each row's nucleus."""
        scores_NC = self.scores(rows)
        return Choice(choose_nucleus(scores_NC, writer_numbers(rows), self.top_p).tolist(), scores_NC)

    def fits(self, row: Row) -> bool:
        """Whether the switcher's context has room for its question."""
        prompt = self.switcher.prompt
        context = row.switcher_context(prompt.query_ids, prompt.segment_ids)
        return len(context.ids) + len(prompt.question_ids) <= self.engine.max_positions
