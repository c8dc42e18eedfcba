"""The routers' neighbours: nudging, logit averaging, a judge; and random switching at three grains."""

from __future__ import annotations

import math

import pytest
import torch
from ladders import make_model, make_tokenizer
from pairs import DECODING, QUESTIONS, SEED, assert_batched_equals_alone, ids_of, make_pair, route, uncached, written

from switchgen import DecodingConfig, Pool, Query, generate
from switchgen.api import make_policy
from switchgen.config import CandidateConfig, RouterConfig
from switchgen.engines.build import build_engine
from switchgen.errors import ConfigError, ModelError
from switchgen.ids import derive_seed
from switchgen.policies.fixed import ShareRandomPolicy
from switchgen.policies.judge import Judge, load_judge
from switchgen.policies.routers import Asked, RouterPolicy, parse_router
from switchgen.rows import Row
from switchgen.sampling import Purpose, SamplingParams, sample_tokens, uniform
from switchgen.vocabulary import Vocabulary


class FourTokens:
    """A vocabulary of four tokens."""

    token_bytes = [b"the", b"cat", b",", b"\n"]
    control_ids: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return 4


SURE = (0.7, 0.1, 0.1, 0.1)
EVEN = (0.25, 0.25, 0.25, 0.25)
COMMA = (0.1, 0.1, 0.7, 0.1)


@pytest.mark.parametrize(
    ("name", "base", "aligned", "expected"),
    [
        ("nudging@0.5", SURE, EVEN, "base"),  # 0.7 < 0.5 is false: the base is sure and writes
        ("nudging@0.5", EVEN, SURE, "aligned"),  # 0.25 < 0.5: it is not
        ("nudging@0.25", EVEN, SURE, "base"),  # 0.25 < 0.25 is false
        ("nudging@0.7001", SURE, COMMA, "aligned"),
        ("nudging@0", EVEN, SURE, "base"),
        ("nudging@inf", SURE, SURE, "aligned"),
        ("baco-punc+base", COMMA, SURE, "aligned"),  # the base predicts the comma
        ("baco-punc+base", SURE, COMMA, "base"),
        ("baco-punc+aligned", SURE, COMMA, "aligned"),
        ("baco-p-punc+base@0.5", EVEN, COMMA, "base"),  # the base predicts "the", and 0.25 < 0.5
        ("baco-p-fc+base@0.5", EVEN, COMMA, "aligned"),  # "the" is a function word
        ("average@0.6", SURE, EVEN, "base"),  # signs for the larger weight
        ("average@0.5", SURE, EVEN, "aligned"),
    ],
)
def test_hand_worked_decisions(name: str, base: tuple[float, ...], aligned: tuple[float, ...], expected: str) -> None:
    policy = RouterPolicy(name, FourTokens())
    picked = policy.pick_base(
        torch.tensor([base], dtype=torch.float64).log(),
        torch.tensor([aligned], dtype=torch.float64).log(),
        torch.tensor([1]),
        torch.tensor([0]),
    )
    assert ("base" if picked.item() else "aligned") == expected


def test_a_name_says_more_than_the_recipe() -> None:
    settings = RouterConfig(predictor="base")
    assert RouterPolicy("baco-punc+aligned", FourTokens(), settings=settings).predictor == "aligned"
    assert RouterPolicy("baco-punc", FourTokens(), settings=settings).predictor == "base"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nudging", "nudging@0.3"),
        ("average@1.2", "from 0 to 1"),
        ("average@nan", "from 0 to 1"),
        ("baco-judge@1", "has no γ"),
        ("baco-punc+other", "aligned or base"),
        ("baco-p+base@0.3", "only in baco-punc"),
        ("nudging+base@0.3", "only in baco-punc"),
    ],
)
def test_wrong_names(name: str, part: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_router(name)
    assert part in str(raised.value)


# -- in the loop ------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "same_as"),
    [
        ("nudging@0", "base"),
        ("nudging@inf", "aligned"),
        ("average@1", "base"),
        ("average@0", "aligned"),
        ("segment-rand@1", "base"),
        ("segment-rand@0", "aligned"),
        ("response-rand@1", "base"),
        ("response-rand@0", "aligned"),
    ],
)
def test_extremes_token_for_token(pair: Pool, policy: str, same_as: str) -> None:
    assert written(pair, policy) == written(pair, same_as)


@pytest.mark.parametrize("policy", ["average@1", "average@0", "nudging@0", "nudging@inf"])
def test_extremes_where_the_ends_of_text_differ(policy: str) -> None:
    pool = make_pair(("<|endoftext|>", "<|end|>"))
    assert written(pool, policy) == written(pool, "base" if policy in ("average@1", "nudging@0") else "aligned")


