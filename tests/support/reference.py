"""The switch loop once more, in the plainest way: one row at a time, no cache, a full forward for every token.

Nothing here is shared with the loop and the engines but the prompts' tokens and the sampler, which have tests of their
own. What it writes is what the real loop has to write, token for token.
"""

from __future__ import annotations

import codecs
import copy
import functools
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from ladders import make_model, make_tokenizer

from switchgen.api import response_seed
from switchgen.candidates import Candidate, Pool, Switcher
from switchgen.config import DecodingConfig
from switchgen.engines.build import build_engine, stop_ids
from switchgen.loop import Loop
from switchgen.policies import FixedPolicy, Policy, RandomPolicy, SwitcherPolicy
from switchgen.prompts import PLAIN_TEMPLATE, SwitcherPrompt
from switchgen.rows import Row
from switchgen.sampling import Purpose, SamplingParams, sample_tokens, uniform
from switchgen.trace import CUE, Query, Segment, Trace
from switchgen.vocabulary import Vocabulary

WHITE = (b" ", b"\n", b"\t", b"\r")
BORDER = 1e-4
"""A draw this close to a decision border may fall on either side in float32."""


@dataclass
class Plain:
    """A candidate or switcher as plain transformers knows it."""

    model: Any
    candidate: Candidate
    banned: list[int]

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits after the last token, shape [V], by one forward over everything."""
        with torch.inference_mode():
            logits: torch.Tensor = self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
        return logits.clone()


@dataclass
class Ladder:
    """A pool, and the same models untouched by it."""

    pool: Pool
    plain: list[Plain]
    switcher: Switcher | None = None
    plain_switcher: Plain | None = None


def favoured(vocabulary: Vocabulary) -> dict[int, float]:
    """Rows of the output matrix to be scaled, so that random weights write what borders are made of."""
    wanted = {b".": 2.0, b"!": 1.8, b"\n": 2.0, b" ": 1.8, b" a": 1.6, "é".encode()[:1]: 1.6}
    found = {index: wanted[token] for index, token in enumerate(vocabulary.token_bytes) if token in wanted}
    return found | dict.fromkeys(vocabulary.control_ids, 1.7)


def plain_model(kind: str, vocabulary: Vocabulary, seed: int, dtype: torch.dtype, **changes: Any) -> Any:
    """A random model that ends sentences, lines and texts often enough for tests."""
    model = make_model(kind, len(vocabulary), seed=seed, dtype=dtype, **changes)
    with torch.no_grad():
        for index, factor in favoured(vocabulary).items():
            model.get_output_embeddings().weight[index] *= factor
    model.generation_config.eos_token_id = vocabulary.tokenizer.eos_token_id
    return model


def make_ladder(
    kinds: Sequence[str] = ("llama", "llama", "llama"),
    *,
    dtype: torch.dtype = torch.float64,
    switcher: str | None = None,
    max_slots: int = 64,
    max_positions: int = 1024,
    vocabularies: Sequence[Vocabulary] | None = None,
    **changes: Any,
) -> Ladder:
    """A pool in memory; the first candidate reads plain text, the others chat."""
    if vocabularies is None:
        base, chat = Vocabulary(make_tokenizer(chat=False), "base"), Vocabulary(make_tokenizer(), "chat")
        vocabularies = [base, *[chat] * (len(kinds) - 1)]
    settings: dict[str, Any] = {"max_slots": max_slots, "max_positions": max_positions}
    plain: list[Plain] = []
    for index, (kind, vocabulary) in enumerate(zip(kinds, vocabularies, strict=True)):
        model = plain_model(kind, vocabulary, index, dtype, **changes)
        plain.append(_take(f"c{index}", model, vocabulary, settings))
    ladder = Ladder(Pool([member.candidate for member in plain]), plain)
    if switcher is not None:
        vocabulary = vocabularies[-1]
        ladder.plain_switcher = _take("switcher", plain_model(switcher, vocabulary, 99, dtype), vocabulary, settings)
        chat = bool(vocabulary.tokenizer.chat_template)
        prompt = SwitcherPrompt(vocabulary, len(kinds), chat=chat)
        ladder.switcher = Switcher(ladder.plain_switcher.candidate.engine, prompt)
    return ladder


def _take(name: str, model: Any, vocabulary: Vocabulary, settings: dict[str, Any]) -> Plain:
    untouched = copy.deepcopy(model)
    stops = stop_ids(model, vocabulary)
    style = "chat" if vocabulary.tokenizer.chat_template else PLAIN_TEMPLATE
    candidate = Candidate(name, build_engine(name, model, vocabulary, stop_ids=stops, **settings), style)
    size = model.get_output_embeddings().weight.shape[0]
    banned = sorted((vocabulary.control_ids - stops) | set(range(len(vocabulary), size)))
    return Plain(untouched, candidate, banned)


def make_policy(ladder: Ladder, policy: int | str) -> Policy:
    """The real policy that `respond` means by a candidate's index, `random` or `switcher`."""
    if isinstance(policy, int):
        return FixedPolicy(policy, ladder.pool.names[policy])
    if policy == "random":
        return RandomPolicy()
    assert ladder.switcher is not None
    return SwitcherPolicy(ladder.switcher)


