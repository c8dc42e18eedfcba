"""Policies that combine whole responses: several drafts are written, one of them, or a rewriting, is the response.

    best-of@N      N responses of the last candidate; the one that a scorer likes best
    majority@N     N responses, the candidates in turn; the first that gives the most frequent answer
    refine         the first candidate drafts, the last one reads the draft and writes the response
    cascade@T      candidates in ladder order; the first response whose tokens have a mean probability of at least T

`+` names candidates: `best-of+finetuned@4`, `majority+aligned@5` (self-consistency), `refine+finetuned+aligned`,
`cascade+aligned+pretrained@0.8`. All drafts are paid for: their tokens count as the response's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from switchgen.candidates import Pool
from switchgen.config import BaselinesConfig, nearest
from switchgen.errors import ConfigError
from switchgen.ids import derive_seed
from switchgen.likelihood import likelihoods
from switchgen.rows import Row
from switchgen.scoring.reward import RewardModelScorer
from switchgen.scoring.voting import answer_key
from switchgen.trace import Query, Trace

Rule = Literal["best-of", "majority", "refine", "cascade"]
RESPONSE_RULES: dict[str, str | None] = {"best-of": "4", "majority": "3", "refine": None, "cascade": "0.8"}
"""Rules and an example of what stands after their @; None: nothing does."""


@dataclass(frozen=True)
class Ask:
    """One draft that is wanted."""

    query: Query
    seed: int
    writer: int
    """Place on the ladder."""


WriteDrafts = Callable[[Sequence[Ask]], list[Trace]]


@dataclass(frozen=True)
class ResponseName:
    """A policy's name taken apart: `majority+aligned@5`."""

    rule: Rule
    names: tuple[str, ...]
    """Candidates that the name lists; empty for the rule's own choice."""
    value: float
    """N or T; 0 where the rule has none."""


def is_response_policy(name: str) -> bool:
    """Whether a policy's name means a rule over whole responses, well formed or not."""
    return name.partition("@")[0].partition("+")[0] in RESPONSE_RULES


def reads_answers(policy: str) -> bool:
    """Whether the policy's choice depends on how answers stand in responses (`AnswerForm`)."""
    return is_response_policy(policy) and policy.startswith("majority")


def parse_response_policy(name: str, names: Sequence[str]) -> ResponseName:
    """Take a name apart.

    Args:
        names: the pool's candidates.

    Raises:
        ConfigError: N or T is missing or out of range, or a candidate is unknown.
    """
    head, at, text = name.partition("@")
    rule, *listed = head.split("+")
    example = RESPONSE_RULES[rule]
    for candidate in listed:
        if candidate not in names:
            hint = nearest(candidate, list(names))
            raise ConfigError(
                f"policy {name!r}: no candidate is called {candidate!r}{hint}; allowed: {', '.join(names)}"
            )
    if rule == "refine":
        if at or len(listed) not in (0, 2):
            raise ConfigError(f"policy {name!r}: write refine, or refine+DRAFTER+REWRITER")
        return ResponseName("refine", tuple(listed), 0.0)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    share = rule == "cascade"
    if not (0 <= value <= 1 if share else 1 <= value <= 1000 and value.is_integer()):
        allowed = "a mean probability from 0 to 1" if share else "a whole number of responses"
        raise ConfigError(f"policy {name!r}: after @ stands {allowed}, e.g. {head}@{example}")
    return ResponseName(rule, tuple(listed), value)  # type: ignore[arg-type]


