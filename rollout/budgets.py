"""How completions are spent on the branches of a state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rollout.racing import Race, Scores
from switchgen.config import RacingConfig, RolloutConfig


@dataclass(frozen=True)
class Verdict:
    """What a state's scores say, once nothing more is spent on it."""

    label: int
    """The candidate that should write next."""
    outcome: str
    """Why the state ended: `winner` (nobody is better by the margin), `tie` (and somebody is no worse), `budget`."""
    confidence: float | None
    """Of the label against every other candidate, valid whenever the spending stopped; None for unbounded scores."""


class Budget(Protocol):
    """Decides how many more completions each branch gets, and what the scores say in the end."""

    def more(self, scores: Sequence[Scores], ended: Sequence[bool]) -> list[int]:
        """Completions to add to each branch, once all earlier ones are scored; zeros end the state.

        Args:
            scores: per branch the scores so far. Completion j has the same random numbers in every branch, so the j-th
                scores are paired.
            ended: branches whose segment ended the response; they have one certain score and get no completions.
        """

    def verdict(self, scores: Sequence[Scores], ended: Sequence[bool]) -> Verdict:
        """The label of a state that has ended."""


@dataclass(frozen=True)
class UniformBudget:
    """`completions` each, at once (arXiv 2510.09913)."""

    completions: int

    def more(self, scores: Sequence[Scores], ended: Sequence[bool]) -> list[int]:
        """What is missing of `completions`."""
        return [0 if over else self.completions - len(own) for own, over in zip(scores, ended, strict=True)]

    def verdict(self, scores: Sequence[Scores], ended: Sequence[bool]) -> Verdict:
        """The lowest index of the best mean."""
        race = Race(scores, ended)
        label = race.best(range(len(scores)))
        return Verdict(label, "budget", race.confidence(label))


@dataclass(frozen=True)
class RacingBudget:
    """`start` each, then `step` at a time for whom that can still change the label (`rollout.racing`, see `racing`)."""

    settings: RacingConfig

    def more(self, scores: Sequence[Scores], ended: Sequence[bool]) -> list[int]:
        """For the best mean so far and whoever may yet be better than it by the margin; nothing once nobody may."""
        settings = self.settings
        race = Race(scores, ended)
        running = [own for own, over in zip(scores, ended, strict=True) if not over]
        longest = max(map(len, running), default=0)
        if longest == 0:
            # One candidate alone: all write the same. A completion is for the record.
            return [0 if over else settings.start if len(scores) > 1 else 1 for over in ended]
        left = race.survivors(settings.confidence)
        rivals = race.unsettled(left, settings.margin, settings.confidence)
        if not rivals:
            return [0] * len(scores)
        racing = [index for index in (race.best(left), *rivals) if not ended[index]]
        ahead = max(len(scores[index]) for index in racing)
        # Who waited while another led has fewer: pairs count as far as both have completions, so it catches up first.
        behind = [index for index in racing if len(scores[index]) < ahead]
        target = ahead if behind else settings.max
        more = [0] * len(scores)
        for index in behind or racing:
            more[index] = min(settings.step, target - len(scores[index]))
        return more

    def verdict(self, scores: Sequence[Scores], ended: Sequence[bool]) -> Verdict:
        """The best mean among the candidates that are not ruled out."""
        settings = self.settings
        race = Race(scores, ended)
        left = race.survivors(settings.confidence)
        label = race.best(left)
        outcome = "budget"
        if not race.unsettled(left, settings.margin, settings.confidence):
            outcome = "tie" if race.tied(left, settings.margin, settings.confidence) else "winner"
        return Verdict(label, outcome, race.confidence(label))


def budget_of(settings: RolloutConfig) -> Budget:
    """The recipe's budget."""
    return RacingBudget(settings.racing) if settings.budget == "racing" else UniformBudget(settings.completions)
