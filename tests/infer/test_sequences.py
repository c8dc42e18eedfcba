"""Speaker sequences: counted by hand, an effect planted and found, none found where there is none; who helps."""

from __future__ import annotations

import numpy as np
import pytest

from infer.sequences import Spoken, helpfulness_of, sequence_effects


def test_counted_by_hand() -> None:
    responses = [
        Spoken("t", "1", ("a", "b", "a"), 1.0),
        Spoken("t", "2", ("a", "b", "b"), 0.0),
        Spoken("t", "3", ("b",), 0.0),
        Spoken("t", "4", ("a", "b", "a", "b"), 1.0),
    ]
    effects = {one.writers: one for one in sequence_effects(responses)}
    assert effects["a", "b"].count == 3 and effects["a", "b"].share == 0.75
    assert effects["a", "b"].effect == pytest.approx(2 / 3)  # (1 + 0 + 1) / 3 against 0
    assert effects["b", "a"].effect == pytest.approx(1.0)
    assert effects["a", "b", "a"].count == 2 and effects["b", "a", "b"].count == 1
    assert [len(one.writers) for one in sequence_effects(responses)] == sorted(len(w) for w in effects)


def test_an_easy_tasks_sequence_is_not_a_good_one() -> None:
    """All of the easy task's responses score 1, of the hard one's 0; the sequence is frequent on the easy one."""
    easy = [Spoken("easy", str(i), ("a", "b") if i < 9 else ("a", "a"), 1.0) for i in range(10)]
    hard = [Spoken("hard", str(i), ("a", "b") if i < 1 else ("a", "a"), 0.0) for i in range(10)]
    effect = next(one for one in sequence_effects([*easy, *hard]) if one.writers == ("a", "b"))
    assert effect.effect == 0.0


def test_a_planted_effect_is_covered_and_none_where_there_is_none() -> None:
    rng = np.random.default_rng(0)
    inside = {0.3: 0, 0.0: 0}
    for planted in inside:
        for trial in range(200):
            responses = []
            for question in range(60):
                treated = bool(rng.random() < 0.5)
                score = float(rng.random() < 0.4 + planted * treated)
                responses.append(Spoken("t", str(question), ("a", "b") if treated else ("b", "a"), score))
            effects = sequence_effects(responses, lengths=(2,), num_resamples=300, seed=trial)
            one = next(effect for effect in effects if effect.writers == ("a", "b"))
            assert one.low is not None and one.high is not None
            inside[planted] += one.low <= planted <= one.high
    assert all(0.90 <= count / 200 <= 0.985 for count in inside.values()), inside


def test_tasks_are_resampled_independently() -> None:
    """Twice the questions, in two tasks: half the variance, not the same draws in both."""
    rng = np.random.default_rng(1)

    def task(name: str) -> list[Spoken]:
        return [Spoken(name, str(i), ("a", "b") if i % 2 else ("b", "a"), float(rng.random() < 0.5)) for i in range(80)]

    def width(responses: list[Spoken]) -> float:
        one = next(e for e in sequence_effects(responses, lengths=(2,), num_resamples=4000) if e.writers == ("a", "b"))
        assert one.low is not None and one.high is not None
        return one.high - one.low

    alone = task("one")
    copied = [Spoken("two", one.question, one.writers, one.score) for one in alone]
    assert width([*alone, *copied]) / width(alone) == pytest.approx(0.5**0.5, abs=0.06)


def test_always_or_never_has_no_effect() -> None:
    always = sequence_effects([Spoken("t", str(i), ("a", "b"), float(i % 2)) for i in range(6)])
    assert [(one.share, one.effect, one.low) for one in always] == [(1.0, None, None)]
    assert sequence_effects([Spoken("t", "1", ("a",), 1.0)]) == []


def test_who_helps() -> None:
    comparison = {"policy": "switcher", "task": "mean", "difference": 0.2, "low": 0.1, "high": 0.3, "p": 0.01}
    results = {
        "rows": [{"policy": "base", "task": "mean", "seed": None, "value": 0.31},
                 {"policy": "base", "task": "mean", "seed": 0, "value": 0.9}],
        "comparisons": [{**comparison, "against": "switcher~base"}, {**comparison, "against": "aligned"},
                        {**comparison, "against": "switcher~base", "task": "sums"}],
    }  # fmt: skip
    (helps,) = helpfulness_of(results)
    assert (helps.policy, helps.candidate, helps.helps, helps.alone) == ("switcher", "base", 0.2, 0.31)
