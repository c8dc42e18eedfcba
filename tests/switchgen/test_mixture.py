"""The likelihood of a given text under a pool: Σ_i p_i P_i within a segment, sampled sequences of writers beyond it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from ladders import make_tokenizer
from reference import Ladder, make_ladder

from switchgen import DecodingConfig, Query
from switchgen.api import make_policy
from switchgen.errors import ConfigError, DataError
from switchgen.mixture import Mixture, split_segments
from switchgen.rows import Row
from switchgen.segmentation import SegmentRule
from switchgen.trace import Segment
from switchgen.vocabulary import Vocabulary

QUERY = Query.from_text("How old is Vudak?")
DECODING = DecodingConfig(segment=6)


@pytest.fixture(scope="module")
def ladder() -> Ladder:
    """Three candidates of one vocabulary, and a switcher."""
    chat = Vocabulary(make_tokenizer(), "chat")
    return make_ladder(vocabularies=[chat] * 3, switcher="llama")


def log_prob(ladder: Ladder, writer: int, context: list[int], ids: list[int]) -> float:
    """By plain forwards."""
    total = 0.0
    for place, token in enumerate(ids):
        total += float(torch.log_softmax(ladder.plain[writer].logits([*context, *ids[:place]]), -1)[token])
    return total


def alone(ladder: Ladder, writer: int, text: str) -> float:
    candidate = ladder.pool.candidates[writer]
    return log_prob(ladder, writer, candidate.prompt_ids(QUERY), candidate.vocabulary.encode_text(text))


def score(ladder: Ladder, policy: str, text: str, samples: int | None = None, seed: int = 0) -> float:
    chosen = make_policy(policy, ladder.pool, switcher=ladder.switcher)
    mixture = Mixture(ladder.pool, chosen, DECODING, samples=samples, seed=seed)
    return mixture.score([(QUERY, text)])[0].log_prob


def test_within_a_segment_it_is_the_mixture(ladder: Ladder) -> None:
    text = " Answer: 17"
    each = [alone(ladder, writer, text) for writer in range(3)]
    assert score(ladder, "c1", text) == pytest.approx(each[1], abs=1e-9)
    assert score(ladder, "random", text) == pytest.approx(math.log(sum(math.exp(p) for p in each) / 3), abs=1e-9)
    two = math.log((math.exp(each[0]) + math.exp(each[2])) / 2)
    assert score(ladder, "random~c1", text) == pytest.approx(two, abs=1e-9)
    shared = math.log(0.3 * math.exp(each[0]) + 0.7 * math.exp(each[2]))
    assert score(ladder, "segment-rand@0.3", text) == pytest.approx(shared, abs=1e-9)
    policy = make_policy("switcher", ladder.pool, switcher=ladder.switcher, top_p=0.1)
    p = policy.scores([Row(ladder.pool, QUERY, 0)])[0].tolist()  # type: ignore[union-attr]
    mixed = math.log(sum(weight * math.exp(one) for weight, one in zip(p, each, strict=True)))
    assert Mixture(ladder.pool, policy, DECODING).score([(QUERY, text)])[0].log_prob == pytest.approx(mixed, abs=1e-9)


def test_a_longer_text_is_refused_or_sampled(ladder: Ladder) -> None:
    text = " Write a list: apples, pears"
    candidate = ladder.pool.candidates[0]
    pieces = split_segments(candidate.vocabulary, candidate.vocabulary.encode_text(text), SegmentRule(), 6)
    assert 2 <= len(pieces) <= 4
    with pytest.raises(DataError, match="1 of 1 texts are longer than one segment .6 tokens.*--mc N"):
        score(ladder, "random", text)
    exact = []
    for writers in itertools.product(range(3), repeat=len(pieces)):
        context, total = candidate.prompt_ids(QUERY), -len(pieces) * math.log(3)
        for writer, piece in zip(writers, pieces, strict=True):
            total += log_prob(ladder, writer, context, piece)
            context = [*context, *piece]
        exact.append(total)
    wanted = float(torch.tensor(exact).logsumexp(0))
    assert score(ladder, "random", text, samples=3000) == pytest.approx(wanted, abs=0.35)
    assert score(ladder, "random", text, samples=5) != score(ladder, "random", text, samples=5, seed=1)
    # A policy that chooses once: its writer writes on, however long that is.
    assert score(ladder, "c2", text) == pytest.approx(alone(ladder, 2, text), abs=1e-9)
    once = math.log(0.5 * math.exp(alone(ladder, 0, text)) + 0.5 * math.exp(alone(ladder, 2, text)))
    assert score(ladder, "response-rand@0.5", text) == pytest.approx(once, abs=1e-9)


def test_the_first_writer_hands_over_to_who_is_chosen_once(ladder: Ladder) -> None:
    """A text of two segments counted as the first writer's alone."""
    text = " Write a list: apples, pears"
    candidate = ladder.pool.candidates[0]
    prompt, ids = candidate.prompt_ids(QUERY), candidate.vocabulary.encode_text(text)
    decoding = DecodingConfig(segment=6, first="c2")
    head, rest = ids[:6], ids[6:]
    assert rest and not candidate.vocabulary.ends_inside_character(head)

    def found(policy: str, text: str, decoding: DecodingConfig = decoding) -> float:
        chosen = make_policy(policy, ladder.pool, switcher=ladder.switcher)
        return Mixture(ladder.pool, chosen, decoding).score([(QUERY, text)])[0].log_prob

    opening = log_prob(ladder, 2, prompt, head)
    after = [log_prob(ladder, writer, [*prompt, *head], rest) for writer in range(3)]
    assert found("response-rand@1", text) == pytest.approx(opening + after[0], abs=1e-9)
    shared = math.log(0.3 * math.exp(after[0]) + 0.7 * math.exp(after[2]))
    assert found("response-rand@0.3", text) == pytest.approx(opening + shared, abs=1e-9)
    row = Row(ladder.pool, QUERY, 0)
    row.append(Segment(2, candidate.vocabulary.decode(head), tuple(head), "length"))
    routing = make_policy("routing", ladder.pool, switcher=ladder.switcher)
    p = routing.scores([row])[0].tolist()  # type: ignore[union-attr]
    mixed = math.log(sum(weight * math.exp(one) for weight, one in zip(p, after, strict=True)))
    assert found("routing", text) == pytest.approx(opening + mixed, abs=1e-9)
    short = candidate.vocabulary.decode(head)
    assert found("response-rand@1", short) == found("routing", short) == pytest.approx(opening, abs=1e-9)
    assert found("c1", text) == pytest.approx(alone(ladder, 1, text), abs=1e-9), "a candidate alone is alone"
    unsure = DecodingConfig.model_validate({"segment": {"tokens": 50, "end": "h@2"}, "first": "c2"})
    with pytest.raises(ConfigError, match="each writer ends its segments elsewhere"):
        found("routing", text, unsure)


