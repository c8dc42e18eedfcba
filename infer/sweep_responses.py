"""Responses of a sweep: several per prompt and operating point, kept and gone on with like an evaluation's."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from infer.batch import check_conversations
from infer.claims import response_claim
from infer.questions import Questions, load_questions
from infer.sweep_methods import Point
from switchgen.api import response_seed
from switchgen.assembly import DISTILLED, Writer, load_writers, set_threads
from switchgen.candidates import Pool
from switchgen.errors import ConfigError
from switchgen.files import Shard, json_line, write_atomic
from switchgen.progress import progress
from switchgen.records import SCHEMA, usage_of
from switchgen.rows import Row
from switchgen.rundir import Run, claim_stage
from switchgen.tasks import Example
from switchgen.trace import Query, Trace

logger = logging.getLogger("switchgen")

JSON = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One prompt of a sweep."""

    questions: Questions
    example: Example

    @property
    def id(self) -> str:
        """Unique among the prompts of a split."""
        return f"{self.questions.name}/{self.example.id}"

    @property
    def query(self) -> Query:
        """What is asked."""
        return Query(self.id, self.example.messages)


def load_prompts(run: Run, split: str) -> list[Prompt]:
    """The prompts of one split, task by task.

    Raises:
        ConfigError, DataError: there is no such task, or a file is wrong.
    """
    recipe = run.recipe
    evaluate = recipe.evaluate.model_copy(update={"split": split, "limit": recipe.sweep.prompts})
    tasks = load_questions(replace(run, recipe=recipe.model_copy(update={"evaluate": evaluate})))
    wanted = recipe.sweep.tasks
    if wanted is not None:
        known = [questions.name for questions in tasks]
        if unknown := [name for name in wanted if name not in known]:
            raise ConfigError(f"sweep.tasks: no task is called {', '.join(unknown)}; allowed: {', '.join(known)}")
        tasks = [questions for questions in tasks if questions.name in wanted]
    return [Prompt(questions, example) for questions in tasks for example in questions.examples]


def at_temperature(run: Run, point: Point) -> Run:
    """The run with a point's temperature in its recipe."""
    decoding = run.recipe.decoding.model_copy(update={"temperature": point.temperature})
    return replace(run, recipe=run.recipe.model_copy(update={"decoding": decoding}))


def responses_file(run: Run, split: str, point: Point) -> Path:
    """Where a point's responses are kept."""
    return run.dir / "sweep" / "responses" / split / f"{point.key}.jsonl"


def claim_points(run: Run, split: str, points: Sequence[Point], prompts: Sequence[Prompt]) -> None:
    """See that the responses that are there were made by this recipe, and note what new ones will depend on.

    Raises:
        ConfigError: another recipe, other weights or other prompts made them.
    """
    contents = {prompt.questions.name: prompt.questions.content for prompt in prompts}
    for point in points:
        claim = {
            "seed": run.recipe.sweep.seed,
            "split": split,
            **response_claim(at_temperature(run, point), point.policy),
        }
        for task, content in contents.items():
            place = run.dir / "sweep" / "claims" / split / point.key / task
            try:
                claim_stage(place, "sweep", {"prompts": content, **claim})
            except ConfigError as error:
                raise ConfigError(f"{error}, together with {responses_file(run, split, point)}") from None


class Writers:
    """The policies of a sweep, loaded when the first of them is needed."""

    def __init__(self, run: Run, points: Sequence[Point]) -> None:
        self.run = run
        self.policies = list(dict.fromkeys(point.policy for point in points))
        self._writers: dict[str, Writer] | None = None

    def __getitem__(self, policy: str) -> Writer:
        if self._writers is None:
            self._writers = load_writers(self.run, self.policies)
        return self._writers[policy]

    @cached_property
    def pool(self) -> Pool:
        """The candidates; loaded by themselves if nothing had to be written."""
        for policy, writer in (self._writers or {}).items():
            if policy != DISTILLED:
                return writer.pool
        set_threads(self.run)
        return Pool.from_recipe(self.run.recipe)


