"""What the student learns from: the collaboration's responses to training questions, scored, filtered, in tokens.

Responses go to RUN/distill-data/responses.jsonl as they are finished, with their scores; the filter is applied when
they are read, so that another threshold writes nothing anew. Evaluation questions are never among them: that is
checked, by id and by text, before anything is loaded.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from switchgen.assembly import check_writers, fingerprint, load_writers, spread
from switchgen.candidates import prompt_style
from switchgen.config import CandidateConfig
from switchgen.errors import ConfigError, DataError
from switchgen.files import Shard, lock
from switchgen.ids import derive_seed
from switchgen.progress import progress
from switchgen.prompts import chat_prompt_ids, plain_prompt_ids
from switchgen.records import read_records, response_record
from switchgen.rows import Row
from switchgen.rundir import Run, claim_stage
from switchgen.scoring import RewardModelScorer, metric_named
from switchgen.tasks import Example, Task, load_task
from switchgen.tasks.overlap import EvaluationQuestions
from switchgen.trace import Query
from switchgen.vocabulary import Vocabulary
from switchgen.weights import candidate_weights, weights_hash
from switchgen.workers import (
    Report,
    Share,
    Spent,
    Stopwatch,
    do_shares,
    gather_shards,
    log_spent,
    shard_folder,
    split,
    wait_for_leftovers,
)

logger = logging.getLogger("switchgen")

SCHEMA = 1
FOLDER = "distill-data"
RESPONSES = "responses.jsonl"
REASONS = ("not_answered", "unfinished", "low_score", "repeated", "too_long")
"""Why responses are left out, in the order in which they are looked at."""

_REWARD_MODEL = "reward_model"
_IGNORED = -100
_MAX_SHOWN = 5


@dataclass(frozen=True)
class Question:
    """One training question."""

    task: Task
    example: Example
    query: Query
    """Its id is `<task>/<the example's id>`."""


@dataclass
class StudentData:
    """Examples for the student and where the responses went."""

    rows: list[dict[str, list[int]]] = field(default_factory=list)
    """`{"input_ids", "labels"}`; the response and its end token have a loss, the prompt has none."""
    kept: list[str] = field(default_factory=list)
    """Ids of the responses behind the rows."""
    by_task: dict[str, Counter[str]] = field(default_factory=dict)
    """Per task: `written`, `kept`, and one count per reason."""
    tokens: int = 0
    """Tokens that were written for all responses, kept or not."""

    def counts(self) -> dict[str, Any]:
        """For the student's `switchgen.json`."""
        total = sum(self.by_task.values(), Counter())
        return {
            "written": total["written"],
            "kept": total["kept"],
            "left_out": {reason: total[reason] for reason in REASONS},
            "by_task": {
                task: {key: counter[key] for key in ("written", "kept", *REASONS)}
                for task, counter in self.by_task.items()
            },
        }


def training_questions(run: Run) -> list[Question]:
    """The questions whose responses the student learns from, spread evenly over the tasks.

    Raises:
        ConfigError: no tasks, or tasks whose responses cannot be scored one by one.
        DataError: a task's file is wrong, or a question is also an evaluation question.
    """
    settings = run.recipe.distill
    if not run.recipe.tasks:
        raise ConfigError(f"{run.source}: distillation takes its questions from `tasks`; the recipe lists none")
    tasks = [load_task(spec) for spec in run.task_specs(split=settings.split)]
    for task in tasks:
        if metric_named(task.metric).score is None and (
            task.metric != _REWARD_MODEL or run.recipe.rollout.reward_model is None
        ):
            needed = "rollout.reward_model" if task.metric == _REWARD_MODEL else "another metric for it"
            raise ConfigError(f"task {task.name}: metric {task.metric!r} scores no single response; set {needed}")
    questions = []
    for (_, wanted), task in zip(spread(settings.queries, [task.name for task in tasks]), tasks, strict=True):
        drawn = sorted(task.examples, key=lambda example: derive_seed(settings.seed, "distill question", example.id))
        if len(drawn) < wanted:
            logger.warning(
                "task %s has %d questions in split %s; distill.queries asks for %d of them",
                task.name, len(drawn), task.split, wanted,
            )  # fmt: skip
        questions += [
            Question(task, example, Query(f"{task.name}/{example.id}", example.messages, form=task.form(example)))
            for example in drawn[:wanted]
        ]
    refuse_evaluation_questions(run, questions)
    return questions