class ResponsePolicy:
    """One of the rules over a loaded pool.

    Raises:
        ConfigError: see `parse_response_policy`; or the recipe's scorer is no candidate.
    """

    engine = None

    def __init__(self, name: str, pool: Pool, settings: BaselinesConfig | None = None) -> None:
        self.name = name
        self.pool = pool
        self.settings = settings or BaselinesConfig()
        parsed = parse_response_policy(name, pool.names)
        self.rule, self.value = parsed.rule, parsed.value
        everyone, last = list(range(len(pool))), len(pool) - 1
        own = {"best-of": [last], "majority": everyone, "refine": [0, last], "cascade": everyone}[parsed.rule]
        self.order = [pool.index(candidate) for candidate in parsed.names] or own
        self._scorer = pool.index(self.settings.scorer) if self.settings.scorer is not None else last
        self._reward: RewardModelScorer | None = None

    def writers(self, num_candidates: int) -> list[int]:
        """Who drafts."""
        return sorted(set(self.order))

    def respond(self, rows: Sequence[Row], write: WriteDrafts) -> None:
        """Give every row's trace its response and the drafts that led to it."""
        if self.rule == "cascade":
            self._cascade(rows, write)
        elif self.rule == "refine":
            self._refine(rows, write)
        else:
            count = int(self.value)
            asks = [
                Ask(row.trace.query, draft_seed(row.trace.seed, number), self.order[number % len(self.order)])
                for row in rows
                for number in range(count)
            ]
            drafts = write(asks)
            groups = [drafts[start : start + count] for start in range(0, len(drafts), count)]
            choose = self._best if self.rule == "best-of" else _majority
            for row, group in zip(rows, groups, strict=True):
                _settle(row, group, choose(group))

    def _best(self, drafts: Sequence[Trace]) -> int:
        """The draft that the scorer likes best; the earlier one where two are as good."""
        there = [index for index, draft in enumerate(drafts) if draft.finish != "too_long"]
        if not there:
            return 0
        traces = [drafts[index] for index in there]
        scores = self._rewards(traces) if self.settings.select == "reward_model" else self._likelihoods(traces)
        return max(zip(there, scores, strict=True), key=lambda pair: (pair[1], -pair[0]))[0]

    def _likelihoods(self, drafts: Sequence[Trace]) -> list[float]:
        """Mean log-probability of each draft under the scoring candidate; an empty draft comes last."""
        candidate = self.pool.candidates[self._scorer]
        pairs = [(candidate.prompt_ids(draft.query), candidate.vocabulary.encode_text(draft.text)) for draft in drafts]
        return [-math.inf if found is None else found.per_token for found in likelihoods(candidate, pairs)]

    def _rewards(self, drafts: Sequence[Trace]) -> list[float]:
        if self._reward is None:
            assert self.settings.reward_model is not None, "checked by the recipe"
            self._reward = RewardModelScorer(self.settings.reward_model, too_long="nan")
        scores = self._reward.score_batch([draft.query.messages for draft in drafts], [draft.text for draft in drafts])
        return [-math.inf if math.isnan(score) else score for score in scores]

    def _refine(self, rows: Sequence[Row], write: WriteDrafts) -> None:
        drafter, rewriter = self.order
        drafts = write([Ask(row.trace.query, row.trace.seed, drafter) for row in rows])
        asks = []
        for row, draft in zip(rows, drafts, strict=True):
            query = _with_draft(row.trace.query, draft.text, self.settings.refine)
            asks.append(Ask(query, draft_seed(row.trace.seed, 1), rewriter))
        for row, draft, rewritten in zip(rows, drafts, write(asks), strict=True):
            # A draft too long to be read again stands as it is.
            _settle(row, [draft, rewritten], 0 if rewritten.finish == "too_long" else 1)

    def _cascade(self, rows: Sequence[Row], write: WriteDrafts) -> None:
        written: list[list[Trace]] = [[] for _ in rows]
        going = list(range(len(rows)))
        for number, writer in enumerate(self.order):
            asks = [Ask(rows[i].trace.query, draft_seed(rows[i].trace.seed, number), writer) for i in going]
            for index, draft in zip(going, write(asks), strict=True):
                written[index].append(draft)
            sure = self._confidences(writer, [written[index][-1] for index in going])
            going = [index for index, value in zip(going, sure, strict=True) if value < self.value]
            if not going:
                break
        for row, drafts in zip(rows, written, strict=True):
            there = [index for index, draft in enumerate(drafts) if draft.finish != "too_long"]
            _settle(row, drafts, there[-1] if there else 0)

    def _confidences(self, writer: int, drafts: Sequence[Trace]) -> list[float]:
        """Geometric mean of the tokens' probabilities under their writer; 0 for an empty draft."""
        candidate = self.pool.candidates[writer]
        pairs = [(candidate.prompt_ids(draft.query), [i for s in draft.segments for i in s.ids]) for draft in drafts]
        return [0.0 if found is None else math.exp(found.per_token) for found in likelihoods(candidate, pairs)]


def draft_seed(seed: int, number: int) -> int:
    """Seed of a row's draft; the first one's is the row's own, so that the best of one is the candidate alone."""
    return seed if number == 0 else derive_seed(seed, "draft", number)


def _majority(drafts: Sequence[Trace]) -> int:
    """The first draft that gives the most frequent answer; of equally frequent ones the earliest."""
    keys = [None if draft.finish == "too_long" else answer_key(draft.text, draft.query.form) for draft in drafts]
    votes = Counter(key for key in keys if key is not None)
    if not votes:
        return next((index for index, draft in enumerate(drafts) if draft.finish != "too_long"), 0)
    return keys.index(max(votes, key=lambda key: votes[key]))  # a dict keeps the order of the first votes


def _with_draft(query: Query, draft: str, template: str) -> Query:
    """The query with the draft in its last message."""
    head, _, rest = template.partition("{query}")
    between, _, tail = rest.partition("{draft}")
    last = query.messages[-1]
    message = {**last, "content": f"{head}{last['content']}{between}{draft}{tail}"}
    return replace(query, messages=(*query.messages[:-1], message))


def _settle(row: Row, drafts: Sequence[Trace], chosen: int) -> None:
    row.trace.segments = drafts[chosen].segments
    row.trace.finish = drafts[chosen].finish
    row.trace.drafts = [draft for index, draft in enumerate(drafts) if index != chosen]
