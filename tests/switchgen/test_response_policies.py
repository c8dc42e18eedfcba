"""Policies over whole responses: drafts are what candidates write alone; which of them is the response; who pays."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from ladders import make_tokenizer
from reference import Ladder, make_ladder

from switchgen import DecodingConfig, Query, Trace, generate
from switchgen.api import check_policy, make_policy
from switchgen.config import BaselinesConfig
from switchgen.errors import ConfigError
from switchgen.likelihood import likelihoods
from switchgen.policies.responses import draft_seed, parse_response_policy
from switchgen.records import response_record, usage_of
from switchgen.rows import Row
from switchgen.scoring.voting import AnswerForm, answer_key
from switchgen.tasks import Example, Task
from switchgen.trace import Segment
from switchgen.vocabulary import Vocabulary

QUESTIONS = [Query.from_text(f"How old is number {index}?", id=str(index)) for index in range(6)]
DECODING = DecodingConfig(max_new_tokens=24, segment=7)


@pytest.fixture(scope="module")
def ladder() -> Ladder:
    return make_ladder()


def write(ladder: Ladder, policy: str, settings: BaselinesConfig | None = None) -> list[Trace]:
    chosen = make_policy(policy, ladder.pool, baselines=settings)
    return generate(ladder.pool, QUESTIONS, chosen, decoding=DECODING, max_rows=4)


def likelihood(ladder: Ladder, candidate: int, trace: Trace) -> float:
    judge = ladder.pool.candidates[candidate]
    found = likelihoods(judge, [(judge.prompt_ids(trace.query), judge.vocabulary.encode_text(trace.text))])[0]
    return -math.inf if found is None else found.per_token


@pytest.mark.parametrize("policy", ["best-of@1", "majority+c2@1", "cascade+c2@1"])
def test_one_draft_is_the_candidate_alone(ladder: Ladder, policy: str) -> None:
    alone, one = write(ladder, "c2"), write(ladder, policy)
    assert [trace.segments for trace in one] == [trace.segments for trace in alone]
    assert all(trace.drafts == [] for trace in one)


def test_the_best_of_n_is_the_likeliest_and_all_are_paid_for(ladder: Ladder) -> None:
    names = ladder.pool.names
    chosen = write(ladder, "best-of@4")
    for trace in chosen:
        drafts = [trace, *trace.drafts]
        assert len(drafts) == 4 and all(set(draft.writers) == {2} for draft in drafts)
        assert likelihood(ladder, 2, trace) == max(likelihood(ladder, 2, draft) for draft in drafts)
        usage = usage_of(trace, names)
        assert usage["new_tokens"] == usage["by_writer"]["c2"] == sum(draft.num_tokens for draft in drafts)
        record = response_record(trace, names)
        assert record["output"] == trace.text and len(record["drafts"]) == 3
        assert record["drafts"][0]["writers"] == ["c2"] * len(trace.drafts[0].writers)
    assert any(trace.text != alone.text for trace, alone in zip(chosen, write(ladder, "c2"), strict=True))
    assert "drafts" not in response_record(write(ladder, "c2")[0], names)


def test_drafts_are_different_and_depend_on_the_row_alone(ladder: Ladder) -> None:
    together = write(ladder, "best-of@3")
    policy = make_policy("best-of@3", ladder.pool)
    alone = generate(ladder.pool, QUESTIONS[3:4], policy, decoding=DECODING)
    assert alone[0].segments == together[3].segments
    texts = {draft.text for draft in (together[3], *together[3].drafts)}
    assert len(texts) == 3
    assert draft_seed(7, 0) == 7 and len({draft_seed(7, number) for number in range(5)}) == 5


def test_another_scorer_chooses_otherwise(ladder: Ladder) -> None:
    for trace in write(ladder, "best-of+c0+c1@4", BaselinesConfig(scorer="c1")):
        drafts = [trace, *trace.drafts]
        assert sorted(draft.writers[0] for draft in drafts) == [0, 0, 1, 1]
        assert likelihood(ladder, 1, trace) == max(likelihood(ladder, 1, draft) for draft in drafts)


class Scripted:
    """Stands in for the loop: every draft's text is given."""

    def __init__(self, ladder: Ladder, *rounds: list[str]) -> None:
        self.ladder, self.rounds = ladder, list(rounds)
        self.asked: list[tuple[str, int]] = []

    def __call__(self, asks: list) -> list[Trace]:  # type: ignore[type-arg]
        texts = self.rounds.pop(0)
        traces = []
        for ask, text in zip(asks, texts, strict=True):
            self.asked.append((ask.query.text, ask.writer))
            ids = tuple(self.ladder.pool.candidates[ask.writer].vocabulary.encode_text(text))
            trace = Trace(ask.query, ask.seed, [Segment(ask.writer, text, ids, "eos")], "eos")
            traces.append(trace)
        return traces


