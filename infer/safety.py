"""`switchgen safety`: what the base model slips past the guard rails, and what constraints against it cost.

For a file of prompts that should be refused: the refusal rate of each candidate alone and of each policy, without
constraints, with the first, the last, and both first and last segments by the aligned model, and with `policy.guard`
where the recipe has one. Lines are `{"input": "…"}`; lines with `"should_refuse": false` measure refusing too much.

    RUN/safety/<constraint>/evaluation/…   one evaluation a constraint, resumable as any
    RUN/safety/results.json                rates with intervals, and who wrote what slipped through

Prompts beyond a policy's context are neither refused nor slipped through: its rates leave them out and count them.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infer.evaluation import main as evaluate
from infer.responses import responses_path, run_seeds
from infer.results import MEAN
from infer.stats import bootstrap_mean
from infer.subruns import choosing, sub_run
from switchgen.config import TaskConfig
from switchgen.errors import ConfigError, DataError
from switchgen.files import write_json
from switchgen.policies.responses import is_response_policy
from switchgen.policies.routers import is_router
from switchgen.rundir import Run
from switchgen.scoring.refusal import expected_refusal
from switchgen.tasks import Example, load_task

logger = logging.getLogger("switchgen")

JSON = dict[str, Any]
PROMPTS = "prompts to refuse"
REFUSED = "refusal"


def main(
    run: Run, prompts: Path, *, quality: bool = False, limit: int | None = None, workers: int | None = None
) -> JSON:
    """Write responses to the prompts under every policy and constraint, and count refusals.

    Args:
        prompts: JSON or JSONL file of prompts.
        quality: evaluate the recipe's own tasks under each constraint, too: what it costs.
        limit: prompts.
        workers: processes; default `evaluate.workers`.

    Raises:
        ConfigError: decoding.first or last are set (the constraints set them), or a policy cannot work.
        DataError: the file is wrong, or none of its prompts should be refused.
    """
    decoding = run.recipe.decoding
    if decoding.first is not None or decoding.last is not None:
        raise ConfigError(
            "safety compares responses with and without decoding.first and decoding.last; leave both null"
        )
    spec = {"file": str(prompts), "name": PROMPTS, "metric": REFUSED, "split": run.recipe.evaluate.split}
    examples = load_task(spec).examples[:limit]
    if not any(expected_refusal(example.item) for example in examples):
        raise DataError(f"{prompts}: none of its prompts should be refused (should_refuse is false everywhere)")
    own = [_limited(task, run.recipe.evaluate.limit) for task in run.recipe.tasks] if quality else []
    tasks = [TaskConfig(**spec, limit=limit).model_dump(), *own]
    rows: list[JSON] = []
    slipped: list[JSON] = []
    for constraint, updates in constraints(run).items():
        policies = [p for p in choosing(run, run.recipe.evaluate.policies) if _takes(run, p, constraint)]
        if not policies:
            continue
        logger.info("safety: %s", constraint)
        evaluation = {"policies": policies, "baselines": False, "against": None, "limit": None}
        changed = sub_run(run, f"safety/{constraint}", {**updates, "tasks": tasks, "evaluate": evaluation})
        results = evaluate(changed, workers=workers)
        for policy in policies:
            answered, records = _answered(_records(changed, policy, examples), examples)
            row = _row(policy, constraint, records, answered, results, quality)
            rows.append({**row, "not_answered": len(examples) - len(answered)})
            slipped += _slipped(policy, constraint, records, answered)
    document = {"schema": 1, "prompts": str(prompts), "num_prompts": len(examples), "rows": rows, "slipped": slipped}
    write_json(run.dir / "safety" / "results.json", document)
    return document


def _limited(task: TaskConfig, limit: int | None) -> JSON:
    """A task of the recipe with the evaluation's limit as its own: the prompts have another one."""
    limits = [own for own in (task.limit, limit) if own is not None]
    return {**task.model_dump(), "limit": min(limits, default=None)}


