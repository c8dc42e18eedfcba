"""Token routers in the loop: extremes, batches, memory, a plain loop, and every rule on fixed logits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np
import pytest
import torch
from fixed import FixedLogits
from pairs import DECODING, QUESTIONS, SEED, assert_batched_equals_alone, ids_of, make_pair, route, written
from reference import goes_on_with_word
from stated import stated_pick

from switchgen import DecodingConfig, Pool, Query, generate
from switchgen.api import response_seed
from switchgen.config import SegmentConfig
from switchgen.engines.base import Context
from switchgen.errors import ModelError
from switchgen.policies.routers import RouterPolicy
from switchgen.rows import Row
from switchgen.sampling import Purpose, SamplingParams, sample_tokens, uniform
from switchgen.token_loop import TokenLoop
from switchgen.token_pen import TokenPen
from switchgen.vocabulary import Vocabulary


@pytest.mark.parametrize(
    ("router", "same_as"),
    [
        ("baco-p@0", "aligned"),
        ("baco-p@inf", "base"),
        ("baco-h@inf", "aligned"),
        ("baco-h@-1", "base"),
        ("baco-rand@0", "aligned"),
        ("baco-rand@1", "base"),
        ("baco-p-punc@0", "aligned"),
        ("baco-h-punc@inf", "aligned"),
        ("baco-p-fc@0", "aligned"),
        ("baco-h-fc@inf", "aligned"),
        ("baco-p-punc@inf", "baco-punc"),
        ("baco-h-punc@-1", "baco-punc"),
        ("baco-p-fc@inf", "baco-fc"),
        ("baco-h-fc@-1", "baco-fc"),
    ],
)
def test_extremes_token_for_token(pair: Pool, router: str, same_as: str) -> None:
    assert written(pair, router) == written(pair, same_as)


@pytest.mark.parametrize("router", ["baco-rand@0.5", "baco-p@0.2", "baco-h-punc@2.0"])
def test_batched_equals_alone(pair: Pool, router: str) -> None:
    assert_batched_equals_alone(pair, router)


@pytest.mark.parametrize("max_slots", [(3, 128), (128, 2), (1, 1)])
@pytest.mark.parametrize("kinds", [("llama", "llama"), ("llama", "bloom")])
def test_more_rows_than_caches(pair: Pool, kinds: tuple[str, str], max_slots: tuple[int, int]) -> None:
    """Rows in flight took each other's slots where `engine.kv_budget` was below `engine.max_rows`."""
    narrow = make_pair(kinds=kinds, max_slots=max_slots)
    wide = pair if kinds == ("llama", "llama") else make_pair(kinds=kinds)
    assert written(narrow, "baco-rand@0.5") == written(wide, "baco-rand@0.5")


def test_no_round_is_long_where_somebody_waits(pair: Pool) -> None:
    """With all places taken a round once went on until a row ended: whoever came meanwhile heard nothing."""
    decoding = DECODING.model_copy(update={"segment": SegmentConfig(tokens=5)})
    expected = [trace.text for trace in generate(pair, QUESTIONS[:4], "baco-rand@0.5", decoding=decoding, seed=SEED)]

    def longest_round(*, live: bool) -> int:
        """Tokens of a row that a round writes at most."""
        rows = [Row(pair, Query.from_text(question, str(index)), response_seed(SEED, str(index)))
                for index, question in enumerate(QUESTIONS[:4])]  # fmt: skip
        heard = dict.fromkeys(rows, 0)
        for row in rows:
            row.listener = lambda *_, row=row: heard.update({row: heard[row] + 1})
        loop = TokenLoop(pair, RouterPolicy("baco-rand@0.5", pair.vocabularies[0]), decoding, max_rows=2)
        longest = 0
        for _ in loop.rounds(chain(rows, repeat(None)), live=live):
            longest = max(longest, *heard.values())
            heard = dict.fromkeys(rows, 0)
            if all(row.trace.finish for row in rows):
                break
        assert [row.trace.text for row in rows] == expected
        return longest

    assert longest_round(live=True) == 5 < longest_round(live=False)


