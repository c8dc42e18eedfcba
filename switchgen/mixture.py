"""How likely a pool under a policy finds a given text: Σ_i p_i P_i(text), p the policy's probabilities before top-p.

That is exact for a text within one segment, and for a policy that chooses once for the whole response. A longer text is
a sum over all sequences of writers; it is refused, or estimated from sampled sequences (`samples`): with writers drawn
from p, each given the signed segments before it, the mean of Π_j P_{w_j}(segment_j) is unbiased.

Token probabilities are those at temperature 1 without top-p, as harnesses compare them. The end of text is not part of
a text: what is asked is how likely the text is written before anyone ends, so what another writer would add after an
end (`decoding.last`, `eos: segment`) does not count.

`decoding.first` writes the first segment here, too; whoever is chosen after it, once for all the rest, reads it. What
`decoding.last` would write when the others' share of `max_new_tokens` is used up is refused.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from switchgen.api import AnyPolicy
from switchgen.candidates import Candidate, Pool
from switchgen.config import DecodingConfig
from switchgen.engines.base import Engine
from switchgen.errors import ConfigError, DataError
from switchgen.ids import derive_seed
from switchgen.likelihood import Likelihood, likelihoods
from switchgen.policies.base import Policy
from switchgen.policies.fixed import FixedPolicy, RandomPolicy, ShareRandomPolicy, decoding_under
from switchgen.policies.masked import MaskedPolicy, fits, one_hot, probabilities
from switchgen.policies.probe import ProbePolicy
from switchgen.policies.routing import RoutingPolicy
from switchgen.policies.switcher import SwitcherPolicy
from switchgen.prompts import plain_prompt_ids
from switchgen.rows import Reader, Row
from switchgen.sampling import Purpose, choose_nucleus, uniform
from switchgen.segmentation import SegmentRule
from switchgen.trace import Query, Segment
from switchgen.vocabulary import Vocabulary

Ids = list[int]
_MAX_ROWS = 64
"""Rows that the switcher reads at once."""


@dataclass(frozen=True, slots=True)
class TextLikelihood:
    """How likely a pool finds a text."""

    log_prob: float
    """In nats; minus infinity where no candidate that may write can write it."""
    is_greedy: bool
    """Whether the likeliest writer's every token is its likeliest."""


class BeyondContext(DataError):
    """A query with its text is longer than a model's context."""


