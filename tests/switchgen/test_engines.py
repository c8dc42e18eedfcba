"""Engines: catch-up, forks, eviction and rewinding against plain forwards; what was read is counted to the token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from reference import Ladder, collaborate, first_difference, make_ladder, make_policy, respond, switcher_scores
from transformers import GenerationConfig

from switchgen.config import DecodingConfig
from switchgen.engines.base import Context, Engine, WriteItem
from switchgen.engines.build import build_engine
from switchgen.ids import derive_seed
from switchgen.loop import Loop
from switchgen.policies import SwitcherPolicy
from switchgen.rows import Reader, Row
from switchgen.sampling import SamplingParams
from switchgen.segmentation import SegmentRule
from switchgen.trace import Query, Trace

QUERIES = [
    Query.from_text(text, text) for text in ("How old is Vudak?", "12 + 35", "Größe? 東京 🙂 " * 4, "Write a list")
]
SLOTS = ["llama", "qwen2", "qwen3", "gptneox", "gpt2", "mistral-window", "gemma2", "gemma3"]
FALLBACK = ["mamba", "jamba", "qwen3-next", "recurrent-gemma", "bloom", "openai-gpt"]
ROUGH = {"gemma2", "mamba", "jamba", "qwen3-next", "recurrent-gemma"}
"""Kinds that compute something in float32 whatever their dtype."""


def settings(**changes: object) -> DecodingConfig:
    values = {"max_new_tokens": 24, "segment": 5, "temperature": 1.0, "top_p": 0.95, **changes}
    return DecodingConfig.model_validate(values)


@pytest.fixture(scope="module")
def ladder() -> Ladder:
    return make_ladder(switcher="llama")


# -- one model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*SLOTS, "bloom", "jamba"])
def test_a_pool_of_one_is_plain_greedy_generate(kind: str) -> None:
    ladder = make_ladder([kind])
    (plain,) = ladder.plain
    engine = plain.candidate.engine
    for query, trace in zip(QUERIES, collaborate(ladder, QUERIES, 0, settings(temperature=0)), strict=True):
        prompt = torch.tensor([plain.candidate.prompt_ids(query)])
        config = GenerationConfig(
            do_sample=False, max_new_tokens=27, suppress_tokens=plain.banned or None,
            eos_token_id=sorted(engine.stop_ids), pad_token_id=0,
        )  # fmt: skip
        with torch.inference_mode():
            whole = plain.model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        generated = whole[0, prompt.shape[1] :].tolist()
        written = [index for segment in trace.segments for index in segment.ids]
        if trace.finish == "eos":
            assert generated[: len(written) + 1] == [*written, generated[len(written)]]
            assert generated[len(written)] in engine.stop_ids
        else:
            assert generated[: len(written)] == written and 24 <= len(written) <= 27


def random_ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 300, (count,), generator=generator).tolist()


def plain_logits(ladder: Ladder, reader: int, ids: Sequence[int]) -> torch.Tensor:
    return ladder.plain[reader].logits(ids)


@pytest.mark.parametrize("kind", [*SLOTS, *FALLBACK])
def test_catch_up_equals_from_scratch(kind: str) -> None:
    """Contexts that grow by others' words, by 0 to 60 tokens at a time, in batches that change, with one rewind."""
    ladder = make_ladder([kind])
    engine = ladder.pool.candidates[0].engine
    contexts = [Context(random_ids(3 + 5 * row, row)) for row in range(3)]
    tolerance = 1e-6 if kind in ROUGH else 1e-9

    def check(logits: torch.Tensor, members: Sequence[Context]) -> None:
        for place, context in enumerate(members):
            assert torch.allclose(logits[place], plain_logits(ladder, 0, context.ids), atol=tolerance, rtol=tolerance)

    for step, members in enumerate(([0, 1, 2], [1], [2, 0], [0, 1, 2])):
        batch = [contexts[index] for index in members]
        for context in batch:
            context.ids.extend(random_ids([0, 1, 23, 60][(step + len(context.ids)) % 4], step))
        session = engine.begin(batch)
        with torch.inference_mode():
            check(session.logits(), session.contexts)
            for context in session.contexts:
                context.ids.append(7)
            check(session.logits(), session.contexts)


