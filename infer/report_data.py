"""What the report is made of: `evaluation/results.json`, checked, and the responses, counted in one pass.

Every response is counted; the page carries as many as fit (`MAX_EMBEDDED_BYTES`), whole questions with all their
policies and seeds, drawn by the hash of their id, so the part that is shown is a fair sample of the whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from infer.sequences import Spoken
from infer.stats import FloatArray
from switchgen.errors import DataError
from switchgen.records import read_records

MAX_EMBEDDED_BYTES = 12_000_000  # the page stays below 15 MB
NUM_BINS = 20  # relative positions in a response, for the speakers' shares
RIGHT = 0.5  # a score from here on counts as right
CUE_WRITER = "cue"

JSON = dict[str, Any]


@dataclass(slots=True)
class Tally:
    """What the responses of one policy to one task add up to."""

    num_responses: int = 0
    num_too_long: int = 0
    num_segments: int = 0
    num_switches: int = 0  # changes of writer within responses
    share_BW: FloatArray = field(default_factory=lambda: np.zeros((NUM_BINS, 0)))  # sums over responses with text
    tokens_W: FloatArray = field(default_factory=lambda: np.zeros(0))
    scores: dict[tuple[str, int], float | None] = field(default_factory=dict)  # (question id, seed) → score
    spoken: list[Spoken] = field(default_factory=list)  # who wrote the scored responses

    def add(self, response: Mapping[str, Any], writers: Mapping[str, int]) -> None:
        """Counts one response line; `writers` numbers the writers met so far."""
        segments = response["segments"]
        self.num_responses += 1
        self.num_too_long += response.get("status") == "too_long"
        self.num_segments += len(segments)
        names = [segment["writer"] for segment in segments if segment["writer"] != CUE_WRITER]
        self.num_switches += sum(a != b for a, b in zip(names, names[1:], strict=False))
        score = response.get("score")
        self.scores[response["id"], response["seed"]] = score
        if score is not None:
            self.spoken.append(Spoken(response.get("task", ""), response["id"], tuple(names), float(score)))
        missing = len(writers) - self.tokens_W.size
        if missing:
            self.tokens_W = np.pad(self.tokens_W, (0, missing))
            self.share_BW = np.pad(self.share_BW, ((0, 0), (0, missing)))
        total = sum(segment["num_tokens"] for segment in segments)
        start = 0
        for segment in segments:
            writer, tokens = writers[segment["writer"]], segment["num_tokens"]
            self.tokens_W[writer] += tokens
            if tokens:
                self.share_BW[:, writer] += _overlap(start / total, (start + tokens) / total)
            start += tokens


@dataclass(slots=True)
class Responses:
    """All responses, counted, and those that the page shows."""

    writers: list[str]  # the pool in ladder order, then other names as they were met
    policies: list[str]
    tasks: list[str]
    tallies: dict[tuple[str, str], Tally]  # (policy, task)
    num_responses: int
    num_shown: int
    shown: JSON  # for the page's browser (`_shown`)


def read_results(run_dir: Path) -> JSON:
    """`evaluation/results.json` of a run.

    Raises:
        DataError: missing, no JSON, or not of schema 1.
    """
    path = run_dir / "evaluation" / "results.json"
    results = read_document(path)
    if results is None:
        raise DataError(f"{path}: not there; `switchgen evaluate` writes it")
    check_results(results, str(path))
    return results


def read_document(path: Path) -> JSON | None:
    """A stage's JSON document; None if there is none.

    Raises:
        DataError: no JSON, or not of schema 1.
    """
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    check_schema(document, str(path))
    return dict(document)


def check_schema(document: Any, where: str) -> None:
    """Refuses what is no document of schema 1.

    Raises:
        DataError: what was got and where.
    """
    if not isinstance(document, dict) or document.get("schema") != 1:
        schema = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise DataError(f"{where}: schema is {schema!r}; this version reads schema 1")


def check_results(results: Any, where: str = "results") -> None:
    """Refuses what is no results document of schema 1.

    Raises:
        DataError: what was got, where, and what belongs there.
    """
    check_schema(results, where)
    for part, needed in (
        ("rows", ("policy", "task", "value")),
        ("comparisons", ("policy", "against", "task", "difference")),
    ):
        rows = results.get(part, [] if part == "comparisons" else None)
        if not isinstance(rows, list):
            raise DataError(f"{where}: {part!r} is a list of rows, got {type(rows).__name__}")
        for number, row in enumerate(rows):
            missing = [key for key in needed if not isinstance(row, dict) or key not in row]
            if missing:
                raise DataError(f"{where}: {part}[{number}] lacks {', '.join(missing)}")


def read_responses(
    run_dir: Path,
    candidates: Sequence[str],
    policies: Sequence[str],
    tasks: Sequence[str],
    *,
    evaluated: Mapping[str, Any] | None = None,
) -> Responses | None:
    """Reads `evaluation/responses/*.jsonl`; None where there are none.

    Args:
        candidates: the pool in ladder order; other writers are appended as they are met.
        policies, tasks: the order in which they are shown; others are appended too.
        evaluated: {"seeds": {policy: seeds}, "questions": {task: ids}} that count, as the results say: evaluations of
            more questions, or of other policies, may have left others in the folder. None: all count.

    Raises:
        DataError: a line that is no response record, with file and line.
    """
    files = sorted((run_dir / "evaluation" / "responses").glob("*.jsonl"))
    if not files:
        return None
    size = sum(path.stat().st_size for path in files)
    writers = {name: index for index, name in enumerate(candidates)}
    policy_order, task_order = list(policies), list(tasks)
    tallies: dict[tuple[str, str], Tally] = {}
    kept: dict[tuple[str, str], _Question] = {}
    seeds = evaluated and evaluated["seeds"]
    ids = evaluated and {task: frozenset(own) for task, own in evaluated["questions"].items()}
    total = 0
    for response in _lines(files):
        policy, task = response["policy"], response["task"]
        if seeds is not None and response["seed"] not in seeds.get(policy, ()):
            continue
        if ids is not None and response["id"] not in ids.get(task, ()):
            continue
        total += 1
        if policy not in policy_order:
            policy_order.append(policy)
        if task not in task_order:
            task_order.append(task)
        for segment in response["segments"]:
            writers.setdefault(segment["writer"], len(writers))
        tallies.setdefault((policy, task), Tally()).add(response, writers)
        rank = _rank(task, response["id"])
        if size <= 2 * MAX_EMBEDDED_BYTES or rank <= 2 * MAX_EMBEDDED_BYTES / size:
            question = kept.setdefault((task, response["id"]), _Question(rank, len(kept), task, response))
            question.add(response, policy_order.index(policy), writers)
    shown = _fitting(list(kept.values()))
    document = _shown(shown, list(writers), policy_order, task_order)
    return Responses(list(writers), policy_order, task_order, tallies, total, len(document["responses"]), document)


class _Question:
    """One question with all its responses, encoded for the page."""

    def __init__(self, rank: float, order: int, task: str, response: Mapping[str, Any]) -> None:
        self.rank = rank
        self.order = order
        self.task = task
        self.id = response["id"]
        self.question = response.get("question") or ""
        self.reference = response.get("reference")
        self.rows: list[list[Any]] = []
        self.size = len(self.question) + 60

    def add(self, response: Mapping[str, Any], policy: int, writers: Mapping[str, int]) -> None:
        segments = [
            [writers[s["writer"]], s["text"], s["num_tokens"], s.get("finish"), _per_mille(s.get("scores"), writers)]
            for s in response["segments"]
        ]
        score = response.get("score")
        row = [
            policy,
            response["seed"],
            None if score is None else round(score, 4),
            int(response.get("status") == "too_long"),
            response.get("extracted"),
            response.get("finish"),
            segments,
        ]
        self.rows.append(row)
        self.size += len(safe_json(row).encode("utf-8")) + 8


def safe_json(value: Any) -> str:
    """JSON that may stand inside a `<script type="application/json">` element, whatever the texts hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate(_ESCAPES)