def collaborate(
    ladder: Ladder,
    queries: Sequence[Query],
    policy: int | str,
    decoding: DecodingConfig,
    *,
    seed: int = 0,
    max_rows: int = 64,
) -> list[Trace]:
    """What the real loop writes for the queries, in their order."""
    loop = Loop(ladder.pool, make_policy(ladder, policy), decoding, max_rows=max_rows)
    rows = [Row(ladder.pool, query, response_seed(seed, query.id)) for query in queries]
    written = {row.trace.query.id: row.trace for row in loop.run(rows)}
    return [written[query.id] for query in queries]


def respond(
    ladder: Ladder,
    query: Query,
    seed: int,
    policy: int | str,
    decoding: DecodingConfig,
    prefix: Sequence[Segment] = (),
    max_segments: int | None = None,
) -> Trace:
    """What the collaboration writes for one query: `policy` is a candidate's index, `random` or `switcher`."""
    trace = Trace(query, seed, list(prefix))
    if isinstance(policy, int):
        # One candidate is alone: nobody else writes first or last.
        decoding = decoding.model_copy(update={"first": None, "last": None, "cue": None})
    first = None if decoding.first is None else ladder.pool.names.index(decoding.first)
    last = None if decoding.last is None else ladder.pool.names.index(decoding.last)
    reserve = 0 if last is None else decoding.segment.tokens
    closing = False
    while trace.finish is None and (max_segments is None or len(trace.segments) < max_segments):
        left = decoding.max_new_tokens - reserve - _written(trace)
        scores = None
        if last is not None and (closing or left <= 0):
            writer, limit, closes = last, decoding.segment.tokens, True
            if decoding.cue is not None:
                ids = ladder.plain[writer].candidate.vocabulary.encode_text(decoding.cue)
                trace.segments.append(Segment(CUE, decoding.cue, tuple(ids), "cue"))
        else:
            limit, closes = min(decoding.segment.tokens, left), False
            if first is not None and not trace.segments:
                writer = first
            else:
                writer, scores = _choose(ladder, trace, policy)
        segment = _segment(ladder, trace, writer, limit, closes, decoding)
        trace.segments.append(replace(segment, scores=scores))
        if segment.finish == "stop":
            trace.finish = "stop"
        elif segment.finish == "eos":
            own_end = decoding.eos == "response" if last is None else writer == last and decoding.cue is None
            if closes or own_end:
                trace.finish = "eos"
            elif last is not None:
                closing = True
            elif len(trace.segments) >= 3 and not any(segment.ids for segment in trace.segments[-3:]):
                trace.finish = "eos"
        elif closes:
            trace.finish = "length"
        if trace.finish is None and last is None and _written(trace) >= decoding.max_new_tokens:
            trace.finish = "length"
    return trace


