"""Candidates that are adapters over one base write in one batch; what they write is what each writes alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ladders import make_tokenizer, save_member
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from switchgen.api import response_seed
from switchgen.candidates import Pool
from switchgen.config import CandidateConfig, DecodingConfig, SwitcherConfig
from switchgen.engines.joint import families
from switchgen.engines.transformers import SlotEngine
from switchgen.ids import derive_seed
from switchgen.loop import Loop
from switchgen.models import ModelStore
from switchgen.policies import Policy, RandomPolicy, SwitcherPolicy
from switchgen.rows import Row
from switchgen.trace import CUE, Query, Trace

NAMES = ("base", "a", "b")
QUERIES = [Query.from_text("How old is Vudak? " * (1 + index % 3), str(index)) for index in range(7)]
SETTINGS: dict[str, dict[str, Any]] = {
    "lengths": {"max_new_tokens": 24, "segment": 5},
    "ends": {"max_new_tokens": 30, "segment": {"tokens": 8, "end": "sentence"}, "stop": ["th", "zq"],
             "eos": "segment", "first": "a", "last": "b", "cue": " So:"},
    "unsure": {"max_new_tokens": 30, "segment": {"tokens": 12, "end": "p@0.2", "min_tokens": 2}},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two plain LoRA adapters, one with DoRA, and the switcher's."""
    path = tmp_path_factory.mktemp("family")
    save_member(path / "base", make_tokenizer())
    for seed, name in enumerate(("a", "b", "dora", "judge")):
        torch.manual_seed(seed)
        settings = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, use_dora=name == "dora",
            task_type="CAUSAL_LM",
        )  # fmt: skip
        get_peft_model(AutoModelForCausalLM.from_pretrained(path / "base"), settings).save_pretrained(path / name)
    return path


def load(folder: Path, names: Sequence[str] = NAMES, max_slots: int = 32) -> tuple[Pool, SwitcherPolicy]:
    configs = [
        CandidateConfig(name=name, model=str(folder / "base"), dtype="float64",
                        adapter=None if name == "base" else str(folder / name))
        for name in names
    ]  # fmt: skip
    pool = Pool.load(configs, max_slots=max_slots)
    judge = SwitcherConfig(base=str(folder / "base"), adapter=str(folder / "judge"))
    # Random weights are too sure of one candidate.
    return pool, SwitcherPolicy(pool.load_switcher(judge, max_slots=max_slots), temperature=20, top_p=1.0)


def engines(pool: Pool) -> list[SlotEngine]:
    found = [candidate.engine for candidate in pool]
    assert all(isinstance(engine, SlotEngine) for engine in found)
    return found  # type: ignore[return-value]


def write_alone(pool: Pool) -> None:
    """From now on every candidate writes in a batch of its own."""
    family = engines(pool)[0].family
    assert family is not None
    family.together = False


def steps(pool: Pool) -> int:
    return sum(engine.stats.steps for engine in engines(pool))


def signed(traces: Sequence[Trace]) -> list[Any]:
    return [(t.finish, [(s.writer, s.ids, s.text, s.finish) for s in t.segments]) for t in traces]


def collaborate(pool: Pool, policy: Policy, decoding: DecodingConfig, max_rows: int = 64) -> list[Any]:
    loop = Loop(pool, policy, decoding, max_rows=max_rows)
    rows = [Row(pool, query, response_seed(0, query.id)) for query in QUERIES]
    done = {row.trace.query.id: row.trace for row in loop.run(rows)}
    return signed([done[query.id] for query in QUERIES])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("chosen", ["random", "switcher"])