@pytest.mark.parametrize("max_slots", [2, 64])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral-window", "gpt2", "jamba", "bloom", "openai-gpt"])
def test_label_logits_are_a_plain_forwards(kind: str, max_slots: int) -> None:
    """The question is rewound: asked again, after growth, of forks and of more contexts than there are slots."""
    ladder = make_ladder([kind], max_slots=max_slots)
    engine = ladder.pool.candidates[0].engine
    suffix, labels = random_ids(9, 100), [20, 21, 22]
    tolerance = 1e-6 if kind in ROUGH else 1e-9
    contexts = [Context(random_ids(4 + 9 * row, row)) for row in range(3)]

    def check() -> None:
        got = engine.label_logits(contexts, suffix, labels)
        assert got.dtype == torch.float64 and got.shape == (len(contexts), 3)
        for row, context in enumerate(contexts):
            expected = plain_logits(ladder, 0, [*context.ids, *suffix])[labels]
            assert torch.allclose(got[row], expected, atol=tolerance, rtol=tolerance)

    check()
    check()
    for context in contexts[1:]:
        context.ids.extend(random_ids(11, 50))
    check()
    parent = contexts[1]
    contexts += [Context([*parent.ids, *random_ids(own, own)], parent, len(parent.ids)) for own in (0, 6)]
    check()


@pytest.mark.parametrize("max_slots", [2, 64])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral-window", "gpt2", "jamba", "bloom", "openai-gpt"])
def test_hidden_states_are_a_plain_forwards(kind: str, max_slots: int) -> None:
    """Asked again, after growth, of forks, of more contexts than there are slots; writing goes on as if not asked."""
    ladder = make_ladder([kind], max_slots=max_slots)
    engine = ladder.pool.candidates[0].engine
    head = engine.model.get_output_embeddings()  # type: ignore[attr-defined]
    tolerance = 1e-6 if kind in ROUGH else 1e-9
    contexts = [Context(random_ids(4 + 9 * row, row)) for row in range(3)]

    @torch.inference_mode()
    def check(members: Sequence[Context]) -> None:
        got = engine.hidden(members)
        assert got.dtype == torch.float64 and got.shape == (len(members), engine.hidden_size)
        for state, context in zip(got, members, strict=True):
            logits = head(state.to(head.weight.dtype)).double()
            capped = torch.tanh(logits / 30) * 30 if kind == "gemma2" else logits
            expected = plain_logits(ladder, 0, context.ids)
            assert torch.allclose(capped, expected, atol=tolerance, rtol=tolerance)

    check(contexts)
    check(contexts)
    for context in contexts[1:]:
        context.ids.extend(random_ids(11, 50))
    check(contexts[1:])
    with torch.inference_mode():
        session = engine.begin(contexts[:2])
        for logits, context in zip(session.logits(), session.contexts, strict=True):
            assert torch.allclose(logits, plain_logits(ladder, 0, context.ids), atol=tolerance, rtol=tolerance)
    parent = contexts[1]
    check([*contexts, *(Context([*parent.ids, *random_ids(own, own)], parent, len(parent.ids)) for own in (0, 6))])


def test_reads_longer_than_a_pack() -> None:
    """More than 4,096 missing tokens are read in several forwards."""
    ladder = make_ladder(["llama"], max_position_embeddings=2048, max_positions=2048)
    engine = ladder.pool.candidates[0].engine
    contexts = [Context(random_ids(1500, row)) for row in range(4)]
    got = engine.label_logits(contexts, [9, 8], [20, 21])
    assert engine.stats.read_tokens == 6000 and engine.stats.scored_tokens == 8
    for row, context in enumerate(contexts[:2]):
        assert torch.allclose(got[row], plain_logits(ladder, 0, [*context.ids, 9, 8])[[20, 21]], atol=1e-9)


