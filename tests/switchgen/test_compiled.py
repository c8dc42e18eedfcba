"""Compiled decoding: the same numbers as plain forwards, few compilations, and where it is refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from ladders import make_tokenizer, save_member
from peft import LoraConfig, get_peft_model
from reference import Ladder, make_ladder
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from transformers import AutoModelForCausalLM

from switchgen import Pool, generate
from switchgen.config import CandidateConfig, Recipe
from switchgen.engines.base import Context
from switchgen.engines.compiled import rounded
from switchgen.engines.transformers import SlotEngine
from switchgen.errors import ConfigError
from switchgen.models import ModelStore

ROUGH = 1e-4
"""How far numbers may be apart where some are computed in float32 whatever the dtype."""


@pytest.fixture(autouse=True)
def counts() -> Iterator[Callable[[], int]]:
    """How many graphs were compiled."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but inductor's code: what was traced is run by torch itself."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def make_engine(kind: str, max_slots: int = 6) -> tuple[Ladder, SlotEngine]:
    ladder = make_ladder([kind], max_slots=max_slots)
    engine = ladder.pool.candidates[0].engine
    assert isinstance(engine, SlotEngine)
    engine.compile()
    return ladder, engine


def write_and_compare(ladder: Ladder, engine: SlotEngine, tolerance: float = 1e-8) -> None:
    """Rows of several lengths that grow, leave, fork, are dropped and come back; every step's logits are compared."""
    draw = random.Random(0)
    vocabulary = engine.vocabulary

    def token() -> int:
        return draw.randrange(10, len(vocabulary))

    def steps(contexts: list[Context], number: int, leaving: int = 0) -> None:
        session = engine.begin(contexts)
        for step in range(number):
            for row, logits_V in zip(session.contexts, session.logits(), strict=True):
                expected = ladder.plain[0].logits(row.ids)
                assert torch.allclose(logits_V, expected, atol=tolerance), (step, row.slot)
            for row in session.contexts:
                row.ids.append(token())
            if step < leaving:
                session.keep([row for row in range(len(session.contexts)) if row != 1])

    with torch.inference_mode():
        rows = [Context([token() for _ in range(length)]) for length in (1, 31, 5, 60, 12)]
        steps(rows, 6, leaving=3)
        forks = [Context([*rows[3].ids, token()], rows[3], len(rows[3].ids)) for _ in range(3)]
        steps([rows[2], *forks], 4)
        others = [Context([token() for _ in range(length)]) for length in (9, 126, 33)]
        steps(others, 4)
        assert engine.stats.evicted_rows and engine.stats.copied_rows
        steps([rows[0]], 3)
        steps([*others[1:], rows[1]], 4)
        before = engine.cache.num_positions
        others[0].ids += [token() for _ in range(300)]
        steps([others[0], rows[0]], 2)
        assert engine.cache.num_positions > before
        engine.clear()
        steps(rows[:2], 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gptneox", "gpt2", "mistral-window", "gemma2", "gemma3"])
def test_a_compiled_step_is_a_plain_forward(kind: str, traced: None, counts: Callable[[], int]) -> None:
    """One compilation for all lengths, row counts and sizes of the cache."""
    ladder, engine = make_engine(kind)
    write_and_compare(ladder, engine, ROUGH if kind == "gemma2" else 1e-8)
    assert counts() == 1


@pytest.mark.slow
def test_padding_is_nobodys(traced: None, counts: Callable[[], int]) -> None:
    """Rows and lengths rounded up, as on CUDA."""
    ladder, engine = make_engine("mistral-window")
    assert engine.decoder is not None
    engine.decoder.round_rows, engine.decoder.round_length = lambda rows: 4 * rows, 256
    write_and_compare(ladder, engine)
    assert counts() == 1


def test_row_counts_are_rounded_up_to_few() -> None:
    assert sorted({rounded(rows) for rows in range(1, 129)}) == [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    assert all(rows <= rounded(rows) < 1.5 * rows + 1 for rows in range(1, 300))


@pytest.mark.slow
@pytest.mark.needs("g++", "python-headers")
@pytest.mark.parametrize(("kind", "tolerance"), [("gpt2", 1e-8), ("mistral-window", ROUGH)])
def test_compiled_code(kind: str, tolerance: float, monkeypatch: pytest.MonkeyPatch, counts: Callable[[], int]) -> None:
    """Caches are written where they lie: a CUDA graph would copy what has no fixed address, or not be captured."""
    seen: list[tuple[set[int], set[int]]] = []

    def inner(*arguments: Any, **keywords: Any) -> Any:
        graph = compile_fx_inner(*arguments, **keywords)
        seen.append((set(graph.mutated_input_idxs), set(keywords["static_input_idxs"])))
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=partial(compile_fx, inner_compile=inner)))
    ladder, engine = make_engine(kind)
    # Mistral's angles of positions are computed in float32, and here in another way.
    # Code that an earlier run left in inductor's cache would be taken from there.
    with torch._inductor.config.patch(force_disable_caches=True):
        write_and_compare(ladder, engine, tolerance)
    ((written, fixed),) = seen
    assert counts() == 1 and len(written) == 2 * len(engine.cache.layers) and written <= fixed