class Mixture:
    """A pool under a policy, as a distribution over texts.

    Args:
        samples: writer sequences a text beyond one segment is estimated from; None refuses such texts.
        seed: of those sequences.
        truncate: whether a query that with its text is beyond a context is read from its end only, as by
            lm-evaluation-harness's own models: candidates read the last tokens that they have room for, the policy's
            model as much of the end of the last message. `truncated` lists such queries' ids.

    Raises:
        ConfigError: the policy has no probabilities of writers (token routers, rules over whole responses), or
            segments end where their writer is unsure.
    """

    def __init__(
        self,
        pool: Pool,
        policy: AnyPolicy,
        decoding: DecodingConfig,
        *,
        samples: int | None = None,
        seed: int = 0,
        truncate: bool = False,
    ) -> None:
        inner = policy.inner if isinstance(policy, MaskedPolicy) else policy
        if not isinstance(inner, FixedPolicy | RandomPolicy | ShareRandomPolicy | SwitcherPolicy | ProbePolicy):
            raise ConfigError(
                f"policy {policy.name!r} chooses no writer of a segment, so a given text has no likelihood under it; "
                "allowed: a candidate's name, random, segment-rand@γ, response-rand@γ, switcher, untuned, routing, "
                "prompted-routing"
            )
        self.pool = pool
        self.policy: Policy = MaskedPolicy(inner, policy.mask) if isinstance(policy, MaskedPolicy) else inner
        self.decoding = decoding = decoding_under(policy, decoding)
        self.samples = samples
        self.seed = seed
        self.truncate = truncate
        self.truncated: set[str] = set()
        self._first = None if decoding.first is None else pool.index(decoding.first)
        self._rule = SegmentRule.of(decoding.segment, whole_words=len(pool.vocabularies) > 1)
        grain = inner.grain if isinstance(inner, ShareRandomPolicy) else None
        # One choice, and its writer writes to the end, however long that is.
        self._chooses_once = isinstance(inner, FixedPolicy | RoutingPolicy) or grain == "response"
        self._has_one_writer = self._chooses_once and self._first is None
        if self._rule.reads_logits and not self._has_one_writer:
            raise ConfigError(
                f"decoding.segment.end: with {decoding.segment.end!r} each writer ends its segments elsewhere in the "
                "same text, so the text has no common cut into segments; allowed where texts are compared by their "
                "likelihood: length, sentence, line"
            )

    def score(self, pairs: Sequence[tuple[Query, str]]) -> list[TextLikelihood]:
        """Likelihood of each (query, text).

        Raises:
            DataError: an empty text, one beyond a candidate's context, one that `decoding.last` would have a part in,
                or one beyond a segment without `samples`.
        """
        texts = [[_ids(candidate, query, text) for candidate in self.pool] for query, text in pairs]
        long = []
        for index, ids in enumerate(texts):
            if any(not own for _, own in ids):
                raise DataError(f"query {pairs[index][0].id!r}: an empty text has no likelihood")
            self._check_last(pairs[index], ids)
            if not self._within_a_segment(ids):
                long.append(index)
        if long and self.samples is None and not self._chooses_once:
            query, text = pairs[long[0]]
            raise DataError(
                f"{len(long)} of {len(pairs)} texts are longer than one segment ({self.decoding.segment.tokens} tokens"
                f"{'' if self._rule.end == 'length' else ', or to the end of a ' + self._rule.end}), the first: "
                f"{text[:60]!r} (query {query.id!r}); their likelihood is a sum over all sequences of writers: raise "
                "decoding.segment.tokens, or estimate it from samples (--mc N)"
            )
        short = [index for index in range(len(pairs)) if index not in set(long)]
        found = dict(zip(short, self._exact([pairs[i][0] for i in short], [texts[i] for i in short]), strict=True))
        beyond = self._handed_over if self._chooses_once else self._sampled
        for index in long:
            found[index] = beyond(pairs[index][0], texts[index])
        return [found[index] for index in range(len(pairs))]

    def _check_last(self, pair: tuple[Query, str], ids: Sequence[tuple[Ids, Ids]]) -> None:
        if self.decoding.last is None:
            return
        room = self.decoding.max_new_tokens - self.decoding.segment.tokens
        longest = max(len(own) for _, own in ids)
        if longest > room:
            raise DataError(
                f"query {pair[0].id!r}: text {pair[1][:60]!r} has {longest} tokens, and after {room} (max_new_tokens "
                f"less a segment) decoding.last ({self.decoding.last}) writes; raise decoding.max_new_tokens, or set "
                "decoding.last to null"
            )

    def _within_a_segment(self, ids: Sequence[tuple[Ids, Ids]]) -> bool:
        if self._has_one_writer:
            return True
        return all(
            len(split_segments(candidate.vocabulary, own, self._rule, self.decoding.segment.tokens)) == 1
            for candidate, (_, own) in zip(self.pool, ids, strict=True)
        )

    def _exact(self, queries: Sequence[Query], texts: Sequence[Sequence[tuple[Ids, Ids]]]) -> list[TextLikelihood]:
        """log Σ_i p_i P_i of each text; all candidates' texts in batches."""
        if not queries:
            return []
        probs_NC = self._probabilities([self._row(query) for query in queries])
        results: list[dict[int, Likelihood]] = [{} for _ in queries]
        for place in range(len(self.pool)):
            asked = [index for index in range(len(queries)) if probs_NC[index, place] > 0]
            found = self._read(place, [queries[i] for i in asked], [texts[i][place] for i in asked])
            for index, one in zip(asked, found, strict=True):
                results[index][place] = one
        return [_mixed(probs_C, by_writer) for probs_C, by_writer in zip(probs_NC, results, strict=True)]

    def _handed_over(self, query: Query, texts: Sequence[tuple[Ids, Ids]]) -> TextLikelihood:
        """log P_first(head) Σ_i p_i P_i(rest): the forced first segment, and whoever is chosen after it."""
        assert self._first is not None
        head, *others = self._pieces(texts)
        rest = [token for piece in others for token in piece]
        opening = self._read(self._first, [query], [(texts[self._first][0], head)])[0]
        probs_C = self._probabilities([self._row(query, (self._first,), (head,))])[0]
        by_writer = {
            place: self._read(place, [query], [([*texts[place][0], *head], rest)])[0]
            for place in probs_C.nonzero()[:, 0].tolist()
        }
        ending = _mixed(probs_C, by_writer)
        return TextLikelihood(opening.log_prob + ending.log_prob, opening.is_greedy and ending.is_greedy)

    def _sampled(self, query: Query, texts: Sequence[tuple[Ids, Ids]]) -> TextLikelihood:
        """The mean over sampled sequences of writers; a sequence's beginning is read once."""
        assert self.samples is not None
        pieces = self._pieces(texts)
        sequences: dict[tuple[int, ...], tuple[float, bool]] = {(): (0.0, True)}
        probs: dict[tuple[int, ...], torch.Tensor] = {}
        totals = []
        greedy = True
        for sample in range(self.samples):
            seed = torch.tensor([derive_seed(self.seed, query.id, "mixture", sample)])
            writers: tuple[int, ...] = ()
            for number, piece in enumerate(pieces):
                if writers not in probs:
                    probs[writers] = self._probabilities([self._row(query, writers, pieces)])[0]
                drawn = uniform(seed, Purpose.WRITER, torch.tensor([number]))
                writer = int(choose_nucleus(probs[writers][None], drawn, 1.0)[0])
                before, is_greedy = sequences[writers]
                writers = (*writers, writer)
                if writers not in sequences:
                    prompt = texts[writer][0]
                    context = [*prompt, *(token for earlier in pieces[:number] for token in earlier)]
                    found = self._read(writer, [query], [(context, piece)])[0]
                    sequences[writers] = (before + found.log_prob, is_greedy and found.is_greedy)
            totals.append(sequences[writers][0])
            greedy = greedy and sequences[writers][1]
        return TextLikelihood(_log_sum_exp(totals) - math.log(len(totals)), greedy)

    def _pieces(self, texts: Sequence[tuple[Ids, Ids]]) -> list[Ids]:
        """A text's segments.

        Raises:
            ConfigError: the pool has several vocabularies.
        """
        if len(self.pool.vocabularies) > 1:
            raise ConfigError(
                "texts beyond a segment (--mc, decoding.first) need one vocabulary: with several, a text has no "
                "common cut into segments"
            )
        return split_segments(self.pool.candidates[0].vocabulary, texts[0][1], self._rule, self.decoding.segment.tokens)

    def _read(self, place: int, queries: Sequence[Query], pairs: Sequence[tuple[Ids, Ids]]) -> list[Likelihood]:
        """A candidate's likelihood of each (context, text).

        Raises:
            BeyondContext: one is longer than the candidate's context; with `truncate`, its text alone is.
        """
        candidate = self.pool.candidates[place]
        known = zip(queries, pairs, strict=True)
        cut = [(self._end_of(query, context, text, candidate), text) for query, (context, text) in known]
        read = []
        for query, found in zip(queries, likelihoods(candidate, cut), strict=True):
            if found is None:
                raise BeyondContext(f"query {query.id!r}: with its text beyond the context of {candidate.name!r} "
                                    f"({candidate.engine.max_positions} tokens)")  # fmt: skip
            read.append(found)
        return read

    def _end_of(self, query: Query, context: Ids, text: Ids, candidate: Candidate) -> Ids:
        """What of the context the candidate has room for; all of it where nothing is truncated."""
        # The text's last token is not read.
        over = len(context) + len(text) - (candidate.engine.max_positions + 1)
        if not self.truncate or not 0 < over < len(context):
            return context
        self.truncated.add(query.id)
        return context[over:]

    def _row(self, query: Query, writers: Sequence[int] = (), pieces: Sequence[Ids] = ()) -> Row:
        """A row in which these writers have written the first pieces."""

        def build(query: Query) -> Row:
            row = Row(self.pool, query, derive_seed(self.seed, query.id))
            for writer, piece in zip(writers, pieces, strict=False):
                text = self.pool.candidates[writer].vocabulary.decode(piece)
                row.append(Segment(writer, text, tuple(piece), "length"))
            return row

        row = build(query)
        if not self.truncate or fits(self.policy, row):
            return row
        self.truncated.add(query.id)
        return build(shortened(query, lambda shorter: fits(self.policy, build(shorter))))

    def _probabilities(self, rows: Sequence[Row]) -> torch.Tensor:
        """p of each candidate at each row's next segment, before top-p; [rows, candidates], float64."""
        if self._first is not None and not rows[0].trace.segments:
            return one_hot([self._first] * len(rows), len(self.pool))
        parts = []
        for start in range(0, len(rows), _MAX_ROWS):
            batch = rows[start : start + _MAX_ROWS]
            for row in batch:
                if not fits(self.policy, row):
                    raise BeyondContext(f"query {row.trace.query.id!r}: beyond the switcher's context")
            parts.append(probabilities(self.policy, batch))
            readers: list[tuple[Reader, Engine]] = [(i, candidate.engine) for i, candidate in enumerate(self.pool)]
            if self.policy.engine is not None:
                readers.append(("switcher", self.policy.engine))
            for row in batch:
                row.release(readers)
        return torch.cat(parts)


