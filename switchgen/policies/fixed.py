"""Policies that ask no model: one candidate always, or each with some probability."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from switchgen.config import DecodingConfig
from switchgen.errors import ConfigError
from switchgen.policies.base import Choice
from switchgen.rows import Row
from switchgen.sampling import Purpose, uniform


class FixedPolicy:
    """One candidate writes everything."""

    engine = None

    def __init__(self, writer: int, name: str) -> None:
        self.writer = writer
        self.name = name

    def writers(self, num_candidates: int) -> Sequence[int]:
        """Just the one."""
        return [self.writer]

    def choose(self, rows: Sequence[Row]) -> Choice:
        """The one candidate, for every row."""
        return Choice([self.writer] * len(rows))


def decoding_under(policy: object, decoding: DecodingConfig) -> DecodingConfig:
    """The settings as far as they are about the policy: one candidate writes alone, first and last segment included."""
    return decoding.alone() if isinstance(policy, FixedPolicy) else decoding


class RandomPolicy:
    """Uniformly random switching (arXiv 2510.09913: prefixes and completions of the rollouts)."""

    engine = None
    name = "random"

    def writers(self, num_candidates: int) -> Sequence[int]:
        """All."""
        return range(num_candidates)

    def choose(self, rows: Sequence[Row]) -> Choice:
        """A candidate drawn by each row's own random number; its index is the number of segments so far."""
        numbers_N = writer_numbers(rows)
        count = len(rows[0].pool)
        return Choice((numbers_N * count).long().clamp(max=count - 1).tolist())


def writer_numbers(rows: Sequence[Row], *, first_only: bool = False) -> torch.Tensor:
    """Each row's random number for its next choice of a writer, float64; or always that of its first choice."""
    seeds_N = torch.tensor([row.trace.seed for row in rows])
    index_N = torch.tensor([0 if first_only else len(row.trace.segments) for row in rows])
    return uniform(seeds_N, Purpose.WRITER, index_N)


class ShareRandomPolicy:
    """BACo's rule RAND at coarser grains: the base with probability γ, else the aligned model.

    `segment-rand@γ` draws anew for every segment, `response-rand@γ` once for the whole response; `baco-rand@γ` is the
    same rule for every token. So the three grains can be compared at the same γ.

    Args:
        base, aligned: places on the ladder.
    """

    engine = None

    def __init__(self, name: str, *, base: int, aligned: int) -> None:
        self.name = name
        self.grain, self.gamma = parse_share(name)
        self.base = base
        self.aligned = aligned

    def writers(self, num_candidates: int) -> Sequence[int]:
        """The two models it draws from."""
        return [self.base, self.aligned]

    def choose(self, rows: Sequence[Row]) -> Choice:
        """The base where the row's number is below γ."""
        numbers_N = writer_numbers(rows, first_only=self.grain == "response")
        return Choice([self.base if number < self.gamma else self.aligned for number in numbers_N.tolist()])


SHARE_POLICIES = {"segment-rand": "segment", "response-rand": "response"}


def parse_share(name: str) -> tuple[str, float]:
    """(grain, γ) of `segment-rand@0.3` or `response-rand@0.3`.

    Raises:
        ConfigError: γ is missing, or no number from 0 to 1.
    """
    rule, _, text = name.partition("@")
    try:
        gamma = float(text)
    except ValueError:
        gamma = -1.0
    if not 0 <= gamma <= 1:
        raise ConfigError(f"policy {name!r}: after @ stands γ, a number from 0 to 1, e.g. {rule}@0.3")
    return SHARE_POLICIES[rule], gamma