def test_one_forward_reads_no_more_than_a_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt beyond it was read in one forward, whose masks alone take memory with the square of its length."""
    monkeypatch.setattr("switchgen.engines.transformers.MAX_PACKED", 16)
    ladder = make_ladder(["llama"])
    engine = ladder.pool.candidates[0].engine
    fed: list[int] = []
    plain = engine.forward

    def forward(module: Any, plan: Any, ids: torch.Tensor, *rest: Any, **settings: Any) -> Any:
        fed.append(ids.shape[1])
        return plain(module, plan, ids, *rest, **settings)

    monkeypatch.setattr(engine, "forward", forward)
    contexts = [Context(random_ids(length, length)) for length in (50, 5, 33)]
    for context, row in zip(contexts, engine.label_logits(contexts, [9, 8], [20, 21]), strict=True):
        assert torch.allclose(row, plain_logits(ladder, 0, [*context.ids, 9, 8])[[20, 21]], atol=1e-9)
        context.ids.extend(random_ids(40, 1))
    assert engine.stats.read_tokens == 88
    with torch.inference_mode():
        session = engine.begin(contexts)
        for context, row in zip(session.contexts, session.logits(), strict=True):
            assert torch.allclose(row, plain_logits(ladder, 0, context.ids), atol=1e-9)
    assert engine.stats.read_tokens == 88 + 3 * 39
    for context in contexts:
        engine.release(context)
    states = engine.hidden(contexts)
    assert torch.allclose(states, torch.cat([engine.hidden([Context(list(one.ids))]) for one in contexts]), atol=1e-9)
    assert max(fed) == 16


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["llama", "jamba"])
def test_weights_that_are_kept_elsewhere(kind: str) -> None:
    """accelerate brings offloaded weights (`device_map`) where they are used; until then they are on no device."""
    plain = make_ladder([kind]).plain[0]
    vocabulary, stop_ids = plain.candidate.vocabulary, plain.candidate.engine.stop_ids
    offloaded = cpu_offload(plain.model, torch.device("cpu"))
    engine = build_engine("c0", offloaded, vocabulary, stop_ids=stop_ids, max_positions=512)
    assert type(engine) is type(plain.candidate.engine) and engine.device.type == "cpu"
    ids = random_ids(20, 3)
    expected = plain.candidate.engine.begin([Context(list(ids))]).logits()
    assert torch.allclose(engine.begin([Context(list(ids))]).logits(), expected, atol=1e-6)
    scored = [score.logprob for score in engine.token_scores(ids, 1, 0)]
    assert scored == pytest.approx([score.logprob for score in plain.candidate.engine.token_scores(ids, 1, 0)])


def test_garbage_beyond_a_rows_length_is_never_seen() -> None:
    ladder = make_ladder(["llama"])
    engine = ladder.pool.candidates[0].engine
    context = Context(random_ids(20, 0))
    engine.begin([context])
    with torch.inference_mode():
        for layer in engine.cache.layers:  # type: ignore[attr-defined]
            for pool in (layer.keys, layer.values):
                pool[:, :, 19:] = 1e5
                pool[1:] = 1e5
        logits = engine.begin([context]).logits()[0]
    assert torch.allclose(logits, plain_logits(ladder, 0, context.ids), atol=1e-9)


# -- forks -------------------------------------------------------------------------------------------------------------


def grow(ladder: Ladder, policy: int | str, decoding: DecodingConfig, rows: list[Row], to: int | None) -> list[Row]:
    """Write rows until they have so many segments (None: to their end); caches stay."""
    loop = Loop(ladder.pool, make_policy(ladder, policy), decoding, max_segments=to)
    return sorted(loop.run(rows, release=False), key=rows.index)


def forks(rows: Sequence[Row], count: int) -> list[Row]:
    return [
        row.fork(derive_seed(row.trace.seed, index))
        for row in rows
        if row.trace.finish is None
        for index in range(count)
    ]


def grow_tree(
    ladder: Ladder, policy: int | str, decoding: DecodingConfig
) -> tuple[list[list[Row]], Iterator[str | None]]:
    """A root of 2 segments, 3 branches of one more, 2 leaves of each; and each leaf's difference from being alone."""
    roots = grow(ladder, policy, decoding, [Row(ladder.pool, query, seed) for seed, query in enumerate(QUERIES)], 2)
    branches = grow(ladder, policy, decoding, forks(roots, 3), 3)
    leaves = grow(ladder, policy, decoding, forks(branches, 2), None)

    def differences() -> Iterator[str | None]:
        for row, to in [*((branch, 3) for branch in branches), *((leaf, None) for leaf in leaves)]:
            assert row.parent is not None
            prefix = row.parent.trace.segments
            expected = respond(ladder, row.trace.query, row.trace.seed, policy, decoding, prefix, max_segments=to)
            yield first_difference(row.trace, expected)

    return [roots, branches, leaves], differences()


@pytest.mark.parametrize("policy", ["random", "switcher"])
@pytest.mark.parametrize("max_slots", [1, 3, 7, 64])
def test_forked_equals_separate(max_slots: int, policy: str) -> None:
    ladder = make_ladder(switcher="llama", max_slots=max_slots)
    (_, branches, leaves), differences = grow_tree(ladder, policy, settings(max_new_tokens=20))
    assert list(differences) == [None] * (len(branches) + len(leaves))
    assert len(leaves) >= 12
    evicted = sum(candidate.engine.stats.evicted_rows for candidate in ladder.pool)
    assert (evicted == 0) == (max_slots == 64)


