"""`switchgen sweep`: methods x operating points on diversity x quality planes (BACo's evaluation, arXiv 2511.05650).

    RUN/sweep/
      responses/<split>/<policy>-t<temperature>.jsonl   what was written; a line as soon as it is finished
      claims/<split>/<point>/<task>/stage.json          what those responses depend on
      metrics/<split>/<point>.jsonl                     figures per prompt
      results.json                                      planes, Coverage, Dominance (`infer/sweep_results.py`)

A killed sweep goes on where it was.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from infer.evaluation import hardware
from infer.sweep_methods import Point, points_of
from infer.sweep_metrics import METRICS, Measures, point_metrics
from infer.sweep_responses import (
    Prompt,
    Writers,
    at_temperature,
    claim_points,
    load_prompts,
    read_responses,
    score_again,
    write_missing,
)
from infer.sweep_results import point_record, split_document
from switchgen.api import check_decoding
from switchgen.assembly import check_writers
from switchgen.config import CandidateConfig
from switchgen.errors import DataError
from switchgen.files import lock, write_json
from switchgen.loading import check_model
from switchgen.rundir import Run

logger = logging.getLogger("switchgen")

JSON = dict[str, Any]


def main(run: Run) -> JSON:
    """Write what is missing, measure it, and sum it up in `sweep/results.json`, which is also returned.

    Raises:
        ConfigError: methods that cannot work, no tasks, responses made by another recipe.
        DataError: a task file is wrong, or no prompt of a split fits the models' contexts.
    """
    points = points_of(run)
    settings = run.recipe.sweep
    prompts = {split: load_prompts(run, split) for split in dict.fromkeys(settings.splits)}
    check_points(run, points)
    with lock(run.dir / "sweep"):
        writers = Writers(run, points)
        splits = {}
        absent: dict[str, str] = {}
        for split, own in prompts.items():
            measures = Measures(run, own, writers)
            absent |= measures.absent
            records, ids, left_out = measured_points(run, split, points, own, writers, measures)
            splits[split] = split_document(records, ids, left_out, settings.resamples)
        document = {
            "schema": 1,
            "recipe": run.name,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "hardware": hardware(),
            "candidates": run.recipe.names,
            "temperature": run.recipe.decoding.temperature,
            "samples": settings.samples,
            "metrics": {name: asdict(metric) for name, metric in METRICS.items()},
            "absent": absent,
            "splits": splits,
        }
        write_json(run.dir / "sweep" / "results.json", document)
    return document


def check_points(run: Run, points: Sequence[Point]) -> None:
    """See that every point can work and what measures them is there, before a model is loaded.

    Raises:
        ConfigError, ModelError: one cannot, or is not.
    """
    for key in ("embedding_model", "reward_model"):
        if (model := getattr(run.recipe.sweep, key)) is not None:
            check_model(CandidateConfig(name=f"sweep.{key}", model=model))
    check_writers(run, list(dict.fromkeys(point.policy for point in points)))
    for point in points:
        check_decoding(point.policy, at_temperature(run, point).recipe.decoding)


def measured_points(
    run: Run, split: str, points: Sequence[Point], prompts: Sequence[Prompt], writers: Writers, measures: Measures
) -> tuple[list[JSON], list[str], list[str]]:
    """Write what is missing of a split and measure it: (points, ids of the prompts that count, of those left out).

    A prompt is left out where a model's context has no room for it.
    """
    claim_points(run, split, points, prompts)
    write_missing(run, split, points, prompts, writers)
    score_again(run, split, points, prompts)
    for name, reason in measures.absent.items():
        logger.info("sweep: no %s: %s", METRICS[name].label, reason)
    responses = {point: read_responses(run, split, point, prompts) for point in points}
    left_out = {
        prompt.id
        for own in responses.values()
        for prompt in prompts
        if any(record["output"] is None for record in own[prompt.id])
    }
    ids = [prompt.id for prompt in prompts if prompt.id not in left_out]
    if left_out:
        logger.warning("sweep %s: %d prompts beyond the context, left out: %s", split, len(left_out), sorted(left_out))
    if not ids:
        raise DataError(f"sweep: every prompt of split {split!r} is beyond a model's context")
    records = [
        point_record(point, run.recipe.names, point_metrics(measures, split, point, prompts), responses[point], ids)
        for point in points
    ]
    return records, ids, sorted(left_out)
