"""A base and an aligned model in float64, and token routing over them in the plainest way: one row, no cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ladders import make_model, make_tokenizer

from switchgen import DecodingConfig, Pool, Query, Trace, generate
from switchgen.candidates import Candidate
from switchgen.engines.build import build_engine
from switchgen.ids import derive_seed
from switchgen.sampling import SamplingParams, sample_tokens
from switchgen.vocabulary import Vocabulary, continues_word

QUESTIONS = [f"How old is number {index}?" for index in range(12)]
DECODING = DecodingConfig(max_new_tokens=40, segment=40)
SEED = 5

At = tuple[torch.Tensor, torch.Tensor]
"""A row's seed and the index of its next token, as tensors of one."""
Pick = Callable[[list[torch.Tensor], At, bytes], int]
"""Who writes (0 the base, 1 the aligned model), by both models' logits [1, V], the place, and the text so far."""


def make_pair(
    stops: tuple[str, str] = ("<|end|>", "<|end|>"),
    kinds: tuple[str, str] = ("llama", "llama"),
    max_slots: tuple[int, int] = (128, 128),
) -> Pool:
    """Two models of random weights and one vocabulary.

    Args:
        stops: each one's end of text.
        max_slots: rows whose caches each one keeps.
    """
    tokenizer = make_tokenizer(400)
    vocabulary = Vocabulary(tokenizer, "test")
    engines = [
        build_engine(
            name,
            make_model(kind, len(tokenizer), seed=seed, dtype=torch.float64),
            vocabulary,
            stop_ids=frozenset([tokenizer.convert_tokens_to_ids(stop)]),
            max_positions=1024,
            max_slots=slots,
        )
        for seed, (name, stop, kind, slots) in enumerate(zip(("base", "aligned"), stops, kinds, max_slots, strict=True))
    ]
    return Pool([Candidate(engine.name, engine, "chat") for engine in engines])


def ids_of(trace: Trace) -> list[int]:
    return [token for segment in trace.segments for token in segment.ids]


def written(pool: Pool, policy: str) -> list[tuple[list[int], str | None]]:
    """Tokens and finish of what the pool writes to the questions."""
    traces = generate(pool, QUESTIONS, policy, decoding=DECODING, seed=SEED, max_rows=5)
    return [(ids_of(trace), trace.finish) for trace in traces]


def assert_batched_equals_alone(pool: Pool, policy: str) -> None:
    """Every question alone gives the segments that it gives among the others."""
    together = generate(pool, QUESTIONS, policy, decoding=DECODING, seed=SEED, max_rows=5)
    for index, question in enumerate(QUESTIONS):
        alone = generate(pool, [Query.from_text(question, str(index))], policy, decoding=DECODING, seed=SEED)
        assert alone[0].segments == together[index].segments


def uncached(pool: Pool, query: Query, ids: list[int], *, ban: bool = True) -> list[torch.Tensor]:
    """Each model's logits after the query and the tokens, [1, V], by one forward over everything."""
    rows = []
    for candidate in pool:
        full = torch.tensor([[*candidate.prompt_ids(query), *ids]])
        row = candidate.engine.model(input_ids=full, use_cache=False).logits[:, -1].detach()
        if ban:
            row[:, candidate.engine.banned_ids] = -torch.inf
        rows.append(row)
    return rows


def route(pair: Pool, query: Query, pick: Pick) -> tuple[list[int], list[int]]:
    """Tokens and their writers under a rule; as in the loop, a token that goes on with a word stands."""
    vocabulary, stop = pair.candidates[0].vocabulary, pair.candidates[0].engine.stop_ids
    seed = torch.tensor([derive_seed(SEED, query.id, "response", 0)])
    ids: list[int] = []
    writers: list[int] = []
    while len(ids) < DECODING.max_new_tokens:
        logits = uncached(pair, query, ids)
        at = seed, torch.tensor([len(ids)])
        drawn = [int(sample_tokens(row, *at, SamplingParams(0.7, 0.9))) for row in logits]
        text = vocabulary.decode_bytes(ids)
        writer = writers[-1] if writers else -1
        stands = writer >= 0 and drawn[writer] not in stop
        if not (stands and continues_word(text, vocabulary.token_bytes[drawn[writer]])):
            writer = pick(logits, at, text)
        if drawn[writer] in stop:
            break
        ids.append(drawn[writer])
        writers.append(writer)
    return ids, writers