def write_missing(run: Run, split: str, points: Sequence[Point], prompts: Sequence[Prompt], writers: Writers) -> None:
    """Write the responses that are missing, point by point."""
    samples = run.recipe.sweep.samples
    missing: dict[Point, list[tuple[Prompt, int]]] = {}
    for point in points:
        done: set[str] = set()
        if responses_file(run, split, point).is_file():
            with Shard(responses_file(run, split, point)) as shard:
                done = shard.done
        asks = [(prompt, sample) for prompt in prompts for sample in range(samples)]
        missing[point] = [ask for ask in asks if _id(*ask) not in done]
    total = sum(map(len, missing.values()))
    if not total:
        logger.info("sweep: all responses of split %s are written already", split)
        return
    wanted = len(points) * len(prompts) * samples
    with progress(f"sweep {split}", total=wanted, done=wanted - total, unit="response") as advance:
        for point, asks in missing.items():
            if asks:
                _write(run, split, point, asks, writers[point.policy], advance)


def _id(prompt: Prompt, sample: int) -> str:
    return f"{prompt.id}#{sample}"


def _write(
    run: Run,
    split: str,
    point: Point,
    asks: Sequence[tuple[Prompt, int]],
    writer: Writer,
    advance: Callable[[int], None],
) -> None:
    seed = run.recipe.sweep.seed
    queries = [replace(prompt.query, fields={"ask": index}) for index, (prompt, _) in enumerate(asks)]
    check_conversations(writer, queries)
    rows = (
        Row(writer.pool, query, response_seed(seed, query.id, sample))
        for query, (_, sample) in zip(queries, asks, strict=True)
    )
    with ExitStack() as stack:
        shard = stack.enter_context(Shard(responses_file(run, split, point)))
        last = time.monotonic()
        for row in writer.loop(at_temperature(run, point)).run(rows):
            now = time.monotonic()
            # Rows are written together: what has passed since the last one was finished is noted with this one.
            prompt, sample = asks[row.trace.query.fields["ask"]]
            shard.append(_record(point, prompt, sample, row.trace, writer.pool.names, now - last))
            last = now
            advance(row.trace.num_tokens)


def _record(point: Point, prompt: Prompt, sample: int, trace: Trace, names: Sequence[str], seconds: float) -> JSON:
    record = {
        "schema": SCHEMA,
        "id": _id(prompt, sample),
        "prompt": prompt.id,
        "sample": sample,
        "policy": point.policy,
        "temperature": point.temperature,
        "question": prompt.example.query,
        "output": None if trace.finish == "too_long" else trace.text,
        "finish": trace.finish,
        "usage": usage_of(trace, names),
        "switches": sum(a.writer != b.writer for a, b in pairwise(trace.segments)),
        "seconds": round(seconds, 5),
    }
    prompt.questions.score_record(prompt.example, record)
    return record


def score_again(run: Run, split: str, points: Sequence[Point], prompts: Sequence[Prompt]) -> None:
    """Give saved responses new scores where another metric, marker or other answers made those that they have."""
    by_id = {prompt.id: prompt for prompt in prompts if prompt.questions.scored_singly}
    stamps = {id: prompt.questions.score_stamp(prompt.example) for id, prompt in by_id.items()}
    count = 0
    for point in points:
        path = responses_file(run, split, point)
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        outdated = [r for r in records if r["prompt"] in stamps and r.get("scored_by") != stamps[r["prompt"]]]
        for record in outdated:
            prompt = by_id[record["prompt"]]
            prompt.questions.score_record(prompt.example, record)
        if outdated:
            write_atomic(path, "".join(json_line(record).decode() for record in records))
        count += len(outdated)
    if count:
        logger.info("sweep %s: %d responses were scored with another metric or other answers; they are scored again",
                    split, count)  # fmt: skip


def read_responses(run: Run, split: str, point: Point, prompts: Sequence[Prompt]) -> dict[str, list[JSON]]:
    """A point's responses by prompt, as many as the recipe's samples, in their order."""
    wanted = {_id(prompt, sample): prompt.id for prompt in prompts for sample in range(run.recipe.sweep.samples)}
    found: Mapping[str, list[JSON]] = {prompt.id: [] for prompt in prompts}
    with open(responses_file(run, split, point), encoding="utf-8", newline="\n") as stream:
        for line in stream:
            record = json.loads(line)
            if record["id"] in wanted:
                found[record["prompt"]].append(record)
    for records in found.values():
        records.sort(key=lambda record: record["sample"])
    return dict(found)
