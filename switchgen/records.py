"""What crosses stage borders, as JSON lines. Every record carries its schema version.

Records are plain dicts on disk; the functions here build them, so that every stage writes the same keys.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from switchgen.errors import DataError
from switchgen.trace import CUE, Query, Segment, Trace, writer_name

SCHEMA = 1


def segment_record(segment: Segment, names: Sequence[str]) -> dict[str, Any]:
    """`{"writer", "text", "num_tokens", "finish", "scores"}`; scores by candidate name, or null."""
    scores = None if segment.scores is None else dict(zip(names, (round(p, 6) for p in segment.scores), strict=True))
    return {
        "writer": writer_name(segment.writer, names),
        "text": segment.text,
        "num_tokens": len(segment.ids),
        "finish": segment.finish,
        "scores": scores,
    }


def usage_of(trace: Trace, names: Sequence[str]) -> dict[str, Any]:
    """Tokens by writer and in all, those of drafts among them; cue tokens are counted apart."""
    by_writer = {name: 0 for name in names}
    cue = 0
    for segment in (segment for written in (trace, *trace.drafts) for segment in written.segments):
        if segment.writer == CUE:
            cue += len(segment.ids)
        else:
            by_writer[names[segment.writer]] += len(segment.ids)
    return {"new_tokens": sum(by_writer.values()), "cue_tokens": cue, "by_writer": by_writer}


def response_record(trace: Trace, names: Sequence[str]) -> dict[str, Any]:
    """A finished trace: `{"id", "output", "segments", "finish", "usage"}`. A row beyond the context has output null.

    Where drafts led to the response there are `drafts`, too: `{"output", "writers", "num_tokens"}` of each.
    """
    record = {
        "id": trace.query.id,
        "output": None if trace.finish == "too_long" else trace.text,
        "segments": [segment_record(segment, names) for segment in trace.segments],
        "finish": trace.finish,
        "usage": usage_of(trace, names),
    }
    if trace.drafts:
        record["drafts"] = [
            {
                "output": draft.text,
                "writers": [names[writer] for writer in draft.writers],
                "num_tokens": draft.num_tokens,
            }
            for draft in trace.drafts
        ]
    return record


def released_log(trace: Trace) -> dict[str, Any]:
    """The released code's `generation_log`: query, segments, writers' indices, the whole sequence."""
    signed = trace.signed()
    return {
        "query": trace.query.text,
        "generated_segments": [text for _, text in signed],
        "segment_model_index": [writer for writer, _ in signed],
        "generated_sequence": trace.text,
    }


_SAME = 1e-9
"""Means that differ by less are the same: sums of graded scores (.1 + .2 and .3) differ in the last digits."""


def label_record(
    *,
    state_id: str,
    query: Query,
    task: str,
    prefix: Sequence[tuple[int, str]],
    names: Sequence[str],
    scores: Sequence[Sequence[float]],
    tokens: int,
    label: int | None = None,
    outcome: str = "budget",
    confidence: float | None = None,
    round_index: int = 0,
) -> dict[str, Any]:
    """One labelled state (arXiv 2510.09913, labels from rollouts).

    Args:
        state_id: unique over the rollout.
        prefix: (writer, text) of the trace that was branched.
        scores: for each candidate, the scores of its branch's completions (s_i is their mean); the j-th ones are pairs.
        tokens: new tokens that this state cost.
        label: the best candidate, where means of different numbers of completions do not say it.
        outcome: why no more was spent: `budget`, or `winner` or `tie` (rollout.budget: racing).
        confidence: that the label is better than every other candidate; None where unknown.

    Returns:
        `label` is the lowest index of the best mean, unless given; `tie` says that another candidate is exactly as
        good, or that the race ended in a tie; `margin` is what the label is ahead of the next best, by the completions
        that both have; `spread` best minus worst mean; `std_errors` one per candidate.
    """
    means = [statistics.fmean(values) for values in scores]
    ordered = sorted(means, reverse=True)
    best = means.index(ordered[0]) if label is None else label
    margin = min((_ahead(scores[best], other) for index, other in enumerate(scores) if index != best), default=0.0)
    spread = ordered[0] - ordered[-1]
    return {
        "schema": SCHEMA,
        "id": state_id,
        "query_id": query.id,
        "task": task,
        "messages": [dict(message) for message in query.messages],
        "segments": [{"writer": writer, "text": text} for writer, text in prefix],
        "candidates": list(names),
        "scores": [list(values) for values in scores],
        "counts": [len(values) for values in scores],
        "means": means,
        "std_errors": [statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None for values in scores],
        "label": best,
        "tie": len(means) > 1 and (margin <= _SAME or outcome == "tie"),
        "margin": margin if margin > _SAME else 0.0,
        "outcome": outcome,
        "confidence": confidence,
        "spread": spread if spread > _SAME else 0.0,
        "round": round_index,
        "tokens": tokens,
    }


def _ahead(scores: Sequence[float], others: Sequence[float]) -> float:
    """Difference of means; over the pairs where one has fewer completions. A single score is a certain one."""
    if 1 < min(len(scores), len(others)) < max(len(scores), len(others)):
        count = min(len(scores), len(others))
        scores, others = scores[:count], others[:count]
    return statistics.fmean(scores) - statistics.fmean(others)


def query_of(record: Mapping[str, Any]) -> Query:
    """The query of a label record."""
    return Query(record["query_id"], tuple(record["messages"]))


def read_records(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Records of JSONL files, in order; a torn last line (a killed run's) is left out.

    Raises:
        DataError: a line that is no JSON object, or of an unknown schema.
    """
    for path in paths:
        lines = path.read_bytes().split(b"\n")
        # Without a final line break the last line was being written when its writer was killed.
        for number, line in enumerate(lines[:-1], start=1):
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError):
                raise DataError(f"{path}, line {number}: not JSON: {line[:80]!r}") from None
            if not isinstance(record, dict) or record.get("schema", SCHEMA) != SCHEMA:
                raise DataError(f"{path}, line {number}: not a record of schema {SCHEMA}")
            yield record
