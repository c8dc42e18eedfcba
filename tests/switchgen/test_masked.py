"""Barred candidates: left out everywhere, or guarded by the prompt."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from reference import Ladder, make_ladder

from switchgen import DecodingConfig, Query, generate
from switchgen.api import check_policy, make_policy
from switchgen.assembly import guarded
from switchgen.config import GuardConfig, PolicyConfig, Recipe
from switchgen.errors import ConfigError
from switchgen.guard import guard_mask
from switchgen.policies.masked import MaskedPolicy, masked, probabilities
from switchgen.rows import Row

QUESTIONS = [Query.from_text(f"How old is number {index}?", id=str(index)) for index in range(12)]
DECODING = DecodingConfig(max_new_tokens=16, segment=4)


@pytest.fixture(scope="module")
def ladder() -> Ladder:
    return make_ladder(switcher="llama")


def rows(ladder: Ladder, count: int = 12) -> list[Row]:
    return [Row(ladder.pool, QUESTIONS[index % 12], index) for index in range(count)]


def guard(**settings: Any) -> Recipe:
    pool = [{"name": f"c{index}", "model": "x"} for index in range(3)]
    return Recipe.model_validate({"pool": pool, "policy": {"guard": settings}})


def test_what_is_left_is_scaled_to_one() -> None:
    probs_NC = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [0.2, 0.2, 0.6]], dtype=torch.float64)
    left_NC = masked(probs_NC, [frozenset({1, 2}), frozenset({1, 2}), None])
    expected = torch.tensor([[0.0, 0.6, 0.4], [0.0, 0.5, 0.5], [0.2, 0.2, 0.6]], dtype=torch.float64)
    torch.testing.assert_close(left_NC, expected)


@pytest.mark.parametrize("policy", ["random", "switcher", "segment-rand@0.4", "response-rand@0.4"])
def test_an_open_mask_changes_nothing(ladder: Ladder, policy: str) -> None:
    inner = make_policy(policy, ladder.pool, switcher=ladder.switcher, top_p=0.7)
    open_mask = MaskedPolicy(inner, lambda row: None)  # type: ignore[arg-type]
    if policy.endswith("rand@0.4"):  # the two models stand in the other order there: shares, not draws, are the same
        assert abs(Counter(open_mask.choose(rows(ladder, 2000)).writers)[0] - 800) < 100
    else:
        assert open_mask.choose(rows(ladder)).writers == inner.choose(rows(ladder)).writers  # type: ignore[union-attr]


def test_left_out_candidates_never_write(ladder: Ladder) -> None:
    for name in ("random~c0", "switcher~c2", "untuned~c0~c1"):
        policy = make_policy(name, ladder.pool, switcher=ladder.switcher, top_p=1.0)
        barred = {int(part[1]) for part in name.split("~")[1:]}
        traces = generate(ladder.pool, QUESTIONS, policy, decoding=DECODING)
        written = {writer for trace in traces for writer in trace.writers}
        assert written == {0, 1, 2} - barred if name.startswith("random") else written <= {0, 1, 2} - barred
        assert policy.name == name and set(policy.writers(3)) == {0, 1, 2} - barred
    switcher = make_policy("switcher", ladder.pool, switcher=ladder.switcher)
    without = make_policy("switcher~c1", ladder.pool, switcher=ladder.switcher)
    p_NC = probabilities(switcher, rows(ladder))  # type: ignore[arg-type]
    left_NC = without.choose(rows(ladder)).scores_NC  # type: ignore[union-attr]
    torch.testing.assert_close(left_NC[:, 0] / left_NC[:, 2], p_NC[:, 0] / p_NC[:, 2])
    assert float(left_NC[:, 1].max()) == 0.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random~c7", "after ~ stands a candidate to leave out, got 'c7'"),
        ("random~c0~c1~c2", "leaves out every candidate"),
        ("baco-punc~c0", "left out of segment policies only"),
        ("c1~c0", "left out of segment policies only"),
        ("majority@3~c0", "segment policies only|whole number"),
    ],
)
def test_names_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_policy(name, ["c0", "c1", "c2"])


def test_a_guard_bars_by_the_prompt(ladder: Ladder) -> None:
    patterns = {"harmful": ["number [0-4]"], "odd": ["number 7"]}
    recipe = guard(patterns=patterns, allow={"harmful": ["c2"], "odd": ["c0", "c1"]})
    for name in ("random", "switcher"):
        policy = guarded(make_policy(name, ladder.pool, switcher=ladder.switcher, top_p=1.0), recipe, ladder.pool)
        traces = generate(ladder.pool, QUESTIONS, policy, decoding=DECODING)
        assert {writer for trace in traces[:5] for writer in trace.writers} == {2}
        assert set(traces[7].writers) <= {0, 1}
        free = {writer for trace in traces[8:] for writer in trace.writers}
        assert free == {0, 1, 2} if name == "random" else free - {2}
    alone = make_policy("c0", ladder.pool)
    assert guarded(alone, recipe, ladder.pool) is alone
    with pytest.raises(ConfigError, match="'refine': policy.guard bars writers of segments"):
        guarded(make_policy("refine", ladder.pool), recipe, ladder.pool)
    both = guarded(make_policy("random~c1", ladder.pool), recipe, ladder.pool)
    traces = generate(ladder.pool, QUESTIONS, both, decoding=DECODING)
    assert {writer for trace in traces[:5] for writer in trace.writers} == {2} and set(traces[7].writers) == {0}


def test_a_guard_tells_conversations_of_one_text_apart(ladder: Ladder) -> None:
    """As plain text both are the same; the user's last message, which the patterns read, is not."""
    turns = ({"role": "system", "content": "Fine."}, {"role": "user", "content": "Now what?"})
    conversation = Query("0", turns)
    message = Query.from_text(conversation.text)
    assert message.text == conversation.text
    mask = guard_mask(GuardConfig(patterns={"system": ["^System"]}, allow={"system": ["c1"]}), ladder.pool.names)
    for _ in range(2):
        assert mask(Row(ladder.pool, conversation, 0)) is None
        assert mask(Row(ladder.pool, message, 0)) == {1}