_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029\x7f"} | dict.fromkeys(range(0xD800, 0xE000), "\\ufffd")


def _lines(files: Sequence[Path]) -> Iterator[JSON]:
    for path in files:
        for number, response in enumerate(read_records([path]), start=1):
            _check(response, f"{path}, line {number}")
            yield response


_KINDS = {str: "a text", int: "a whole number", list: "a list"}


def _check(response: JSON, where: str) -> None:
    """Just what the page relies on; types are checked so that a wrong file fails here, by name."""
    for key, types in (("id", str), ("task", str), ("policy", str), ("seed", int), ("segments", list)):
        if not isinstance(response.get(key), types):
            raise DataError(f"{where}: {key!r} is {_KINDS[types]}, got {response.get(key)!r}"[:300])
    for segment in response["segments"]:
        right = isinstance(segment, dict) and isinstance(segment.get("writer"), str)
        if not (right and isinstance(segment.get("text"), str) and isinstance(segment.get("num_tokens"), int)):
            raise DataError(f"{where}: a segment holds writer, text and num_tokens, got {segment!r}"[:300])
    score = response.get("score")
    if score is not None and not (isinstance(score, int | float) and math.isfinite(score)):
        raise DataError(f"{where}: 'score' is a finite number or null, got {score!r}")