def test_the_last_writers_part_is_refused(ladder: Ladder) -> None:
    decoding = DecodingConfig(segment=6, last="c2", max_new_tokens=10)
    policy = make_policy("response-rand@0.5", ladder.pool)
    mixture = Mixture(ladder.pool, policy, decoding)
    once = math.log(0.5 * math.exp(alone(ladder, 0, " 17")) + 0.5 * math.exp(alone(ladder, 2, " 17")))
    assert mixture.score([(QUERY, " 17")])[0].log_prob == pytest.approx(once, abs=1e-9)
    with pytest.raises(DataError, match="after 4 .* decoding.last .c2. writes; raise decoding.max_new_tokens"):
        mixture.score([(QUERY, " Write a list: apples, pears")])
    candidate = Mixture(ladder.pool, make_policy("c0", ladder.pool), decoding)
    assert candidate.score([(QUERY, " Write a list: apples, pears")])[0].log_prob < 0


def test_segments_are_cut_as_the_loop_cuts_them() -> None:
    vocabulary = Vocabulary(make_tokenizer(), "chat")
    text = "The sum is 47! Then add 12.\nGröße, 🙂🙃 emoji"
    ids = vocabulary.encode_text(text)
    for rule in (SegmentRule(), SegmentRule("sentence"), SegmentRule("line")):
        pieces = split_segments(vocabulary, ids, rule, 9)
        assert [token for piece in pieces for token in piece] == ids
        assert not any(vocabulary.ends_inside_character(piece) for piece in pieces)
        assert max(map(len, pieces)) <= 9 + rule.max_extra
    lines = split_segments(vocabulary, ids, SegmentRule("line"), 100)
    assert [vocabulary.decode(piece) for piece in lines] == [text[: text.index("\n") + 1], text[text.index("\n") + 1 :]]


def test_ends_that_each_writer_sees_elsewhere(ladder: Ladder) -> None:
    """Where segments end by their writer's distribution a text has no common cut; a writer alone needs none."""
    decoding = DecodingConfig.model_validate({"segment": {"tokens": 50, "end": "h@2"}})
    with pytest.raises(ConfigError, match="'h@2' each writer ends its segments elsewhere.*allowed.*length, sentence"):
        Mixture(ladder.pool, make_policy("random", ladder.pool), decoding)
    alone_score = Mixture(ladder.pool, make_policy("c1", ladder.pool), decoding).score([(QUERY, " Answer: 17")])
    assert alone_score[0].log_prob == pytest.approx(alone(ladder, 1, " Answer: 17"), abs=1e-9)


def test_what_has_no_likelihood(ladder: Ladder) -> None:
    for name in ("baco-punc", "refine", "average@0.5"):
        policy = make_policy(name, ladder.pool)
        with pytest.raises(ConfigError, match="a given text has no likelihood under it"):
            Mixture(ladder.pool, policy, DECODING)
    with pytest.raises(DataError, match="an empty text has no likelihood"):
        score(ladder, "random", "")
