"""`switchgen segments`: the same questions with other segments: 10 to 100 tokens, or to where a boundary lies.

RUN/segments/<setting>/evaluation/…   one evaluation a setting, resumable as any
RUN/segments/results.json             `{"schema", "settings": […], "rows": [{"policy", "task", "setting", "value", …}]}`
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from infer.evaluation import main as evaluate
from infer.results import MEAN
from infer.subruns import choosing, sub_run
from switchgen.baselines import TURNS, family_of
from switchgen.errors import ConfigError
from switchgen.files import write_json
from switchgen.rundir import Run

logger = logging.getLogger("switchgen")

JSON = dict[str, Any]
_LONG = 100
"""Tokens at which an adaptive segment ends at the latest."""


def main(
    run: Run, *, tokens: Sequence[int] = (10, 25, 50, 100), ends: Sequence[str] = ("sentence", "line", "p@0.3"),
    workers: int | None = None,
) -> JSON:  # fmt: skip
    """Evaluate the recipe's switching policies with each kind of segment.

    Args:
        tokens: lengths of segments.
        ends: adaptive segments of at most 100 tokens, as `decoding.segment.end` has them: to the end of a sentence
            or a line, or to where the writer is unsure.
        workers: processes; default `evaluate.workers`.

    Raises:
        ConfigError: the recipe evaluates no policy that segments matter to.
    """
    recipe = run.recipe
    policies = [
        policy for policy in choosing(run, recipe.evaluate.policies) if family_of(policy, recipe.names) == TURNS
    ]
    if not policies:
        raise ConfigError(f"{run.source}: none of evaluate.policies depends on segments; allowed: switcher, untuned, "
                          "random, segment-rand@γ")  # fmt: skip
    settings: dict[str, JSON] = {f"{count} tokens": {"tokens": count, "end": "length"} for count in tokens}
    settings |= {end: {"tokens": _LONG, "end": end} for end in ends}
    evaluation = {"policies": policies, "baselines": False, "against": None}
    # All settings are checked before the first is evaluated.
    runs = {
        name: sub_run(
            run,
            f"segments/{segment['end']}-{segment['tokens']}",
            {"decoding": {"segment": segment}, "evaluate": evaluation},
        )
        for name, segment in settings.items()
    }
    rows = []
    for name, changed in runs.items():
        logger.info("segments: %s", name)
        results = evaluate(changed, workers=workers)
        for row in results["rows"]:
            if row["seed"] is None:
                kept = ("policy", "task", "metric", "value", "low", "high", "n", "tokens", "seconds")
                rows.append({"setting": name, **{key: row[key] for key in kept}})
    document = {"schema": 1, "settings": list(settings), "policies": policies, "rows": rows}
    write_json(run.dir / "segments" / "results.json", document)
    return document


def best_settings(document: JSON) -> dict[tuple[str, str], str]:
    """The setting with the highest value of each (policy, task); the earlier one where two are as good."""
    best: dict[tuple[str, str], JSON] = {}
    for row in document["rows"]:
        key = row["policy"], row["task"]
        if key not in best or row["value"] > best[key]["value"]:
            best[key] = row
    return {key: row["setting"] for key, row in best.items()}


def tasks_of(document: JSON) -> list[str]:
    """The tasks of the sweep, the mean first."""
    tasks = list(dict.fromkeys(row["task"] for row in document["rows"]))
    return sorted(tasks, key=lambda task: task != MEAN)
