"""The loop against the same loop in its plainest form (`tests/support/reference.py`): token for token, in float64."""

from __future__ import annotations

import pytest
import torch
from ladders import make_tokenizer
from reference import (
    Ladder,
    collaborate,
    context_ids,
    first_difference,
    make_ladder,
    make_policy,
    near_border,
    respond,
)
from vocabularies import make_vocabulary

from switchgen.api import response_seed
from switchgen.config import DecodingConfig
from switchgen.errors import ConfigError
from switchgen.loop import Loop
from switchgen.policies import FixedPolicy, RandomPolicy
from switchgen.prompts import RELEASED
from switchgen.rows import Row
from switchgen.sampling import SamplingParams
from switchgen.segmentation import MAX_WORD_EXTRA
from switchgen.trace import CUE, Query, Trace
from switchgen.vocabulary import MAX_UTF8_EXTRA, Vocabulary

QUERIES = [
    Query.from_text(text, str(index))
    for index, text in enumerate(["How old is Vudak?", "Write a list: apples", "Größe? 東京 🙂 " * 6])
]
POLICIES = [0, "random", "switcher"]
SETTINGS = {
    "fixed length": {},
    "sentences": {"segment": {"tokens": 9, "end": "sentence"}},
    "lines": {"segment": {"tokens": 9, "end": "line"}},
    "eos ends a segment": {"eos": "segment"},
    "first, last and cue": {"first": "c2", "last": "c2", "cue": " The answer is"},
    "last": {"last": "c1", "segment": {"tokens": 6, "end": "sentence"}},
    "unsure by p": {"segment": {"tokens": 12, "end": "p@0.15", "min_tokens": 3}},
    "unsure by h": {"segment": {"tokens": 9, "end": "h@3.8", "min_tokens": 2}, "last": "c1"},
    "greedy": {"temperature": 0.0},
    "whole distribution": {"top_p": 1.0, "segment": 1},
}


def settings(name: str = "fixed length", **changes: object) -> DecodingConfig:
    values = {"max_new_tokens": 30, "segment": 7, "temperature": 1.0, "top_p": 0.95, **SETTINGS[name], **changes}
    return DecodingConfig.model_validate(values)


def assert_plain(
    ladder: Ladder, traces: list[Trace], policy: int | str, decoding: DecodingConfig, **how: float
) -> None:
    for query, trace in zip(QUERIES, traces, strict=False):
        expected = respond(ladder, query, response_seed(0, query.id), policy, decoding)
        assert first_difference(trace, expected, **how) is None


@pytest.fixture(scope="module")
def ladder() -> Ladder:
    return make_ladder(switcher="llama")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", SETTINGS)
def test_cached_and_batched_equals_plain_and_alone(ladder: Ladder, name: str, policy: int | str) -> None:
    decoding = settings(name)
    assert_plain(ladder, collaborate(ladder, QUERIES, policy, decoding, max_rows=2), policy, decoding)


def test_one_candidate_is_alone(ladder: Ladder) -> None:
    """A forced first and last writer once wrote beside the candidate that tables call alone."""
    forced = settings("first, last and cue")
    plain = settings()
    for writer in (0, 1):
        traces = collaborate(ladder, QUERIES, writer, forced)
        assert {segment.writer for trace in traces for segment in trace.segments} == {writer}
        assert traces == collaborate(ladder, QUERIES, writer, plain)
    switched = {
        segment.writer for trace in collaborate(ladder, QUERIES, "random", forced) for segment in trace.segments
    }
    assert switched >= {2, CUE}


def test_the_settings_reach_every_kind_of_end(ladder: Ladder) -> None:
    """The comparisons above would say little if random models never ended a sentence, a line or a text."""
    finishes: set[str] = set()
    for name in SETTINGS:
        traces = collaborate(ladder, QUERIES, "random", settings(name))
        finishes |= {segment.finish for trace in traces for segment in trace.segments}
        finishes |= {f"response: {trace.finish}" for trace in traces}
    assert finishes == {"length", "boundary", "eos", "cue", "response: length", "response: eos"}


SLOTS = ["qwen2", "qwen3", "gptneox", "gpt2", "mistral-window", "gemma2", "gemma3"]
FALLBACK = ["mamba", "jamba", "qwen3-next", "recurrent-gemma", "bloom", "falcon-alibi", "gpt-neo", "openai-gpt"]


