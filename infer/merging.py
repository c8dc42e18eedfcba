"""`switchgen merge`: models merged of the candidates, once, into the run folder (`switchgen.merges`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from infer.questions import Questions, load_questions
from switchgen.api import make_loop, make_policy, response_seed
from switchgen.candidates import Pool
from switchgen.config import CandidateConfig
from switchgen.errors import ConfigError, DataError
from switchgen.files import lock
from switchgen.merges import (
    MERGES,
    check_merge,
    combination,
    is_merge,
    is_merged,
    mean_of,
    merged_candidate,
    merged_folder,
    parse_merge,
    write_merged,
)
from switchgen.rows import Row
from switchgen.rundir import Run
from switchgen.trace import Query

logger = logging.getLogger("switchgen")

JSON = dict[str, Any]


def main(run: Run, names: Sequence[str]) -> JSON:
    """Make the merged models that are not there yet.

    Args:
        names: `soup`, `greedy-soup`, `dare-ties@0.5`, `expo@0.3`.

    Returns:
        Where each of them is.

    Raises:
        ConfigError: a name means no merged model.
        ModelError: the candidates cannot be merged.
    """
    for name in names:
        if not is_merge(name):
            raise ConfigError(f"merge: {name!r} is no merged model; allowed: "
                              + ", ".join(n if at is None else f"{n}@{at}" for n, at in MERGES.items()))  # fmt: skip
        check_merge(name, run.recipe.names)
    with lock(run.dir / "merged"):
        for name in names:
            if not is_merged(run, name):
                logger.info("merge: %s", name)
                _make(run, name)
    return {name: str(merged_folder(run, name)) for name in names}


def _make(run: Run, name: str) -> None:
    if parse_merge(name).method == "greedy-soup":
        _make_greedy_soup(run, name)
    else:
        write_merged(run, name, combination(name, len(run.recipe.pool), run.recipe.baselines.seed), {})


def _make_greedy_soup(run: Run, name: str) -> None:
    """Best candidate first; each further one stays in the mean if the dev score does not fall."""
    tasks = _dev_questions(run)
    singles = {
        index: dev_score(run, config.model_copy(update={"name": "merged"}), tasks)
        for index, config in enumerate(run.recipe.pool)
    }
    order = sorted(singles, key=lambda index: (-singles[index], index))
    members, best = [order[0]], singles[order[0]]
    trials = [{"members": [run.recipe.names[order[0]]], "score": best}]
    for index in order[1:]:
        tried = sorted([*members, index])
        write_merged(run, name, mean_of(tried), {"members": [run.recipe.names[i] for i in tried], "trial": True})
        score = dev_score(run, merged_candidate(run, name), tasks)
        trials.append({"members": [run.recipe.names[i] for i in tried], "score": score})
        if score >= best:
            members, best = tried, score
    named = [run.recipe.names[index] for index in members]
    logger.info("merge: greedy-soup is %s (dev score %.3f)", " + ".join(named), best)
    write_merged(run, name, mean_of(members), {"members": named, "dev_score": best, "trials": trials})


def _dev_questions(run: Run) -> list[Questions]:
    """The dev questions of the tasks that are scored response by response, the exact ones where there are any."""
    limit = run.recipe.baselines.dev_questions
    settings = run.recipe.evaluate.model_copy(update={"split": "dev", "limit": limit})
    dev = Run(run.name, run.recipe.model_copy(update={"evaluate": settings}), run.dir, run.source)
    scored = [questions for questions in load_questions(dev) if questions.scored_singly]
    if not scored:
        raise DataError(
            "greedy-soup: none of the tasks is scored response by response, so there is nothing to choose by"
        )
    return [questions for questions in scored if questions.exact] or scored


def dev_score(run: Run, config: CandidateConfig, tasks: Sequence[Questions]) -> float:
    """Mean over tasks of a model's mean score, decoded greedily."""
    decoding = run.recipe.decoding.model_copy(update={"temperature": 0.0})
    pool = Pool.load([config])
    loop = make_loop(pool, make_policy(config.name, pool), decoding, max_rows=run.recipe.engine.max_rows)
    means = []
    for questions in tasks:
        examples = {example.id: example for example in questions.examples}
        rows = (Row(pool, Query(id, example.messages), response_seed(0, id)) for id, example in examples.items())
        scores = []
        for row in loop.run(rows):
            output = None if row.trace.finish == "too_long" else row.trace.text
            scores.append(questions.score(examples[row.trace.query.id], output)[0] or 0.0)
        means.append(sum(scores) / len(scores))
    return sum(means) / len(means)
