"""Who is ahead in a state, tested as the scores come in.

The j-th completions of all branches share their random numbers, so candidates a and b are compared by the paired
differences D_j = score_aj - score_bj, in [-1, 1] for scores in [0, 1]. Evidence that a's lead E D is above -m is the
wealth of a gambler who bets on it (Waudby-Smith & Ramdas 2023, "Estimating means of bounded random variables by
betting"), with parts of the money on several stakes s in (0, 1 / (1 - m)]:

    W_n = sum over stakes of  part * prod_{j<=n} (1 + s (D_j + m))

If E D <= -m, W is a nonnegative supermartingale that starts at 1, and by Ville's inequality
P(W_n >= 1 / alpha for any n) <= alpha, however often one looks, and whoever's completions are drawn first: W_n is of
the first n pairs, in their order. With m > 0 pairs that score alike are evidence, too: n of them raise the large
stake's wealth to (1 - m)^-n, as in an exact binomial test.

Why betting: Hoeffding races (Maron & Moore 1994) and empirical Bernstein stopping (Mnih et al. 2008) decide nothing
within 32 completions at the confidences that pay: their bounds pay for the range of the scores (Hoeffding at n = 32,
alpha = .1: a half-width of .38 on D, before any union), and most pairs of completions score alike.

What is guaranteed, for scores in [0, 1] and each pair of candidates: if b is better than a by `margin` or more, the
probability that a state ends with a as its label and b called no better (outcome `winner` or `tie`) is at most
1 - confidence. A state that ends at `max` undecided (`budget`) has no such guarantee: its label is the best mean so
far. Differences below the margin are not looked for; a margin nearer to 0 looks for smaller ones, and needs a larger
`max`. The best of C candidates is dropped in mid-race, whatever its lead, with probability at most 1 - confidence in
all (each pair tests at (1 - confidence) / (C - 1)).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Scores = Sequence[float]

_STAKES = ((1.0, 0.8), (0.5, 0.2))
"""(share of the largest stake, part of the money): most of it on scores that are alike or all on one side."""


def wealth(differences: Sequence[float], margin: float = 0.0) -> float:
    """Evidence that the differences' mean is above -margin; 1 is none."""
    largest = 1 / (1 - margin)
    return math.fsum(
        part * math.prod(max(0.0, 1 + share * largest * (value + margin)) for value in differences)
        for share, part in _STAKES
    )


def smallest_margin(completions: int, confidence: float) -> float:
    """The margin below which so many completions, even if they all score alike, cannot end a race."""
    low, high = 0.0, 1.0 - 1e-9
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if wealth([0.0] * completions, middle) * (1 - confidence) >= 1 else (middle, high)
    return high


class Race:
    """The candidates of one state.

    Args:
        scores: of each branch's completions; they may differ in number.
        ended: branches that ended the response: one certain score.
    """

    def __init__(self, scores: Sequence[Scores], ended: Sequence[bool]) -> None:
        self.scores = scores
        self.ended = ended
        self.bounded = all(0 <= value <= 1 for own in scores for value in own)

    def differences(self, a: int, b: int) -> list[float]:
        """Scores of a minus scores of b, pair by pair, as far as both have completions."""
        own, other = self.scores[a], self.scores[b]
        if self.ended[a] and not self.ended[b]:
            return [own[0] - value for value in other]
        if self.ended[b] and not self.ended[a]:
            return [value - other[0] for value in own]
        return [x - y for x, y in zip(own, other, strict=False)]

    def best(self, candidates: Iterable[int]) -> int:
        """The lowest index of the best mean among them."""
        return max(candidates, key=lambda index: (math.fsum(self.scores[index]) / len(self.scores[index]), -index))

    def survivors(self, confidence: float) -> list[int]:
        """The candidates that no other is shown to be better than; never none."""
        indices = range(len(self.scores))
        needed = (len(self.scores) - 1) / (1 - confidence)
        return [
            index
            for index in indices
            if not any(self.evidence(other, index) >= needed for other in indices if other != index)
        ]

    def unsettled(self, candidates: Sequence[int], margin: float, confidence: float) -> list[int]:
        """Who may yet be better than the best mean's by the margin; without any, more would change little."""
        leader = self.best(candidates)
        needed = 1 / (1 - confidence)
        return [other for other in candidates
                if other != leader and self.evidence(leader, other, margin) < needed]  # fmt: skip

    def tied(self, candidates: Sequence[int], margin: float, confidence: float) -> bool:
        """Whether another of them is no worse than the best mean's by the margin."""
        leader = self.best(candidates)
        needed = 1 / (1 - confidence)
        return any(self.evidence(other, leader, margin) >= needed for other in candidates if other != leader)

    def confidence(self, label: int) -> float | None:
        """That the label is better than every other candidate: 1 - the union of the gamblers' p-values 1 / W."""
        if not self.bounded:
            return None
        others = [other for other in range(len(self.scores)) if other != label]
        return max(0.0, 1 - math.fsum(1 / max(1.0, self.evidence(label, other)) for other in others))

    def evidence(self, a: int, b: int, margin: float = 0.0) -> float:
        """That a is better than b, or worse by less than the margin; two certain scores leave no doubt."""
        differences = self.differences(a, b)
        if self.ended[a] and self.ended[b]:
            return math.inf if differences[0] > -margin else 0.0
        return wealth(differences, margin)