def shortened(query: Query, fits: Callable[[Query], bool]) -> Query:
    """The query with as much of the end of its last message as fits."""
    *earlier, last = query.messages
    text = last["content"]

    def from_place(start: int) -> Query:
        return replace(query, messages=(*earlier, {**last, "content": text[start:]}))

    return from_place(bisect_left(range(len(text)), True, key=lambda start: fits(from_place(start))))


def _mixed(probs_C: torch.Tensor, by_writer: Mapping[int, Likelihood]) -> TextLikelihood:
    """log Σ_i p_i P_i of a text."""
    terms = [math.log(float(probs_C[place])) + found.log_prob for place, found in by_writer.items()]
    return TextLikelihood(_log_sum_exp(terms), by_writer[int(probs_C.argmax())].is_greedy)


def split_segments(vocabulary: Vocabulary, ids: Sequence[int], rule: SegmentRule, max_tokens: int) -> list[Ids]:
    """A text's tokens cut where segments of it would end."""
    pieces: list[Ids] = []
    piece: Ids = []
    for token in ids:
        if piece and rule.ends_before(vocabulary, piece, token, max_tokens):
            pieces.append(piece)
            piece = []
        piece.append(token)
        if rule.ends_after(vocabulary, piece, max_tokens)[0]:
            pieces.append(piece)
            piece = []
    return [*pieces, piece] if piece else pieces


def _ids(candidate: Candidate, query: Query, text: str) -> tuple[Ids, Ids]:
    """(prompt, text) as the candidate's tokens.

    Where the text follows the query directly, both are tokenized as one string and cut at the prompt's length, as
    lm-evaluation-harness does; else the text is tokenized as a trace is.
    """
    prompt = candidate.prompt_ids(query)
    if candidate.prompt.endswith("{query}{trace}") and query.text:
        message = {**query.messages[-1], "content": query.messages[-1]["content"] + text}
        whole = plain_prompt_ids(
            candidate.vocabulary, Query(query.id, (*query.messages[:-1], message)), candidate.prompt
        )
        if len(whole) > len(prompt):
            return prompt, whole[len(prompt) :]
    return prompt or _prefix(candidate), candidate.vocabulary.encode_text(text)


def _prefix(candidate: Candidate) -> Ids:
    """What stands before a text without a prompt: the tokenizer's start token, else its end of text."""
    tokenizer = candidate.vocabulary.tokenizer
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [] if token is None else [token]


def _log_sum_exp(terms: Sequence[float]) -> float:
    return float(torch.tensor(terms, dtype=torch.float64).logsumexp(0)) if terms else -math.inf
