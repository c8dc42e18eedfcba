"""Racing: what the gamblers say, what is spent, and that the guarantees hold on planted means."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rollout.budgets import Budget, RacingBudget, UniformBudget, Verdict
from rollout.questions import warn_of_budget
from rollout.racing import Race, smallest_margin, wealth
from rollout.stage import main
from switchgen.config import RacingConfig, RolloutConfig
from switchgen.errors import ConfigError
from switchgen.records import label_record
from switchgen.rundir import Run
from switchgen.trace import Query

DEFAULT = RacingConfig()
Planted = Callable[[random.Random], list[float]]


def race(
    budget: Budget, scores: Sequence[Sequence[float]], ended: Sequence[bool] = (False,) * 3
) -> tuple[Verdict, list[int]]:
    """Spend a budget on scores that are there already; the verdict and each branch's completions."""
    seen: list[list[float]] = [list(own) if over else [] for own, over in zip(scores, ended, strict=True)]
    while any(more := budget.more(seen, ended)):
        seen = [
            list(own[: len(got) + count]) if count else got for own, got, count in zip(scores, seen, more, strict=True)
        ]
    return budget.verdict(seen, ended), [len(got) for got in seen]


def completions(rng: random.Random, means: Sequence[float], count: int, paired: float) -> list[list[float]]:
    """0/1 scores of these means; a share of the j-th ones has its random number in common."""
    columns = []
    for _ in range(count):
        shared = rng.random()
        columns.append([float((shared if rng.random() < paired else rng.random()) < mean) for mean in means])
    return [list(row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5])
def test_the_gambler_cannot_win_a_lost_game(margin: float) -> None:
    """Where the mean is exactly -margin, expected wealth stays 1: summed over every outcome of six pairs."""
    for down, level, up in ((0.5 + margin / 2, 0.0, 0.5 - margin / 2), (0.4 + margin / 2, 0.2, 0.4 - margin / 2)):
        chances = {-1.0: down, 0.0: level, 1.0: up}
        expected = sum(
            math.prod(chances[value] for value in values) * wealth(values, margin)
            for values in itertools.product(chances, repeat=6)
        )
        assert expected == pytest.approx(1.0)
        assert all(wealth(values, margin) >= 0 for values in itertools.product(chances, repeat=6))


def test_scores_that_are_alike_end_as_a_tie_early() -> None:
    for value in (0.0, 1.0):
        verdict, counts = race(RacingBudget(DEFAULT), [[value] * 32] * 3)
        assert verdict.outcome == "tie" and verdict.confidence == 0.0
        # (1 - margin)^-n with four fifths of the money reaches 1 / (1 - confidence).
        needed = math.ceil(math.log(1 / (1 - DEFAULT.confidence) / 0.8) / -math.log(1 - DEFAULT.margin))
        assert counts[0] == counts[1] == counts[2] <= needed + DEFAULT.step
    coarse = RacingConfig(margin=0.5, confidence=0.8)
    assert race(RacingBudget(coarse), [[0.0] * 32] * 3)[1] == [4, 4, 4]


def test_a_clear_winner_ends_at_once_and_losers_drop_out() -> None:
    verdict, counts = race(RacingBudget(DEFAULT), [[0.0] * 32, [1.0] * 32, [0.0] * 32])
    assert (verdict.label, verdict.outcome) == (1, "winner") and counts == [4, 4, 4]
    # Two that are hard to tell apart, and one that loses: it gets no more once it is ruled out.
    close = [[1.0, 0.0] * 16, [0.0, 1.0] * 16, [0.0] * 32]
    verdict, counts = race(RacingBudget(RacingConfig(margin=0.05)), close)
    assert verdict.label in (0, 1)
    assert counts[0] == counts[1] == 32 > counts[2]


def test_who_is_no_better_than_the_leader_waits_and_goes_on_when_another_leads() -> None:
    budget = RacingBudget(RacingConfig(start=4, step=2, margin=0.3, confidence=0.8))
    none = [False] * 3
    # 0 is no worse than 2 in all four pairs: 2 waits. 1 may yet be better than 0.
    scores = [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]]
    assert budget.more(scores, none) == [2, 2, 0]
    scores = [[*scores[0], 0.0, 0.0], [*scores[1], 0.0, 1.0], scores[2]]
    # 1 leads; that it is no worse than 2 has not been shown, so 2 catches up before anybody else goes on.
    assert Race(scores, none).unsettled([0, 1, 2], 0.3, 0.8) == [0, 2]
    assert budget.more(scores, none) == [0, 0, 2]
    assert race(budget, [[*own, *[0.0] * 26] for own in scores])[0].label == 1