def refuse_evaluation_questions(run: Run, questions: Sequence[Question]) -> None:
    """See that no question is asked in the evaluation too (`EvaluationQuestions`).

    Raises:
        DataError: names the first of them.
    """
    evaluation, split = EvaluationQuestions(run), run.recipe.distill.split
    found = evaluation.among([(question.task.name, question.example) for question in questions], split)
    if found:
        more = f"\n  … and {len(found) - _MAX_SHOWN} more" if len(found) > _MAX_SHOWN else ""
        raise DataError(
            f"distill.split {split!r}: {len(found)} of {len(questions)} questions are evaluation questions (split "
            f"{evaluation.split!r}); a student must not see them: leave them out of its file, or choose another "
            "split:\n  " + "\n  ".join(found[:_MAX_SHOWN]) + more
        )


def dependencies(run: Run, questions: Sequence[Question]) -> dict[str, Any]:
    """What a response depends on, beside its question. Not their number: more can be added."""
    policy = run.recipe.distill.policy
    tasks = {question.task.name: question.task for question in questions}
    settings: dict[str, Any] = {
        "policy": policy,
        "seed": run.recipe.distill.seed,
        "split": run.recipe.distill.split,
        **fingerprint(run, policy),
        "tasks": {
            name: [task.sha256, task.metric, task.marker, task.strict, *(["confidence"] if task.confidence else [])]
            for name, task in tasks.items()
        },
        "reward_model": run.recipe.rollout.reward_model,
        "weights": {candidate.name: candidate_weights(candidate) for candidate in run.recipe.pool},
    }
    if policy == "switcher":
        adapter = run.recipe.switcher.adapter or str(run.switcher_adapter)
        settings["switcher_weights"] = weights_hash(adapter)
    return settings


def response_ids(run: Run, question: Question) -> list[str]:
    """Ids of a question's responses, `<query id>/<sample>`."""
    return [f"{question.query.id}/{sample}" for sample in range(run.recipe.distill.samples)]