@pytest.mark.parametrize("max_slots", [2, 64])
@pytest.mark.parametrize("kind", ["jamba", "openai-gpt"])
def test_forked_equals_separate_without_slots(kind: str, max_slots: int) -> None:
    ladder = make_ladder([kind, kind], max_slots=max_slots)
    (_, branches, leaves), differences = grow_tree(ladder, "random", settings(max_new_tokens=16, segment=4))
    assert list(differences) == [None] * (len(branches) + len(leaves))


def test_sentences_and_turns_after_forks() -> None:
    """A fork whose parent's last turn drew a token that it did not write (a sentence's next word, an end of text)."""
    ladder = make_ladder(switcher="llama")
    decoding = settings(max_new_tokens=30, segment={"tokens": 9, "end": "sentence"}, eos="segment")
    (_, branches, leaves), differences = grow_tree(ladder, 0, decoding)
    assert list(differences) == [None] * (len(branches) + len(leaves))
    assert any(row.trace.segments[-1].finish in ("boundary", "eos") for row in branches)


def fed_tokens(ladder: Ladder) -> dict[Reader, list[int]]:
    """For each model, the number of tokens of each forward, noted as they are fed."""
    fed: dict[Reader, list[int]] = {}
    for reader, engine in readers(ladder):
        counts = fed.setdefault(reader, [])
        embeddings = engine.model.get_input_embeddings()  # type: ignore[attr-defined]
        embeddings.register_forward_pre_hook(lambda _, args, counts=counts: counts.append(args[0].numel()))
    return fed


def readers(ladder: Ladder) -> list[tuple[Reader, Engine]]:
    assert ladder.switcher is not None
    found: list[tuple[Reader, Engine]] = [(index, member.engine) for index, member in enumerate(ladder.pool)]
    return [*found, ("switcher", ladder.switcher.engine)]


def assert_each_token_was_read_once(
    ladder: Ladder, rows: Sequence[Row], fed: dict[Reader, list[int]]
) -> dict[Reader, int]:
    """What a model was fed is what its caches hold, what forks inherited not counted again."""
    shares: dict[Reader, int] = {}
    for reader, engine in readers(ladder):
        stats = engine.stats
        assert stats.evicted_rows == 0
        held = copied = 0
        for row in rows:
            context = row._contexts.get(reader)
            if context is None or context.slot is None:
                continue
            inherited = 0
            if context.parent is not None:
                assert row.parent is not None
                own = row.trace.segments[len(row.parent.trace.segments) :]
                # The first to write after a fork decodes from the last shared token, which is fed for that.
                inherited = context.shared - (bool(own) and own[0].writer == reader)
                copied += 1
            held += context.cached - inherited
        assert stats.read_tokens + stats.decoded_tokens == held
        assert sum(fed[reader]) == held + stats.scored_tokens
        assert stats.copied_rows == copied
        shares[reader] = stats.read_tokens
    return shares


@pytest.mark.parametrize("policy", ["random", "switcher"])
def test_nothing_is_read_twice_in_a_forked_tree(policy: str) -> None:
    ladder = make_ladder(switcher="llama", max_slots=256)
    fed = fed_tokens(ladder)
    levels, _ = grow_tree(ladder, policy, settings())
    assert_each_token_was_read_once(ladder, [row for level in levels for row in level], fed)


def test_nothing_is_read_twice_in_rollouts(capsys: pytest.CaptureFixture[str]) -> None:
    """A prefix, a branch by each of 3 candidates, 8 completions of each: the prefix is read once by each model."""
    ladder = make_ladder(switcher="llama", max_slots=256)
    fed = fed_tokens(ladder)
    decoding = settings(max_new_tokens=30)
    source = respond(make_ladder(), QUERIES[2], 1, "random", decoding)
    prefix = Row(ladder.pool, QUERIES[2], 1)
    assert len(source.segments) > 3
    for segment in source.segments[:3]:
        prefix.append(segment)
    branches = []
    for writer in range(3):
        branches += grow(ladder, writer, decoding, [prefix.fork(derive_seed("branch", writer))], 4)
    completions = grow(ladder, "random", decoding, forks(branches, 8), None)
    assert len(completions) >= 16
    reads = assert_each_token_was_read_once(ladder, [prefix, *branches, *completions], fed)
    lengths = {}
    for reader in range(3):
        context = prefix._contexts[reader]
        # All of it, or all but the last token where only its own branch and completions needed it.
        assert context.cached in (len(context.ids), len(context.ids) - 1)
        lengths[reader] = len(context.ids)
    separate = sum(lengths.values()) * len(completions)
    with capsys.disabled():
        print(f"\nrollout of {len(completions)} completions, prefixes of {lengths} tokens: {reads} tokens read")
    assert sum(reads.values()) < separate / 4