@pytest.mark.parametrize("policy", ["nudging@0.2", "average@0.5", "average@0.3"])
def test_batched_equals_alone(pair: Pool, policy: str) -> None:
    assert_batched_equals_alone(pair, policy)


@pytest.mark.parametrize("weight", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("stops", [("<|end|>", "<|end|>"), ("<|endoftext|>", "<|end|>")])
def test_averaging_against_a_plain_loop(weight: float, stops: tuple[str, str]) -> None:
    """Either model's end of text ends the row; a control token that is neither's is never drawn."""
    pool = make_pair(stops)
    vocabulary = pool.candidates[0].vocabulary
    ends = {vocabulary.tokenizer.convert_tokens_to_ids(stop) for stop in stops}
    banned = sorted(vocabulary.control_ids - ends)
    finishes = set()
    for index in range(4):
        query = Query.from_text(QUESTIONS[index], str(index))
        seed = derive_seed(SEED, query.id, "response", 0)
        ids: list[int] = []
        finish = "length"
        while len(ids) < 40:
            base, aligned = uncached(pool, query, ids, ban=False)
            mixed = weight * base + (1 - weight) * aligned
            mixed[:, banned] = -torch.inf
            at = (torch.tensor([seed]), torch.tensor([len(ids)]))
            token = sample_tokens(mixed, *at, SamplingParams(0.7, 0.9)).item()
            if token in ends:
                finish = "eos"
                break
            ids.append(token)
        trace = generate(pool, [query], f"average@{weight}", decoding=DECODING, seed=SEED)[0]
        assert ids_of(trace)[:40] == ids
        assert trace.finish == finish
        assert {segment.writer for segment in trace.segments} == {0 if weight > 0.5 else 1}
        finishes.add(finish)
    assert finishes


def test_averaging_is_the_normalised_geometric_mean() -> None:
    base, aligned = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.7])
    mixed = torch.softmax(0.5 * (base.log() + 3) + 0.5 * (aligned.log() - 1), -1)
    root = (base * aligned).sqrt()
    assert torch.allclose(mixed, root / root.sum())


def test_nudging_against_a_plain_loop(pair: Pool) -> None:
    """The base writes; where its likeliest token has less than γ the aligned model writes a word."""
    both = set()
    for index in range(4):
        query = Query.from_text(QUESTIONS[index], str(index))
        ids, writers = route(pair, query, lambda logits, *_: 0 if torch.softmax(logits[0], -1).max() >= 0.2 else 1)
        trace = generate(pair, [query], "nudging@0.2", decoding=DECODING, seed=SEED)[0]
        assert ids_of(trace)[:40] == ids
        both |= set(writers)
    assert both == {0, 1}