def test_a_branch_that_ended_is_certain() -> None:
    budget = RacingBudget(DEFAULT)
    assert race(budget, [[1.0], [0.0], [0.0]], [True] * 3)[0] == Verdict(0, "winner", 1.0)
    assert race(budget, [[1.0], [1.0], [0.0]], [True] * 3)[0].outcome == "tie"
    verdict, counts = race(budget, [[1.0], [0.0] * 32, [0.0] * 32], [True, False, False])
    assert (verdict.label, verdict.outcome, counts) == (0, "winner", [1, 4, 4])


def test_a_single_distinct_candidate_needs_one_completion() -> None:
    verdict, counts = race(RacingBudget(DEFAULT), [[0.5] * 32], [False])
    assert counts == [1] and verdict.label == 0


def test_the_smallest_margin_is_where_a_race_of_equals_can_end() -> None:
    for most in (8, 32, 64):
        margin = smallest_margin(most, 0.9)
        for value, outcome in ((margin + 1e-6, "tie"), (margin - 1e-6, "budget")):
            budget = RacingBudget(RacingConfig(max=most, margin=value))
            assert race(budget, [[0.0] * most] * 3)[0].outcome == outcome
    assert smallest_margin(32, 0.9) < DEFAULT.margin


def test_unbounded_scores_have_no_confidence() -> None:
    assert Race([[3.0], [-1.0]], [False, False]).confidence(0) is None


def _spread_out(rng: random.Random) -> list[float]:
    return [rng.random() for _ in range(3)]


@pytest.mark.parametrize(
    "planted",
    [lambda rng: [0.5, 0.3, 0.3], lambda rng: [0.2, 0.0, 0.0], lambda rng: [1.0, 0.8, 0.8], _spread_out],
    ids=["half", "rare", "usual", "spread out"],
)
@pytest.mark.parametrize("paired", [0.0, 0.7])
def test_false_winners_and_missed_candidates_stay_below_the_stated_level(planted: Planted, paired: float) -> None:
    rng = random.Random(7)
    states = 600
    missed = 0
    for _ in range(states):
        means = planted(rng)
        rng.shuffle(means)
        verdict, _ = race(RacingBudget(DEFAULT), completions(rng, means, DEFAULT.max, paired))
        missed += verdict.outcome != "budget" and max(means) - means[verdict.label] >= DEFAULT.margin - 1e-9
    # Per pair of candidates; here one candidate is better than two others. Three standard errors of 600 states.
    assert missed / states <= 2 * (1 - DEFAULT.confidence) + 3 * math.sqrt(0.16 / states)
    assert missed / states <= 1 - DEFAULT.confidence + 0.037, "the union's bound is loose: the level itself holds here"


