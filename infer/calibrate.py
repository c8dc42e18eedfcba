"""`switchgen calibrate`: router and γ for a wanted operating point, from a few prompts of the dev split.

Two wishes are understood, both relative to the aligned model alone, on the same prompts:

    quality Q      the most diverse router whose quality is at least Q times the aligned model's
    diversity D    the best router whose diversity is at least D times the aligned model's

Both figures of a router are taken at the lower ends of their intervals, as what is known of it: of many routers the one
with the highest mean is one that was lucky on these prompts, and disappoints on others. A router that fails on whole
prompts, or is diverse on few of them, is known less well than one that spreads the same mean evenly.

Quality is the first of validity, reward and likelihood that is there and of which a share means something (a reward
only where the aligned model's is above 0, the likelihood as the geometric mean probability of a token); diversity the
first of the number of clusters, the Vendi score, expectation-adjusted distinct and distinct-2. The sweep's responses
are used where they are there; what is missing is written. The choice is a policy's name, which every verb takes, and
goes with the recipe's temperature.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from infer.frontier import FloatArray, estimate, resample_counts, resampled_means
from infer.report_text import markdown_table
from infer.sweep import check_points, measured_points
from infer.sweep_methods import Point, points_of
from infer.sweep_metrics import (
    DIVERSITY,
    METRICS,
    PREFERRED_DIVERSITY,
    PREFERRED_QUALITY,
    QUALITY,
    Measures,
    has_shares,
)
from infer.sweep_responses import Writers, load_prompts
from switchgen.errors import ConfigError
from switchgen.files import lock, write_json
from switchgen.rundir import Run

logger = logging.getLogger("switchgen")

JSON = dict[str, Any]
SPLIT = "dev"


def main(
    run: Run,
    *,
    quality: float | None = None,
    diversity: float | None = None,
    quality_metric: str | None = None,
    diversity_metric: str | None = None,
) -> JSON:
    """Choose router and γ; the choice is written to RUN/calibration.json and returned.

    Args:
        quality: floor of the quality, as a share of the aligned model's.
        diversity: wanted diversity, as a multiple of the aligned model's.
        quality_metric, diversity_metric: names as in `sweep/results.json`; default: see the module.

    Raises:
        ConfigError: not exactly one wish, a metric that is not there, or no router that comes up to the wish.
    """
    if (quality is None) == (diversity is None):
        raise ConfigError("calibrate: give either --quality (e.g. 0.95) or --diversity (e.g. 1.2)")
    records, ids = records_of(run, SPLIT, calibration_points(run))
    y = chosen_metric(records, quality_metric, PREFERRED_QUALITY, "--quality-metric")
    x = chosen_metric(records, diversity_metric, PREFERRED_DIVERSITY, "--diversity-metric")
    considered = compare(records, x, y, run.recipe.sweep.resamples)
    chosen = choose(considered, quality, diversity)
    document = {
        "schema": 1,
        "policy": chosen["policy"],
        "gamma": chosen["gamma"],
        "temperature": run.recipe.decoding.temperature,
        "wanted": {"quality": quality} if quality is not None else {"diversity": diversity},
        "quality": {"metric": y, **chosen["quality"]},
        "diversity": {"metric": x, **chosen["diversity"]},
        "split": SPLIT,
        "prompts": len(ids),
        "samples": run.recipe.sweep.samples,
        "considered": considered,
    }
    write_json(run.dir / "calibration.json", document)
    return document


def records_of(run: Run, split: str, points: Sequence[Point]) -> tuple[list[JSON], list[str]]:
    """Each point's figures per prompt, and the prompts' ids; responses that are not there are written."""
    prompts = load_prompts(run, split)
    check_points(run, points)
    with lock(run.dir / "sweep"):
        writers = Writers(run, points)
        measures = Measures(run, prompts, writers)
        records, ids, _ = measured_points(run, split, points, prompts, writers, measures)
    return records, ids


def calibration_points(run: Run) -> list[Point]:
    """The aligned model alone, then every point of a BACo router in the sweep's methods, at the recipe's temperature.

    Raises:
        ConfigError: there is no such router.
    """
    temperature = run.recipe.decoding.temperature
    aligned = Point("aligned", run.recipe.names[-1], None, temperature)
    routers = [p for p in points_of(run) if p.policy.startswith("baco-") and p.temperature == temperature]
    if not routers:
        raise ConfigError(f"calibrate: sweep.methods lists no BACo router at decoding.temperature ({temperature:g})")
    return [aligned, *routers]


def chosen_metric(records: Sequence[JSON], given: str | None, order: Sequence[str], option: str) -> str:
    """The metric that the user gave, or the first of `order` that every point has and of which shares mean something.

    Args:
        records: one per point, the aligned model's first.
        option: what the user calls it.

    Raises:
        ConfigError: there is none, or the given one has no figures.
    """
    there = [name for name in METRICS if all(name in record["per_prompt"] for record in records)]
    if given is not None:
        allowed = [name for name in (QUALITY if order is PREFERRED_QUALITY else DIVERSITY) if name in there]
        if given not in allowed:
            raise ConfigError(f"{option}: {given!r} has no figures here; allowed: {', '.join(allowed)}")
        return given
    for name in (name for name in order if name in there):
        aligned = float(np.nanmean(np.array(records[0]["per_prompt"][name], dtype=np.float64)))
        if has_shares(name, aligned):
            return name
        logger.warning("calibrate: the aligned model's %s is %.3g, and shares of it mean nothing; it is passed over",
                       name, aligned)  # fmt: skip
    raise ConfigError(f"calibrate: none of {', '.join(order)} is defined for these tasks and above 0; see sweep.*")


def _values(record: JSON, metric: str) -> FloatArray:
    """Figures per prompt for which shares have a meaning: positive, more is better."""
    values_Q = np.array(record["per_prompt"][metric], dtype=np.float64)
    return np.exp(values_Q) if metric == "likelihood" else values_Q


def compare(records: Sequence[JSON], x: str, y: str, resamples: int) -> list[JSON]:
    """Every point's quality and diversity with their ratios to the first point's, and bootstrap intervals over prompts.

    A resample in which a ratio's denominator is 0 may stand for any ratio: it counts as 0 for the interval's low end
    and as infinite for the high one, which is None where that decides it.

    Raises:
        ConfigError: no prompt has the figure at every point, or a denominator is 0 for all prompts together, so that
            shares mean nothing.
    """
    found = [{"policy": record["policy"], "gamma": record["gamma"]} for record in records]
    for name, metric in (("quality", y), ("diversity", x)):
        values_PQ = np.stack([_values(record, metric) for record in records])
        values_PQ = values_PQ[:, np.isfinite(values_PQ).all(axis=0)]
        if not values_PQ.size:
            raise ConfigError(f"calibrate: no prompt has {metric} at every point; allowed: more sweep.prompts or "
                              "sweep.samples, or another metric")  # fmt: skip
        means_RP = resampled_means(values_PQ, resample_counts(values_PQ.shape[1], resamples))
        # Where less is more diverse the ratio is turned round.
        less_is_more = METRICS[metric].sign < 0
        above_RP, below_RP = (means_RP[:, :1], means_RP) if less_is_more else (means_RP, means_RP[:, :1])
        below_RP = np.broadcast_to(below_RP, means_RP.shape)
        for index, entry in enumerate(found):
            if below_RP[0, index] <= 0:
                whose = entry["policy"] if less_is_more else records[0]["policy"]
                raise ConfigError(f"calibrate: the {metric} of {whose} is not above 0, and shares of it mean nothing")
            entry[name] = {"value": float(means_RP[0, index])}
            if index == 0:  # it divided by itself
                entry[name] |= {"ratio": 1.0, "low": 1.0, "high": 1.0}
                continue
            entry[name] |= _ratio_of(np.broadcast_to(above_RP, means_RP.shape)[:, index], below_RP[:, index])
    return found


def _ratio_of(above_R: FloatArray, below_R: FloatArray) -> JSON:
    """The ratio of the sample (first) and its interval; `compare` says what becomes of zeros."""
    known_R = below_R > 0
    ratio_R = np.divide(above_R, below_R, out=np.zeros(len(below_R)), where=known_R)
    low = estimate(ratio_R)
    # A number beyond all others stands for infinity, with which quantiles cannot be interpolated.
    beyond = 2 * ratio_R.max() + 1
    high = estimate(np.where(known_R, ratio_R, beyond)).high
    return {"ratio": low.value, "low": low.low, "high": high if high <= ratio_R.max() else None}


def choose(considered: Sequence[JSON], quality: float | None, diversity: float | None) -> JSON:
    """The point whose interval is above the floor on one axis and whose interval on the other ends highest below.

    Ties go to the higher ratio on the other axis, then on the first.

    Raises:
        ConfigError: none reaches the wish.
    """
    wanted, other = ("quality", "diversity") if quality is not None else ("diversity", "quality")
    floor = quality if quality is not None else diversity
    assert floor is not None
    meeting = [entry for entry in considered if entry[wanted]["low"] >= floor]
    if not meeting:
        best = max(considered, key=lambda entry: entry[wanted]["low"])
        raise ConfigError(
            f"calibrate: no router is known to reach {floor:g} times the aligned model's {wanted}; the nearest is "
            f"{best['policy']}, {_ratio(best[wanted])}; more sweep.prompts make intervals narrower"
        )
    return max(meeting, key=lambda entry: (entry[other]["low"], entry[other]["ratio"], entry[wanted]["ratio"]))


def calibration_table(document: JSON) -> str:
    """What was considered, most diverse first, as Markdown that also lines up in a terminal."""
    lines = []
    for entry in sorted(document["considered"], key=lambda e: -e["diversity"]["ratio"]):
        mark = "◀ chosen" if entry["policy"] == document["policy"] else ""
        lines.append([entry["policy"], *(_ratio(entry[axis]) for axis in ("quality", "diversity")), mark])
    head = ["policy", f"{document['quality']['metric']} ÷ aligned", f"{document['diversity']['metric']} ÷ aligned", ""]
    return markdown_table(head, lines)


def _ratio(figure: JSON) -> str:
    high = "∞" if figure["high"] is None else f"{figure['high']:.3f}"
    return f"{figure['ratio']:.3f} [{figure['low']:.3f}, {high}]"