def test_rows_that_do_not_fit_in_memory(pair: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that holds the caches of two rows: fewer rows at a time, and the same tokens."""
    narrow = make_pair(max_slots=(8, 8))
    aligned = narrow.candidates[1].engine
    plain = aligned.forward

    def forward(module: Any, plan: Any, ids: Any, *rest: Any, **settings: Any) -> Any:
        if len(ids) > 2:
            raise MemoryError
        return plain(module, plan, ids, *rest, **settings)

    monkeypatch.setattr(aligned, "forward", forward)
    assert written(narrow, "baco-rand@0.5") == written(pair, "baco-rand@0.5")
    assert {candidate.engine.max_slots for candidate in narrow} == {2}
    monkeypatch.setattr(aligned, "max_slots", 1)
    monkeypatch.setattr(aligned, "forward", lambda *_, **__: forward(None, None, [0] * 3))
    with pytest.raises(ModelError, match="base and aligned: not even one row"):
        written(narrow, "baco-rand@0.5")


def test_against_a_plain_loop(pair: Pool) -> None:
    """One row, no cache, the rules and the word boundaries written out; every token and every writer agree."""
    policy = RouterPolicy("baco-rand@0.5", pair.candidates[0].vocabulary)
    switches = 0
    for index in range(3):
        query = Query.from_text(QUESTIONS[index], str(index))
        ids, writers = route(pair, query, lambda logits, at, _: 0 if policy.pick_base(*logits, *at).item() else 1)
        trace = generate(pair, [query], "baco-rand@0.5", decoding=DECODING, seed=SEED)[0]
        assert ids_of(trace)[:40] == ids
        signed = [segment.writer for segment in trace.segments for _ in segment.ids]
        switches += sum(a != b for a, b in zip(writers, writers[1:], strict=False))
        # A run of one writer that ends inside a character is signed together with the next run.
        agree = sum(a == b for a, b in zip(signed, writers, strict=False))
        assert agree >= 0.8 * len(writers)
    assert switches > 5


# What the fixed models write, and which content rule fires on it, by hand.
KINDS: dict[bytes, str | None] = {
    b",": "punc", b"\n": "punc", b" ": "punc", b"(": "punc", b"a": "fc", b"i": "fc", b"k": None, b"v": None, b"7": None,
    "中".encode()[:1]: None, "中".encode()[1:2]: None, "中".encode()[2:]: None,
}  # fmt: skip
INTERIOR = [
    "baco-p@0.45", "baco-h@1.2", "baco-rand@0.5", "baco-punc", "baco-fc", "baco-p-punc@0.45", "baco-h-punc@1.2",
    "baco-p-fc@0.45", "baco-h-fc@1.2", "baco-punc+base", "baco-h-fc+base@1.2", "nudging@0.45",
]  # fmt: skip


Routed = tuple[list[int], list[int], int]
"""Tokens, who wrote each of them, and how often the router was asked."""


class Tables:
    """A base and an aligned model that depend on the last token and on the length, by tables of random logits."""

    def __init__(self, vocabulary: Vocabulary, end: int) -> None:
        self.vocabulary = vocabulary
        self.end = end
        where = {token: index for index, token in enumerate(vocabulary.token_bytes)}
        known = [where[token] for token in KINDS]
        self.kinds: list[str | None] = [KINDS.get(token) for token in vocabulary.token_bytes]
        size = len(vocabulary)
        # Side, length modulo 7, last token, next token.
        self.logits = np.full((2, 7, size, size), -np.inf)
        self.logits[..., known] = np.random.default_rng(11).normal(0, 2.0, (2, 7, size, len(known)))
        self.logits[..., end] = -2.0
        # A character that is begun is ended, and only so.
        first, *rest = (where[bytes([byte])] for byte in "中".encode())
        self.logits[..., rest] = -np.inf
        for begun, following in zip((first, *rest), rest, strict=False):
            self.logits[:, :, begun] = -np.inf
            self.logits[:, :, begun, following] = 0.0

    def look_up(self, side: int, ids: list[int]) -> np.ndarray:
        """Logits of the next token."""
        return self.logits[side, len(ids) % 7, ids[-1]]

    def write(self, name: str, prompt: list[int], seed: int, params: SamplingParams, limit: int) -> Routed:
        """One row token by token, as the rules are stated."""
        ids: list[int] = []
        writers: list[int] = []
        asked = 0
        while len(ids) < limit or self.vocabulary.ends_inside_character(ids):
            logits = np.stack([self.look_up(side, [*prompt, *ids]) for side in (0, 1)])
            at = torch.tensor([seed]), torch.tensor([len(ids)])
            drawn = [int(sample_tokens(torch.from_numpy(row)[None], *at, params)) for row in logits]
            text = self.vocabulary.decode_bytes(ids)
            writer = writers[-1] if writers else -1
            token = -1 if writer < 0 else drawn[writer]
            if token in (-1, self.end) or not goes_on_with_word(text, self.vocabulary.token_bytes[token]):
                base, aligned = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
                picked = stated_pick(name, base, aligned, uniform(at[0], Purpose.ROUTER, at[1]).item(), self.kinds)
                writer = ["base", "aligned"].index(picked)
                asked += 1
            if drawn[writer] == self.end:
                break
            ids.append(drawn[writer])
            writers.append(writer)
        return ids, writers, asked


@pytest.fixture(scope="module")
def tables(pair: Pool) -> Tables:
    (end,) = pair.candidates[0].engine.stop_ids
    return Tables(pair.candidates[0].vocabulary, end)


@pytest.mark.parametrize("name", INTERIOR)
def test_every_rule_decides_in_the_loop_as_stated(
    pair: Pool, tables: Tables, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Fixed logits, many rows in a batch: each token and who wrote it, against one row at a time in numpy."""
    for side, candidate in enumerate(pair):

        def begin(contexts: Sequence[Context], side: int = side) -> FixedLogits:
            return FixedLogits(contexts, lambda ids: torch.from_numpy(tables.look_up(side, ids)))

        monkeypatch.setattr(candidate.engine, "begin", begin)
    seen: dict[str, tuple[list[int], list[int]]] = {}
    sign = TokenPen.sign

    def recorded(pen: TokenPen, *arguments: Any) -> None:
        seen[pen.row.trace.query.id] = pen.ids, pen.writers[: len(pen.ids)]
        sign(pen, *arguments)

    monkeypatch.setattr(TokenPen, "sign", recorded)
    decoding = DecodingConfig(max_new_tokens=30, temperature=0.8, top_p=0.9)
    traces = generate(pair, QUESTIONS, name, decoding=decoding, seed=SEED, max_rows=5)
    all_writers: set[int] = set()
    kept = 0
    for trace in traces:
        prompt = pair.candidates[0].prompt_ids(trace.query)
        ids, writers, asked = tables.write(name, prompt, trace.seed, SamplingParams(0.8, 0.9), 30)
        assert seen[trace.query.id] == (ids, writers)
        assert trace.text == tables.vocabulary.decode(ids)
        all_writers |= set(writers)
        kept += len(ids) - asked
    assert all_writers == {0, 1}, "γ is interior"
    assert kept > 0, "some tokens go on with a word"


def test_stop_string_and_text(pair: Pool) -> None:
    plain = generate(pair, QUESTIONS, "baco-rand@0.5", decoding=DECODING, seed=SEED)
    letter = next(character for character in plain[0].text if character.isascii() and character.isalpha())
    stopped = generate(
        pair, QUESTIONS, "baco-rand@0.5", decoding=DECODING.model_copy(update={"stop": [letter]}), seed=SEED
    )
    for before, after in zip(plain, stopped, strict=True):
        expected = before.text.split(letter)[0] if letter in before.text else before.text
        assert after.text == expected
        # As under segment policies, tokens of which no text is left are not the response's.
        ids = ids_of(after)
        assert ids == ids_of(before)[: len(ids)]
        decode = pair.candidates[0].vocabulary.decode
        assert not ids or letter not in before.text or len(decode(ids[:-1])) < len(expected)
        assert (after.finish == "stop") == (letter in before.text)