def respond(ladder: Ladder, policy: str, *rounds: list[str], **settings: str) -> tuple[Row, Scripted]:
    row = Row(ladder.pool, QUESTIONS[0], 1)
    script = Scripted(ladder, *rounds)
    make_policy(policy, ladder.pool, baselines=BaselinesConfig(**settings)).respond([row], script)  # type: ignore[union-attr, arg-type]
    return row, script


@pytest.mark.parametrize(
    ("drafts", "chosen"),
    [
        (["Answer: 4", "Answer: 5", "So it is 5. Answer: 5"], 1),
        (["The answer is 5.", "five", "Answer: 7"], 0),  # numbers by value
        (["Answer: 4", "Answer: 5", "Answer: 6"], 0),  # a tie: the earliest
        (["", "", "Answer: 6"], 2),  # who says nothing does not vote
        (["", "", ""], 0),
        (["long thoughts\nPARIS", "london", "the answer is Paris!"], 0),
    ],
)
def test_the_majority(ladder: Ladder, drafts: list[str], chosen: int) -> None:
    row, script = respond(ladder, "majority@3", drafts)
    assert row.trace.text == drafts[chosen]
    assert [writer for _, writer in script.asked] == [0, 1, 2]
    assert [draft.text for draft in row.trace.drafts] == [text for i, text in enumerate(drafts) if i != chosen]


def test_answers_are_equal_by_what_they_say() -> None:
    assert answer_key("So 2 + 3. The answer is 5.0.") == answer_key("Answer: five") == answer_key("\\boxed{5}")
    assert answer_key("Answer: Moon.") == answer_key("well,\nMoon")
    assert answer_key("Answer: 5") != answer_key("Answer: 6")
    assert answer_key("  \n ") is None
    assert answer_key("3 apples cost $2 each so the total is $6.") == answer_key("Answer: 6")


def test_votes_are_read_as_the_task_scores_them(ladder: Ladder) -> None:
    """The label votes, not its wording; the marker announces; the marker alone where the task is strict."""
    choices = {"A": "Rome", "B": "Paris"}
    texts = ("B", "B. Paris", "Answer: (B)", "Paris")
    assert {answer_key(text, AnswerForm(choices=choices)) for text in texts} == {"B"}
    assert answer_key("Who knows?", AnswerForm(choices=choices)) is None
    total = AnswerForm("The total:", metric="number")
    assert answer_key("The total: 5 eggs, of 7", total) == answer_key("2 + 3\nThe total: five\nBye 1!", total) == "5"
    assert answer_key("So it is 7.\nHope this helps!", AnswerForm(metric="number")) == "7"
    assert answer_key("I say 7", AnswerForm("Answer:", strict=True)) is None
    assert answer_key("Apollo 11", AnswerForm(metric="f1")) == "apollo 11"
    halves = {answer_key(text, AnswerForm(metric="math")) for text in ("\\boxed{\\frac{1}{2}}", "Answer: 0.5")}
    assert halves == {"1/2"} and answer_key("Answer: 2 \\sin b", AnswerForm(metric="math")) != "2"
    task = Task("t", "multiple_choice", (), "The total:")
    example = Example("1", ({"role": "user", "content": "Where?"},), {"choices": choices, "answer": "B"})
    assert task.form(example) == AnswerForm("The total:", choices=choices, metric="multiple_choice")
    row = Row(ladder.pool, replace(QUESTIONS[0], form=task.form(example)), 1)
    policy = make_policy("majority@3", ladder.pool)
    policy.respond([row], Scripted(ladder, ["Rome", "The total: B", "The total: B. Paris"]))  # type: ignore[union-attr]
    assert row.trace.text == "The total: B"


def test_lettered_options_of_a_query_are_choices() -> None:
    task = Task("t", "string", ())
    listed = Example("1", ({"role": "user", "content": "Which?\n(A) red\n(B) blue"},), {"output": "(B)"})
    assert task.form(listed).choices == {"A": "red", "B": "blue"}


def test_the_rewriter_reads_the_draft(ladder: Ladder) -> None:
    row, script = respond(ladder, "refine", ["a {query} draft"], ["the response"], refine="Q {query} D {draft} E")
    assert script.asked == [("How old is number 0?", 0), ("Q How old is number 0? D a {query} draft E", 2)]
    assert row.trace.text == "the response" and [draft.text for draft in row.trace.drafts] == ["a {query} draft"]
    assert row.trace.query.text == "How old is number 0?"
    _, script = respond(ladder, "refine+c1+c0", ["x"], ["y"])
    assert [writer for _, writer in script.asked] == [1, 0]


