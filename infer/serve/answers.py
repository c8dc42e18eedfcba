"""The JSON of answers: chat completions, completions, their streams, log-probabilities."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice
from typing import Any

from infer.serve.asked import Asked, scorer_of
from infer.serve.feed import Piece
from infer.serve.protocol import ChatBody, CompletionBody
from switchgen.engines.scoring import TokenScore
from switchgen.records import segment_record, usage_of
from switchgen.rows import Row
from switchgen.trace import CUE, Segment
from switchgen.vocabulary import Vocabulary

_FINISH = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}


@dataclass
class Scored:
    """A token with its log-probabilities and its place."""

    score: TokenScore
    vocabulary: Vocabulary
    offset: int
    """Characters of the answer before it (of prompt and answer, where the prompt is echoed)."""

    def text_of(self, token: int) -> str:
        """A token as text; bytes that are no text by themselves as OpenAI writes them."""
        if token >= len(self.vocabulary) or not self.vocabulary.token_bytes[token]:
            return str(self.vocabulary.tokenizer.convert_ids_to_tokens(token))
        raw = self.vocabulary.token_bytes[token]
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def score_answer(asked: Asked, row: Row, body: ChatBody | CompletionBody) -> list[Scored]:
    """Log-probabilities of an answer's tokens by who wrote them, and of its prompt's if that is echoed.

    Runs on the writing thread. A cue's tokens are nobody's and have none. Behind an echoed prompt stand at most
    `max_tokens` tokens, and an answer that ended before has one more for its end, the writer's end of text: clients
    that score a prompt (lm-eval) ask for one token and drop one.
    """
    num_top, pool = body.num_top, row.pool
    assert num_top is not None
    echoes = isinstance(body, CompletionBody) and body.echo
    prompt_scored, offset = _score_prompt(asked, row, num_top) if echoes else ([], 0)
    segments = row.trace.segments
    starts = list(accumulate((len(segment.text) for segment in segments), initial=offset))
    scored: list[Scored] = []
    end: list[Scored] = []
    for writer in {segment.writer for segment in segments} - {CUE}:
        vocabulary = pool.candidates[writer].vocabulary
        prompt = row.prompt_ids(writer)
        parts = [_ids_for(row, segment, writer) for segment in segments]
        end_ids = _end_ids(row) if echoes and segments[-1].writer == writer else []
        context = [*prompt, *chain.from_iterable(parts), *end_ids]
        scores = iter(pool.candidates[writer].engine.token_scores(context, len(prompt), num_top))
        for segment, part, start in zip(segments, parts, starts, strict=False):
            own = list(islice(scores, len(part)))
            if segment.writer == writer:
                places = [start + place for place in _offsets(vocabulary, part)[0]]
                scored += [Scored(score, vocabulary, place) for score, place in zip(own, places, strict=True)]
        end += [Scored(score, vocabulary, starts[-1]) for score in scores]
    scored = [*sorted(scored, key=lambda item: item.offset), *end]
    return [*prompt_scored, *scored[: asked.decoding.max_new_tokens]] if echoes else scored


def _score_prompt(asked: Asked, row: Row, num_top: int) -> tuple[list[Scored], int]:
    """Log-probabilities of a prompt's tokens, and its characters."""
    candidate = row.pool.candidates[scorer_of(asked)]
    ids = row.prompt_ids(scorer_of(asked))
    scores = candidate.engine.token_scores(ids, 0, num_top)
    starts, length = _offsets(candidate.vocabulary, ids)
    return [Scored(score, candidate.vocabulary, start) for score, start in zip(scores, starts, strict=True)], length


def _end_ids(row: Row) -> list[int]:
    """The token that stands for the end of an answer that has ended by itself, or at a stop string."""
    engine = row.pool.candidates[row.trace.segments[-1].writer].engine
    if row.trace.finish not in ("eos", "stop") or not engine.stop_ids:
        return []
    usual = engine.vocabulary.tokenizer.eos_token_id
    return [usual if usual in engine.stop_ids else min(engine.stop_ids)]


def _ids_for(row: Row, segment: Segment, reader: int) -> Sequence[int]:
    """A segment's tokens as a candidate reads them."""
    vocabulary, candidates = row.pool.candidates[reader].vocabulary, row.pool.candidates
    if segment.writer != CUE and candidates[segment.writer].vocabulary_index == candidates[reader].vocabulary_index:
        return segment.ids
    return vocabulary.encode_text(segment.text)


