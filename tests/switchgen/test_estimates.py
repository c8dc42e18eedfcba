"""What doctor says of memory: sizes that are the models' own, and arrangements that add up."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ladders import save_ladder
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from switchgen.candidates import Pool
from switchgen.config import CandidateConfig
from switchgen.doctor import examine
from switchgen.engines.base import Context
from switchgen.engines.transformers import SlotEngine
from switchgen.estimates import ADAPTER_RANK, Load, ModelSize, arrangements, model_size, work_tokens
from switchgen.rundir import open_run

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


def test_quantized_weights_are_smaller(tmp_path: Path) -> None:
    """Linear layers are; embeddings, norms and what makes the logits keep the type they are stored in."""
    folder = save_ladder(tmp_path / "ladder", ("base",)) / "base"
    model = AutoModelForCausalLM.from_pretrained(folder)
    linear = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    plain = model_size(CandidateConfig(name="base", model=str(folder)))
    assert plain is not None and linear > 0
    for quantization, per_value in (("4bit", 0.5625), ("8bit", 1.0)):
        size = model_size(CandidateConfig(name="base", model=str(folder), quantization=quantization))
        assert size is not None and size.parameters == plain.parameters
        assert size.weight_bytes == int(4 * (plain.parameters - linear) + per_value * linear)
        assert size.cache_bytes_per_token == plain.cache_bytes_per_token


def test_hub_names_are_looked_for_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its weights, and by its config alone; nothing is asked of the network, and what is not there is unknown."""
    folder = save_ladder(tmp_path / "ladder", ("base",)) / "base"
    cached = tmp_path / "hub" / "models--lab--base"
    snapshot = cached / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    wanted = model_size(CandidateConfig(name="base", model=str(folder)))
    hub = CandidateConfig(name="base", model="lab/base")
    assert model_size(hub) is None
    shutil.copyfile(folder / "config.json", snapshot / "config.json")
    assert model_size(hub) == wanted, "from the config"
    # A download that is not finished: the index names a file that is not there.
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert model_size(hub) == wanted
    (snapshot / "model.safetensors.index.json").unlink()
    shutil.copyfile(folder / "model.safetensors", snapshot / "model.safetensors")
    assert model_size(hub) == wanted
    assert model_size(hub.model_copy(update={"revision": "other"})) is None


def test_a_candidate_s_own_adapter_counts(tmp_path: Path) -> None:
    folder = save_ladder(tmp_path / "ladder", ("base",)) / "base"
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules=["q_proj"]))
    tuned.save_pretrained(tmp_path / "adapter")
    size = model_size(CandidateConfig(name="base", model=str(folder), adapter=str(tmp_path / "adapter")))
    assert size is not None
    assert size.own_adapter_bytes == sum(w.nbytes for key, w in tuned.named_parameters() if "lora_" in key) > 0
    (one,) = arrangements([("a", replace(SIZE, own_adapter_bytes=30)), ("a", replace(SIZE, own_adapter_bytes=50))],
                          SIZE, LOAD)  # fmt: skip
    assert one.weights == 4000 + 30 + 50 + 100


def test_the_work_of_each_way() -> None:
    """Each candidate is fed the prompt and the response; the switcher sits beside one of them."""
    one, spread, shared = arrangements([("a", SIZE), ("b", SIZE), ("c", SIZE)], SIZE, LOAD)
    candidate, switcher = 2 * 1000 * 120, 2 * 1000 * (120 + 2 * (16 + 28))
    assert one.work == shared.work == 3 * candidate + switcher
    assert spread.work == candidate + switcher


@pytest.mark.parametrize("rounds", [1, 4])
def test_rounds_cost(rounds: int, tmp_path: Path) -> None:
    lines, _ = examine(open_run("lab", [f"rollout.rounds={rounds}"], tmp_path))
    settings = open_run("lab", [], tmp_path).recipe.rollout
    [line] = [line for line in lines if line.startswith("cost")]
    assert f" {settings.queries * settings.states * rounds} states x 3 branches" in line
    assert ("4 rounds, " in line) == (rounds == 4)


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
