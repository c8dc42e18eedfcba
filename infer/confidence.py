"""Stated confidence against being right: expected calibration error and Brier score.

Shapes: S run seeds, Q questions, B bins, R resamples. Not a number in a confidence: the response states none and is
left out. Sources: Guo et al. 2017 (arXiv 1706.04599), bins of equal width; Brier 1950.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from infer.stats import FloatArray, Interval, bootstrap_statistic

NUM_BINS = 10


def calibration(confidence_SQ: FloatArray, right_SQ: npt.NDArray[np.bool_]) -> dict[str, Interval | None]:
    """`{"ece", "brier"}` with intervals over questions, all run seeds of a question together; None where no response
    states its confidence.

    Args:
        confidence_SQ: 0 to 1, or not a number.
        right_SQ: whether the response is right.

    Raises:
        ValueError: different shapes, or a confidence outside 0 to 1.
    """
    if confidence_SQ.shape != right_SQ.shape:
        raise ValueError(f"need as many confidences as outcomes, got {confidence_SQ.shape} and {right_SQ.shape}")
    stated_SQ = ~np.isnan(confidence_SQ)
    if not stated_SQ.any():
        return {"ece": None, "brier": None}
    if wrong := [value for value in confidence_SQ[stated_SQ] if not 0 <= value <= 1]:
        raise ValueError(f"a confidence lies between 0 and 1, got {wrong[0]}")
    asked = stated_SQ.any(axis=0)
    confidence_SQ, right_SQ, stated_SQ = confidence_SQ[:, asked], right_SQ[:, asked], stated_SQ[:, asked]
    gap_SQ = np.where(stated_SQ, confidence_SQ - right_SQ, 0.0)
    bin_SQ = np.minimum(np.where(stated_SQ, confidence_SQ, 0.0) * NUM_BINS, NUM_BINS - 1).astype(int)
    gap_QB = np.stack([np.where(bin_SQ == b, gap_SQ, 0.0).sum(axis=0) for b in range(NUM_BINS)], axis=1)
    square_Q, count_Q = (gap_SQ**2).sum(axis=0), stated_SQ.sum(axis=0)
    num_questions = int(asked.sum())

    def ece(weights_RQ: FloatArray) -> FloatArray:
        return np.asarray(np.abs(weights_RQ @ gap_QB).sum(axis=1) / (weights_RQ @ count_Q))

    def brier(weights_RQ: FloatArray) -> FloatArray:
        return np.asarray(weights_RQ @ square_Q / (weights_RQ @ count_Q))

    return {"ece": bootstrap_statistic(ece, num_questions), "brier": bootstrap_statistic(brier, num_questions)}