def classify_by_length(messages: list[dict[str, str]]) -> str | None:
    """A user's own classifier."""
    text = messages[-1]["content"]
    return "strange" if "strange" in text else "long" if len(text) > 30 else None


def test_a_guard_of_ones_own(ladder: Ladder) -> None:
    mask = guard_mask(GuardConfig(classify=f"{__name__}:classify_by_length", allow={"long": ["c1"]}), ladder.pool.names)
    long, short = Query.from_text("How old is the one called number 1?"), QUESTIONS[0]
    assert mask(Row(ladder.pool, long, 0)) == {1} and mask(Row(ladder.pool, short, 0)) is None
    with pytest.raises(ConfigError, match="returned 'strange' for query '0'; allowed: None, long"):
        mask(Row(ladder.pool, Query.from_text("strange"), 0))
    for place in ("no_such_module:f", f"{__name__}:nothing"):
        with pytest.raises(ConfigError, match="cannot be imported"):
            guard_mask(GuardConfig(classify=place, allow={"long": ["c1"]}), ladder.pool.names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"allow": {"a": ["c0"]}}, "a guard has patterns or classify"),
        ({"allow": {"a": []}, "patterns": {"a": ["x"]}}, "class 'a' has no candidates"),
        ({"allow": {"a": ["c0"]}, "patterns": {"b": ["x"]}}, "class 'b' is not in allow"),
        ({"allow": {"a": ["c0"]}, "patterns": {"a": ["("]}}, "no regular expression"),
        ({"allow": {"a": ["c9"]}, "patterns": {"a": ["x"]}}, "policy.guard.allow: no candidate is called 'c9'"),
    ],
)
def test_guards_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guard(**settings)
    assert PolicyConfig().guard is None
