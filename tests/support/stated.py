"""The token routers' rules once more, one row at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def stated_pick(
    name: str,
    base: np.ndarray,
    aligned: np.ndarray,
    number: float,
    kinds: Sequence[str | None] = ("fc", None, "punc", "punc"),
) -> str:
    """The rules as the paper states them, one row, in numpy.

    Args:
        base, aligned: probabilities of the next token.
        number: the row's random number.
        kinds: which content rule fires on each token, if any.
    """
    rule, _, gamma = name.partition("@")
    rule, _, predictor = rule.partition("+")
    threshold = float(gamma) if gamma else math.nan
    parts = rule.removeprefix("baco-").split("-")
    predicted = kinds[int(np.argmax(base if predictor == "base" else aligned))]
    if predicted in parts:
        return "aligned"
    if parts[0] == "p":
        return "base" if base.max() < threshold else "aligned"
    if parts[0] == "h":
        entropy = -sum(p * math.log(p) for p in base if p > 0)
        return "base" if entropy > threshold else "aligned"
    if parts[0] == "rand":
        return "base" if number < threshold else "aligned"
    if parts[0] == "nudging":
        return "aligned" if base.max() < threshold else "base"
    return "base"