def test_nothing_is_read_twice_without_slots() -> None:
    """The fallback counts as honestly, and forks copy their parent's cache there, too."""
    ladder = make_ladder(["jamba", "bloom"], switcher="jamba", max_slots=256)
    fed = fed_tokens(ladder)
    decoding = settings(max_new_tokens=16, segment=4)
    roots = grow(ladder, "switcher", decoding, [Row(ladder.pool, QUERIES[0], 1)], 1)
    leaves = grow(ladder, "switcher", decoding, forks(roots, 3), None)
    for reader, engine in readers(ladder):
        contexts = [row._contexts[reader] for row in (*roots, *leaves) if reader in row._contexts]
        contexts = [context for context in contexts if context.slot is not None]
        held = sum(context.cached - (context.shared if context.parent else 0) for context in contexts)
        stats = engine.stats
        # A turn right after a fork or after its own words finds its logits kept: nothing is fed for its first token.
        assert stats.read_tokens <= held <= stats.read_tokens + stats.decoded_tokens
        assert sum(fed[reader]) == held + stats.scored_tokens
        assert stats.copied_rows == sum(context.parent is not None for context in contexts)


def test_a_released_row_is_read_anew(ladder: Ladder) -> None:
    """A row that goes on after its caches were dropped, under a switcher: its signed segments must all be there.

    The count of segments that the switcher had read used to outlive its context.
    """
    decoding = settings()
    policy = make_policy(ladder, "switcher")
    row = Row(ladder.pool, QUERIES[2], 3)
    for to in (1, 2, None):
        loop = Loop(ladder.pool, policy, decoding, max_segments=to)
        (row,) = loop.run([row])
        if row.trace.finish is not None:
            break
    assert first_difference(row.trace, respond(ladder, QUERIES[2], 3, "switcher", decoding)) is None
    trace = Trace(row.trace.query, 0, list(row.trace.segments))
    fresh = Row(ladder.pool, QUERIES[2], 3)
    for segment in row.trace.segments:
        fresh.append(segment)
    assert isinstance(policy, SwitcherPolicy)
    assert policy.scores([fresh])[0].tolist() == pytest.approx(switcher_scores(ladder, trace), abs=1e-9)
    row.release(loop.readers)
    row.trace.finish = None
    assert policy.scores([row])[0].tolist() == pytest.approx(switcher_scores(ladder, trace), abs=1e-9)


def test_finished_and_forked_rows_do_not_grow(ladder: Ladder) -> None:
    row = Row(ladder.pool, QUERIES[0], 0)
    (row,) = Loop(ladder.pool, make_policy(ladder, 0), settings(), max_segments=1).run([row], release=False)
    segment = row.trace.segments[0]
    row.fork(1)
    with pytest.raises(AssertionError, match="a forked row is frozen"):
        row.append(segment)
    done = Row(ladder.pool, QUERIES[0], 0)
    done.trace.finish = "eos"
    with pytest.raises(AssertionError, match="a finished response does not go on"):
        done.fork(1)


# -- the engine's own account ------------------------------------------------------------------------------------------


def test_control_tokens_of_others_are_never_drawn() -> None:
    """A candidate may only draw its own end of text, however much it wants another control token or a padded row."""
    ladder = make_ladder(["llama", "llama"])
    for member in ladder.plain:
        engine = member.candidate.engine
        with torch.no_grad():
            weight = engine.model.get_output_embeddings().weight  # type: ignore[attr-defined]
            weight[sorted(engine.vocabulary.control_ids)] *= 50
    for trace in collaborate(ladder, QUERIES, "random", settings(eos="segment", max_new_tokens=60)):
        for segment in trace.segments:
            assert engine.vocabulary.control_ids.isdisjoint(segment.ids)


def test_statistics(ladder: Ladder) -> None:
    engine = make_ladder(["llama"]).pool.candidates[0].engine
    contexts = [Context(random_ids(10 + row, row)) for row in range(4)]
    items = [WriteItem(context, 6, seed, 0) for seed, context in enumerate(contexts)]
    written = engine.write(items, SamplingParams(1.0, 1.0), SegmentRule())
    drawn = sum(len(result.ids) + (result.finish == "eos") for result in written)
    stats = engine.stats
    assert stats.decoded_tokens == drawn
    assert stats.read_tokens == sum(10 + row - 1 for row in range(4))
    assert stats.steps == max(len(result.ids) + (result.finish == "eos") for result in written)
    assert stats.mean_batch == pytest.approx(drawn / stats.steps)
    for result, context in zip(written, contexts, strict=True):
        assert context.ids[len(context.ids) - len(result.ids) :] == result.ids