@pytest.mark.parametrize("kind", [*SLOTS, *FALLBACK])
def test_every_architecture(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    ladder = make_ladder([kind, kind], switcher=kind)
    engines = {type(candidate.engine).__name__ for candidate in ladder.pool}
    assert engines == ({"SlotEngine"} if kind in SLOTS else {"SnapshotEngine"})
    # A warning for each engine that was built; a pool that shares weights warns once (test_candidates.py).
    warnings = [record.getMessage() for record in caplog.records if record.name == "switchgen"]
    assert len(warnings) == (0 if kind in SLOTS else 3)
    assert all("rows are decoded one by one" in warning for warning in warnings)
    decoding = settings("sentences", max_new_tokens=24 if kind in SLOTS else 10, segment=6)
    # Gemma 2 in transformers' own form computes its softmax in float32, linear attention its state.
    tolerance = 1e-6 if kind in ("gemma2", "mamba", "jamba", "qwen3-next", "recurrent-gemma") else 1e-9
    traces = collaborate(ladder, QUERIES[: 3 if kind in SLOTS else 2], "switcher", decoding)
    assert_plain(ladder, traces, "switcher", decoding, tolerance=tolerance)


@pytest.mark.parametrize("kind", ["gpt-oss", "phimoe"])
def test_architectures_without_float64(kind: str) -> None:
    """Experts of today's libraries multiply in float32 at most. PhiMoE's attention is not told its window."""
    ladder = make_ladder([kind, kind], dtype=torch.float32)
    assert {type(candidate.engine).__name__ for candidate in ladder.pool} == {"SnapshotEngine"}
    assert_plain(ladder, collaborate(ladder, QUERIES, "random", settings()), "random", settings())


@pytest.mark.parametrize("name", ["sentences", "unsure by p"])
def test_a_pool_of_different_sizes_and_architectures(name: str) -> None:
    ladder = make_ladder(["gpt2", "llama", "jamba"], switcher="gptneox")
    decoding = settings(name, max_new_tokens=20)
    assert_plain(ladder, collaborate(ladder, QUERIES, "switcher", decoding), "switcher", decoding, tolerance=1e-6)


@pytest.mark.parametrize("name", ["fixed length", "sentences", "unsure by p", "first, last and cue"])
def test_different_vocabularies(name: str) -> None:
    small, large = Vocabulary(make_tokenizer(300, chat=False), "small"), Vocabulary(make_tokenizer(), "large")
    ladder = make_ladder(switcher="llama", vocabularies=[small, large, large])
    assert len(ladder.pool.vocabularies) == 2
    decoding = settings(name)
    traces = collaborate(ladder, QUERIES, "random", decoding)
    assert_plain(ladder, traces, "random", decoding)
    assert len({segment.writer for trace in traces for segment in trace.segments}) >= 3


def test_text_through_the_real_loop() -> None:
    """60 rows over three vocabularies, random weights that write any bytes, queries full of control and signatures."""
    kinds = ("metaspace", "bytes", "unigram-nfkc")
    ladder = make_ladder(switcher="llama", vocabularies=[make_vocabulary(kind) for kind in kinds])
    pieces = ["<|end|>", "</s>", "<model 1 ends>", "ﬁ", "e\u0301", "▁", "\u00a0", "東京🙂", "\r\n", "How old", "<0x41>"]
    decoding = settings("sentences", max_new_tokens=20, segment=4, eos="segment")
    assert ladder.switcher is not None
    prompt = ladder.switcher.prompt
    segments = 0
    for policy in ("random", "switcher"):
        texts = ["".join(pieces[(index * step) % len(pieces)] for step in range(1, 5)) for index in range(30)]
        rows = [Row(ladder.pool, Query.from_text(text, str(index)), index) for index, text in enumerate(texts)]
        for row in Loop(ladder.pool, make_policy(ladder, policy), decoding).run(rows, release=False):
            trace = row.trace
            for segment in trace.segments:
                vocabulary = ladder.pool.candidates[segment.writer].vocabulary
                assert vocabulary.decode(segment.ids) == segment.text
                assert vocabulary.control_ids.isdisjoint(segment.ids)
                if segment.finish == "length" and len(segment.ids) < 4 + MAX_WORD_EXTRA + MAX_UTF8_EXTRA:
                    assert not vocabulary.ends_inside_character(segment.ids)
                segments += 1
            for reader, member in enumerate(ladder.plain):
                ids = row.context(reader).ids[len(row.prompt_ids(reader)) :]
                written = b"".join(
                    vocabulary.decode_bytes(segment.ids)
                    if (vocabulary := ladder.pool.candidates[segment.writer].vocabulary) is member.candidate.vocabulary
                    else segment.text.encode()
                    for segment in trace.segments
                )
                assert member.candidate.vocabulary.decode_bytes(ids) == written
                assert member.candidate.vocabulary.control_ids.isdisjoint(ids)
            signed = RELEASED.prompt(trace.query.text, trace.signed(), 3)
            assert signed in prompt.vocabulary.decode(prompt.full_ids(trace.query, trace.signed()))
    assert segments > 150


@pytest.mark.parametrize("name", ["sentences", "unsure by h"])
def test_batches_do_not_matter(ladder: Ladder, name: str) -> None:
    queries = [Query.from_text(QUERIES[index % 3].text[: 5 + 7 * index], str(index)) for index in range(12)]
    decoding = settings(name)
    alone = [collaborate(ladder, [query], "switcher", decoding)[0] for query in queries]
    for max_rows in (1, 5, 64):
        together = collaborate(ladder, queries[::-1], "switcher", decoding, max_rows=max_rows)[::-1]
        assert [first_difference(one, other) for one, other in zip(alone, together, strict=True)] == [None] * 12


@pytest.mark.parametrize(
    ("max_slots", "name"), [(1, "sentences"), (1, "unsure by p"), (2, "sentences"), (3, "sentences")]
)
def test_eviction_changes_nothing(ladder: Ladder, max_slots: int, name: str) -> None:
    """A row that was dropped is read again: what it wrote before, and where its segments ended, stay the same."""
    narrow = make_ladder(switcher="llama", max_slots=max_slots)
    decoding = settings(name)
    traces = collaborate(narrow, QUERIES, "switcher", decoding)
    plenty = collaborate(ladder, QUERIES, "switcher", decoding)
    assert [first_difference(one, other) for one, other in zip(traces, plenty, strict=True)] == [None] * 3
    evicted = [candidate.engine.stats.evicted_rows for candidate in narrow.pool]
    assert any(evicted) == (max_slots < 3)


def test_a_writer_goes_on_after_a_token_it_did_not_write(ladder: Ladder) -> None:
    """A sentence's end is seen by the next word, which is drawn and then left to the next turn.

    The cache had then seen the whole context, and the same writer's next turn used to feed the last token a second
    time, one position too far.
    """
    decoding = settings("sentences", max_new_tokens=60)
    traces = collaborate(ladder, QUERIES, 0, decoding)
    assert any(segment.finish == "boundary" for trace in traces for segment in trace.segments[:-1])
    assert_plain(ladder, traces, 0, decoding)
    uninterrupted = collaborate(ladder, QUERIES, 0, settings(segment=60, max_new_tokens=60))
    for trace, whole in zip(traces, uninterrupted, strict=True):
        assert trace.text.startswith(whole.text[: len(trace.text) - 4])


@pytest.mark.parametrize("end", ["p@0.3", "h@3"])
def test_uncertainty_changes_nothing_where_nobody_else_may_write(ladder: Ladder, end: str) -> None:
    """The token that its writer was unsure of is drawn again at the next segment's start, and is the same."""
    segment = {"tokens": 60, "end": end, "min_tokens": 2}
    traces = collaborate(ladder, QUERIES, 1, settings(segment=segment, max_new_tokens=60))
    uninterrupted = collaborate(ladder, QUERIES, 1, settings(segment=60, max_new_tokens=60))
    borders = 0
    for trace, whole in zip(traces, uninterrupted, strict=True):
        ids = [token for segment in trace.segments for token in segment.ids]
        assert ids == [token for segment in whole.segments for token in segment.ids]
        assert all(len(segment.ids) >= 2 for segment in trace.segments[:-1])
        borders += len(trace.segments) - len(whole.segments)
    assert borders > 5


# -- stop strings ------------------------------------------------------------------------------------------------------


def test_stop_strings_end_the_response_wherever_they_fall(ladder: Ladder) -> None:
    """Within a segment, across a border, in the middle of a token, as the first thing written."""
    decoding = settings(max_new_tokens=40)
    whole = collaborate(ladder, QUERIES, "random", decoding)
    tried = 0
    for trace in whole:
        border = len(trace.segments[0].text)
        for start, length in ((border - 2, 4), (border - 1, 2), (border + 1, 3), (0, 2), (len(trace.text) - 2, 2)):
            stop = trace.text[max(0, start) :][:length]
            if not stop or "�" in stop:
                continue
            stopping = settings(max_new_tokens=40, stop=[stop, "never written"])
            (stopped,) = collaborate(ladder, [trace.query], "random", stopping)
            assert stopped.finish == "stop"
            assert stopped.text == trace.text[: trace.text.find(stop)]
            assert stopped.segments[-1].finish == "stop"
            assert "".join(segment.text for segment in stopped.segments) == stopped.text
            tried += 1
    assert tried >= 8


def test_a_stop_string_before_bytes_that_are_no_text(ladder: Ladder) -> None:
    """The cut is counted in the response's text, where each wrong byte takes the three bytes of U+FFFD."""
    for trace in collaborate(ladder, QUERIES, "random", settings(max_new_tokens=60)):
        wrong = trace.text.find("�")
        stop = next((character for character in trace.text[wrong:] if character != "�"), None)
        if wrong < 0 or stop is None:
            continue
        (stopped,) = collaborate(ladder, [trace.query], "random", settings(max_new_tokens=60, stop=[stop]))
        assert stopped.text == trace.text[: trace.text.find(stop)]
        candidates = ladder.pool.candidates
        for segment in stopped.segments:
            assert candidates[segment.writer].vocabulary.decode(segment.ids).startswith(segment.text)


def test_a_cue_stops_nothing(ladder: Ladder) -> None:
    """The recipe's own cue holds the stop string; the writer after it used to be cut off at its first token."""
    decoding = settings("first, last and cue")
    stopping = settings("first, last and cue", stop=["answer is"])
    traces = collaborate(ladder, QUERIES, "random", stopping)
    assert [trace.text for trace in traces] == [
        trace.text for trace in collaborate(ladder, QUERIES, "random", decoding)
    ]
    # But what begins in the cue and ends in what the writer adds is written by the writer.
    for seed in range(20):
        (trace,) = collaborate(ladder, QUERIES[:1], "random", decoding, seed=seed)
        if trace.segments[-1].text[:1].isalpha():
            break
    across = settings("first, last and cue", stop=["swer is" + trace.segments[-1].text[:1]])
    (stopped,) = collaborate(ladder, [trace.query], "random", across, seed=seed)
    assert stopped.text == trace.text[: trace.text.find("swer is")] and stopped.finish == "stop"


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["random", "switcher"])
def test_lengths_and_the_last_writers_reserve(ladder: Ladder, policy: str) -> None:
    for trace in collaborate(ladder, QUERIES, policy, settings("first, last and cue")):
        assert trace.segments[0].writer == 2 and trace.segments[-1].writer == 2
        assert [segment.writer for segment in trace.segments].count(CUE) == 1
        assert trace.segments[-2].text == " The answer is" and trace.segments[-2].finish == "cue"
        written = sum(len(segment.ids) for segment in trace.segments if segment.writer != CUE)
        assert written <= 30 + 3  # a last character may take three tokens more
    for trace in collaborate(ladder, QUERIES, policy, settings()):
        assert trace.num_tokens <= 30 + 3
        assert trace.finish == "eos" or trace.num_tokens >= 30


