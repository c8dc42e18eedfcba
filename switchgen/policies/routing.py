"""Routing: one candidate is chosen at the start and writes the whole response.

routing            the trained switcher decides, once (the switcher's data without switching)
prompted-routing   the untuned model is asked which candidate should answer, with a line about each
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from switchgen.candidates import Switcher
from switchgen.policies.base import Choice
from switchgen.policies.switcher import SwitcherPolicy
from switchgen.rows import Row

ROUTING = "routing"
PROMPTED = "prompted-routing"
ROUTING_POLICIES = (ROUTING, PROMPTED)

_DESCRIPTIONS = {
    0: "a base model that was trained on raw text: it knows many facts",
    1: "a model that was finetuned on instructions and demonstrations",
    2: "an aligned model that was trained to be helpful, to reason and to keep to a format",
}


class RoutingPolicy(SwitcherPolicy):
    """Asks its model at the first free choice of a row; whoever is drawn there writes all later segments, too."""

    def choose(self, rows: Sequence[Row]) -> Choice:
        """The writer drawn from the nucleus of each new row; the same one again for rows that have one."""
        earlier = [decided(row) for row in rows]
        new = [row for row, found in zip(rows, earlier, strict=True) if found is None]
        drawn: Iterator[tuple[int, Sequence[float]]] = iter(())
        if new:
            choice = super().choose(new)
            assert choice.scores_NC is not None
            drawn = zip(choice.writers, choice.scores_NC.tolist(), strict=True)
        decisions = [next(drawn) if found is None else found for found in earlier]
        scores_NC = torch.tensor([scores for _, scores in decisions], dtype=torch.float64)
        return Choice([writer for writer, _ in decisions], scores_NC)

    def fits(self, row: Row) -> bool:
        """Only the first choice reads the row."""
        return decided(row) is not None or super().fits(row)


def decided(row: Row) -> tuple[int, Sequence[float]] | None:
    """The writer and the probabilities of the row's first choice; None before it. (Forced segments have no scores.)"""
    return next(((s.writer, s.scores) for s in row.trace.segments if s.scores is not None), None)


def routing_question(names: Sequence[str], descriptions: Mapping[str, str]) -> str:
    """What follows the query in prompted routing; it ends as the switcher's question does, with a number to be said.

    Args:
        descriptions: a line about a candidate, by name; candidates without one get their place on the ladder's.
    """
    lines = []
    for index, name in enumerate(names):
        place = 0 if index == 0 else 2 if index == len(names) - 1 else 1
        lines.append(f"model {index} ({name}): {descriptions.get(name, _DESCRIPTIONS[place])}")
    return (
        "\n\nWhich model should answer this?\n" + "\n".join(lines) + "\nPlease respond with a number from 0 to "
        f"{len(names) - 1}. The answer is model "
    )


def ask_for_answerer(switcher: Switcher, names: Sequence[str], descriptions: Mapping[str, str]) -> Switcher:
    """The same model with prompted routing's question."""
    return Switcher(switcher.engine, switcher.prompt.asking(routing_question(names, descriptions)))