def test_together_is_alone(folder: Path, name: str, chosen: str) -> None:
    """The same tokens in fewer decode steps, whatever ends the segments and however many rows are in flight."""
    decoding = DecodingConfig.model_validate({**SETTINGS[name], "temperature": 1.0})
    pool, switcher = load(folder)
    assert families([candidate.engine for candidate in pool]) == [[0, 1, 2]]
    policy = switcher if chosen == "switcher" else RandomPolicy()
    together = collaborate(pool, policy, decoding)
    steps_together = steps(pool)
    few = collaborate(pool, policy, decoding, max_rows=3)
    write_alone(pool)
    before = steps(pool)
    alone = collaborate(pool, policy, decoding)
    assert together == few == alone
    assert len({writer for _, segments in alone for writer, *_ in segments} - {CUE}) >= 2
    assert steps_together < 0.75 * (steps(pool) - before)


@pytest.mark.parametrize("max_slots", [1, 2, 4])
def test_evictions_change_nothing(folder: Path, max_slots: int) -> None:
    decoding = DecodingConfig.model_validate(SETTINGS["lengths"])
    pool, _ = load(folder, max_slots=max_slots)
    plenty, _ = load(folder)
    assert collaborate(pool, RandomPolicy(), decoding) == collaborate(plenty, RandomPolicy(), decoding)
    assert sum(engine.stats.evicted_rows for engine in engines(pool)) > 0
    assert sum(engine.stats.evicted_rows for engine in engines(plenty)) == 0


@pytest.mark.parametrize("max_slots", [4, 64])
def test_forks(folder: Path, max_slots: int) -> None:
    """Prefixes, branches and leaves: the same together and alone."""
    decoding = DecodingConfig.model_validate(SETTINGS["lengths"])

    def tree(pool: Pool) -> Iterator[Trace]:
        def grow(rows: list[Row], to: int | None) -> list[Row]:
            loop = Loop(pool, RandomPolicy(), decoding, max_segments=to)
            return sorted(loop.run(rows, release=False), key=rows.index)

        rows = grow([Row(pool, query, response_seed(0, query.id)) for query in QUERIES[:3]], 2)
        for to in (3, None):
            going = [row for row in rows if row.trace.finish is None]
            rows = grow([row.fork(derive_seed(row.trace.seed, k)) for row in going for k in range(2)], to)
            yield from (row.trace for row in rows)

    pool, _ = load(folder, max_slots=max_slots)
    together = signed(list(tree(pool)))
    other, _ = load(folder)
    write_alone(other)
    assert together == signed(list(tree(other)))
    assert sum(engine.stats.copied_rows for engine in engines(pool)) > 0


@torch.inference_mode()
def test_adapters_that_cannot_be_mixed_write_alone(folder: Path) -> None:
    """PEFT refuses rows with DoRA beside others; such a pool works as before."""
    pool, _ = load(folder, ("a", "dora", "b"))
    decoding = DecodingConfig.model_validate(SETTINGS["lengths"])
    written = collaborate(pool, RandomPolicy(), decoding)
    assert {writer for _, segments in written for writer, *_ in segments} == {0, 1, 2}
    for index, name in enumerate(("a", "dora", "b")):
        store, query = ModelStore(), QUERIES[index]
        single = CandidateConfig(name=name, model=str(folder / "base"), dtype="float64", adapter=str(folder / name))
        engine = store.engine(single, max_slots=4)
        context = Row(pool, query, 0).context(index)
        ours = pool.candidates[index].engine
        assert torch.equal(ours.begin([context]).logits(), engine.begin([type(context)(list(context.ids))]).logits())


def test_what_does_not_fit_together_is_written_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed allocation in mid-segment: what was written is taken back, and comes out the same."""
    decoding = DecodingConfig.model_validate(SETTINGS["lengths"])
    expected = collaborate(load(folder)[0], RandomPolicy(), decoding)
    pool, _ = load(folder)
    family: Any = engines(pool)[0].family
    forward, calls = family.forward_each, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            torch.empty(1 << 60)
        return forward(*args, **kwargs)

    monkeypatch.setattr(family, "forward_each", failing)
    assert collaborate(pool, RandomPolicy(), decoding) == expected
    assert len(calls) == 8 and not family.together