def test_a_budget_that_is_too_small_leaves_most_states_undecided_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is promised for those: with this margin and max a quarter of their labels are wrong by the margin."""
    settings = RacingConfig(margin=0.1, confidence=0.95, max=32)
    rng = random.Random(11)
    ends = [race(RacingBudget(settings), completions(rng, (0.45, 0.55), 32, 0.0), [False] * 2)[0] for _ in range(300)]
    undecided = [verdict.label for verdict in ends if verdict.outcome == "budget"]
    assert len(undecided) > 200 and undecided.count(0) / len(undecided) > 0.15
    assert sum(verdict.label == 0 and verdict.outcome != "budget" for verdict in ends) / len(ends) <= 0.05
    warn_of_budget(RolloutConfig(budget="racing", racing=settings))
    assert "most states will end undecided" in caplog.text
    caplog.clear()
    warn_of_budget(RolloutConfig(budget="racing"))
    assert not caplog.text


def test_racing_spends_less_and_loses_less_than_uniform() -> None:
    """On states as the lab has them: half without any difference, a third clear, the rest in between."""
    rng = random.Random(3)
    kinds: list[tuple[float, Planted]] = [
        (0.5, lambda r: [0.0, 0.0, 0.0]), (0.2, lambda r: [1.0, 0.0, 0.0]), (0.15, lambda r: [1.0, 1.0, 0.0]),
        (0.15, lambda r: [r.random() / 2, 0.0, 0.0]),
    ]  # fmt: skip
    spent = {"racing": 0, "uniform": 0}
    regret = {"racing": 0.0, "uniform": 0.0}
    budgets: dict[str, Budget] = {"racing": RacingBudget(DEFAULT), "uniform": UniformBudget(10)}
    for _ in range(2000):
        [draw] = rng.choices([kind for _, kind in kinds], [weight for weight, _ in kinds])
        means = draw(rng)
        rng.shuffle(means)
        scores = completions(rng, means, 32, 0.5)
        for name, budget in budgets.items():
            verdict, counts = race(budget, scores)
            spent[name] += sum(counts)
            regret[name] += max(means) - means[verdict.label]
    assert spent["racing"] <= spent["uniform"]
    assert regret["racing"] < regret["uniform"]


def test_records_with_different_counts() -> None:
    scores = [[1.0, 0.0, 1.0, 1.0], [0.0, 0.0], [1.0, 0.0, 1.0, 1.0]]
    record = label_record(
        state_id="q/0", query=Query.from_text("?"), task="t", prefix=[], names=("a", "b", "c"), scores=scores,
        tokens=1, label=2, outcome="winner", confidence=0.93,
    )  # fmt: skip
    assert record["counts"] == [4, 2, 4] and record["means"] == [0.75, 0.0, 0.75]
    assert (record["label"], record["margin"], record["tie"]) == (2, 0.0, True)
    assert (record["outcome"], record["confidence"]) == ("winner", 0.93)
    # Ahead of b by the two completions that both have: (1 + 0) / 2.
    alone = label_record(
        state_id="q/0", query=Query.from_text("?"), task="t", prefix=[], names=("a", "b"), scores=scores[:2], tokens=1
    )
    assert alone["margin"] == 0.5


# -- the stage --------------------------------------------------------------------------------------------------------

RACING: dict[str, Any] = {"queries": 6, "states": 2, "budget": "racing"}


def _ages(home: Any) -> dict[str, Any]:
    return {"tasks": [{"file": str(home / "ages.json")}]}


def test_the_stage_races(make_run: Any, home: Any, labels_of: Callable[[Run], dict[str, Any]]) -> None:
    run = make_run("race", rollout={**RACING, "racing": {"start": 2, "step": 1, "max": 7}}, **_ages(home))
    summary = main(run)
    records = labels_of(run)
    assert summary["states"] == len(records) > 6
    budget = RacingBudget(run.recipe.rollout.racing)
    for record in records.values():
        own = [index for index, twin in enumerate(record["twin_of"]) if twin is None]
        scores, ended = ([record[key][index] for index in own] for key in ("scores", "finished"))
        assert not any(budget.more(scores, ended)), "the state ended before its time"
        for index, twin in enumerate(record["twin_of"]):
            assert twin is None or record["scores"][index] == record["scores"][twin]
        assert max(record["counts"]) <= 7
    assert sum(summary["outcomes"].values()) == len(records)
    assert summary["completions_per_branch"] < 7 and summary["tokens_per_state"] > 0
    # Killed in between: the states that are missing come out as they did.
    (run.dir / "rollout" / "summary.json").unlink()
    shard = run.dir / "rollout" / "labels-0.jsonl"
    lines = shard.read_bytes().splitlines(keepends=True)
    shard.write_bytes(b"".join(lines[:3]) + lines[3][:40])
    assert main(run)["command"]["states"] == len(records) - 3
    assert labels_of(run) == records
    uniform = make_run("uniform", rollout={**RACING, "budget": "uniform", "completions": 7}, **_ages(home))
    main(uniform)
    # The same states, and of the same completions the first ones: common random numbers, whatever the budget.
    for name, other in labels_of(uniform).items():
        assert json.dumps(other["segments"]) == json.dumps(records[name]["segments"])
        for ours, theirs in zip(records[name]["scores"], other["scores"], strict=True):
            assert ours == theirs[: len(ours)]


def test_racing_needs_bounded_scores(make_run: Any) -> None:
    with pytest.raises(ConfigError, match=r"racing tests scores between 0 and 1, and a reward model scores tales"):
        main(make_run("run", "rollout.budget=racing"))


def test_a_setting_without_effect_warns(make_run: Any, home: Any, caplog: pytest.LogCaptureFixture) -> None:
    from rollout.questions import load_tasks

    load_tasks(make_run("run", rollout={**RACING, "completions": 5}, **_ages(home)))
    assert "rollout.completions has no effect" in caplog.text
    load_tasks(make_run("run", rollout={"racing": {"start": 2}}, **_ages(home)))
    assert "rollout.racing has no effect" in caplog.text
    load_tasks(make_run("run", rollout={**RACING, "racing": {"margin": 0.05}}, **_ages(home)))
    assert "0.05 is too small for max 32" in caplog.text and "allowed without this warning: 0.142" in caplog.text
