"""Token routers: hand-worked decisions, a plain statement of the rules in numpy, extremes, word boundaries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixed import FixedLogits
from pairs import DECODING, QUESTIONS, SEED, assert_batched_equals_alone, ids_of, make_pair, route, written
from reference import goes_on_with_word, in_word

from switchgen import DecodingConfig, Pool, Query, generate
from switchgen.api import check_policy, response_seed
from switchgen.config import RouterConfig, SegmentConfig
from switchgen.engines.base import Context
from switchgen.errors import ConfigError, ModelError
from switchgen.policies.routers import (
    RULES,
    RouterPolicy,
    content_flags,
    function_words,
    is_format,
    parse_router,
)
from switchgen.rows import Row
from switchgen.sampling import Purpose, SamplingParams, sample_tokens, uniform
from switchgen.token_loop import TokenLoop
from switchgen.token_pen import TokenPen
from switchgen.vocabulary import Vocabulary, continues_word

TOKENS = ("the", "cat", ",", "\n")


class FourTokens:
    """A vocabulary of four tokens: a function word, a content word, a comma, a line break."""

    token_bytes = [token.encode() for token in TOKENS]
    control_ids: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.token_bytes)


# Distributions of the hand-worked cases: probabilities of the, cat, comma, newline.
SURE_THE = (0.7, 0.1, 0.1, 0.1)  # max 0.7, entropy 0.940 nats
SURE_CAT = (0.1, 0.7, 0.1, 0.1)
SURE_COMMA = (0.1, 0.1, 0.7, 0.1)
SURE_BREAK = (0.1, 0.1, 0.1, 0.7)
EVEN = (0.25, 0.25, 0.25, 0.25)  # max 0.25, entropy ln 4 = 1.386 nats; the first token is predicted
LIKELY_CAT = (0.2, 0.5, 0.2, 0.1)  # max 0.5, entropy 1.221 nats

# (router, P_base, P_aligned, who is picked), worked by hand from the rules' statement.
HAND_WORKED = [
    ("baco-p@0.5", SURE_CAT, EVEN, "aligned"),  # 0.7 < 0.5 is false
    ("baco-p@0.5", EVEN, SURE_CAT, "base"),  # 0.25 < 0.5
    ("baco-p@0.7001", SURE_CAT, SURE_CAT, "base"),  # 0.7 < 0.7001
    ("baco-p@0.25", EVEN, SURE_CAT, "aligned"),  # 0.25 < 0.25 is false
    ("baco-h@1.0", SURE_CAT, EVEN, "aligned"),  # 0.940 > 1.0 is false
    ("baco-h@1.0", EVEN, SURE_CAT, "base"),  # 1.386 > 1.0
    ("baco-h@1.3", LIKELY_CAT, EVEN, "aligned"),  # 1.221 > 1.3 is false
    ("baco-h@1.2", LIKELY_CAT, EVEN, "base"),  # 1.221 > 1.2
    ("baco-punc", EVEN, SURE_COMMA, "aligned"),  # a comma is predicted
    ("baco-punc", SURE_COMMA, SURE_CAT, "base"),  # the aligned model's prediction counts, not the base's
    ("baco-punc", SURE_CAT, SURE_BREAK, "aligned"),  # a line break is format
    ("baco-fc", SURE_CAT, SURE_THE, "aligned"),  # "the" is a function word
    ("baco-fc", SURE_THE, SURE_CAT, "base"),
    ("baco-p-punc@0.5", EVEN, SURE_COMMA, "aligned"),  # the content rule comes first
    ("baco-p-punc@0.5", EVEN, SURE_CAT, "base"),  # it does not fire, and 0.25 < 0.5
    ("baco-p-punc@0.5", SURE_CAT, SURE_CAT, "aligned"),  # it does not fire, and 0.7 < 0.5 is false
    ("baco-h-punc@1.0", EVEN, SURE_BREAK, "aligned"),
    ("baco-h-punc@1.0", EVEN, SURE_CAT, "base"),
    ("baco-p-fc@0.5", EVEN, SURE_THE, "aligned"),
    ("baco-p-fc@0.5", EVEN, SURE_COMMA, "base"),  # a comma is no function word
    ("baco-h-fc@1.0", SURE_CAT, SURE_CAT, "aligned"),
    ("baco-h-fc@1.0", EVEN, SURE_CAT, "base"),
]


def _pick(policy: RouterPolicy, base: Sequence[float], aligned: Sequence[float], seed: int = 1, index: int = 0) -> str:
    picked = policy.pick_base(
        torch.tensor([tuple(base)], dtype=torch.float64).log(),
        torch.tensor([tuple(aligned)], dtype=torch.float64).log(),
        torch.tensor([seed]),
        torch.tensor([index]),
    )
    return "base" if picked.item() else "aligned"


@pytest.mark.parametrize(("name", "base", "aligned", "expected"), HAND_WORKED)
def test_hand_worked_decisions(name: str, base: tuple[float, ...], aligned: tuple[float, ...], expected: str) -> None:
    assert _pick(RouterPolicy(name, FourTokens()), base, aligned) == expected


def test_the_base_can_be_the_predictor() -> None:
    policy = RouterPolicy("baco-punc", FourTokens(), settings=RouterConfig(predictor="base"))
    assert _pick(policy, SURE_COMMA, SURE_CAT) == "aligned"
    assert _pick(policy, SURE_CAT, SURE_COMMA) == "base"


def test_random_router_follows_its_number() -> None:
    policy = RouterPolicy("baco-rand@0.3", FourTokens())
    seeds, index = torch.arange(1000), torch.zeros(1000, dtype=torch.long)
    logits = torch.zeros(1000, 4)
    picked = policy.pick_base(logits, logits, seeds, index)
    assert torch.equal(picked, uniform(seeds, Purpose.ROUTER, index) < 0.3)
    assert 0.25 < picked.double().mean().item() < 0.35


def _stated(
    name: str,
    base: np.ndarray,
    aligned: np.ndarray,
    number: float,
    kinds: Sequence[str | None] = ("fc", None, "punc", "punc"),
) -> str:
    """The rules as the paper states them, one row, in numpy.

    Args:
        base, aligned: probabilities of the next token.
        number: the row's random number.
        kinds: which content rule fires on each token, if any.
    """
    rule, _, gamma = name.partition("@")
    rule, _, predictor = rule.partition("+")
    threshold = float(gamma) if gamma else math.nan
    parts = rule.removeprefix("baco-").split("-")
    predicted = kinds[int(np.argmax(base if predictor == "base" else aligned))]
    if predicted in parts:
        return "aligned"
    if parts[0] == "p":
        return "base" if base.max() < threshold else "aligned"
    if parts[0] == "h":
        entropy = -sum(p * math.log(p) for p in base if p > 0)
        return "base" if entropy > threshold else "aligned"
    if parts[0] == "rand":
        return "base" if number < threshold else "aligned"
    if parts[0] == "nudging":
        return "aligned" if base.max() < threshold else "base"
    return "base"


def test_thousand_random_cases_against_the_stated_rules() -> None:
    generator = np.random.default_rng(7)
    names = ["baco-punc", "baco-fc"]
    names += [f"{rule}@{gamma}" for rule in RULES if RULES[rule][0] in ("p", "rand") for gamma in (0.2, 0.45, 0.8)]
    names += [f"{rule}@{gamma}" for rule in RULES if RULES[rule][0] == "h" for gamma in (0.4, 0.9, 1.3)]
    checked = 0
    for case in range(1000):
        base, aligned = generator.dirichlet([0.5] * 4), generator.dirichlet([0.5] * 4)
        name = names[case % len(names)]
        number = uniform(torch.tensor([case]), Purpose.ROUTER, torch.tensor([3])).item()
        decided = _pick(RouterPolicy(name, FourTokens()), base, aligned, seed=case, index=3)
        assert decided == _stated(name, base, aligned, number), (name, base, aligned)
        checked += 1
    assert checked == 1000


@pytest.mark.parametrize(
    ("before", "token", "expected"),
    [
        (b"the ca", b"t", True),
        (b"the", b" cat", False),
        (b"the cat", b",", False),
        (b"(", b"cat", False),
        (b"", b"cat", False),
        (b"1", b"7", True),
        ("Grö".encode(), "ße".encode(), True),
        ("🙂".encode()[:2], "🙂".encode()[2:], True),
        ("東".encode(), "京".encode(), True),
        ("東".encode(), "京".encode()[:2], True),
        ("東".encode(), "京".encode()[:1], True),
        ("東".encode(), "—".encode()[:2], False),
        (b"word", "—".encode()[:2], False),
        (b"word", "😀".encode()[:3], False),
        (b"word", "é".encode()[:1], True),
        ("、".encode(), "京".encode()[:2], False),
        (b"a", b"\xff", False),
        (b"it", b"'s", False),
        (b"line\n", b"next", False),
    ],
)
def test_word_continuation(before: bytes, token: bytes, expected: bool) -> None:
    assert continues_word(before, token) is expected


def _characters(count: int, seed: int) -> Iterator[str]:
    """Random characters, from all of Unicode and from the blocks that texts are made of."""
    generator = np.random.default_rng(seed)
    for limit in (0x110000, 0x10000, 0x800, 0x250):
        for code in generator.integers(1, limit, count // 4).tolist():
            if not 0xD800 <= code < 0xE000:
                yield chr(code)


def test_a_word_is_not_cut_for_want_of_a_byte() -> None:
    """The first bytes of a letter were taken for a word boundary: the router was asked in mid-word."""
    befores = ["東", "a", "7", "é", "x、", " ", "(", "😀"]
    continued = 0
    for number, character in enumerate(_characters(20_000, seed=3)):
        raw, before = character.encode(), befores[number % len(befores)].encode()
        whole = continues_word(before, raw)
        assert whole is goes_on_with_word(before, raw)
        for length in range(1, len(raw)):
            begun = continues_word(before, raw[:length])
            assert begun or not whole, (before, character, length)
            assert begun is False or in_word(before.decode()[-1])
            assert continues_word(before + raw[:length], raw[length:]), "within a character nobody is asked"
            continued += begun
    assert continued > 1000


class TokensOf:
    """A vocabulary of these tokens."""

    control_ids: frozenset[int] = frozenset()

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self.token_bytes = list(token_bytes)

    def __len__(self) -> int:
        return len(self.token_bytes)


def test_content_rules_do_not_fire_on_parts_of_characters() -> None:
    """Bytes that are no character were left out: a space with the first bytes of 中 was white space alone."""
    torn = [b" \xe4\xb8", b" \xf0\x9f", b"(\xe4", b"\n\xc3", b" the\xe2", b"the\xc3", b"\xb8\x80 ", b"\xa0,", b"\xff"]
    heads = ("", " ", "(", " the", "\n", "1.")
    torn += [
        head.encode() + character.encode()[:length]
        for head, character in zip(itertools.cycle(heads), _characters(4000, seed=4))
        for length in range(1, len(character.encode()))
    ]
    vocabulary = TokensOf([*torn, b" the", b" ("])
    assert content_flags(vocabulary, "punc", frozenset()).tolist() == [False] * len(torn) + [False, True]
    assert content_flags(vocabulary, "fc", function_words()).tolist() == [False] * len(torn) + [True, False]


EMOJI = ["❤️", " ✔️", "👩‍💻", "👍🏽", "🏴\U000e0067\U000e0062\U000e007f", ")\n\n("]


@pytest.mark.parametrize("text", [",", "...", "\n\n", " -", "* ", "```", "1.", "b)", " (", "”", "$", *EMOJI])
def test_format(text: str) -> None:
    assert is_format(text)


@pytest.mark.parametrize(
    "text", ["a", "cat", " 17", "1", "é", "don't", "xy.", "\ufe0f", "\u200d", "क्‍ष", "e\u0301", "1️⃣"]
)
def test_not_format(text: str) -> None:
    assert not is_format(text)


def test_function_words() -> None:
    words = function_words()
    assert {"the", "of", "and", "is", "to", "not", "which"} <= words
    assert not {"cat", "run", "blue"} & words
    assert len(words) > 150


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("baco-q@1", "allowed: baco-p"),
        ("baco-p", "baco-p@0.3, or set router.gamma"),
        ("baco-p@x", "a number"),
        ("baco-rand@1.5", "from 0 to 1"),
        ("baco-punc@1", "has no γ"),
        ("baco-h@nan", "a number"),
    ],
)
def test_wrong_router_names(name: str, part: str) -> None:
    with pytest.raises(ConfigError, match="router") as raised:
        parse_router(name)
    assert part in str(raised.value)


def test_gamma_of_the_recipe() -> None:
    settings = RouterConfig(gamma=1.5)
    assert RouterPolicy("baco-h", FourTokens(), settings=settings).gamma == 1.5
    assert RouterPolicy("baco-h-fc+base", FourTokens(), settings=settings).gamma == 1.5
    assert RouterPolicy("baco-h@0.2", FourTokens(), settings=settings).gamma == 0.2, "the name comes first"
    assert RouterPolicy("baco-punc", FourTokens(), settings=settings).gamma is None
    with pytest.raises(ConfigError, match=r"router.gamma \(1.5\) is γ, a number from 0 to 1"):
        RouterPolicy("baco-rand", FourTokens(), settings=settings)


def test_function_words_of_another_language(tmp_path: Path) -> None:
    """Der Rat der Alten: one word a line, whatever its case, in any script."""
    file = tmp_path / "words.txt"
    file.write_text("\ufeff# where it is from\nDer\nfür\nи\n", encoding="utf-8")
    settings = RouterConfig(function_words=str(file))
    vocabulary = TokensOf([token.encode() for token in ("der", " Für", " и", " the", " Rat")])
    policy = RouterPolicy("baco-fc", vocabulary, settings=settings)
    assert policy.fires_V.tolist() == [True, True, True, False, False]
    assert RouterPolicy("baco-fc", vocabulary).fires_V.tolist() == [False, False, False, True, False]
    check_policy("baco-p", ["a", "b"], RouterConfig(gamma=0.3, function_words="nowhere"))
    for broken, content in {"none": None, "empty": b"# nothing\n", "latin": b"f\xfcr\n"}.items():
        wrong = tmp_path / broken
        if content is not None:
            wrong.write_bytes(content)
        with pytest.raises(ConfigError, match=f"router.function_words: .*{broken}.*allowed: a UTF-8 file"):
            check_policy("baco-p-fc@0.3", ["a", "b"], RouterConfig(function_words=str(wrong)))


# -- in the loop ------------------------------------------------------------


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
                picked = _stated(name, base, aligned, uniform(at[0], Purpose.ROUTER, at[1]).item(), self.kinds)
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
