"""Where segments end: rules one by one, on tokens given by their text."""

from __future__ import annotations

import math

import pytest
import torch
from fixed import FixedLogits
from vocabularies import make_vocabulary

from switchgen.config import SegmentConfig
from switchgen.engines.base import Context, EngineStats, WriteItem
from switchgen.engines.writing import write_segments
from switchgen.sampling import SamplingParams
from switchgen.segmentation import MAX_WORD_EXTRA, SegmentRule
from switchgen.vocabulary import MAX_UTF8_EXTRA

VOCABULARY = make_vocabulary("bytes")
BYTE_IDS = {token[0]: index for index, token in enumerate(VOCABULARY.token_bytes) if len(token) == 1}


def ids_of(text: str | bytes) -> list[int]:
    """One token a byte."""
    return [BYTE_IDS[byte] for byte in (text.encode() if isinstance(text, str) else text)]


def write(rule: SegmentRule, text: str | bytes, max_tokens: int) -> tuple[bytes, str]:
    """What of the text a writer gets out before its segment ends, and why."""
    written: list[int] = []
    for token in ids_of(text):
        if rule.ends_before(VOCABULARY, written, token, max_tokens):
            return VOCABULARY.decode_bytes(written), "before"
        written.append(token)
        ended, boundary = rule.ends_after(VOCABULARY, written, max_tokens)
        if ended:
            return VOCABULARY.decode_bytes(written), "boundary" if boundary else "length"
    return VOCABULARY.decode_bytes(written), "goes on"


LENGTH, SENTENCE, LINE = SegmentRule("length"), SegmentRule("sentence"), SegmentRule("line")
WORDS = SegmentRule("length", whole_words=True)


@pytest.mark.parametrize(
    ("rule", "text", "max_tokens", "written", "why"),
    [
        (LENGTH, "abcdef", 4, b"abcd", "length"),
        (LENGTH, "abc", 4, b"abc", "goes on"),
        (LENGTH, "a. b\nc", 6, b"a. b\nc", "length"),
        (LENGTH, "abc\u00e9fgh", 4, "abc\u00e9".encode(), "length"),
        (LENGTH, "a🙂bcd", 2, "a🙂".encode(), "length"),
        (LENGTH, "a🙂bcd", 1, b"a", "length"),
        (SENTENCE, "Hi. So", 50, b"Hi.", "before"),
        (SENTENCE, "3.14 So", 50, b"3.14 So", "goes on"),
        (SENTENCE, "Hi! ", 50, b"Hi!", "before"),
        (SENTENCE, "What?\n", 50, b"What?", "before"),
        (SENTENCE, "a b\nc", 50, b"a b\n", "boundary"),
        (SENTENCE, "Hi. So", 2, b"Hi", "length"),
        (SENTENCE, " .", 50, b" .", "goes on"),
        (LINE, "Hi. So\nx", 50, b"Hi. So\n", "boundary"),
        (LINE, "\n\n", 50, b"\n", "boundary"),
        (WORDS, "abc def", 2, b"abc", "before"),
        (WORDS, "ab cd", 2, b"ab", "before"),
        (WORDS, " ab", 1, b" ab", "goes on"),
        (WORDS, "a" * 30, 2, b"a" * (2 + MAX_WORD_EXTRA), "length"),
    ],
)
def test_ends(rule: SegmentRule, text: str, max_tokens: int, written: bytes, why: str) -> None:
    assert write(rule, text, max_tokens) == (written, why)


@pytest.mark.parametrize("rule", [LENGTH, SENTENCE, LINE, WORDS, SegmentRule("sentence", whole_words=True)])
def test_no_writer_goes_on_for_ever(rule: SegmentRule) -> None:
    """Beginnings of characters that never end: a word rule used to wait for the end of the context."""
    text, why = write(rule, b"\xe2" * 200, 10)
    assert why == "length" and len(text) == 10 + rule.max_extra
    assert rule.max_extra == MAX_UTF8_EXTRA + (MAX_WORD_EXTRA if rule.whole_words else 0)