@pytest.mark.slow
def test_adapters_over_one_base(tmp_path: Path, traced: None, counts: Callable[[], int]) -> None:
    """Each adapter's step is compiled with it; a batch of several is stepped as ever."""
    save_member(tmp_path / "base", make_tokenizer())
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), settings).save_pretrained(
            tmp_path / name
        )
    configs = [
        CandidateConfig(name=name, model=str(tmp_path / "base"), dtype="float64",
                        adapter=None if name == "base" else str(tmp_path / name))
        for name in ("base", "a", "b")
    ]  # fmt: skip
    plain, compiled = (Pool.load(configs, models=ModelStore(compiled=which)) for which in (False, True))
    for policy in ("base", "a", "b", "random", "a"):
        ours, expected = (generate(pool, ["How old?", "12 + 35 is"], policy, seed=3) for pool in (compiled, plain))
        assert [trace.segments for trace in ours] == [trace.segments for trace in expected]
    assert counts() == 3


# -- where it is refused -----------------------------------------------------------------------------------------------


def test_models_that_are_not_compiled(tmp_path: Path) -> None:
    save_member(tmp_path / "bloom", make_tokenizer(), kind="bloom")
    with pytest.raises(ConfigError, match="bloom: engine.compile: caches of BloomForCausalLM .* allowed with it"):
        Pool.load([CandidateConfig(name="bloom", model=str(tmp_path / "bloom"))], models=ModelStore(compiled=True))
    engine = make_ladder(["llama"]).pool.candidates[0].engine
    assert isinstance(engine, SlotEngine)
    cpu_offload(engine.model)
    with pytest.raises(ConfigError, match="its layers are spread by device_map"):
        engine.compile()


def test_no_compiler() -> None:
    missing = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with (
        missing,
        pytest.raises(ConfigError, match="no C\\+\\+ compiler is here .* allowed without one: engine.compile: false"),
    ):
        make_engine("llama")


def test_code_that_cannot_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    _, engine = make_engine("llama")

    def refuse(*_: Any) -> Any:
        raise NotImplementedError("no such thing")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=refuse))
    with pytest.raises(ConfigError, match="c0: engine.compile: a LlamaForCausalLM cannot be compiled: .*no such thing"):
        engine.begin([Context([5, 6, 7])]).logits()


def test_the_recipes_setting(tmp_path: Path) -> None:
    save_member(tmp_path / "base", make_tokenizer())
    pool = [{"name": "base", "model": str(tmp_path / "base")}]
    for compiled in (False, True):
        recipe = Recipe.model_validate({"pool": pool, "engine": {"compile": compiled}})
        (candidate,) = Pool.from_recipe(recipe)
        assert isinstance(candidate.engine, SlotEngine)
        assert (candidate.engine.decoder is not None) == compiled