def test_an_empty_writer_does_not_hang_the_row(ladder: Ladder) -> None:
    """`eos: segment` and a candidate that ends its text at once, again and again: the row ends after three times."""
    lengths = []
    rows = [Row(ladder.pool, QUERIES[0], seed) for seed in range(40)]
    for row in Loop(ladder.pool, FixedPolicy(1, "c1"), settings("eos ends a segment")).run(rows):
        if row.trace.finish == "eos":
            assert [segment.ids for segment in row.trace.segments[-3:]] == [()] * 3
            lengths.append(len(row.trace.segments))
    assert lengths


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_context_is_never_overrun(kind: str) -> None:
    """GPT-2 has an embedding for each position and none beyond: one token too many and its forward fails.

    A segment may be three tokens longer than asked, to complete a character; those used to be forgotten.
    """
    query = QUERIES[0]
    needed = 60
    ladder = (
        make_ladder([kind, kind], max_positions=needed, max_position_embeddings=needed) if kind == "llama" else None
    )
    ladder = ladder or make_ladder([kind, kind], max_positions=needed, n_positions=needed)
    decoding = settings(max_new_tokens=500, segment=4)
    finishes = set()
    rows = [Row(ladder.pool, query, seed) for seed in range(12)]
    for row in Loop(ladder.pool, RandomPolicy(), decoding).run(rows):
        finishes.add(row.trace.finish)
        read = [len(member.candidate.prompt_ids(query)) for member in ladder.plain]
        for count, segment in enumerate(row.trace.segments, start=1):
            assert read[segment.writer] + sum(len(part.ids) for part in row.trace.segments[:count]) <= needed
        assert all(segment.ids for segment in row.trace.segments[:-1])
    assert "context" in finishes


