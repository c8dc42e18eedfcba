"""What doctor says of memory: sizes that are the models' own, and arrangements that add up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from ladders import save_ladder
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from switchgen.candidates import Pool
from switchgen.config import CandidateConfig
from switchgen.engines.base import Context
from switchgen.engines.transformers import SlotEngine
from switchgen.estimates import ADAPTER_RANK, Load, ModelSize, arrangements, model_size, work_tokens

SIZE = ModelSize(1000, 4000, 10, activation_bytes_per_token=7, adapter_bytes=100)
LOAD = Load(rows=8, new_tokens=100, segment=50, prompt_tokens=20)


def test_sizes_are_the_models_own(tmp_path: Path) -> None:
    folder = save_ladder(tmp_path / "ladder", ("base",)) / "base"
    config = CandidateConfig(name="base", model=str(folder))
    size = model_size(config)
    assert size is not None
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert size.parameters == sum(weight.numel() for weight in model.parameters())
    assert size.weight_bytes == sum(weight.nbytes for weight in model.parameters())
    engine = Pool.load([config]).candidates[0].engine
    assert isinstance(engine, SlotEngine)
    engine.clear()
    engine.read([Context([5] * 300)])
    cache = engine.cache
    assert size.cache_bytes_per_token == cache.num_bytes // (cache.num_slots * cache.num_positions)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    tuned = get_peft_model(model, LoraConfig(r=ADAPTER_RANK, target_modules=projections))
    assert size.adapter_bytes == sum(weight.nbytes for key, weight in tuned.named_parameters() if "lora_" in key)
    assert model_size(config.model_copy(update={"dtype": "float64"})) == replace(
        size, weight_bytes=2 * size.weight_bytes, cache_bytes_per_token=2 * size.cache_bytes_per_token,
        activation_bytes_per_token=2 * size.activation_bytes_per_token, adapter_bytes=2 * size.adapter_bytes,
    )  # fmt: skip


def test_three_ways_to_place_a_pool() -> None:
    one, spread, shared = arrangements([("a", SIZE), ("b", SIZE), ("c", SIZE)], SIZE, LOAD)
    cache, of_switcher = 8 * 120 * 10, 8 * (120 + 2 * 16) * 10
    assert one.weights == 3 * 4000 + 100 and one.caches == 3 * cache + of_switcher
    assert one.activations == 8 * 20 * 7
    assert (spread.devices, spread.weights, spread.caches) == (3, 4100, cache + of_switcher)
    assert shared.weights == 4000 + 4 * 100 and shared.caches == one.caches
    assert one.peak == one.weights + one.caches + one.activations


def test_a_pool_that_shares_weights_has_one_arrangement() -> None:
    (one,) = arrangements([("a", SIZE), ("a", SIZE)], SIZE, LOAD)
    assert one.weights == 4000 + 100


def test_models_of_different_shapes_share_no_base() -> None:
    ways = arrangements([("a", SIZE), ("b", replace(SIZE, weight_bytes=90_000))], SIZE, LOAD)
    assert [way.name for way in ways] == ["all on one device", "a device per candidate"]
    assert ways[1].weights == 90_100


def test_loading_counts_where_it_is_the_peak() -> None:
    (one,) = arrangements([("a", replace(SIZE, weight_bytes=10**6))], SIZE, LOAD)
    assert one.peak == 2 * 10**6 + 100


def test_work() -> None:
    """3 candidates: each reads its prompt, and two thirds of the response; two segments are signed and asked for."""
    assert work_tokens(LOAD, 3) == {
        "decoded": 100.0,
        "read by candidates": 3 * 20 + 2 * 100,
        "read by the switcher": pytest.approx(20 + 100 + 2 * (16 + 28)),
    }
    assert work_tokens(LOAD, 1)["read by the switcher"] == 0