def constraints(run: Run) -> dict[str, JSON]:
    """Name → what it changes in the recipe."""
    aligned = run.recipe.names[-1]
    bare: JSON = {"policy": {"guard": None}}
    found: dict[str, JSON] = {
        "none": bare,
        "first": {**bare, "decoding": {"first": aligned}},
        "last": {**bare, "decoding": {"last": aligned}},
        "first and last": {**bare, "decoding": {"first": aligned, "last": aligned}},
    }
    if run.recipe.policy.guard is not None:
        found["guard"] = {}
    return found


def _takes(run: Run, policy: str, constraint: str) -> bool:
    """Whether a constraint means something for a policy: candidates write alone, and routers have no segments."""
    if constraint == "none":
        return True
    return policy not in run.recipe.names and not is_router(policy) and not is_response_policy(policy)


def _records(run: Run, policy: str, examples: Sequence[Example]) -> list[list[JSON]]:
    """Responses [seeds][prompts], in the prompts' order."""
    ids = [example.id for example in examples]
    records = []
    for seed in run_seeds(run, policy):
        path = responses_path(run.dir / "evaluation", policy, PROMPTS, seed)
        by_id = {record["id"]: record for record in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
        records.append([by_id[id] for id in ids])
    return records


def _answered(records: Sequence[Sequence[JSON]], examples: Sequence[Example]) -> tuple[list[Example], list[list[JSON]]]:
    """The prompts that are within the contexts in every run seed, and the responses to them."""
    places = [index for index in range(len(examples)) if all(own[index]["output"] is not None for own in records)]
    return [examples[index] for index in places], [[own[index] for index in places] for own in records]


def _row(
    policy: str, constraint: str, records: Sequence[Sequence[JSON]], examples: Sequence[Example],
    results: Mapping[str, Any], quality: bool,
) -> JSON:  # fmt: skip
    refused_SQ = np.array([[record["extracted"] == REFUSED for record in own] for own in records], dtype=float)
    wanted_Q = np.array([expected_refusal(example.item) for example in examples], dtype=bool)
    row: JSON = {"policy": policy, "constraint": constraint, **_rate("refused", refused_SQ[:, wanted_Q])}
    if not wanted_Q.all():
        row |= _rate("refused_too_much", refused_SQ[:, ~wanted_Q])
    if quality:
        means = [r for r in results["rows"] if (r["policy"], r["task"], r["seed"]) == (policy, MEAN, None)]
        row |= {f"quality{end}": means[0][key] if means else None
                for end, key in (("", "value"), ("_low", "low"), ("_high", "high"))}  # fmt: skip
    return row


def _rate(name: str, values_SQ: Any) -> JSON:
    if not values_SQ.size:
        return {name: None, f"{name}_low": None, f"{name}_high": None, f"{name}_n": 0}
    interval = bootstrap_mean(values_SQ)
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high, f"{name}_n": interval.n}


def _slipped(
    policy: str, constraint: str, records: Sequence[Sequence[JSON]], examples: Sequence[Example]
) -> list[JSON]:
    """Who wrote the responses that should have been refusals: tokens, and who opened them; one row a writer."""
    wanted = [expected_refusal(example.item) for example in examples]
    through = [
        record for own in records for record, should in zip(own, wanted, strict=True)
        if should and record["extracted"] != REFUSED
    ]  # fmt: skip
    tokens: Counter[str] = Counter()
    opened: Counter[str] = Counter()
    present: Counter[str] = Counter()
    for record in through:
        # Who ended a response without a word wrote nothing of it.
        written = [segment for segment in record["segments"] if segment["num_tokens"]]
        writers = [segment["writer"] for segment in written]
        for segment in written:
            tokens[segment["writer"]] += segment["num_tokens"]
        opened.update(writers[:1])
        present.update(set(writers))
    total = sum(tokens.values())
    return [
        {"policy": policy, "constraint": constraint, "writer": writer, "responses": len(through),
         "took_part": present[writer], "opened": opened[writer], "tokens": tokens[writer],
         "token_share": tokens[writer] / total if total else 0.0}
        for writer in sorted(present, key=lambda name: -tokens[name])
    ]  # fmt: skip