def _rank(task: str, id: str) -> float:
    """A question's place in the draw, in [0, 1)."""
    digest = hashlib.sha256(f"{task}\n{id}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _fitting(questions: list[_Question]) -> list[_Question]:
    """The questions with the lowest ranks that fit the page, in the order in which they were read."""
    shown, size = [], 0
    for question in sorted(questions, key=lambda q: q.rank):
        size += question.size
        if size > MAX_EMBEDDED_BYTES and shown:
            break
        shown.append(question)
    return sorted(shown, key=lambda q: q.order)


def _shown(questions: Sequence[_Question], writers: list[str], policies: list[str], tasks: list[str]) -> JSON:
    """Questions `[task, id, text, reference]` and responses `[question, policy, seed, score, too long, extracted,
    finish, [[writer, text, tokens, finish, probabilities], …]]`; whatever has a list of names is its place there."""
    ordered = sorted(questions, key=lambda q: (tasks.index(q.task), _natural(q.id), q.order))
    return {
        "writers": writers,
        "policies": policies,
        "tasks": tasks,
        "questions": [[tasks.index(q.task), q.id, q.question, q.reference] for q in ordered],
        "responses": [
            [number, *row] for number, q in enumerate(ordered) for row in sorted(q.rows, key=lambda r: (r[0], r[1]))
        ],
    }


def _natural(id: str) -> list[tuple[bool, int, str]]:
    """Sort key that puts "q2" before "q10"; responses are stored in the order in which they were finished."""
    parts = re.split(r"([0-9]{1,18})", id)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts if part]


def _per_mille(scores: Mapping[str, float] | None, writers: Mapping[str, int]) -> list[int | None] | None:
    """Probabilities as integers in the writers' order; short, and exact enough to read."""
    if not scores:
        return None
    known = {writers[name]: round(1000 * p) for name, p in scores.items() if name in writers}
    return [known.get(index) for index in range(max(known) + 1)] if known else None


def _overlap(start: float, end: float) -> FloatArray:
    """Share of each bin of [0, 1] that [start, end] covers."""
    edges = np.linspace(0.0, 1.0, NUM_BINS + 1)
    return np.asarray(np.clip(np.minimum(end, edges[1:]) - np.maximum(start, edges[:-1]), 0, None) * NUM_BINS)