def test_what_does_not_fit_is_too_long_and_the_others_go_on(ladder: Ladder) -> None:
    narrow = make_ladder(switcher="llama", max_positions=150)
    long = Query.from_text("xyz " * 100, "long")
    for policy in POLICIES:
        traces = collaborate(narrow, [QUERIES[0], long, QUERIES[1]], policy, settings(segment=4, max_new_tokens=8))
        assert [trace.finish == "too_long" for trace in traces] == [False, True, False]
        assert traces[1].segments == []


def test_unknown_first_and_last_writers_are_named(ladder: Ladder) -> None:
    with pytest.raises(ConfigError, match="no candidate is called 'c9'.*allowed: c0, c1, c2"):
        Loop(ladder.pool, RandomPolicy(), settings(first="c9"))


# -- other precisions --------------------------------------------------------------------------------------------------


def test_float32_differs_only_at_a_border(capsys: pytest.CaptureFixture[str]) -> None:
    """Float32 is not batch-invariant: a draw within 1e-4 of another outcome may fall on its other side."""
    ladder = make_ladder(dtype=torch.float32, switcher="llama")
    decoding = settings("sentences", max_new_tokens=60)
    queries = [Query.from_text(QUERIES[index % 3].text[: 4 + index], str(index)) for index in range(12)]
    traces = collaborate(ladder, queries, "switcher", decoding)
    divergences = tokens = 0
    for query, trace in zip(queries, traces, strict=True):
        expected = respond(ladder, query, response_seed(0, query.id), "switcher", decoding)
        tokens += trace.num_tokens
        difference = first_difference(trace, expected, tolerance=1e-4)
        if difference is not None:
            divergences += 1
            assert _first_token_is_near_border(ladder, trace, expected, decoding), difference
    with capsys.disabled():
        print(f"\nfloat32: {divergences} of {len(queries)} rows diverged ({tokens} tokens)")
    assert divergences <= 1