@pytest.mark.parametrize("policy", ["baco-rand@0.5", "average@0.5"])
def test_one_forward_per_model_per_token(pair: Pool, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token is fed to each model once, and no model reads anything else after the prompts."""
    fed = {name: 0 for name in pair.names}
    for candidate in pair:
        forward = candidate.engine.model.forward

        def count(*args: object, _name: str = candidate.name, _forward: object = forward, **kwargs: object) -> object:
            fed[_name] += kwargs["input_ids"].numel()
            return _forward(*args, **kwargs)

        monkeypatch.setattr(candidate.engine.model, "forward", count)
    traces = generate(pair, QUESTIONS[:5], policy, decoding=DECODING, seed=SEED, max_rows=5)
    # The last token of a prompt and every token but the last (an end of text is drawn, not fed).
    drawn = sum(len(ids_of(trace)) + (trace.finish == "eos") for trace in traces)
    assert fed == {name: drawn for name in pair.names}


# -- the judge --------------------------------------------------------------


def make_judge(seed: int = 0) -> Judge:
    tokenizer = make_tokenizer(420, seed_text="Who should write the next word? A model with many ideas.")
    engine = build_engine(
        "judge",
        make_model("llama", len(tokenizer), seed=seed, dtype=torch.float64),
        Vocabulary(tokenizer, "judge"),
        stop_ids=frozenset(),
        max_positions=1024,
    )
    return Judge(engine, chat=True)


def test_the_judge_reads_a_character_of_two_tokens_whole(pair: Pool) -> None:
    judge = make_judge()
    policy = make_policy("baco-judge", pair, judge=judge)
    row = Row(pair, Query.from_text("How old?"), 0)
    told = judge.start(row)
    for text, new in ((b"a ", "a "), (b"a \xc3", ""), (b"a \xc3\xa9.", "é.")):
        policy.pick_base(torch.empty(1, 0), torch.empty(1, 0), torch.zeros(1), torch.zeros(1), [Asked(row, text)])
        told = told + (judge.engine.vocabulary.encode_text(new) if new else [])
        assert policy._context(Asked(row, text)).ids == told


def test_the_judge_decides_as_its_label_logits_say(pair: Pool) -> None:
    """Asked at word boundaries only, about the text so far; a model of another vocabulary, plain forwards."""
    judge = make_judge()
    policy = make_policy("baco-judge", pair, judge=judge)
    seen = set()
    for index in range(3):
        query = Query.from_text(QUESTIONS[index], str(index))
        row = Row(pair, query, derive_seed(SEED, query.id, "response", 0))
        told: list[int] = judge.start(row)
        told_bytes = 0

        def ask(_logits: object, _at: object, text: bytes) -> int:
            nonlocal told, told_bytes
            new = text[told_bytes:].decode("utf-8", errors="replace")
            told, told_bytes = told + (judge.engine.vocabulary.encode_text(new) if new else []), len(text)
            full = torch.tensor([[*told, *judge.question_ids]])
            label = judge.engine.model(input_ids=full, use_cache=False).logits[0, -1, judge.label_ids]
            return 0 if label[0] > label[1] else 1

        ids, writers = route(pair, query, ask)
        trace = generate(pair, [query], policy, decoding=DECODING, seed=SEED)[0]
        assert ids_of(trace)[:40] == ids
        seen |= set(writers)
    assert seen == {0, 1}
    assert not policy._readings


def test_a_judge_whose_context_is_full_leaves_the_aligned_model(pair: Pool, caplog: pytest.LogCaptureFixture) -> None:
    judge = make_judge()
    judge.engine.max_positions = 10
    policy = make_policy("baco-judge", pair, judge=judge)
    traces = generate(pair, QUESTIONS, policy, decoding=DECODING, seed=SEED, max_rows=5)
    assert [ids_of(trace) for trace in traces] == [ids for ids, _ in written(pair, "aligned")]
    assert caplog.text.count("beyond the judge's context") == 1


def test_a_judge_is_loaded_beside_the_pool(tmp_path: object, pair: Pool) -> None:
    from ladders import save_ladder

    folder = save_ladder(tmp_path / "ladder", ("base", "aligned"))
    pool = Pool.load(
        [CandidateConfig(name=name, model=str(folder / name), dtype="float64") for name in ("base", "aligned")]
    )
    judge = load_judge(pool, RouterConfig())
    assert judge.chat and judge.engine.model is pool.candidates[1].engine.model
    assert judge.engine is not pool.candidates[1].engine
    assert not load_judge(pool, RouterConfig(judge="base")).chat
    with pytest.raises(ModelError):
        load_judge(pool, RouterConfig(judge=str(folder / "nothing")))
    with pytest.raises(ConfigError, match="needs a judge"):
        make_policy("baco-judge", pair)


# -- random switching at three grains ----------------------------------------


def test_shares_at_three_grains(pair: Pool) -> None:
    short = DecodingConfig(max_new_tokens=24, segment=6)
    grains = {}
    for name in ("segment-rand@0.4", "response-rand@0.4"):
        traces = generate(pair, QUESTIONS, name, decoding=short, seed=SEED, max_rows=5)
        grains[name] = [[segment.writer for segment in trace.segments] for trace in traces]
        for trace, writers in zip(traces, grains[name], strict=True):
            index = range(len(writers)) if name.startswith("segment") else [0] * len(writers)
            numbers = [uniform(torch.tensor([trace.seed]), Purpose.WRITER, torch.tensor([i])).item() for i in index]
            assert writers == [0 if number < 0.4 else 1 for number in numbers]
    assert all(len(set(writers)) <= 1 for writers in grains["response-rand@0.4"])
    assert {writer for writers in grains["response-rand@0.4"] for writer in writers} == {0, 1}
    assert any(len(set(writers)) == 2 for writers in grains["segment-rand@0.4"])


@pytest.mark.parametrize("name", ["segment-rand", "response-rand@2", "segment-rand@x", "response-rand@nan"])
def test_wrong_shares(name: str) -> None:
    with pytest.raises(ConfigError, match="from 0 to 1"):
        ShareRandomPolicy(name, base=0, aligned=1)
    assert math.isclose(ShareRandomPolicy("segment-rand@0.25", base=0, aligned=1).gamma, 0.25)
