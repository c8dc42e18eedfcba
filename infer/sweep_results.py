"""From figures per prompt to planes, Coverage and Dominance: the document RUN/sweep/results.json.

    {"schema": 1, "recipe", "date", "hardware", "samples", "metrics": {name: {label, kind, sign}}, "absent": {…: why},
     "splits": {split: {"prompts": [id], "left_out": [id], "planes": [[diversity, quality]],
       "points": [{"method", "kind", "policy", "gamma", "temperature", "values": {metric: mean}, "per_prompt": {metric:
                   [one per prompt]}, "tokens", "seconds", "switches", "forwards"}],
       "methods": [{"name", "kind", "is_baco", "coverage": {value, low, high}, "dominance": {…},
                    "by_plane": [[coverage, dominance]]}]}}}

Coverage and Dominance of a method are means over the planes. `tokens`, `seconds` and `switches` are per response,
`forwards` the model forwards per token.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from infer.frontier import FloatArray, Plane, estimate, plane_scores, resample_counts
from infer.sweep_methods import Point, kind_of
from infer.sweep_metrics import DIVERSITY, METRICS, QUALITY

logger = logging.getLogger("switchgen")

JSON = dict[str, Any]


def point_record(
    point: Point,
    names: Sequence[str],
    figures: Mapping[str, JSON],
    responses: Mapping[str, Sequence[JSON]],
    ids: Sequence[str],
) -> JSON:
    """One operating point of the document.

    Args:
        figures, responses: by prompt.
        ids: the prompts that count, in order.
    """
    records = [record for id in ids for record in responses[id]]
    per_prompt = {metric: [figures[id][metric] for id in ids] for metric in METRICS}
    per_prompt = {metric: values for metric, values in per_prompt.items() if any(value is not None for value in values)}
    kind = kind_of(point.policy, names)
    tokens = sum(record["usage"]["new_tokens"] for record in records)
    return {
        "method": point.method,
        "kind": kind,
        "policy": point.policy,
        "gamma": point.gamma,
        "temperature": point.temperature,
        "values": {metric: _mean(values) for metric, values in per_prompt.items()},
        "per_prompt": per_prompt,
        "tokens": tokens / len(records),
        "seconds": sum(record["seconds"] for record in records) / len(records),
        "switches": sum(record["switches"] for record in records) / len(records),
        "forwards": 2 if kind == "token" else 1,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def planes_of(points: Sequence[JSON]) -> list[tuple[str, str]]:
    """The planes on which every point has figures, both of them for one prompt at least."""
    measured = [metric for metric in METRICS if any(metric in point["per_prompt"] for point in points)]
    known_Q = {}
    for metric in measured:
        if all(metric in point["per_prompt"] for point in points):
            values_PQ = np.array([point["per_prompt"][metric] for point in points], dtype=np.float64)
            known_Q[metric] = np.isfinite(values_PQ).all(axis=0)
    planes = [(x, y) for y in QUALITY for x in DIVERSITY if x in measured and y in measured]
    kept = [(x, y) for x, y in planes if x in known_Q and y in known_Q and (known_Q[x] & known_Q[y]).any()]
    if len(kept) < len(planes):
        logger.warning(
            "sweep: %d of %d planes are left out: no prompt has both figures at every point (short or empty responses "
            "have no n-grams): %s", len(planes) - len(kept), len(planes),
            ", ".join(f"{x} x {y}" for x, y in planes if (x, y) not in kept),
        )  # fmt: skip
    return kept


def plane_of(points: Sequence[JSON], diversity: str, quality: str) -> Plane:
    """One plane, larger meaning better on both axes, over the prompts for which every point has both figures."""
    axes = []
    for metric in (diversity, quality):
        values_PQ = np.array([point["per_prompt"][metric] for point in points], dtype=np.float64)
        axes.append(METRICS[metric].sign * values_PQ)
    keep_Q = np.isfinite(axes[0]).all(axis=0) & np.isfinite(axes[1]).all(axis=0)
    return Plane(axes[0][:, keep_Q], axes[1][:, keep_Q])


def score_methods(
    points: Sequence[JSON], planes: Sequence[tuple[str, str]], resamples: int, seed: int = 0
) -> tuple[list[str], FloatArray, FloatArray]:
    """Names of the methods; their Coverage and Dominance on each plane and resample, two arrays [planes, R, M].

    Where all planes have figures for the same prompts, the same ones are drawn on all of them, so that means over
    planes and differences of methods are paired.
    """
    methods: dict[str, list[int]] = {}
    for index, point in enumerate(points):
        methods.setdefault(point["method"], []).append(index)
    areas, shares = [], []
    for diversity, quality in planes:
        plane = plane_of(points, diversity, quality)
        counts_RQ = resample_counts(plane.diversity_PQ.shape[1], resamples, seed)
        area_RM, share_RM = plane_scores(plane, methods, counts_RQ)
        areas.append(area_RM)
        shares.append(share_RM)
    empty = np.zeros((0, resamples + 1, len(methods)))
    return list(methods), np.stack(areas) if areas else empty, np.stack(shares) if shares else empty


def split_document(points: Sequence[JSON], ids: Sequence[str], left_out: Sequence[str], resamples: int) -> JSON:
    """The results of one split."""
    planes = planes_of(points)
    names, areas, shares = score_methods(points, planes, resamples)
    kinds = {point["method"]: point["kind"] for point in points}
    is_baco = {point["method"]: point["policy"].startswith("baco-") for point in points}
    methods = [
        {
            "name": name,
            "kind": kinds[name],
            "is_baco": is_baco[name],
            "coverage": asdict(estimate(areas[:, :, index].mean(axis=0))) if planes else None,
            "dominance": asdict(estimate(shares[:, :, index].mean(axis=0))) if planes else None,
            "by_plane": [
                [float(area[0, index]), float(share[0, index])] for area, share in zip(areas, shares, strict=True)
            ],
        }
        for index, name in enumerate(names)
    ]
    return {
        "prompts": list(ids),
        "left_out": list(left_out),
        "planes": [list(plane) for plane in planes],
        "points": list(points),
        "methods": methods,
    }
