"""Random numbers that are looked up, and the sampler that uses them: bit for bit, and by their distribution."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from switchgen.ids import derive_seed
from switchgen.sampling import NO_NUMBER, Purpose, SamplingParams, choose_nucleus, sample_tokens, token_probs, uniform

SEEDS = torch.tensor([derive_seed("row", index) for index in range(1000)])


def numpy_uniform(seed: int, purpose: int, index: int, attempt: int) -> float:
    """splitmix64 with Python's integers, as the paper has it."""
    mask, gamma = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    state = mix((seed + gamma) & mask)
    state = mix(state ^ ((index * gamma + purpose) & mask))
    state = mix((state + attempt * 0x94D049BB133111EB) & mask)
    return (state >> 11) * 2.0**-53


def test_numbers_are_splitmix64_bit_for_bit() -> None:
    edges = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), *SEEDS[:40].tolist()])
    for purpose in Purpose:
        for attempt in (0, 1, 7, 8):
            for index in (0, 1, 511, 2**40):
                drawn = uniform(edges, purpose, torch.full_like(edges, index), attempt).tolist()
                expected = [numpy_uniform(seed, purpose, index, attempt) for seed in edges.tolist()]
                assert drawn == expected


def test_numbers_are_uniform_and_independent() -> None:
    """100,000 numbers of one row, of one index over rows, of neighbouring seeds: 256 bins, and correlations."""
    count = 100_000
    steps, zeros = torch.arange(count), torch.zeros(count, dtype=torch.long)
    rows = torch.tensor(np.random.default_rng(0).integers(-(2**63), 2**63, count))
    streams = {
        "one row": uniform(zeros + 7, Purpose.TOKEN, steps),
        "next row": uniform(zeros + 8, Purpose.TOKEN, steps),
        "shifted": uniform(zeros + 7, Purpose.TOKEN, steps + 1),
        "other purpose": uniform(zeros + 7, Purpose.WRITER, steps),
        "other attempt": uniform(zeros + 7, Purpose.TOKEN, steps, 1),
        "third attempt": uniform(zeros + 7, Purpose.TOKEN, steps, 2),
        "many rows": uniform(rows, Purpose.TOKEN, zeros + 3),
        "neighbours": uniform(steps, Purpose.TOKEN, zeros + 3),
    }
    for name, numbers in streams.items():
        assert numbers.min() >= 0 and numbers.max() < 1
        for scale in (1, 2**20):  # the leading bits, and bits further down
            counts = torch.histc((numbers * scale) % 1, bins=256, min=0, max=1)
            statistic = ((counts - count / 256) ** 2 / (count / 256)).sum().item()
            assert 150 < statistic < 380, name  # 255 degrees of freedom: mean 255, standard deviation 22.6
    table = torch.stack(list(streams.values()))
    correlation = torch.corrcoef(table) - torch.eye(len(streams))
    assert correlation.abs().max() < 0.016  # five standard deviations of 1 / sqrt(100,000)


