"""Multiple choice by likelihood: nothing is written; the likeliest option is the answer.

Where the query lists the options (`{choices}` in the task's prompt) the label follows it, " B"; else the option's text,
and then log-probabilities are compared per byte, so that longer options are not at a disadvantage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from switchgen.assembly import Writer
from switchgen.errors import ConfigError
from switchgen.mixture import BeyondContext, Mixture
from switchgen.policies.responses import is_response_policy
from switchgen.policies.routers import is_router
from switchgen.rundir import Run
from switchgen.scoring.choice import options_in
from switchgen.tasks import Example
from switchgen.trace import Query

JSON = dict[str, Any]
BY_LIKELIHOOD = "choice_likelihood"
_BATCH = 16
"""Questions whose options are read together."""


def check_choosing(policies: Sequence[str], task: str) -> None:
    """See that policies have a likelihood of given texts.

    Raises:
        ConfigError: one has none.
    """
    for policy in policies:
        if is_router(policy) or is_response_policy(policy):
            raise ConfigError(
                f"task {task}: metric {BY_LIKELIHOOD} needs the likelihood of given texts, which policy {policy!r} has "
                "not; use metric multiple_choice, or leave the policy out"
            )


def chosen_options(run: Run, writer: Writer, queries: Sequence[Query], examples: Sequence[Example]) -> list[JSON]:
    """The likeliest option of each question.

    Returns:
        `{"output": label or None, "options": {label: log-probability}}`, in order; None where a candidate's context is
        too short for a question with its options.
    """
    mixture = Mixture(writer.pool, writer.policy, run.recipe.decoding)
    chosen: list[JSON] = []
    for start in range(0, len(queries), _BATCH):
        batch = list(zip(queries[start : start + _BATCH], examples[start : start + _BATCH], strict=True))
        try:
            chosen += _choose(mixture, batch)
        except BeyondContext:
            for one in batch:
                try:
                    chosen += _choose(mixture, [one])
                except BeyondContext:
                    chosen.append({"output": None, "options": {}})
    return chosen


def _choose(mixture: Mixture, batch: Sequence[tuple[Query, Example]]) -> list[JSON]:
    pairs, spans = [], []
    for query, example in batch:
        choices = example.item["choices"]
        listed = bool(options_in(example.query)) and list(options_in(example.query)) == list(choices)
        texts = [f" {label if listed else option}" for label, option in choices.items()]
        pairs += [(query, text) for text in texts]
        spans.append((list(choices), [1 if listed else len(text.encode()) for text in texts]))
    scores = iter(mixture.score(pairs))
    chosen = []
    for labels, lengths in spans:
        found = [next(scores).log_prob for _ in labels]
        values = [value / length for value, length in zip(found, lengths, strict=True)]
        best = labels[values.index(max(values))]
        options = {
            label: round(value, 6) if math.isfinite(value) else None for label, value in zip(labels, found, strict=True)
        }
        chosen.append({"output": best, "options": options})
    return chosen
