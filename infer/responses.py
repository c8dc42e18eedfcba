"""Responses of an evaluation: where they are kept, what they depend on, and writing those that are missing."""

from __future__ import annotations

import json
import logging
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer.batch import check_conversations
from infer.choosing import BY_LIKELIHOOD, chosen_options
from infer.claims import response_claim
from infer.questions import Questions, reference_text
from switchgen.api import response_seed
from switchgen.assembly import Writer, fingerprint, is_own_model, load_writers
from switchgen.errors import ConfigError, DataError
from switchgen.files import Shard
from switchgen.ids import content_hash
from switchgen.policies.responses import reads_answers
from switchgen.progress import progress
from switchgen.records import SCHEMA, response_record
from switchgen.rows import Row
from switchgen.rundir import Run, claim_stage
from switchgen.tasks import Example
from switchgen.trace import Query, Trace
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

JSON = dict[str, Any]
_CHOSEN_TOGETHER = 64
"""Questions answered by likelihood between two writes."""


def run_seeds(run: Run, policy: str) -> list[int]:
    """The run seeds of a policy: one will do where nothing is drawn (greedy decoding, always the same writer)."""
    seeds = run.recipe.evaluate.seeds
    fixed = policy in run.recipe.names or is_own_model(policy)
    return seeds[:1] if fixed and run.recipe.decoding.temperature == 0 else seeds


def responses_path(folder: Path, policy: str, task: str, seed: int) -> Path:
    """The file of a policy's responses to a task in a run."""
    return folder / "responses" / f"{file_name(policy)}--{file_name(task)}--{seed}.jsonl"


def file_name(name: str) -> str:
    """The name with nothing that a file system may dislike; different names stay different."""
    plain = re.sub(r"[^A-Za-z0-9._@+-]", "_", name)[:80].lstrip(".").replace("--", "-")
    return plain if plain == name else f"{plain}-{content_hash(name, length=6)}"


# -- claims -----------------------------------------------------------------------------------------------------------


def claim_responses(run: Run, folder: Path, tasks: Sequence[Questions], *, saved_only: bool) -> None:
    """See that the responses that are there were made by this recipe, and note what new ones will depend on.

    Args:
        saved_only: nothing will be written, so the models need not be there: their weights are taken as they were.

    Raises:
        ConfigError: another recipe, other weights or other questions made them.
    """
    others: dict[str, list[str]] = {}
    messages = []
    for policy in run.recipe.evaluate.policies:
        settings = {"policy": policy, **fingerprint(run, policy)} if saved_only else response_claim(run, policy)
        for questions in tasks:
            try:
                _claim(folder, policy, questions, settings, saved_only=saved_only)
            except _MadeOtherwise as error:
                others.setdefault(policy, []).append(questions.name)
                messages.append(str(error))
    if messages:
        more = f"{len(messages) - 1} more sets of responses are not this recipe's. " if len(messages) > 1 else ""
        raise ConfigError(f"{messages[0]}\n{more}To write them anew:\n  {_removal(folder, others, len(tasks))}")


class _MadeOtherwise(ConfigError):
    """A policy's responses to a task were made by another recipe."""


def _removal(folder: Path, others: Mapping[str, Sequence[str]], num_tasks: int) -> str:
    """The command that takes these tasks' responses by these policies away, with what they depend on."""
    patterns = []
    for policy, tasks in others.items():
        name = file_name(policy)
        if len(tasks) == num_tasks > 1:
            patterns.append(f"*/{name}--*")
        else:
            sets = [f"{name}--{file_name(task)}" for task in tasks]
            patterns += [pattern for one in sets for pattern in (f"claims/{one}", f"responses/{one}--*")]
    there = [pattern for pattern in patterns if any(folder.glob(pattern))]
    return " ".join(["rm -r", *(f"{shlex.quote(str(folder))}/{pattern}" for pattern in there)])