def read_responses(run: Run, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """The responses to these questions that are there, in the questions' order."""
    path = run.dir / FOLDER / RESPONSES
    there = {record["id"]: record for record in read_records([path])} if path.is_file() else {}
    wanted = [name for question in questions for name in response_ids(run, question)]
    return [there[name] for name in wanted if name in there]


def check_responses(run: Run, questions: Sequence[Question]) -> None:
    """See that all responses are there, for ranks of a launcher: they write none.

    Raises:
        ConfigError: some are missing, or they were made with other settings.
    """
    folder = run.dir / FOLDER
    wanted = sum(len(response_ids(run, question)) for question in questions)
    there = len(read_responses(run, questions))
    if there < wanted:
        raise ConfigError(
            f"{folder}: {there} of {wanted} responses are there; start `switchgen distill` (with --launcher for "
            "several processes), which writes them first"
        )
    claim_stage(folder, FOLDER, dependencies(run, questions))


def write_responses(run: Run, questions: Sequence[Question], *, workers: int = 1) -> None:
    """Write and score the responses that are not there yet, each kept as soon as it is finished.

    Args:
        workers: processes; the responses do not depend on it.

    Raises:
        ConfigError, ModelError: the policy cannot write; found before any model is loaded.
        StorageError: the folder cannot be written.
        WorkerError: a worker process died; what is finished is kept.
    """
    check_writers(run, [run.recipe.distill.policy])
    folder = run.dir / FOLDER
    with lock(folder):
        wait_for_leftovers(folder)
        claim_stage(folder, FOLDER, dependencies(run, questions))
        gather_shards(folder, folder)
        with Shard(folder / RESPONSES) as shard:
            done = shard.done
        wanted = [
            _Ask(question, sample, name)
            for question in questions
            for sample, name in enumerate(response_ids(run, question))
        ]
        missing = [ask for ask in wanted if ask.id not in done]
        if not missing:
            return
        shares = [
            Share(run, worker, shard_folder(folder, folder, worker, workers), own)
            for worker, own in enumerate(split(missing, lambda ask: ask.question.query.id, workers))
            if own
        ]
        counts = {"total": len(wanted), "done": len(wanted) - len(missing)}
        with progress("distill: responses", **counts, unit="response") as advance:
            spent = do_shares(_write_share, shares, name="distill", folder=folder, report=advance)
        gather_shards(folder, folder)
    log_spent("distill", len(missing), spent)


@dataclass(frozen=True)
class _Ask:
    """One response that is wanted."""

    question: Question
    sample: int
    id: str


def _write_share(share: Share[Sequence[_Ask]], report: Report) -> Spent:
    """Write and score one worker's responses; each is reported with its tokens when it is safe."""
    run = share.run
    settings = run.recipe.distill
    watch = Stopwatch()
    writer = load_writers(run, [settings.policy])[settings.policy]
    judge = None
    if any(ask.question.task.metric == _REWARD_MODEL for ask in share.work):
        judge = RewardModelScorer(str(run.recipe.rollout.reward_model), too_long="nan")
    watch.loaded()
    pending: dict[tuple[str, int], _Ask] = {}

    def rows(done: Collection[str]) -> Iterator[Row]:
        for ask in share.work:
            if ask.id in done:
                continue
            # Another purpose than an evaluation's seeds ("response"), so that no draw is shared with it.
            seed = derive_seed(settings.seed, ask.question.query.id, "distill", ask.sample)
            pending[ask.question.query.id, seed] = ask
            yield Row(writer.pool, ask.question.query, seed)

    with Shard(share.folder / RESPONSES) as shard:
        for row in writer.loop(run).run(rows(shard.done)):
            ask = pending.pop((row.trace.query.id, row.trace.seed))
            record = response_record(row.trace, writer.pool.names)
            shard.append({
                **record,
                "schema": SCHEMA,
                "id": ask.id,
                "query_id": ask.question.query.id,
                "task": ask.question.task.name,
                "messages": [dict(message) for message in ask.question.query.messages],
                "score": _score(ask.question, record["output"], judge),
            })  # fmt: skip
            report(row.trace.num_tokens)
    return watch.spent()


def _score(question: Question, response: str | None, judge: RewardModelScorer | None) -> float | None:
    if response is None:
        return None
    if question.task.metric == _REWARD_MODEL:
        assert judge is not None
        value = judge.score_batch([question.query.messages], [response])[0]
        # NaN: beyond the reward model's context. JSON has no such number.
        return None if math.isnan(value) else value
    return question.task.score(response, question.example).value


def student_data(
    records: Iterable[Mapping[str, Any]],
    base: CandidateConfig,
    vocabulary: Vocabulary,
    end_id: int,
    *,
    min_score: float,
    max_length: int,
) -> StudentData:
    """Filter responses and turn them into examples, in the tokens that the student will read as a candidate.

    Left out and counted per task: questions beyond the context, responses that were cut off by the length (an end token
    there would be a lie), low scores (NaN, too), exact repetitions for one question, examples beyond `max_length`.

    Args:
        end_id: the base's end of text.
    """
    style = prompt_style(base, vocabulary)
    data = StudentData()
    seen: set[tuple[str, str]] = set()
    for record in records:
        counter = data.by_task.setdefault(record["task"], Counter())
        counter["written"] += 1
        data.tokens += record["usage"]["new_tokens"]
        key = (record["query_id"], record["output"] or "")
        reason = _reason(record, min_score, key in seen)
        row = None
        if reason is None:
            seen.add(key)
            query = Query(record["query_id"], tuple(record["messages"]))
            if style == "chat":
                prompt = chat_prompt_ids(vocabulary, query.messages)
            else:
                prompt = plain_prompt_ids(vocabulary, query, style)
            answer = [*vocabulary.encode_text(record["output"]), end_id]
            row = {"input_ids": [*prompt, *answer], "labels": [*[_IGNORED] * len(prompt), *answer]}
            reason = "too_long" if len(prompt) + len(answer) > max_length else None
        if reason is not None:
            counter[reason] += 1
            continue
        assert row is not None
        counter["kept"] += 1
        data.rows.append(row)
        data.kept.append(record["id"])
    return data


def _reason(record: Mapping[str, Any], min_score: float, repeated: bool) -> str | None:
    if record["output"] is None:
        return "not_answered"
    if record["finish"] not in ("eos", "stop"):
        return "unfinished"
    # Not `score < min_score`: a NaN is no score.
    if record["score"] is None or not record["score"] >= min_score:
        return "low_score"
    return "repeated" if repeated else None