def _first_token_is_near_border(ladder: Ladder, trace: Trace, expected: Trace, decoding: DecodingConfig) -> bool:
    """Whether the first differing token's draw lies within 1e-4 of another outcome."""
    params = SamplingParams(decoding.temperature, decoding.top_p)
    so_far = Trace(trace.query, trace.seed)
    for segment, other in zip(trace.segments, expected.segments, strict=False):
        if segment.writer != other.writer:
            return False  # writers are drawn from p; a divergence there is not looked into, and fails
        same = 0
        while same < min(len(segment.ids), len(other.ids)) and segment.ids[same] == other.ids[same]:
            same += 1
        if same < max(len(segment.ids), len(other.ids)):
            context = context_ids(ladder, so_far, segment.writer) + list(segment.ids[:same])
            index = so_far.num_tokens + same
            return near_border(ladder.plain[segment.writer], context, trace.seed, index, params)
        so_far.segments.append(segment)
    return False


@pytest.mark.parametrize("kind", ["llama", "gemma2", "jamba"])
def test_bfloat16_writes_whole_responses(kind: str) -> None:
    """Nothing can be said about single tokens; the form must be right all the same."""
    ladder = make_ladder([kind, kind], dtype=torch.bfloat16, switcher=kind)
    decoding = settings("first, last and cue", first="c0", last="c1", max_new_tokens=16, segment=4)
    for trace in collaborate(ladder, QUERIES[:2], "switcher", decoding):
        assert trace.segments[0].writer == 0 and trace.segments[-1].writer == 1
        for segment in trace.segments:
            if segment.writer != CUE:
                assert ladder.pool.candidates[segment.writer].vocabulary.decode(segment.ids) == segment.text
