"""From a request's body to rows: whose, under which terms, with which seed."""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from infer.serve.protocol import PREFIX, ApiError, ChatBody, CompletionBody
from infer.serve.worker import Worker
from switchgen.api import check_decoding, response_seed
from switchgen.assembly import DISTILLED, Writer, check_writers
from switchgen.candidates import Pool
from switchgen.config import DecodingConfig
from switchgen.errors import SwitchgenError
from switchgen.ids import content_hash
from switchgen.policies import FixedPolicy
from switchgen.prompts import start_ids
from switchgen.rows import Row, Terms
from switchgen.trace import Query

Prompt = tuple[Query, dict[int, list[int]] | None]
"""What is asked, and what each candidate reads of it where that is not made from the query."""


@dataclass(frozen=True)
class Asked:
    """A request, understood."""

    writer: Writer
    decoding: DecodingConfig
    rows: list[Row]
    """`num_choices` for each prompt, prompt by prompt."""
    num_choices: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each once, as the last candidate reads them."""
        last = len(self.writer.pool) - 1
        return sum(len(row.prompt_ids(last)) for row in self.rows[:: self.num_choices])


def understand(worker: Worker, body: ChatBody | CompletionBody) -> Asked:
    """A request's rows, with their prompts' tokens; runs on the writing thread.

    Raises:
        ApiError: 404 for a policy that there is not, 400 for what it or the pool cannot do.
    """
    # Before anything is made of them: a small request may ask for millions.
    wanted = body.num_choices * (1 if isinstance(body, ChatBody) else len(body.prompts))
    if wanted > worker.allowed:
        raise ApiError(400, f"{wanted} answers are asked for at once; at most {worker.allowed} here",
                       code="invalid_value", param="n")  # fmt: skip
    writer = find_writer(worker, body.model)
    decoding = _decoding(worker, writer, body)
    seed = secrets.randbits(62) if body.seed is None else body.seed
    if isinstance(body, ChatBody):
        messages = tuple(message.plain() for message in body.messages)
        prompts: list[Prompt] = [(Query(content_hash(list(messages)), messages), None)]
    else:
        prompts = [_raw_prompt(writer.pool, prompt) for prompt in body.prompts]
    terms = Terms(writer.policy, decoding)  # type: ignore[arg-type]
    # Two equal prompts of one request get different answers: theirs are counted through.
    number: defaultdict[str, Iterator[int]] = defaultdict(count)
    rows = [
        Row(writer.pool, query, response_seed(seed, query.id, next(number[query.id])), prompts=ids, terms=terms)
        for query, ids in prompts
        for _ in range(body.num_choices)
    ]
    for row in rows[:: body.num_choices]:
        _read_prompts(row)
    return Asked(writer, decoding, rows, body.num_choices)


def find_writer(worker: Worker, model: str) -> Writer:
    """The policy that a model's name stands for; runs on the writing thread.

    Raises:
        ApiError: 404, there is none.
    """
    try:
        return worker.writer(model.removeprefix(PREFIX))
    except SwitchgenError as error:
        raise ApiError(404, f"model {model!r}: {error}", code="model_not_found", param="model") from None


def model_names(worker: Worker) -> list[str]:
    """Policies that can be asked for as things are; token routers with a gamma are too many to list."""
    run, names = worker.run, worker.run.recipe.names
    found = list(names)
    for policy in ("random", "switcher", "untuned", DISTILLED):
        try:
            check_writers(run, [policy])
        except SwitchgenError:
            continue
        found.append(policy)
    return found


def _read_prompts(row: Row) -> None:
    """See that every candidate can read the conversation (a chat template may refuse it)."""
    try:
        for candidate in range(len(row.pool)):
            row.prompt_ids(candidate)
    except SwitchgenError as error:
        raise ApiError(400, str(error), param="messages") from None


def _decoding(worker: Worker, writer: Writer, body: ChatBody | CompletionBody) -> DecodingConfig:
    """The recipe's settings with the request's."""
    recipe = worker.run.recipe
    own = writer.decoding(recipe.decoding)
    limit = recipe.serve.max_new_tokens
    tokens = body.limit if body.limit is not None else min(own.max_new_tokens, limit)
    if tokens > limit:
        raise ApiError(400, f"max_tokens {tokens}: at most {limit} here", code="invalid_value", param="max_tokens")
    changes: dict[str, Any] = {"max_new_tokens": max(1, tokens), "stop": [*own.stop, *body.stops]}
    changes |= {
        name: getattr(body, name) for name in ("temperature", "top_p") if getattr(body, name) is not None
    }  # fmt: skip
    if own.last is not None and tokens <= own.segment.tokens:
        raise ApiError(
            400, f"max_tokens {tokens}: the recipe's last writer ({own.last}) needs more than a segment of "
            f"{own.segment.tokens}", code="invalid_value", param="max_tokens",
        )  # fmt: skip
    try:
        check_decoding(writer.name, own)
    except SwitchgenError as error:
        raise ApiError(400, str(error), param="model") from None
    return own.model_copy(update=changes)


def _raw_prompt(pool: Pool, prompt: str | Sequence[int]) -> Prompt:
    """A prompt that is no conversation: every candidate reads the text as it is, or exactly these tokens."""
    vocabularies = pool.vocabularies
    if isinstance(prompt, str):
        text = prompt
        ids = {
            place: [*start_ids(candidate.vocabulary), *candidate.vocabulary.encode_text(prompt, opens=True)]
            for place, candidate in enumerate(pool)
        }
    else:
        if len(vocabularies) > 1:
            raise ApiError(400, "prompt: token ids need a pool of one vocabulary; send text", param="prompt")
        if not all(0 <= token < len(vocabularies[0]) for token in prompt):
            raise ApiError(400, f"prompt: token ids go from 0 to {len(vocabularies[0]) - 1}", param="prompt")
        text = vocabularies[0].decode(list(prompt))
        ids = {place: list(prompt) for place in range(len(pool))}
    if not all(ids.values()):
        raise ApiError(400, "prompt: is empty", param="prompt")
    return Query(content_hash([text]), ({"role": "user", "content": text},)), ids


def check_prompts_fit(asked: Asked, candidate: int) -> None:
    """See that a candidate can read the prompts whose tokens it is to score.

    Raises:
        ApiError: 400, one is longer than its context.
    """
    allowed = asked.writer.pool.candidates[candidate].engine.max_positions
    longest = max(len(row.prompt_ids(candidate)) for row in asked.rows)
    if longest > allowed:
        raise ApiError(
            400, f"the prompt ({longest} tokens) is longer than the model's context ({allowed})",
            code="context_length_exceeded", param="prompt",
        )  # fmt: skip


def scorer_of(asked: Asked) -> int:
    """The candidate whose log-probabilities of a prompt are meant.

    Raises:
        ApiError: 400, the policy has several writers.
    """
    policy = asked.writer.policy
    if not isinstance(policy, FixedPolicy):
        names = ", ".join(f"{PREFIX}{name}" for name in asked.writer.pool.names)
        raise ApiError(
            400, f"logprobs of a prompt are one model's; {PREFIX}{asked.writer.name} has several. Allowed: {names}",
            param="echo",
        )  # fmt: skip
    return policy.writer
