"""`switchgen infer`: responses to a file of queries, durably.

    RUN/infer/<output's name>-<hash of its path>/
      stage.json    what the responses depend on (recipe, weights, policy, seed, input)
      rows.jsonl    finished rows, in the order in which they were finished
      shards/<worker>/rows.jsonl   the same, of several workers that are still writing
      output.json   hashes of the output files that were made from them

Every finished row is on its way to the disk at once. The output file appears when all rows are finished, whole and in
input order (`unordered`: rows go straight to it). A run that was killed goes on where it was; rows are neither lost nor
written twice. An output file that another recipe made, or nobody knows, is never overwritten.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from infer.claims import response_claim
from infer.inputs import parse_queries, read_input
from infer.output_file import assemble, check_ours, check_place, output_line, shard_lines, work_folder
from switchgen.api import response_seed
from switchgen.assembly import Writer, check_writers, load_writers
from switchgen.config import InferConfig
from switchgen.errors import ConfigError, DataError
from switchgen.files import Shard, lock
from switchgen.progress import progress
from switchgen.records import released_log, response_record
from switchgen.rows import Row
from switchgen.rundir import Run, claim_stage
from switchgen.trace import Query, Trace
from switchgen.workers import (
    Report,
    Share,
    Spent,
    Stopwatch,
    do_shares,
    gather_shards,
    num_workers_of,
    shard_folder,
    split,
    wait_for_leftovers,
)

logger = logging.getLogger("switchgen")

FORMATS: tuple[str, ...] = get_args(InferConfig.model_fields["format"].annotation)
_SHOWN_IDS = 20


@dataclass(frozen=True)
class Job:
    """One command: what is asked of whom, and where it goes."""

    run: Run
    policy: str
    seed: int
    format: str
    unordered: bool
    output: Path
    folder: Path
    queries: Sequence[Query]

    @property
    def rows_path(self) -> Path:
        """The shard of finished rows."""
        return self.output if self.unordered else self.folder / "rows.jsonl"

    def row_of(self, query: Query, trace: Trace, names: Sequence[str]) -> dict[str, Any]:
        """A finished row as the shard keeps it: the response; the whole output line where the shard is the output."""
        record = response_record(trace, names)
        if self.format == "released":
            record["generation_log"] = released_log(trace)
        return output_line(query, record) if self.unordered else record


def main(
    run: Run,
    *,
    input: Path,
    output: Path,
    policy: str | None = None,
    limit: int | None = None,
    format: str | None = None,
    unordered: bool = False,
    strict: bool = False,
    seed: int | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Answer every line of `input`; see the module for what is written where.

    Args:
        policy, format, seed: defaults are the recipe's (section `infer`).
        limit: only the first lines. A later start with a higher limit goes on from there.
        unordered: write lines straight to `output` as they finish.
        strict: rows beyond the context are an error, raised when all other rows are written.
        workers: processes; default `infer.workers`. The output does not depend on it.

    Returns:
        Rows, answered rows, ids of rows not answered (beyond the context), tokens by writer, and this start's rows,
        seconds of loading, seconds of writing and tokens per second of writing (of the slowest worker).

    Raises:
        DataError: bad lines, all of them; or, with `strict`, rows beyond the context.
        ConfigError: a policy that cannot work; an output made by another recipe.
        StorageError: full disk, missing rights, another run at work on the same output.
        WorkerError: a worker process died; what is finished is kept.
    """
    input, output = Path(input), Path(output)
    settings = run.recipe.infer
    policy = settings.policy if policy is None else policy
    seed = settings.seed if seed is None else seed
    format = settings.format if format is None else format
    if format not in FORMATS:
        raise ConfigError(f"format {format!r}: allowed are {', '.join(FORMATS)}")
    num_workers = num_workers_of(settings.workers, workers)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit {limit}: at least 1 row")
    check_writers(run, [policy])
    data = read_input(input)
    queries = parse_queries(data, str(input))[:limit]
    claim = {"input": hashlib.blake2b(data, digest_size=8).hexdigest(), "seed": seed, "format": format}
    claim |= {"unordered": unordered, **response_claim(run, policy)}
    folder = work_folder(run, output)
    job = Job(run, policy, seed, format, unordered, output, folder, queries)
    check_place(output)
    check_ours(output, folder, streamed=unordered)
    with lock(folder):
        _claim(job, claim)
        wrote = _write_rows(job, num_workers)
        summary = _finish(job, wrote)
    if strict and summary["not_answered"]:
        raise DataError(
            f"{input}: {_listed(summary['not_answered'])} beyond the context of a model that reads them; {output} has "
            "the answers to all others (without --strict this is a warning)"
        )
    return summary


def _claim(job: Job, claim: dict[str, Any]) -> None:
    try:
        claim_stage(job.folder, "infer", claim)
    except ConfigError as error:
        raise ConfigError(f"{job.output}: nothing was overwritten. {error}\nAnother --output will do, too") from None