def test_a_cascade_stops_at_the_first_sure_response(ladder: Ladder) -> None:
    sure = []
    for writer, trace in enumerate([write(ladder, f"c{index}")[0] for index in range(3)]):
        judge = ladder.pool.candidates[writer]
        ids = [index for segment in trace.segments for index in segment.ids]
        found = likelihoods(judge, [(judge.prompt_ids(trace.query), ids)])[0]
        assert found is not None
        sure.append(math.exp(found.per_token))
    first = write(ladder, f"cascade@{sure[0] - 1e-6}")[0]
    assert first.segments == write(ladder, "c0")[0].segments and first.drafts == []
    later = write(ladder, f"cascade@{sure[0] + 1e-6}")[0]
    assert later.writers[0] > 0 and later.drafts[0].segments == first.segments
    assert {trace.writers[0] for trace in write(ladder, "cascade@1")} == {2}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("best-of", "after @ stands a whole number of responses, e.g. best-of@4"),
        ("best-of@2.5", "after @ stands a whole number"),
        ("majority@0", "after @ stands a whole number"),
        ("cascade@1.2", "after @ stands a mean probability from 0 to 1"),
        ("refine@2", "write refine, or refine[+]DRAFTER[+]REWRITER"),
        ("refine+c1", "write refine, or refine[+]DRAFTER[+]REWRITER"),
        ("best-of+c9@2", "no candidate is called 'c9'"),
    ],
)
def test_names_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_policy(name, ["c0", "c1", "c2"])


def test_names_taken_apart() -> None:
    parsed = parse_response_policy("majority+a-1+b@5", ["a-1", "b"])
    assert (parsed.rule, parsed.names, parsed.value) == ("majority", ("a-1", "b"), 5.0)


def test_first_and_last_writers_mean_nothing_here(ladder: Ladder) -> None:
    decoding = DECODING.model_copy(update={"last": "c2"})
    with pytest.raises(ConfigError, match="'refine' has no segments: decoding.last must be null"):
        generate(ladder.pool, QUESTIONS, "refine", decoding=decoding)


def test_queries_beyond_the_context(ladder: Ladder) -> None:
    long = Query.from_text("Vudak " * 3000, id="long")
    for policy in ("best-of@2", "majority@3", "refine", "cascade@0.5"):
        traces = generate(ladder.pool, [long, QUESTIONS[0]], policy, decoding=DECODING)
        assert [trace.finish == "too_long" for trace in traces] == [True, False]


def test_routing_asks_once_and_stays() -> None:
    ladder = make_ladder(switcher="llama")
    assert ladder.switcher is not None
    for name in ("routing", "prompted-routing"):
        policy = make_policy(name, ladder.pool, switcher=ladder.switcher, top_p=1.0)
        traces = generate(ladder.pool, QUESTIONS, policy, decoding=DECODING)
        assert all(len(set(trace.writers)) == 1 for trace in traces)
        assert any(len(trace.writers) > 1 for trace in traces)
        for trace in traces:
            assert len({segment.scores for segment in trace.segments}) == 1
    routed = make_policy("routing", ladder.pool, switcher=ladder.switcher, top_p=1.0)
    switched = make_policy("switcher", ladder.pool, switcher=ladder.switcher, top_p=1.0)
    rows = [Row(ladder.pool, query, seed) for seed, query in enumerate(QUESTIONS)]
    again = [Row(ladder.pool, query, seed) for seed, query in enumerate(QUESTIONS)]
    first = routed.choose(rows)  # type: ignore[union-attr]
    assert first.writers == switched.choose(again).writers  # type: ignore[union-attr]
    prompted = make_policy("prompted-routing", ladder.pool, switcher=ladder.switcher)
    assert prompted.switcher.prompt.question_ids != ladder.switcher.prompt.question_ids  # type: ignore[union-attr]
    others = prompted.choose([Row(ladder.pool, query, seed) for seed, query in enumerate(QUESTIONS)])  # type: ignore[union-attr]
    assert others.scores_NC is not None and first.scores_NC is not None
    assert not torch.allclose(others.scores_NC, first.scores_NC)


def test_contrast_by_hand() -> None:
    """Greedy: the largest (1 + γ) l_aligned - γ l_base among what is plausible to the aligned model."""
    chat = Vocabulary(make_tokenizer(), "chat")
    pair = make_ladder(("llama", "llama"), vocabularies=[chat, chat])
    decoding = DecodingConfig(max_new_tokens=12, segment=12, temperature=0)
    for gamma in (0.0, 0.5, 3.0):
        trace = generate(pair.pool, QUESTIONS[:1], f"contrast@{gamma}", decoding=decoding)[0]
        assert set(trace.writers) == {1}
        ids: list[int] = []
        for _ in range(12):
            base_V, aligned_V = (
                plain.logits([*candidate.prompt_ids(QUESTIONS[0]), *ids])
                for plain, candidate in zip(pair.plain, pair.pool.candidates, strict=True)
            )
            aligned_V[pair.plain[1].banned] = -torch.inf
            plausible_V = torch.softmax(aligned_V, -1) >= 0.1 * torch.softmax(aligned_V, -1).max() * (1 - 1e-12)
            mixed_V = torch.where(plausible_V, (1 + gamma) * aligned_V - gamma * base_V, -torch.inf)
            token = int(mixed_V.argmax())
            if token in pair.pool.candidates[1].engine.stop_ids:
                break
            ids.append(token)
        written = [index for segment in trace.segments for index in segment.ids]
        assert written[:12] == ids  # a character may go on beyond the limit
