"""Coverage and Dominance: areas and frontiers worked by hand, resampling."""

from __future__ import annotations

import numpy as np
import pytest

from infer.frontier import (
    Plane,
    coverage,
    estimate,
    on_frontier,
    plane_scores,
    resample_counts,
    resampled_means,
    scaled,
)


def row(*values: float) -> np.ndarray:
    return np.array([values], dtype=np.float64)


@pytest.mark.parametrize(
    ("points", "area"),
    [
        ([(1, 1)], 1.0),
        ([(0.5, 0.4)], 0.2),
        ([(1, 0), (0, 1)], 0.0),
        ([(1, 0.2), (0.5, 1)], 0.5 * 1 + 0.5 * 0.2),
        ([(0.5, 1), (1, 0.2)], 0.6),
        ([(0.5, 1), (1, 0.2), (0.4, 0.9)], 0.6),  # a point that the method itself beats changes nothing
        ([(0.2, 0.8), (0.6, 0.5), (0.9, 0.1)], 0.2 * 0.8 + 0.4 * 0.5 + 0.3 * 0.1),
        ([(0.5, 0.5), (0.5, 0.5)], 0.25),
        ([(0.5, 0.2), (0.5, 0.7)], 0.35),
    ],
)
def test_coverage_by_hand(points: list[tuple[float, float]], area: float) -> None:
    x, y = zip(*points, strict=True)
    assert coverage(row(*x), row(*y))[0] == pytest.approx(area)


def test_coverage_against_a_fine_grid() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.random((5, 6)), generator.random((5, 6))
    grid = (np.arange(1000) + 0.5) / 1000
    for one_x, one_y, area in zip(x, y, coverage(x, y), strict=True):
        reached = ((one_x[:, None, None] >= grid[:, None]) & (one_y[:, None, None] >= grid)).any(axis=0)
        assert area == pytest.approx(reached.mean(), abs=5e-3)


def test_frontier_by_hand() -> None:
    x = row(1.0, 0.5, 0.5, 0.2, 0.0, 0.2)
    y = row(0.0, 0.5, 0.4, 0.9, 1.0, 0.9)
    # (0.5, 0.4) is beaten by (0.5, 0.5); the two equal points do not beat each other.
    assert on_frontier(x, y).tolist() == [[True, True, False, True, True, True]]


def test_scaling() -> None:
    assert scaled(np.array([[2.0, 4.0, 3.0], [5.0, 5.0, 5.0]])).tolist() == [[0, 1, 0.5], [1, 1, 1]]


def test_one_plane_by_hand() -> None:
    # Two prompts; means of the points: diversity 1, 2, 3, quality 3, 2.5, 1 → scaled (0, 1), (.5, .75), (1, 0).
    plane = Plane(np.array([[0.0, 2], [1, 3], [2, 4]]), np.array([[3.0, 3], [2, 3], [1, 1]]))
    methods = {"single": [0], "router": [1, 2], "dominated": [0, 1]}
    areas, shares = plane_scores(plane, methods, np.ones((1, 2)))
    assert areas[0] == pytest.approx([0.0, 0.375, 0.375])
    assert shares[0] == pytest.approx([1 / 3, 2 / 3, 2 / 3])


def test_resamples() -> None:
    counts = resample_counts(7, 500, seed=3)
    assert counts.shape == (501, 7)
    assert counts[0].tolist() == [1] * 7
    assert (counts.sum(axis=1) == 7).all()
    assert counts[1:].mean() == pytest.approx(1.0)
    assert not (counts[1] == counts[2]).all()
    values = np.random.default_rng(1).random((3, 7))
    means = resampled_means(values, counts)
    assert means[0] == pytest.approx(values.mean(axis=1))
    drawn = np.repeat(np.arange(7), counts[5].astype(int))
    assert means[5] == pytest.approx(values[:, drawn].mean(axis=1))


def test_interval_of_a_mean_agrees_with_theory() -> None:
    values = np.random.default_rng(2).normal(size=(1, 400))
    found = estimate(resampled_means(values, resample_counts(400, 4000))[:, 0])
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)
