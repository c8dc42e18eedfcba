"""Quality of responses: likelihood under the aligned model. (The other quality metrics are a reward model's score,
`switchgen.scoring.reward`, and, where a task has right answers, the task's own score.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from switchgen.candidates import Candidate
from switchgen.likelihood import likelihoods
from switchgen.trace import Query


def mean_log_probs(candidate: Candidate, queries: Sequence[Query], outputs: Sequence[str]) -> list[float | None]:
    """Mean log-probability (nats per token) of each response under a candidate, at temperature 1.

    (1/T) Σ log p(y_t | query, y_<t), the response tokenized as a text by itself, end of text not counted. It is the
    quality axis of BACo's planes where no reward model is at hand (arXiv 2511.05650): minus the log of the perplexity.

    Returns:
        One figure per response, at most 0; None for an empty response or one beyond the context.
    """
    prompts = [candidate.prompt_ids(query) for query in queries]
    texts = [candidate.vocabulary.encode_text(output) for output in outputs]
    found = likelihoods(candidate, list(zip(prompts, texts, strict=True)))
    return [None if one is None else one.per_token for one in found]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is there; None if nothing is."""
    there = [value for value in values if value is not None and not math.isnan(value)]
    return sum(there) / len(there) if there else None
