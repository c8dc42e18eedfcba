"""From label records to token examples for the switcher's fit.

An example is the switcher's prompt in the very tokens that inference reads (`prompts.SwitcherPrompt`, piece by piece),
followed by the one token of its label. What is left out is counted with its reason; nothing disappears in silence.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from switchgen.config import TrainConfig
from switchgen.errors import DataError
from switchgen.ids import content_hash, derive_seed
from switchgen.prompts import SwitcherPrompt
from switchgen.records import query_of, read_records
from switchgen.rundir import Run

logger = logging.getLogger("switchgen")

IGNORED = -100
_MIN_QUERY_TOKENS = 8
_SHARES = 1 << 32


@dataclass(frozen=True)
class LabelExample:
    """One labelled state in tokens."""

    state_id: str
    input_ids: list[int]
    """The switcher's prompt and, last, the label's token. For a probe, what its host reads, without a label."""
    label: int
    """Index of the best candidate."""
    means: list[float]
    """Mean score of each candidate's branch (s_i)."""
    cut: bool
    """Whether the trace lost its middle."""

    def row(self, tau: float) -> dict[str, Any]:
        """What the trainer's collator reads; only the label's token has a loss.

        Args:
            tau: temperature of the soft targets, softmax(mean / tau), in units of the score.
        """
        return {
            "input_ids": self.input_ids,
            "labels": [*[IGNORED] * (len(self.input_ids) - 1), self.input_ids[-1]],
            "targets": soft_targets(self.means, tau),
            "means": self.means,
        }


@dataclass
class LabelData:
    """The examples of a fit, split by query, and what was left out."""

    train: list[LabelExample] = field(default_factory=list)
    held_out: list[LabelExample] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """Records by reason: `tie`, `margin`, `too_long`, `repeated`."""
    num_records: int = 0

    def counts(self, num_candidates: int) -> dict[str, Any]:
        """For the adapter's `switchgen.json`: how many records went where."""
        by_label = Counter(example.label for example in self.train)
        return {
            "records": self.num_records,
            "train": len(self.train),
            "held_out": len(self.held_out),
            "left_out": {reason: self.left_out.get(reason, 0) for reason in ("tie", "margin", "too_long", "repeated")},
            "cut_traces": sum(example.cut for example in (*self.train, *self.held_out)),
            "train_by_label": [by_label.get(label, 0) for label in range(num_candidates)],
        }


def soft_targets(means: Sequence[float], tau: float) -> list[float]:
    """softmax(mean / tau) over the candidates."""
    best = max(means)
    weights = [math.exp((mean - best) / tau) for mean in means]
    return [weight / sum(weights) for weight in weights]


def read_labels(run: Run) -> list[dict[str, Any]]:
    """The rollout's label records, ordered by id, so that shards and workers change nothing.

    Raises:
        DataError: there are none, or they were made with another pool.
    """
    folder = run.dir / "rollout"
    records = list(read_records(sorted(folder.glob("labels-*.jsonl"))))
    if not records:
        raise DataError(f"no labels in {folder} (labels-*.jsonl); run `switchgen rollout` first")
    names = run.recipe.names
    for record in records:
        if record["candidates"] != names:
            raise DataError(
                f"{folder}: record {record['id']!r} labels the candidates {', '.join(record['candidates'])}; the "
                f"recipe's pool is {', '.join(names)}"
            )
    return sorted(records, key=lambda record: str(record["id"]))


def label_examples(
    records: Iterable[Mapping[str, Any]], prompt: SwitcherPrompt, settings: TrainConfig, max_length: int
) -> LabelData:
    """Token examples of label records.

    Args:
        prompt: the switcher's prompt in its base's vocabulary.
        settings: `train` of the recipe: what counts as a label, and the held-out share.
        max_length: tokens an example may have; longer traces lose their middle.
    """
    return gather(records, lambda record: label_example(record, prompt, max_length), settings)