def _claim(folder: Path, policy: str, questions: Questions, settings: Mapping[str, Any], *, saved_only: bool) -> None:
    place = folder / "claims" / f"{file_name(policy)}--{file_name(questions.name)}"
    stage = place / "stage.json"
    pattern = responses_path(folder, policy, questions.name, 0).name.removesuffix("0.jsonl") + "*.jsonl"
    responses = folder / "responses" / pattern
    if not stage.is_file():
        if there := next(responses.parent.glob(pattern), None):
            raise ConfigError(f"{there}: nothing says how these responses were made; delete {responses}")
        if saved_only:
            raise DataError(f"{responses}: no responses; `switchgen evaluate` without --rescore writes them")
    claim = {"questions": questions.content, **_way_of_answering(policy, questions), **settings}
    if saved_only:
        claim["weights"] = json.loads(stage.read_text(encoding="utf-8"))["settings"]["weights"]
    try:
        claim_stage(place, "evaluate", claim)
    except ConfigError as error:
        raise _MadeOtherwise(str(error)) from None


def _way_of_answering(policy: str, questions: Questions) -> JSON:
    """Of what scores are made by, the part that responses depend on, too.

    Labels that were chosen are no written answers, and they were chosen among these options; a majority was found by
    how answers are read.
    """
    task = questions.task
    if questions.metric == BY_LIKELIHOOD:
        options = content_hash([example.item.get("choices") for example in task.examples])
        return {"answers": f"chosen by likelihood (options {options})"}
    if reads_answers(policy):
        return {"answers": [task.metric, task.marker, task.strict, task.confidence]}
    return {}


# -- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ask:
    """One response that is wanted."""

    questions: Questions
    example: Example
    seed: int

    @property
    def query_id(self) -> str:
        """The task is part of the name: two tasks may use the same ids."""
        return f"{self.questions.name}/{self.example.id}"


def write_missing(run: Run, folder: Path, tasks: Sequence[Questions], *, workers: int = 1) -> None:
    """Write the responses that are missing, policy by policy.

    Args:
        workers: processes; the responses do not depend on it.
    """
    wait_for_leftovers(folder)
    responses = folder / "responses"
    gather_shards(folder, responses)
    missing = {policy: _missing(run, folder, policy, tasks) for policy in run.recipe.evaluate.policies}
    total = sum(map(len, missing.values()))
    if not total:
        logger.info("evaluate: all responses are written already")
        return
    parts: list[dict[str, list[_Ask]]] = [{} for _ in range(workers)]
    for policy, asks in missing.items():
        for part, own in zip(parts, split(asks, lambda ask: ask.query_id, workers), strict=True):
            if own:
                part[policy] = own
    shares = [
        Share(run, worker, shard_folder(folder, responses, worker, workers), part)
        for worker, part in enumerate(parts)
        if part
    ]
    questions = sum(len(task.examples) for task in tasks)
    wanted = questions * sum(len(run_seeds(run, policy)) for policy in run.recipe.evaluate.policies)
    with progress("evaluate", total=wanted, done=wanted - total, unit="response") as advance:
        spent = do_shares(_write_share, shares, name="evaluate", folder=folder, report=advance)
    gather_shards(folder, responses)
    log_spent("evaluate", total, spent)


def _missing(run: Run, folder: Path, policy: str, tasks: Sequence[Questions]) -> list[_Ask]:
    asks = []
    for seed in run_seeds(run, policy):
        for questions in tasks:
            path = responses_path(folder, policy, questions.name, seed)
            done: set[str] = set()
            if path.is_file():
                with Shard(path) as shard:
                    done = shard.done
            asks += [_Ask(questions, example, seed) for example in questions.examples if example.id not in done]
    return asks


