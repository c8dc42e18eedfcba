"""Token routers: hand-worked decisions, a plain statement of the rules in numpy, extremes, word boundaries."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import goes_on_with_word, in_word
from stated import stated_pick

from switchgen.api import check_policy
from switchgen.config import RouterConfig
from switchgen.errors import ConfigError
from switchgen.policies.routers import (
    RULES,
    RouterPolicy,
    content_flags,
    function_words,
    is_format,
    parse_router,
)
from switchgen.sampling import Purpose, uniform
from switchgen.vocabulary import continues_word

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
        assert decided == stated_pick(name, base, aligned, number), (name, base, aligned)
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
