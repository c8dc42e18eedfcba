"""Coverage and Dominance of methods on diversity × quality planes (arXiv 2511.05650), with bootstrap intervals.

A method is a curve of operating points (one per γ or temperature). On every plane both axes are scaled to 0–1 over all
points of all methods, larger meaning better.

    Coverage    area under the method's trade-off curve: of the points (x, y) of the unit square, the share that some
                point of the method reaches or beats on both axes (the staircase under its own Pareto frontier, so one
                point has an area, too, and points that the method itself beats change nothing)
    Dominance   share of the points of the Pareto frontier of all methods together that belong to the method

The unit of sampling is the prompt: a resample draws prompts with replacement, averages every point over them, and
scales, sweeps and counts anew.

Shapes: P points, K points of one method, Q prompts, R resamples (the first row is the sample itself), M methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
_LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Plane:
    """One diversity metric against one quality metric, per point and prompt; larger is better on both."""

    diversity_PQ: FloatArray
    quality_PQ: FloatArray


def scaled(values_RP: FloatArray) -> FloatArray:
    """Each row scaled so that its smallest value is 0 and its largest 1; a row without spread is all 1."""
    low_R1 = values_RP.min(axis=1, keepdims=True)
    span_R1 = values_RP.max(axis=1, keepdims=True) - low_R1
    return np.where(span_R1 > 0, (values_RP - low_R1) / np.where(span_R1 > 0, span_R1, 1.0), 1.0)


def coverage(x_RK: FloatArray, y_RK: FloatArray) -> FloatArray:
    """Area of the union of the rectangles from (0, 0) to each point, per row; shape R."""
    order_RK = np.argsort(-x_RK, axis=1, kind="stable")
    x_RK = np.take_along_axis(x_RK, order_RK, axis=1)
    best_RK = np.maximum.accumulate(np.take_along_axis(y_RK, order_RK, axis=1), axis=1)
    next_RK = np.concatenate([x_RK[:, 1:], np.zeros((len(x_RK), 1))], axis=1)
    area_R: FloatArray = ((x_RK - next_RK) * best_RK).sum(axis=1)
    return area_R


def on_frontier(x_RP: FloatArray, y_RP: FloatArray) -> npt.NDArray[np.bool_]:
    """Which points no other point beats (as good on both axes, better on one), per row; shape RP."""
    as_good_RPP = (x_RP[:, None] >= x_RP[:, :, None]) & (y_RP[:, None] >= y_RP[:, :, None])
    better_RPP = (x_RP[:, None] > x_RP[:, :, None]) | (y_RP[:, None] > y_RP[:, :, None])
    beaten_RP: npt.NDArray[np.bool_] = (as_good_RPP & better_RPP).any(axis=2)
    return ~beaten_RP


def resampled_means(values_PQ: FloatArray, counts_RQ: FloatArray) -> FloatArray:
    """Mean of each point over each resample's prompts, shape RP."""
    return counts_RQ @ values_PQ.T / counts_RQ.sum(axis=1, keepdims=True)


def resample_counts(num_prompts: int, num_resamples: int, seed: int = 0) -> FloatArray:
    """How often each prompt is in the sample itself (first row, once each) and in each resample; shape RQ."""
    generator = np.random.default_rng(seed)
    drawn_RQ = generator.integers(num_prompts, size=(num_resamples, num_prompts))
    counts_RQ = np.zeros((num_resamples + 1, num_prompts))
    counts_RQ[0] = 1
    np.add.at(counts_RQ, (np.arange(1, num_resamples + 1)[:, None], drawn_RQ), 1)
    return counts_RQ


def plane_scores(
    plane: Plane, methods: Mapping[str, Sequence[int]], counts_RQ: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Coverage and Dominance of each method on one plane, per resample; two arrays of shape RM.

    Args:
        methods: the points of each method.
    """
    x_RP = scaled(resampled_means(plane.diversity_PQ, counts_RQ))
    y_RP = scaled(resampled_means(plane.quality_PQ, counts_RQ))
    frontier_RP = on_frontier(x_RP, y_RP)
    total_R = frontier_RP.sum(axis=1)
    areas, shares = [], []
    for points in methods.values():
        own = list(points)
        areas.append(coverage(x_RP[:, own], y_RP[:, own]))
        shares.append(frontier_RP[:, own].sum(axis=1) / total_R)
    return np.stack(areas, axis=1), np.stack(shares, axis=1)


def estimate(values_R: FloatArray) -> Estimate:
    """The first value, and the percentile interval of the others."""
    low, high = np.quantile(values_R[1:], [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2]) if len(values_R) > 1 else [np.nan] * 2
    return Estimate(float(values_R[0]), float(low), float(high))