def test_a_line_break_inside_a_character_waits() -> None:
    """A token may hold a line break and the beginning of a character: the segment ends when that is complete."""
    table = VOCABULARY.token_bytes
    ids = [*ids_of("a"), *ids_of("\n")]
    assert LINE.ends_after(VOCABULARY, ids, 50) == (True, True)
    assert table[ids[-1]] == b"\n"
    assert LINE.ends_after(VOCABULARY, [*ids_of("a\n"), *ids_of(b"\xc3")], 50) == (False, False)


# -- where the writer is unsure ----------------------------------------------------------------------------------------


def look_up(ids: list[int]) -> torch.Tensor:
    """The writer's logits by the text so far; "~" and "^" share what is left."""
    logits_V = torch.full((len(VOCABULARY),), -math.inf, dtype=torch.float64)
    probs = WRITTEN.get(VOCABULARY.decode(ids), {})
    rest = (1 - sum(probs.values())) / 2
    for text, value in {"~": rest, "^": rest, **probs}.items():
        logits_V[ids_of(text)[0]] = math.log(value)
    return logits_V


WRITTEN = {
    "": {"a": 0.4},  # unsure, and nothing is written yet: a segment is never empty
    "a": {"b": 0.4},  # unsure, but "b" goes on with the word
    "ab": {" ": 0.5},  # 0.5 < 0.5 is false
    "ab ": {"c": 0.49},  # unsure, and a word begins
    "ab c": {",": 0.3, "d": 0.25, "e": 0.25},  # unsure; a comma is no part of the word
    "ab c,": {" ": 0.9},
}


@pytest.mark.parametrize(
    ("end", "min_tokens", "max_tokens", "written", "finish"),
    [
        ("p@0.5", 1, 50, "ab ", "boundary"),
        ("p@0.5", 3, 50, "ab ", "boundary"),
        ("p@0.5", 4, 50, "ab c", "boundary"),
        ("p@0.5", 5, 6, "ab c, ", "length"),
        ("p@0.5", 1, 2, "ab", "length"),
        ("p@0.4", 1, 50, "ab c", "boundary"),  # 0.49 is not below 0.4, 0.3 is
        ("p@0.51", 1, 50, "ab", "boundary"),  # 0.5 is below it now, and white space ends the word
        ("h@1.03", 1, 50, "ab", "boundary"),  # 0.5, 0.25, 0.25: 1.0397 nats
        ("h@1.04", 1, 50, "ab ", "boundary"),  # 0.49, 0.255, 0.255: 1.0465
        ("h@1.05", 1, 50, "ab c", "boundary"),  # 0.3, 0.25, 0.25, 0.1, 0.1: 1.5148
        ("h@1.6", 1, 6, "ab c, ", "length"),
        ("length", 1, 6, "ab c, ", "length"),
    ],
)
def test_ends_where_the_writer_is_unsure(end: str, min_tokens: int, max_tokens: int, written: str, finish: str) -> None:
    """Worked by hand; a row beside it that ends elsewhere changes nothing."""
    segment = SegmentConfig.model_validate({"tokens": 50, "end": end, "min_tokens": min_tokens})
    contexts = [Context([]), Context(ids_of("ab c"))]
    items = [WriteItem(context, max_tokens, seed=0, token_index=0) for context in contexts]
    first, _ = write_segments(
        FixedLogits(contexts, look_up), items, SamplingParams(temperature=0), SegmentRule.of(segment), (), VOCABULARY,
        frozenset(), torch.empty(0, dtype=torch.long), EngineStats(),
    )  # fmt: skip
    assert (VOCABULARY.decode(first.ids), first.finish) == (written, finish)
    assert VOCABULARY.decode(contexts[0].ids) == written, "what it was unsure of is not written"