def exact_nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Tokens whose strictly likelier mass is below top_p, renormalised."""
    above = torch.stack([probs[probs > p].sum() for p in probs])
    kept = torch.where(above < top_p, probs, 0.0)
    return kept / kept.sum()


def assert_distributed(drawn: torch.Tensor, expected: torch.Tensor) -> None:
    counts = torch.bincount(drawn, minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0
    mean = expected[expected > 0] * len(drawn)
    statistic = ((counts[expected > 0] - mean) ** 2 / mean).sum().item()
    freedom = len(mean) - 1
    assert statistic <= freedom + 5 * (2 * max(freedom, 1)) ** 0.5


LOGITS: dict[str, Callable[[], torch.Tensor]] = {
    "random": lambda: torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2,
    "flat slope": lambda: -torch.arange(60, dtype=torch.float64) * 0.01,  # a small nucleus is accepted rarely
    "ties": lambda: torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0, 0.0, -1.0, -1.0], dtype=torch.float64),
    "banned": lambda: torch.tensor([0.5, float("-inf"), 0.2, float("-inf"), 1.0, 0.9], dtype=torch.float64),
}


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_tokens_follow_the_nucleus(name: str, top_p: float) -> None:
    logits, count = LOGITS[name](), 40_000
    seeds = torch.tensor(np.random.default_rng(1).integers(-(2**63), 2**63, count))
    for temperature in (0.7, 1.3):
        expected = exact_nucleus(torch.softmax(logits / temperature, dim=-1), top_p)
        drawn = sample_tokens(
            logits.expand(count, -1), seeds, torch.full((count,), 5), SamplingParams(temperature, top_p)
        )
        assert_distributed(drawn, expected)


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 1.0])
def test_choices_follow_the_nucleus(top_p: float) -> None:
    count = 40_000
    numbers = uniform(torch.arange(count), Purpose.WRITER, torch.zeros(count, dtype=torch.long))
    for probs in ([0.2, 0.5, 0.3], [0.25, 0.25, 0.5], [1 / 3] * 3, [0.0, 1.0], [0.1] * 10):
        table = torch.tensor(probs, dtype=torch.float64)
        drawn = choose_nucleus(table.expand(count, -1), numbers, top_p)
        assert_distributed(drawn, exact_nucleus(table, top_p))


def test_rows_do_not_see_each_other() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    index = torch.arange(50) * 3
    for params in (SamplingParams(1.0, 0.1), SamplingParams(0.7, 0.9), SamplingParams(1.0, 1.0)):
        together = sample_tokens(logits, SEEDS[:50], index, params)
        alone = [sample_tokens(logits[n : n + 1], SEEDS[n : n + 1], index[n : n + 1], params).item() for n in range(50)]
        assert together.tolist() == alone
        order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
        assert torch.equal(sample_tokens(logits[order], SEEDS[order], index[order], params), together[order])


def draw_all(logits: torch.Tensor, params: SamplingParams) -> set[int]:
    count = len(SEEDS)
    return set(sample_tokens(logits.expand(count, -1), SEEDS, torch.zeros(count, dtype=torch.long), params).tolist())


def test_edges() -> None:
    some = torch.tensor([0.0, 3.0, 1.0])
    assert draw_all(some, SamplingParams(0.0, 0.9)) == {1}
    assert draw_all(torch.tensor([1.0, 3.0, 3.0]), SamplingParams(0.0, 0.9)) == {1}  # the first of the likeliest
    assert draw_all(some, SamplingParams(1.0, 1e-9)) == {1}
    assert draw_all(torch.tensor([3.0, 3.0, 1.0]), SamplingParams(1.0, 1e-9)) == {0, 1}  # ties stand together
    assert draw_all(torch.tensor([float("-inf"), 0.0, float("-inf")]), SamplingParams(1.0, 0.9)) == {1}
    assert draw_all(torch.tensor([0.0]), SamplingParams(1.0, 0.9)) == {0}
    assert draw_all(torch.tensor([1e30, 0.0, -1e30]), SamplingParams(0.7, 0.9)) == {0}
    assert draw_all(torch.tensor([-1e30, -1e30, -2e30]), SamplingParams(0.7, 1.0)) == {0, 1}
    assert draw_all(some, SamplingParams(1.0, 1.0)) == {0, 1, 2}


@pytest.mark.parametrize("temperature", [1e-3, 1e-7, 1e-30, 1e-45])
def test_cold_is_greedy(temperature: float) -> None:
    """Logits divided by next to nothing overflow, and a softmax of infinities is no distribution."""
    assert draw_all(torch.tensor([5.0, 80.0, 79.0]), SamplingParams(temperature, 1.0)) == {1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.zeros(5000, dtype=dtype)
    assert token_probs(logits[None], 1.0).dtype == torch.float32
    drawn = sample_tokens(logits.expand(1000, -1), SEEDS, torch.zeros(1000, dtype=torch.long), SamplingParams(1.0, 1.0))
    assert drawn.max() > 4900 and len(drawn.unique()) > 800  # float16's own sums stop growing at 2,048


@pytest.mark.parametrize("params", [SamplingParams(0.0), SamplingParams(0.7, 0.9), SamplingParams(1.0, 1.0)])
def test_logits_that_are_no_numbers_are_told(params: SamplingParams) -> None:
    """They gave the vocabulary's last token, every time."""
    logits = torch.randn(4, 9)
    logits[1, 3] = torch.nan
    logits[2, 5] = torch.inf
    drawn = sample_tokens(logits, SEEDS[:4], torch.arange(4), params).tolist()
    assert drawn[1] == NO_NUMBER and drawn[2] == (5 if params.temperature == 0 else NO_NUMBER)
    assert min(drawn[0], drawn[3]) >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_that_rounds_to_one_draws_no_impossible_token(dtype: torch.dtype) -> None:
    """The largest number, 1 - 2^-53, is 1 in float32; it used to draw the last entry, were its probability zero."""
    numbers = torch.tensor([1 - 2.0**-53, 1 - 2.0**-25, 0.0], dtype=torch.float64)
    for probs in ([0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.1, 0.2, 0.7, 0.0], [0.3, 0.3, 0.4, 0.0]):
        table = torch.tensor(probs, dtype=dtype)
        for top_p in (0.5, 1.0):
            drawn = choose_nucleus(table.expand(3, -1), numbers, top_p)
            assert (table[drawn] > 0).all()


def test_a_token_drawn_again_is_the_same() -> None:
    """After a rewind, in another batch, in another process: the number belongs to the row and the index."""
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(4))
    params = SamplingParams(1.0, 0.95)
    drawn = [sample_tokens(logits, SEEDS[:1], torch.tensor([index]), params).item() for index in range(30)]
    later = [sample_tokens(logits, SEEDS[:1], torch.tensor([index]), params).item() for index in range(10, 30)]
    assert drawn[10:] == later and len(set(drawn)) > 5
