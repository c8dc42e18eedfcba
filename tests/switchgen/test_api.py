"""The public API: what people call from Python."""

from __future__ import annotations

from pathlib import Path

import pytest
from ladders import make_tokenizer, save_ladder
from reference import Ladder, make_ladder

import switchgen
from switchgen import CandidateConfig, DecodingConfig, Pool, Query, SwitcherConfig, decide, generate, generate_stream
from switchgen.api import response_seed
from switchgen.errors import ConfigError
from switchgen.policies import FixedPolicy
from switchgen.vocabulary import Vocabulary

DECODING = DecodingConfig(max_new_tokens=16, segment=4, temperature=1.0)


@pytest.fixture(scope="module")
def ladder() -> Ladder:
    return make_ladder(switcher="llama")


def test_from_disk_to_text(tmp_path: Path) -> None:
    """The documented example: load, generate, ask who is next."""
    folder = save_ladder(tmp_path)
    names = ("base", "tuned", "aligned")
    pool = Pool.load([CandidateConfig(name=name, model=str(folder / name)) for name in names])
    switcher = pool.load_switcher(SwitcherConfig(base="aligned"))
    traces = generate(pool, ["How old is Vudak?", "12 + 35"], "switcher", switcher=switcher, decoding=DECODING)
    assert [trace.query.text for trace in traces] == ["How old is Vudak?", "12 + 35"]
    for trace in traces:
        assert trace.finish in ("eos", "length")
        assert "".join(segment.text for segment in trace.segments) == trace.text
    signed = [(pool.names[segment.writer], segment.text) for segment in traces[0].segments]
    p = decide(pool, switcher, "How old is Vudak?", signed)
    assert list(p) == list(names) and sum(p.values()) == pytest.approx(1.0)


def test_responses_depend_on_seed_and_id_alone(ladder: Ladder) -> None:
    queries = [Query.from_text(f"Question {index}", f"id{index}") for index in range(7)]
    traces = generate(ladder.pool, queries, "random", decoding=DECODING, seed=3)
    assert [trace.query.id for trace in traces] == [query.id for query in queries]
    again = generate(ladder.pool, queries[::-1][:4], "random", decoding=DECODING, seed=3, max_rows=2)
    assert [trace.segments for trace in again] == [trace.segments for trace in traces[::-1][:4]]
    other = generate(ladder.pool, queries, "random", decoding=DECODING, seed=4)
    assert [trace.text for trace in other] != [trace.text for trace in traces]
    assert traces[0].seed == response_seed(3, "id0")
    renamed = generate(ladder.pool, [Query.from_text("Question 0", "else")], "random", decoding=DECODING, seed=3)
    assert renamed[0].text != traces[0].text


def test_a_stream_yields_as_rows_finish(ladder: Ladder) -> None:
    taken = []

    def queries():  # type: ignore[no-untyped-def]
        for index in range(6):
            taken.append(index)
            yield f"Question {index}"

    stream = generate_stream(ladder.pool, queries(), "random", decoding=DECODING, max_rows=2)
    first = next(stream)
    assert first.finish is not None and len(taken) < 6  # queries are taken as room becomes free
    rest = list(stream)
    assert sorted(trace.query.id for trace in [first, *rest]) == [str(index) for index in range(6)]
    whole = generate(ladder.pool, [f"Question {index}" for index in range(6)], "random", decoding=DECODING)
    assert {trace.query.id: trace.text for trace in [first, *rest]} == {trace.query.id: trace.text for trace in whole}


def test_no_queries_no_responses(ladder: Ladder) -> None:
    assert generate(ladder.pool, [], "random", decoding=DECODING) == []


def test_a_policy_object_will_do(ladder: Ladder) -> None:
    (trace,) = generate(ladder.pool, ["q"], FixedPolicy(2, "mine"), decoding=DECODING)
    assert set(trace.writers) == {2}


def test_mistakes_are_named(ladder: Ladder) -> None:
    with pytest.raises(ConfigError, match="two queries have the same id"):
        generate(ladder.pool, [Query.from_text("a", "x"), Query.from_text("b", "x")], "random")
    with pytest.raises(ConfigError, match="unknown policy 'rnadom' .*did you mean 'random'"):
        generate(ladder.pool, ["a"], "rnadom")
    with pytest.raises(ConfigError, match="needs a switcher model"):
        generate(ladder.pool, ["a"], "switcher")
    with pytest.raises(ConfigError, match="queries is one string; allowed: a list"):
        generate(ladder.pool, "How old?", "random")
    with pytest.raises(ConfigError, match="no candidate is called 'nobody'"):
        generate(ladder.pool, ["a"], "random", decoding=DecodingConfig(last="nobody"))


def test_a_switcher_of_another_pool_is_refused(ladder: Ladder) -> None:
    smaller = make_ladder(["llama", "llama"])
    assert ladder.switcher is not None
    message = r"the switcher chooses between 3 candidates, the pool has 2 \(c0, c1\)"
    with pytest.raises(ConfigError, match=message):
        generate(smaller.pool, ["a"], "switcher", switcher=ladder.switcher)
    with pytest.raises(ConfigError, match=message):
        decide(smaller.pool, ladder.switcher, "a")


def test_a_query_that_does_not_fit_stands_in_its_place() -> None:
    narrow = make_ladder(max_positions=120)
    traces = generate(narrow.pool, ["a", "xyz " * 200, "b"], "random", decoding=DECODING)
    assert [trace.finish == "too_long" for trace in traces] == [False, True, False]
    assert traces[1].segments == [] and traces[1].text == ""


def test_public_names() -> None:
    for name in switchgen.__all__:
        assert getattr(switchgen, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        switchgen.nothing  # noqa: B018


@pytest.mark.parametrize("policy", ["random", "switcher", "baco-rand@0.5"])
def test_a_stream_that_is_not_read_to_its_end(policy: str) -> None:
    """Its rows in flight kept their caches."""
    both = make_ladder(["llama", "llama"], switcher="llama", vocabularies=[Vocabulary(make_tokenizer(), "one")] * 2)
    assert both.switcher is not None
    engines = [both.switcher.engine, *(candidate.engine for candidate in both.pool)]

    def held() -> list[object]:
        return [owner for engine in engines for owner in engine.table.owners if owner is not None]

    long = DECODING.model_copy(update={"max_new_tokens": 64})
    queries = [f"How old is number {row}?" for row in range(12)]
    stream = generate_stream(both.pool, queries, policy, decoding=long, switcher=both.switcher, max_rows=4)
    while not held():
        next(stream)
    stream.close()
    assert not held()
