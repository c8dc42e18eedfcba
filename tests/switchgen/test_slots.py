"""Slots: ragged attention against the textbook's, growth, moves, and garbage that stays unseen."""

from __future__ import annotations

import pytest
import torch
from pairs import make_pair

from switchgen.engines.attention import slot_attention
from switchgen.engines.base import Context
from switchgen.engines.slots import Plan, SlotCache
from switchgen.engines.transformers import SlotEngine

HEADS, GROUPS, SIZE, POSITIONS = 2, 3, 8, 40


def textbook(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, softcap: float | None
) -> torch.Tensor:
    """One token's attention over its row's own keys: query [Q, D], key and value [H, length, D]."""
    parts = []
    for head in range(query.shape[0]):
        keys, values = key[head // GROUPS], value[head // GROUPS]
        scores = keys @ query[head] / SIZE**0.5
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if window is not None:
            scores = scores[-window:]
            values = values[-window:]
        parts.append(torch.softmax(scores, dim=-1) @ values)
    return torch.stack(parts)


@pytest.fixture
def pools() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (6, HEADS, POSITIONS, SIZE)
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64),
        torch.randn(shape, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("groups", [[(0, 4, 32)], [(0, 2, 8), (2, 3, 32), (3, 4, 13)]])
def test_decode_step(
    pools: tuple[torch.Tensor, torch.Tensor],
    groups: list[tuple[int, int, int]],
    window: int | None,
    softcap: float | None,
) -> None:
    """Rows of different lengths; everything beyond a row's length is another row's garbage."""
    key, value = pools
    lengths = [0, 7, 31, 12]
    query = torch.randn(4, HEADS * GROUPS, 1, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    positions = torch.tensor(lengths)
    plan = Plan(torch.arange(4), positions, [], groups, max(lengths) + 1)
    out, _ = slot_attention(
        torch.nn.Module(), query, key, value, None, slot_plan=plan, sliding_window=window, softcap=softcap
    )
    for row, length in enumerate(lengths):
        own = slice(0, length + 1)
        expected = textbook(query[row, :, 0], key[row, :, own], value[row, :, own], window, softcap)
        assert torch.allclose(out[row, 0], expected, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_packed_read(pools: tuple[torch.Tensor, torch.Tensor], window: int | None, softcap: float | None) -> None:
    """Chunks of several rows in one sequence: (slot, first position, tokens)."""
    key, value = pools
    chunks = [(4, 0, 6), (1, 17, 1), (2, 9, 11)]
    total = sum(count for _, _, count in chunks)
    query = torch.randn(1, HEADS * GROUPS, total, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plan = Plan(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), chunks, [], 20)
    out, _ = slot_attention(
        torch.nn.Module(), query, key, value, None, slot_plan=plan, sliding_window=window, softcap=softcap
    )
    place = 0
    for slot, first, count in chunks:
        for position in range(first, first + count):
            own = slice(0, position + 1)
            expected = textbook(query[0, :, place], key[slot, :, own], value[slot, :, own], window, softcap)
            assert torch.allclose(out[0, place], expected, atol=1e-12)
            place += 1


def filled_cache(num_slots: int = 3, length: int = 4) -> SlotCache:
    """One layer; row i's key at position p is 100 * i + p."""
    cache = SlotCache(1)
    cache.add_slots(num_slots)
    slots = torch.arange(num_slots).repeat_interleave(length)
    positions = torch.arange(length).repeat(num_slots)
    cache.set_plan(Plan(slots, positions, [], [], length))
    states = (100 * slots + positions).double()[None, None, :, None].expand(1, 2, -1, 3)
    cache.layers[0].update(states.contiguous(), -states.contiguous())
    return cache


def rows_of(cache: SlotCache, length: int = 4) -> list[list[float]]:
    keys, values = cache.layers[0].keys, cache.layers[0].values
    assert torch.equal(keys, -values)
    assert torch.equal(keys[:, 0], keys[:, 1]) and torch.equal(keys[..., 0], keys[..., 2])
    rows: list[list[float]] = keys[:, 0, :length, 0].tolist()
    return rows


def test_tokens_go_to_their_places() -> None:
    assert rows_of(filled_cache()) == [[0, 1, 2, 3], [100, 101, 102, 103], [200, 201, 202, 203]]


def test_growth_keeps_what_is_there() -> None:
    cache = filled_cache()
    before = cache.num_bytes
    cache.add_slots(7)
    cache.set_plan(Plan(torch.tensor([6]), torch.tensor([900]), [], [], 901))
    assert cache.num_positions >= 901 and cache.num_slots == 7 and cache.num_bytes > before
    rows = rows_of(cache)
    assert rows[:3] == [[0, 1, 2, 3], [100, 101, 102, 103], [200, 201, 202, 203]]
    assert rows[3:] == [[0] * 4] * 4  # zeros, never uninitialised memory: 0 x NaN is NaN behind any mask


def test_moves_are_permutations() -> None:
    cache = filled_cache()
    cache.move([0, 1, 2], [1, 2, 0], 4)
    assert rows_of(cache) == [[200, 201, 202, 203], [0, 1, 2, 3], [100, 101, 102, 103]]
    cache.move([0], [2], 2)
    assert rows_of(cache)[2] == [200, 201, 102, 103]


def test_without_a_plan_the_attention_is_transformers_own(pools: tuple[torch.Tensor, torch.Tensor]) -> None:
    key, value = (pool[:1, :, :9] for pool in pools)
    query = torch.randn(1, HEADS * GROUPS, 9, SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    module = torch.nn.Module()
    module.num_key_value_groups = GROUPS  # type: ignore[assignment]
    module.is_causal = True  # type: ignore[assignment]
    out, _ = slot_attention(module, query, key, value, None)
    for position in range(9):
        own = slice(0, position + 1)
        expected = textbook(query[0, :, position], key[0, :, own], value[0, :, own], None, None)
        assert torch.allclose(out[0, position], expected, atol=1e-12)


def test_layers_on_several_devices(pools: tuple[torch.Tensor, torch.Tensor]) -> None:
    """A plan's tensors lie where the model takes its input; each layer's slots, places and masks where the layer is."""
    cache = SlotCache(2)
    cache.add_slots(2)
    for plan in (
        Plan(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), [(0, 0, 2), (1, 0, 1)], [], 2),
        Plan(torch.arange(2), torch.tensor([2, 1]), [], [(0, 2, 3)], 3),
    ):
        cache.set_plan(plan)
        shape = (2, HEADS, 1, SIZE) if plan.groups else (1, HEADS, 3, SIZE)
        for layer, device in zip(cache.layers, ("cpu", "meta"), strict=True):
            key, value = layer.update(torch.zeros(shape, device=device), torch.zeros(shape, device=device))
            query = torch.zeros(shape, device=device).repeat(1, GROUPS, 1, 1)
            out, _ = slot_attention(torch.nn.Module(), query, key, value, None, slot_plan=plan)
            assert key.device.type == out.device.type == device


# -- what is set aside -------------------------------------------------------------------------------------------------


@pytest.fixture
def engine() -> SlotEngine:
    made = make_pair().candidates[0].engine
    assert isinstance(made, SlotEngine)
    return made


@torch.inference_mode()
def test_one_long_row_does_not_make_every_slot_long_for_ever(engine: SlotEngine) -> None:
    """A request of 900 tokens once sized the caches of all that came after it."""
    short, long = Context([5, 6, 7], expected=60), Context([8] * 150, expected=900)
    alone = engine.begin([Context([5, 6, 7])]).logits()
    engine.begin([short, long]).logits()
    assert engine.cache.num_positions >= 900
    engine.release(long)
    short.ids.append(9)
    again = engine.begin([short]).logits()
    assert engine.cache.num_positions == 128, "what the row that is left needs"
    engine.clear()
    assert torch.allclose(engine.begin([Context([5, 6, 7, 9])]).logits(), again)
    assert torch.allclose(engine.begin([Context([5, 6, 7])]).logits(), alone)


def test_slots_are_set_aside_as_they_are_asked_for(engine: SlotEngine) -> None:
    """96 rows once got 128 slots, by doubling."""
    engine.begin([Context([5, 6, index]) for index in range(96)])
    assert engine.cache.num_slots == 96
    engine.begin([Context([5, 7, index]) for index in range(2)])
    assert engine.cache.num_slots == 120
    engine.begin([Context([5, 8, index]) for index in range(60)])
    assert engine.cache.num_slots == engine.max_slots == 128
    assert engine.stats.evicted_rows == 96 + 2 + 60 - 128