def _write_rows(job: Job, workers: int) -> dict[str, Any]:
    """Write the rows that are missing; returns what this start did."""
    wait_for_leftovers(job.folder)
    gather_shards(job.folder, job.rows_path.parent)
    with Shard(job.rows_path) as shard:
        pending = [query for query in job.queries if query.id not in shard.done]
        if not pending:
            logger.info("%s: all %d rows are written already", job.output, len(job.queries))
            return {"written": 0, "load_seconds": 0.0, "seconds": 0.0, "tokens_per_second": None}
        if len(pending) < len(job.queries):
            logger.info("%s: %d of %d rows are written; going on", job.output, len(shard.done), len(job.queries))
        own_job = replace(job, queries=())  # what is asked is in the shares
        shares = [
            Share(job.run, worker, shard_folder(job.folder, job.rows_path.parent, worker, workers), (own_job, own))
            for worker, own in enumerate(split(pending, lambda query: query.id, workers))
            if own
        ]
        tokens = 0
        done = len(job.queries) - len(pending)
        with progress(job.policy, total=len(job.queries), done=done, unit="row") as advance:

            def report(message: tuple[int, dict[str, Any] | None]) -> None:
                nonlocal tokens
                count, row = message
                if row is not None:
                    shard.append(row)
                tokens += count
                advance(count)

            spent = do_shares(_write_share, shares, name="infer", folder=job.folder, report=report)
    gather_shards(job.folder, job.rows_path.parent)
    seconds = max(part.work_seconds for part in spent)
    return {
        "written": len(pending),
        "load_seconds": round(max(part.load_seconds for part in spent), 2),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
    }


def _write_share(share: Share[tuple[Job, Sequence[Query]]], report: Report) -> Spent:
    """Write one worker's rows; reports tokens, and the row where the parent has to bring it to the output at once."""
    job, queries = share.work
    watch = Stopwatch()
    writer = load_writers(job.run, [job.policy])[job.policy]
    check_conversations(writer, queries)
    watch.loaded()
    streams = job.unordered and share.folder != job.rows_path.parent
    with Shard(share.folder / job.rows_path.name) as shard:
        by_id = {query.id: query for query in queries if query.id not in shard.done}
        for trace in _traces(job, writer, list(by_id.values())):
            row = job.row_of(by_id.pop(trace.query.id), trace, writer.pool.names)
            shard.append(row)
            report((trace.num_tokens, row if streams else None))
    return watch.spent()


def _traces(job: Job, writer: Writer, queries: Sequence[Query]) -> Iterator[Trace]:
    rows = (Row(writer.pool, query, response_seed(job.seed, query.id)) for query in queries)
    for row in writer.loop(job.run).run(rows):
        yield row.trace


def check_conversations(writer: Writer, queries: Sequence[Query]) -> None:
    """See that every chat template takes the conversations, by the first query of each sequence of roles.

    Raises:
        DataError: one does not.
    """
    shapes: dict[tuple[str, ...], Query] = {}
    for query in queries:
        shapes.setdefault(tuple(message["role"] for message in query.messages), query)
    for query in shapes.values():
        for candidate in writer.pool:
            try:
                candidate.prompt_ids(query)
            except ValueError as error:
                raise DataError(f"query {query.id!r}, candidate {candidate.name!r}: {error}") from None


def _finish(job: Job, wrote: dict[str, Any]) -> dict[str, Any]:
    """Put the output together, and sum up."""
    offsets: dict[str, int] = {}
    wanted = {query.id for query in job.queries}
    not_answered: set[str] = set()
    by_writer: dict[str, int] = {}
    cue_tokens = 0
    for offset, record in shard_lines(job.rows_path):
        row_id = str(record["id"])
        if row_id not in wanted:
            continue
        offsets[row_id] = offset
        usage = record["usage"]
        cue_tokens += usage["cue_tokens"]
        for name, tokens in usage["by_writer"].items():
            by_writer[name] = by_writer.get(name, 0) + tokens
        if record["finish"] == "too_long":
            not_answered.add(row_id)
    if not job.unordered:
        assemble(job.output, job.folder, job.rows_path, offsets, job.queries)
    missed = [query.id for query in job.queries if query.id in not_answered]
    if missed:
        logger.warning("%s beyond the context of a model that reads them; their output is null", _listed(missed))
    summary = {
        "output": str(job.output),
        "policy": job.policy,
        "rows": len(job.queries),
        "answered": len(job.queries) - len(missed),
        "not_answered": missed,
        "new_tokens": sum(by_writer.values()),
        "cue_tokens": cue_tokens,
        "by_writer": by_writer,
        **wrote,
    }
    logger.info(
        "%s: %d rows, %d answered, %d tokens (%s)", job.output, summary["rows"], summary["answered"],
        summary["new_tokens"], ", ".join(f"{name} {tokens}" for name, tokens in by_writer.items()),
    )  # fmt: skip
    return summary


def _listed(ids: Sequence[str]) -> str:
    more = f" … and {len(ids) - _SHOWN_IDS} more" if len(ids) > _SHOWN_IDS else ""
    return f"{len(ids)} row{'s' if len(ids) > 1 else ''} ({', '.join(ids[:_SHOWN_IDS])}{more})"