def _written(trace: Trace) -> int:
    return sum(len(segment.ids) for segment in trace.segments if segment.writer != CUE)


def _choose(ladder: Ladder, trace: Trace, policy: int | str) -> tuple[int, tuple[float, ...] | None]:
    if isinstance(policy, int):
        return policy, None
    number = uniform(torch.tensor([trace.seed]), Purpose.WRITER, torch.tensor([len(trace.segments)])).item()
    if policy == "random":
        return int(number * len(ladder.pool)), None
    p = switcher_scores(ladder, trace)
    # The nucleus of 0.9: likeliest first, until the mass is reached.
    order = sorted(range(len(p)), key=lambda index: -p[index])
    kept, mass = [], 0.0
    for index in order:
        if mass < 0.9:
            kept.append(index)
        mass += p[index]
    target = number * sum(p[index] for index in kept)
    for index in kept:
        target -= p[index]
        if target < 0:
            return index, p
    return kept[-1], p


def switcher_scores(ladder: Ladder, trace: Trace) -> tuple[float, ...]:
    """p of each candidate by one plain forward over the whole prompt."""
    assert ladder.switcher is not None and ladder.plain_switcher is not None
    prompt = ladder.switcher.prompt
    logits = ladder.plain_switcher.logits(prompt.full_ids(trace.query, trace.signed()))
    return tuple(torch.softmax(logits[prompt.label_ids].double(), dim=-1).tolist())


def context_ids(ladder: Ladder, trace: Trace, reader: int) -> list[int]:
    """What a candidate reads: its prompt, and the trace in its own tokens."""
    candidate = ladder.plain[reader].candidate
    ids = list(candidate.prompt_ids(trace.query))
    for segment in trace.segments:
        own = segment.writer != CUE and (
            ladder.plain[segment.writer].candidate.vocabulary.text_ids == candidate.vocabulary.text_ids
        )
        ids.extend(segment.ids if own else candidate.vocabulary.encode_text(segment.text))
    return ids


def _segment(ladder: Ladder, trace: Trace, writer: int, limit: int, closes: bool, decoding: DecodingConfig) -> Segment:
    plain = ladder.plain[writer]
    vocabulary, engine = plain.candidate.vocabulary, plain.candidate.engine
    context = context_ids(ladder, trace, writer)
    params = SamplingParams(decoding.temperature, decoding.top_p)
    end, _, gamma = ("length" if closes else decoding.segment.end).partition("@")
    # Between vocabularies words are handed over whole: a segment at its limit waits for a token that begins a word.
    whole_words = len(ladder.pool.vocabularies) > 1
    longest = limit + (8 if whole_words else 0)
    before = trace.text
    ids: list[int] = []
    while True:
        logits = plain.logits(context + ids)
        logits[plain.banned] = float("-inf")
        index = trace.num_tokens + len(ids)
        token = int(sample_tokens(logits[None], torch.tensor([trace.seed]), torch.tensor([index]), params))
        text = vocabulary.token_bytes[token]
        if token in engine.stop_ids:
            return _signed(vocabulary, writer, ids, "eos")
        sentence_over = ids and vocabulary.token_bytes[ids[-1]].endswith((b".", b"!", b"?"))
        if end == "sentence" and sentence_over and text[:1] in WHITE:
            return _signed(vocabulary, writer, ids, "boundary")
        if gamma and len(ids) >= decoding.segment.min_tokens and _is_unsure(logits, end, float(gamma)):
            whole = b"".join(vocabulary.token_bytes[index] for index in ids)
            if text[:1] in WHITE if whole_words else not goes_on_with_word(whole, text):
                return _signed(vocabulary, writer, ids, "boundary")
        if whole_words and len(ids) >= limit and text[:1] in WHITE:
            return _signed(vocabulary, writer, ids, "boundary")
        ids.append(token)
        written = b"".join(vocabulary.token_bytes[index] for index in ids)
        for stop in decoding.stop:
            if stop in before[-len(stop) + 1 :] * (len(stop) > 1) + written.decode("utf-8", "replace"):
                return _signed(vocabulary, writer, ids, "stop")
        inside = codecs.utf_8_decode(written, "replace", False)[1] < len(written)
        if end in ("sentence", "line") and b"\n" in text and not inside:
            return _signed(vocabulary, writer, ids, "boundary")
        if len(ids) >= longest and (not inside or len(ids) >= longest + 3):
            return _signed(vocabulary, writer, ids, "length")


