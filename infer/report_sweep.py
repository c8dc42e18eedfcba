"""The report's part on diversity and quality: what `switchgen sweep` found, as views for the template.

One figure compares the grains of collaboration (token, segment, whole response) on one plane; a table gives each
method's Coverage and Dominance; small plots show every plane with the frontier of all methods. Axes point so that right
is more diverse and up is better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infer.frontier import Estimate, FloatArray, estimate, on_frontier, resample_counts, resampled_means
from infer.report_data import read_document
from infer.report_text import markdown_table
from infer.sweep_metrics import PREFERRED_DIVERSITY, PREFERRED_QUALITY, has_shares

JSON = dict[str, Any]

KINDS = {"token": 0, "segment": 1, "response": 2}
"""Grains and their colour numbers in the style sheet."""
_MAIN = (640.0, 380.0)  # size of the main plot, in its own units
_SMALL = (220.0, 160.0)
_RESAMPLES = 1000
_FLOOR = 0.95  # quality that the table of operating points asks for, as a share of the aligned model's


@dataclass(frozen=True)
class Dot:
    """One operating point of a plot."""

    x: float
    y: float
    kind: str
    is_baco: bool
    title: str


@dataclass(frozen=True)
class Plot:
    """One plane, drawn."""

    width: float
    height: float
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    dots: list[Dot]
    frontiers: list[tuple[str, str]]
    """(class of the line, path)."""
    crosses: list[tuple[str, str]]
    """(class of the line, path): both intervals of the points on a frontier."""


def read_sweep(run_dir: Path) -> JSON | None:
    """`sweep/results.json` of a run; None if there is no sweep.

    Raises:
        DataError: no JSON, or not of schema 1.
    """
    return read_document(run_dir / "sweep" / "results.json")


def sweep_view(document: JSON) -> JSON | None:
    """What the template shows of a sweep: its test split, else the first one; None if no plane is defined."""
    splits = document["splits"]
    name = "test" if "test" in splits else next(iter(splits))
    results = splits[name]
    planes = [tuple(plane) for plane in results["planes"]]
    if not planes:
        return None
    labels = {key: metric["label"] for key, metric in document["metrics"].items()}
    signs = {key: metric["sign"] for key, metric in document["metrics"].items()}
    points = results["points"]
    aligned = _aligned(points, document)
    quality = [name for name in PREFERRED_QUALITY if not aligned or has_shares(name, aligned["values"].get(name) or 0)]
    x = _first(PREFERRED_DIVERSITY, [plane[0] for plane in planes])
    y = _first(quality, [plane[1] for plane in planes])
    return {
        "split": name,
        "prompts": len(results["prompts"]),
        "samples": document["samples"],
        "date": document["date"],
        "hardware": document["hardware"],
        "main": draw(points, x, y, labels, signs, _MAIN, by_kind=True),
        "kinds": [{"name": kind, "colour": colour} for kind, colour in KINDS.items()],
        "x_label": labels[x],
        "y_label": labels[y],
        "floor": _FLOOR,
        "operating": operating_points(points, document, x, y) if aligned else [],
        "methods": _methods(results["methods"]),
        "planes": [draw(points, a, b, labels, signs, _SMALL, by_kind=False) for a, b in planes],
        "absent": [(labels[key], reason) for key, reason in document["absent"].items()],
    }


def _first(order: Sequence[str], there: Sequence[str]) -> str:
    return next((key for key in order if key in there), there[0])


def operating_points(points: Sequence[JSON], document: JSON, x: str, y: str) -> list[JSON]:
    """For each grain the most diverse point whose quality is at least 95% of the aligned model's, and that model.

    Likelihood, a negative figure, is compared as the probability of a token. Equal tokens: all points have the same
    limit and the same number of responses; what they wrote and cost stands in the row.
    """
    aligned = _aligned(points, document)
    assert aligned is not None
    sign = document["metrics"][x]["sign"]
    rows = [("aligned model alone", aligned)]
    for kind in KINDS:
        meeting = [p for p in points if p["kind"] == kind and _share(p, aligned, y) >= _FLOOR]
        if meeting:
            rows.append((kind, max(meeting, key=lambda p: sign * p["values"][x])))
    return [
        {
            "grain": grain,
            "policy": point["policy"],
            "temperature": point["temperature"],
            "quality": interval_of(point, y),
            "share": _share(point, aligned, y),
            "diversity": interval_of(point, x),
            "tokens": point["tokens"],
            "forwards": point["forwards"],
            "milliseconds": 1000 * point["seconds"] / max(point["tokens"], 1e-9),
        }
        for grain, point in rows
    ]


def _aligned(points: Sequence[JSON], document: JSON) -> JSON | None:
    """The aligned model alone at the recipe's temperature, if the sweep has it."""
    wanted = document["candidates"][-1], document["temperature"]
    return next((point for point in points if (point["policy"], point["temperature"]) == wanted), None)


def interval_of(point: JSON, metric: str) -> Estimate:
    """A point's mean over its prompts, with a bootstrap interval over them."""
    values_Q = np.array([value for value in point["per_prompt"][metric] if value is not None], dtype=np.float64)
    means_R1 = resampled_means(values_Q[None], resample_counts(len(values_Q), _RESAMPLES))
    return estimate(means_R1[:, 0])


def _share(point: JSON, aligned: JSON, metric: str) -> float:
    own, other = point["values"][metric], aligned["values"][metric]
    if metric == "likelihood":
        return float(np.exp(own - other))
    return float(own / other) if other > 0 else float("nan")


