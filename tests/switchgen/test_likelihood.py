"""Log-probabilities of given texts: those of a plain forward, alone or in a batch."""

from __future__ import annotations

import pytest
import torch
from reference import Ladder, make_ladder

from switchgen.likelihood import likelihoods


@pytest.fixture(scope="module")
def ladder() -> Ladder:
    return make_ladder()


def test_equal_to_plain_forwards_token_by_token(ladder: Ladder) -> None:
    """Pairs of all lengths in one batch, one of them twice."""
    candidate, plain = ladder.pool.candidates[1], ladder.plain[1]
    encode = candidate.vocabulary.encode_text
    pairs = [
        (encode("How old is Vudak? "), encode("Answer: 17")),
        (encode("A"), encode(" list of apples, pears and plums")),
        (encode("A"), encode("b")),
        (encode("How old is Vudak? "), encode("Answer: 17")),
    ]
    for (context, continuation), got in zip(pairs, likelihoods(candidate, pairs), strict=True):
        expected, greedy = 0.0, True
        for place, token in enumerate(continuation):
            logits_V = plain.logits([*context, *continuation[:place]])
            expected += float(torch.log_softmax(logits_V, -1)[token])
            greedy = greedy and int(logits_V.argmax()) == token
        assert got is not None and (got.num_tokens, got.is_greedy) == (len(continuation), greedy)
        assert got.log_prob == pytest.approx(expected, abs=1e-9)
        assert got.per_token == pytest.approx(expected / len(continuation), abs=1e-9)


def test_greedy_continuations_are_known_as_such(ladder: Ladder) -> None:
    candidate = ladder.pool.candidates[0]
    context = candidate.vocabulary.encode_text("How old")
    ids = list(context)
    for _ in range(4):
        ids.append(int(ladder.plain[0].logits(ids).argmax()))
    found = likelihoods(candidate, [(context, ids[len(context) :])])
    assert found[0] is not None and found[0].is_greedy


def test_nothing_and_too_much_have_no_likelihood(ladder: Ladder) -> None:
    candidate = ladder.pool.candidates[0]
    limit = candidate.engine.max_positions
    assert likelihoods(candidate, [([1], []), ([], [1]), ([1] * limit, [1, 1])]) == [None, None, None]
    assert likelihoods(candidate, [([1] * limit, [1])]) != [None], "the last token is not read"
    assert likelihoods(candidate, []) == []