def _write_share(share: Share[dict[str, list[_Ask]]], report: Report) -> Spent:
    """Write one worker's responses, by policy; each is reported with its tokens when it is safe."""
    watch = Stopwatch()
    writers = load_writers(share.run, list(share.work))
    for policy, asks in share.work.items():
        check_conversations(writers[policy], [_query(ask, index) for index, ask in enumerate(asks)])
    watch.loaded()
    for policy, asks in share.work.items():
        _write(share, policy, writers[policy], asks, report)
    return watch.spent()


def _query(ask: _Ask, index: int) -> Query:
    return Query(ask.example.id, ask.example.messages, {"ask": index}, ask.questions.task.form(ask.example))


def _write(share: Share[Any], policy: str, writer: Writer, asks: Sequence[_Ask], report: Report) -> None:
    """A worker's missing responses of one policy, all tasks and seeds, through one loop: its batches stay full."""
    likely = [index for index, ask in enumerate(asks) if ask.questions.metric == BY_LIKELIHOOD]
    if likely:
        _choose(share, policy, writer, [asks[index] for index in likely], report)
        asks = [ask for index, ask in enumerate(asks) if index not in set(likely)]
    names = [responses_path(Path(), policy, ask.questions.name, ask.seed).name for ask in asks]
    with ExitStack() as stack:
        shards = {name: stack.enter_context(Shard(share.folder / name)) for name in dict.fromkeys(names)}
        last = time.monotonic()
        rows = (
            Row(writer.pool, _query(ask, index), response_seed(ask.seed, ask.query_id))
            for index, ask in enumerate(asks)
            if ask.example.id not in shards[names[index]].done
        )
        for row in writer.loop(share.run).run(rows):
            now = time.monotonic()
            index = row.trace.query.fields["ask"]
            # Rows are written together: what has passed since the last one was finished is noted with this one.
            shards[names[index]].append(_response(asks[index], policy, row.trace, writer.pool.names, now - last))
            last = now
            report(row.trace.num_tokens)


def _choose(share: Share[Any], policy: str, writer: Writer, asks: Sequence[_Ask], report: Report) -> None:
    """A worker's missing answers to questions that are answered by likelihood; the same in every run seed."""
    with ExitStack() as stack:
        shards: dict[str, Shard] = {}
        for start in range(0, len(asks), _CHOSEN_TOGETHER):
            batch = asks[start : start + _CHOSEN_TOGETHER]
            began = time.monotonic()
            queries = [_query(ask, index) for index, ask in enumerate(batch)]
            found = chosen_options(share.run, writer, queries, [ask.example for ask in batch])
            seconds = (time.monotonic() - began) / len(batch)
            for ask, query, choice in zip(batch, queries, found, strict=True):
                name = responses_path(Path(), policy, ask.questions.name, ask.seed).name
                if name not in shards:
                    shards[name] = stack.enter_context(Shard(share.folder / name))
                if ask.example.id in shards[name].done:  # by a worker that was lost
                    continue
                trace = Trace(query, 0, finish="too_long" if choice["output"] is None else "eos")
                record = _response(ask, policy, trace, writer.pool.names, seconds, choice["output"])
                shards[name].append({**record, "options": choice["options"]})
                report(0)


def _response(
    ask: _Ask,
    policy: str,
    trace: Trace,
    names: Sequence[str],
    seconds: float,
    output: str | None = None,
) -> JSON:
    """A finished response as it is kept; `output` is an option that was chosen and not written."""
    record = response_record(trace, names)
    if output is not None:
        record["output"] = output
    kept = {
        "schema": SCHEMA,
        "id": ask.example.id,
        "task": ask.questions.name,
        "policy": policy,
        "seed": ask.seed,
        "question": ask.example.query,
        "reference": reference_text(ask.example),
        **{key: record[key] for key in ("output", "segments", "finish", "usage")},
        **({"drafts": record["drafts"]} if "drafts" in record else {}),
        "seconds": round(seconds, 4),
        "status": "too_long" if record["output"] is None else "ok",
    }
    ask.questions.score_record(ask.example, kept)
    return kept