def gather(
    records: Iterable[Mapping[str, Any]],
    make: Callable[[Mapping[str, Any]], LabelExample | None],
    settings: TrainConfig,
) -> LabelData:
    """Examples of the records that count, split by query.

    Args:
        make: a record's example; None where it does not fit.
    """
    data = LabelData()
    seen: set[str] = set()
    for record in records:
        data.num_records += 1
        if record["id"] in seen:
            data.left_out["repeated"] += 1
            continue
        seen.add(record["id"])
        example = make(record)
        if is_tie(record, settings.labels) and not settings.keep_ties:
            data.left_out["tie"] += 1
        elif record["margin"] < settings.min_margin:
            data.left_out["margin"] += 1
        elif example is None:
            data.left_out["too_long"] += 1
        elif is_held_out(record, settings.held_out):
            data.held_out.append(example)
        else:
            data.train.append(example)
    return data


def is_tie(record: Mapping[str, Any], labels: str) -> bool:
    """Whether a record says nothing about the choice.

    A hard label needs one best candidate. A soft one is undecided only where all candidates are equal: two equally good
    ones still say that the third is worse (on the lab's ladder, half of the records that say anything are like that).
    """
    return bool(record["spread"] == 0 if labels == "soft" else record["tie"])


def label_example(record: Mapping[str, Any], prompt: SwitcherPrompt, max_length: int) -> LabelExample | None:
    """One record in tokens; None where not even the query's beginning, the question and the label fit."""
    query = query_of(record)
    query_ids = prompt.query_ids(query)
    pieces = [prompt.segment_ids(segment["writer"], segment["text"]) for segment in record["segments"]]
    room = max_length - len(prompt.question_ids) - 1
    if room < min(len(query_ids), len(prompt.head_ids) + _MIN_QUERY_TOKENS):
        return None
    kept = fit_pieces(query_ids, pieces, room)
    length = len(query_ids) + sum(map(len, pieces))
    ids = [*kept, *prompt.question_ids, prompt.label_ids[record["label"]]]
    return LabelExample(str(record["id"]), ids, record["label"], list(record["means"]), len(kept) < length)


def fit_pieces(query_ids: Sequence[int], pieces: Sequence[Sequence[int]], room: int) -> list[int]:
    """Query and signed segments in at most `room` tokens; what is lost is the middle of the trace.

    Whole segments are kept, from the newest and the oldest in turns; a newest segment that alone is too long loses its
    own middle. A query that leaves too little room for the trace loses its middle too, never its beginning.
    """
    trace_length = sum(map(len, pieces))
    query = cut_middle(query_ids, max(room - trace_length, (room + 1) // 2))
    room -= len(query)
    rest = list(pieces)
    oldest: list[Sequence[int]] = []
    newest: list[Sequence[int]] = [cut_middle(rest.pop(), room)] if rest else []
    room -= sum(map(len, newest))
    from_end = False
    while rest and len(rest[-1 if from_end else 0]) <= room:
        piece = rest.pop(-1 if from_end else 0)
        oldest, newest = (oldest, [piece, *newest]) if from_end else ([*oldest, piece], newest)
        room -= len(piece)
        from_end = not from_end
    return [*query, *(index for piece in (*oldest, *newest) for index in piece)]


def cut_middle(ids: Sequence[int], room: int) -> list[int]:
    """The first and last tokens of a list, `room` in all."""
    if len(ids) <= room:
        return list(ids)
    tail = room // 2
    return [*ids[: room - tail], *ids[len(ids) - tail :]]


def is_held_out(record: Mapping[str, Any], share: float) -> bool:
    """Whether a record's query is kept for measuring: a hash of what is asked, whatever the seed and the other queries.

    Two ids with the same conversation count as one query.
    """
    key = content_hash([dict(message) for message in record["messages"]])
    return derive_seed("held-out", key) % _SHARES < share * _SHARES