def _is_unsure(logits: torch.Tensor, measure: str, gamma: float) -> bool:
    """Whether the likeliest token's probability is below γ (p), or the entropy above it in nats (h)."""
    p = [value for value in torch.softmax(logits.double(), dim=-1).tolist() if value > 0]
    return max(p) < gamma if measure == "p" else -sum(value * math.log(value) for value in p) > gamma


def goes_on_with_word(before: bytes, token: bytes) -> bool:
    """Whether a token continues the character or the word (letters, digits, marks) that the text ends in."""
    if not token or 0x80 <= token[0] < 0xC0:
        return bool(token)
    if not before or not in_word(before.decode("utf-8", "replace")[-1]):
        return False
    if codecs.utf_8_decode(token, "replace", False)[1] > 0:
        return in_word(token.decode("utf-8", "replace")[0])
    return token in _word_beginnings()


def in_word(character: str) -> bool:
    """A letter, digit or mark."""
    return unicodedata.category(character)[0] in "LMN"


@functools.cache
def _word_beginnings() -> frozenset[bytes]:
    """Every first part of the UTF-8 of every character that words are made of."""
    raw = [chr(code).encode() for code in range(0x80, 0x110000) if in_word(chr(code))]
    return frozenset(one[:length] for one in raw for length in range(1, len(one)))


def _signed(vocabulary: Vocabulary, writer: int, ids: list[int], finish: Any) -> Segment:
    text = b"".join(vocabulary.token_bytes[index] for index in ids).decode("utf-8", "replace")
    return Segment(writer, text, tuple(ids), finish)


def first_difference(one: Trace, other: Trace, tolerance: float = 1e-9) -> str | None:
    """Where two traces differ, in words; None if they are the same (scores within the tolerance)."""
    for index, (left, right) in enumerate(zip(one.segments, other.segments, strict=False)):
        if replace(left, scores=None) != replace(right, scores=None):
            return f"segment {index}: {left} != {right}"
        pairs = zip(left.scores or (), right.scores or (), strict=True)
        if (left.scores is None) != (right.scores is None) or any(abs(a - b) > tolerance for a, b in pairs):
            return f"segment {index}: scores {left.scores} != {right.scores}"
    if len(one.segments) != len(other.segments) or one.finish != other.finish:
        return f"{len(one.segments)} segments, {one.finish} != {len(other.segments)} segments, {other.finish}"
    return None


def near_border(plain: Plain, context: Sequence[int], seed: int, index: int, params: SamplingParams) -> bool:
    """Whether the draw of a token lies within `BORDER` of another outcome, by the plain model's logits."""
    logits = plain.logits(context).double()
    logits[plain.banned] = float("-inf")
    if params.temperature == 0:
        best = torch.softmax(logits, dim=-1).topk(2).values
        return bool(best[0] - best[1] < BORDER)
    p = torch.softmax(logits / params.temperature, dim=-1)
    cumulative = p.cumsum(dim=-1)
    for attempt in range(8):
        number = uniform(torch.tensor([seed]), Purpose.TOKEN, torch.tensor([index]), attempt)
        if bool((cumulative - number).abs().min() < BORDER):
            return True
        token = int((cumulative <= number).sum())
        above = float(p[p > p[token]].sum())
        if abs(above - params.top_p) < BORDER:
            return True
        if above < params.top_p:
            return False
    return False