def _offsets(vocabulary: Vocabulary, ids: Sequence[int]) -> tuple[list[int], int]:
    """Characters before each token, and in all; a character's bytes belong to the token that completes it."""
    starts, raw = [], b""
    for token in ids:
        starts.append(len(raw.decode("utf-8", errors="ignore")))
        raw += vocabulary.token_bytes[token]
    return starts, len(vocabulary.decode(list(ids)))


@dataclass
class Answer:
    """A request's answer in the making."""

    asked: Asked
    body: ChatBody | CompletionBody
    created: int = field(default_factory=lambda: int(time.time()))
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def is_chat(self) -> bool:
        """Whether it is a conversation's."""
        return isinstance(self.body, ChatBody)

    def _head(self, *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.is_chat else "text_completion"
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {"id": f"{prefix}-{self.name}", "object": kind, "created": self.created, "model": self.body.model}

    def usage(self) -> dict[str, int]:
        """Tokens read and written."""
        prompt, written = self.asked.prompt_tokens, sum(row.trace.num_tokens for row in self.asked.rows)
        if self.body.limit == 0:
            written = 0
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def whole(self, scores: Sequence[list[Scored] | None]) -> dict[str, Any]:
        """The answer at once."""
        choices = [self._choice(index, row, scores[index]) for index, row in enumerate(self.asked.rows)]
        return {**self._head(chunk=False), "choices": choices, "usage": self.usage()}

    def _choice(self, index: int, row: Row, scores: list[Scored] | None) -> dict[str, Any]:
        trace, names = row.trace, row.pool.names
        finish = _FINISH.get(trace.finish or "length", "stop")
        extra = {
            "segments": [segment_record(segment, names) for segment in trace.segments],
            "finish": trace.finish,
            "usage": usage_of(trace, names),
        }
        choice: dict[str, Any] = {"index": index, "finish_reason": finish, "switchgen": extra}
        if self.is_chat:
            message = {"role": "assistant", "content": trace.text}
            return {**choice, "message": message, "logprobs": None if scores is None else _chat_logprobs(scores)}
        assert isinstance(self.body, CompletionBody)
        echoed = trace.query.text if self.body.echo else ""
        logprobs = None if scores is None else _logprobs(scores)
        return {**choice, "text": echoed + trace.text, "logprobs": logprobs}

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """What opens a stream."""
        for index in range(len(self.asked.rows) if self.is_chat else 0):
            delta = {"role": "assistant", "content": ""}
            yield {**self._head(chunk=True), "choices": [{"index": index, "delta": delta, "finish_reason": None}]}

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of a choice; `switchgen.segments` holds the segments that have ended since the one before."""
        finish = _FINISH.get(self.asked.rows[index].trace.finish or "", "stop") if piece.finished else None
        choice: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": None}
        choice |= {"delta": {"content": piece.text}} if self.is_chat else {"text": piece.text}
        if piece.segments:
            choice["switchgen"] = {"segments": piece.segments}
        return {**self._head(chunk=True), "choices": [choice]}

    def last_chunk(self) -> dict[str, Any]:
        """The usage, where it was asked for."""
        return {**self._head(chunk=True), "choices": [], "usage": self.usage()}


def _logprobs(scored: Sequence[Scored]) -> dict[str, Any]:
    """As /v1/completions gives them."""
    tops: list[dict[str, float] | None] = []
    for item in scored:
        best: dict[str, float] = {}
        for token, logprob in item.score.top:
            # Different tokens may read alike: the likelier one keeps the name.
            best.setdefault(item.text_of(token), logprob)
        tops.append(best if item.score.logprob is not None else None)
    return {
        "tokens": [item.text_of(item.score.token) for item in scored],
        "token_logprobs": [item.score.logprob for item in scored],
        "top_logprobs": tops,
        "text_offset": [item.offset for item in scored],
    }


def _chat_logprobs(scored: Sequence[Scored]) -> dict[str, Any]:
    """As /v1/chat/completions gives them."""

    def entry(item: Scored, token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": item.text_of(token), "logprob": logprob, "bytes": list(item.vocabulary.token_bytes[token])}

    return {
        "content": [
            {
                **entry(item, item.score.token, item.score.logprob),
                "top_logprobs": [entry(item, token, logprob) for token, logprob in item.score.top
                                 if token < len(item.vocabulary)],
            }
            for item in scored
        ]
    }  # fmt: skip