def _methods(methods: Sequence[JSON]) -> list[JSON]:
    ranked = sorted(methods, key=lambda method: -method["coverage"]["value"])
    best = max((method["dominance"]["value"] for method in methods), default=0.0)
    return [
        {
            "name": method["name"],
            "kind": method["kind"],
            "is_baco": method["is_baco"],
            "coverage": _figure(method["coverage"]),
            "dominance": _figure(method["dominance"]),
            "best_coverage": index == 0,
            "best_dominance": method["dominance"]["value"] == best,
        }
        for index, method in enumerate(ranked)
    ]


def _figure(figure: Mapping[str, float]) -> JSON:
    value, low, high = figure["value"], figure["low"], figure["high"]
    # The interval of a mean over planes need not hold its value; it is drawn as it is.
    return {"text": f"{value:.3f}", "interval": f"{low:.3f} to {high:.3f}", "at": (low, value, high)}


def draw(
    points: Sequence[JSON],
    x: str,
    y: str,
    labels: Mapping[str, str],
    signs: Mapping[str, int],
    size: tuple[float, float],
    *,
    by_kind: bool,
) -> Plot:
    """One plane: a dot per point; a frontier per grain, or one of all methods."""
    width, height = size
    at_P2 = np.array([[signs[x] * p["values"][x], signs[y] * p["values"][y]] for p in points])
    low_2, high_2 = at_P2.min(axis=0), at_P2.max(axis=0)
    span_2 = np.where(high_2 > low_2, high_2 - low_2, 1.0)
    # A margin keeps dots off the frame; y grows downwards in SVG.
    scaled_P2 = 0.04 + 0.92 * (at_P2 - low_2) / span_2
    place_P2 = np.stack([scaled_P2[:, 0] * width, (1 - scaled_P2[:, 1]) * height], axis=1)
    dots = [
        Dot(float(left), float(top), p["kind"], p["policy"].startswith("baco-"), _title(p, x, y, labels))
        for (left, top), p in zip(place_P2, points, strict=True)
    ]
    groups: dict[str, list[int]] = {}
    for index, point in enumerate(points):
        groups.setdefault(point["kind"] if by_kind else "all", []).append(index)
    frontiers = [(name, _staircase(scaled_P2[own], width, height)) for name, own in groups.items()]

    def place(axis: int, value: float) -> float:
        share = 0.04 + 0.92 * float(np.clip((value - low_2[axis]) / span_2[axis], -0.04, 1.04))
        return share * width if axis == 0 else (1 - share) * height

    crosses = _crosses(points, groups, at_P2, (x, y), signs, place) if by_kind else []

    def ticks(axis: int, sign: int) -> list[tuple[float, str]]:
        shares = (0.0, 0.5, 1.0)
        return [(0.04 + 0.92 * s, f"{sign * (low_2[axis] + s * span_2[axis]):.3g}") for s in shares]

    x_ticks = [(share * width, text) for share, text in ticks(0, signs[x])]
    y_ticks = [((1 - share) * height, text) for share, text in ticks(1, signs[y])]
    return Plot(width, height, labels[x], labels[y], x_ticks, y_ticks, dots, frontiers, crosses)


def _crosses(
    points: Sequence[JSON],
    groups: Mapping[str, Sequence[int]],
    at_P2: FloatArray,
    axes: tuple[str, str],
    signs: Mapping[str, int],
    place: Callable[[int, float], float],
) -> list[tuple[str, str]]:
    """SVG paths of the intervals of every group's points on its frontier; points in one place have one."""
    crosses: dict[tuple[float, float], tuple[str, str]] = {}
    for name, own in groups.items():
        for index in np.array(own)[on_frontier(at_P2[None, own, 0], at_P2[None, own, 1])[0]]:
            left, top = (place(axis, at_P2[index, axis]) for axis in (0, 1))
            figures = [interval_of(points[index], metric) for metric in axes]
            (x_1, x_2), (y_1, y_2) = (
                [place(axis, signs[metric] * end) for end in (figure.low, figure.high)]
                for axis, (metric, figure) in enumerate(zip(axes, figures, strict=True))
            )
            path = f"M{x_1:.1f} {top:.1f}H{x_2:.1f}M{left:.1f} {y_1:.1f}V{y_2:.1f}"
            crosses.setdefault((left, top), (name, path))
    return list(crosses.values())


def _staircase(scaled_K2: Any, width: float, height: float) -> str:
    """SVG path of the edge of what these points reach on both axes."""
    keep_K = on_frontier(scaled_K2[None, :, 0], scaled_K2[None, :, 1])[0]
    corners = sorted({(float(a), float(b)) for a, b in scaled_K2[keep_K]})
    path = f"M0 {(1 - corners[0][1]) * height:.1f}"
    for index, (a, b) in enumerate(corners):
        if index:
            path += f"V{(1 - b) * height:.1f}"
        path += f"H{a * width:.1f}"
    return f"{path}V{height:.1f}"


def _title(point: JSON, x: str, y: str, labels: Mapping[str, str]) -> str:
    return (
        f"{point['policy']}, temperature {point['temperature']:g}: {labels[x]} {point['values'][x]:.3g}, "
        f"{labels[y]} {point['values'][y]:.3g}"
    )


def sweep_table(document: JSON) -> str:
    """Coverage and Dominance of every method, best first, as Markdown that also lines up in a terminal."""
    parts = []
    for split, results in document["splits"].items():
        ranked = sorted(results["methods"], key=lambda m: -(m["coverage"] or {"value": 0.0})["value"])
        lines = [[m["name"], m["kind"], _interval(m["coverage"]), _interval(m["dominance"])] for m in ranked]
        parts.append(f"Split {split}: {len(results['prompts'])} prompts, {len(results['planes'])} planes.")
        parts.append(markdown_table(["method", "kind", "Coverage", "Dominance"], lines))
    return "\n\n".join(parts)


def _interval(figure: JSON | None) -> str:
    return "–" if figure is None else f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"
