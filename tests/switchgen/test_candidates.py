"""Pools from disk: shared weights, adapters, a published switcher, and what cannot be loaded."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ladders import make_model, make_tokenizer, save_ladder, save_member
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from reference import Ladder, Plain, collaborate, first_difference, respond, switcher_scores
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from switchgen.api import decide, generate, response_seed
from switchgen.candidates import Pool, check_trained_for
from switchgen.config import CandidateConfig, DecodingConfig, SwitcherConfig
from switchgen.engines.base import Context
from switchgen.errors import ConfigError, ModelError
from switchgen.loop import Loop
from switchgen.models import ModelStore
from switchgen.policies import FixedPolicy
from switchgen.rows import Row
from switchgen.trace import Query, Segment, Trace

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
QUERIES = [Query.from_text(text, text) for text in ("How old is Vudak?", "12 + 35", "Write a list")]


def save_adapter(base: Path, folder: Path, seed: int, **changes: Any) -> Path:
    """A LoRA adapter with random weights, large enough to change every token."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "target_modules": PROJECTIONS, "init_lora_weights": False, "task_type": "CAUSAL_LM", **changes}
    get_peft_model(model, LoraConfig(**settings)).save_pretrained(folder)
    return folder


def merged(base: Path, adapter: Path | None) -> Any:
    """The weights with an adapter merged into them, in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three adapters over it, on disk."""
    path = tmp_path_factory.mktemp("adapters")
    save_member(path / "base", make_tokenizer())
    for seed, name in enumerate(("a", "b", "judge")):
        save_adapter(path / "base", path / name, seed)
    return path


def configs(folder: Path, *adapters: str | None, **changes: Any) -> list[CandidateConfig]:
    return [
        CandidateConfig(
            name=adapter or "base", model=str(folder / "base"), dtype="float64",
            adapter=None if adapter is None else str(folder / adapter), **changes,
        )
        for adapter in adapters
    ]  # fmt: skip


def as_plain(candidate: Any, model: Any) -> Plain:
    engine = candidate.engine
    return Plain(model, candidate, sorted(engine.vocabulary.control_ids - engine.stop_ids))


@pytest.mark.parametrize("order", [(None, "a", "b"), ("b", None, "a"), ("a", "b", None)])
def test_adapters_over_one_base_are_merged_weights(folder: Path, order: tuple[str | None, ...]) -> None:
    """Candidates and switcher share one model; each writes as its merged weights do, whoever was loaded last.

    PEFT goes on with the adapter that was active when another is loaded: the last one's first turn used to be
    another's.
    """
    pool = Pool.load(configs(folder, *order))
    assert len({id(candidate.engine.model) for candidate in pool}) == 1  # type: ignore[attr-defined]
    switcher = pool.load_switcher(SwitcherConfig(base=str(folder / "base"), adapter=str(folder / "judge")), max_slots=8)
    last = pool.candidates[-1].engine
    models = [merged(folder / "base", None if name is None else folder / name) for name in order]
    first = Context(list(pool.candidates[-1].prompt_ids(QUERIES[0])))
    with torch.inference_mode():
        drawn = last.begin([first]).logits()[0]
        expected = models[-1](input_ids=torch.tensor([first.ids])).logits[0, -1]
    assert torch.allclose(drawn, expected, atol=1e-9)
    ladder = Ladder(pool, [as_plain(candidate, model) for candidate, model in zip(pool, models, strict=True)], switcher)
    ladder.plain_switcher = Plain(merged(folder / "base", folder / "judge"), pool.candidates[0], [])
    decoding = DecodingConfig(max_new_tokens=24, segment=5, temperature=1.0, top_p=0.95)
    writers: set[int] = set()
    for policy in ("random", "switcher"):
        for query, trace in zip(QUERIES, collaborate(ladder, QUERIES, policy, decoding), strict=True):
            expected_trace = respond(ladder, query, response_seed(0, query.id), policy, decoding)
            assert first_difference(trace, expected_trace) is None
            writers |= set(trace.writers)
    assert writers == {0, 1, 2}


def released_adapter(base: Path, folder: Path) -> Path:
    """An adapter as `bunsenfeng/PFA_switcher_1` is published: another base's name, fields of an older PEFT."""
    save_adapter(base, folder, 9, r=64, lora_alpha=16, lora_dropout=0.1)
    for item in folder.iterdir():
        if item.name not in ("adapter_config.json", "adapter_model.safetensors"):
            item.unlink()
    config = {
        "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "allenai/Llama-3.1-Tulu-3-8B",
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {},
        "lora_alpha": 16, "lora_dropout": 0.1, "megatron_config": None, "megatron_core": "megatron.core",
        "modules_to_save": None, "peft_type": "LORA", "r": 64, "rank_pattern": {}, "revision": None,
        "target_modules": ["v_proj", "k_proj", "q_proj", "o_proj"], "task_type": "CAUSAL_LM", "use_dora": False,
        "use_rslora": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    names = load_file(folder / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    return folder


def test_a_released_switcher(tmp_path: Path, folder: Path) -> None:
    """p is what plain PEFT and one forward over the released prompt give."""
    adapter = released_adapter(folder / "base", tmp_path / "PFA_switcher_1")
    pool = Pool.load(configs(folder, None, "a"))
    switcher = pool.load_switcher(SwitcherConfig(base="base", adapter=str(adapter)))
    query, segments = QUERIES[0], [("base", "He is"), ("a", " 17"), ("base", ".")]
    p = decide(pool, switcher, query, segments)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
    plain = PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = pool.candidates[0].vocabulary.tokenizer
    text = (
        "How old is Vudak? <model 0 begins> He is <model 0 ends> <model 1 begins>  17 <model 1 ends>"
        " <model 0 begins> . <model 0 ends> Which model should generate the next segment? "
        "Please respond with a number from 0 to 1. The answer is model "
    )
    message = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    # Piece by piece the ids may differ from the whole string's; for this prompt they do not.
    trace = Trace(query, 0, [Segment(pool.index(name), part, (), "length") for name, part in segments])
    assert ids == switcher.prompt.full_ids(query, trace.signed())
    with torch.inference_mode():
        logits = plain(input_ids=torch.tensor([ids])).logits[0, -1]
    expected = torch.softmax(logits[tokenizer.convert_tokens_to_ids(["0", "1"])], dim=-1).tolist()
    assert list(p) == ["base", "a"] and list(p.values()) == pytest.approx(expected, abs=1e-9)
    untuned = pool.load_switcher(SwitcherConfig(base="base"))
    assert decide(pool, untuned, query, segments) != p


def test_decide_is_one_plain_forward(folder: Path) -> None:
    pool = Pool.load(configs(folder, None, "a"))
    switcher = pool.load_switcher(SwitcherConfig(base="a"))
    ladder = Ladder(pool, [], switcher, Plain(merged(folder / "base", folder / "a"), pool.candidates[0], []))
    for segments in ([], [("a", " <model 0 ends>"), ("base", "<|end|>東京"), ("a", "")]):
        p = decide(pool, switcher, QUERIES[0], segments)
        written = [Segment(pool.index(name), text, (), "length") for name, text in segments]
        expected = switcher_scores(ladder, Trace(QUERIES[0], 0, written))
        assert list(p.values()) == pytest.approx(expected, abs=1e-9) and sum(p.values()) == pytest.approx(1)
    with pytest.raises(ConfigError, match="no candidate is called 'c'; allowed: base, a"):
        decide(pool, switcher, "q", [("c", "x")])


def test_one_warning_for_one_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Candidates and switcher over one hybrid model: decoded one by one, said once."""
    save_member(tmp_path / "base", make_tokenizer(), kind="jamba")
    save_adapter(tmp_path / "base", tmp_path / "a", 0)
    pool = Pool.load(configs(tmp_path, None, "a"))
    pool.load_switcher(SwitcherConfig(base="base"))
    warnings = [record.getMessage() for record in caplog.records if record.name == "switchgen"]
    assert len(warnings) == 1 and "layers of kind linear_attention" in warnings[0]


def test_shared_weights_with_capped_attention(tmp_path: Path) -> None:
    """Gemma 2 caps its scores, which sdpa cannot: the second engine over its weights must not be judged by sdpa."""
    save_member(tmp_path / "base", make_tokenizer(), kind="gemma2")
    save_adapter(tmp_path / "base", tmp_path / "a", 0)
    pool = Pool.load(configs(tmp_path, None, "a"))
    assert [type(candidate.engine).__name__ for candidate in pool] == ["SlotEngine"] * 2
    ids = pool.candidates[0].prompt_ids(QUERIES[0])
    for candidate, adapter in zip(pool, (None, tmp_path / "a"), strict=True):
        context = Context(list(ids))
        with torch.inference_mode():
            drawn = candidate.engine.begin([context]).logits()[0]
            expected = merged(tmp_path / "base", adapter)(input_ids=torch.tensor([ids])).logits[0, -1]
        assert torch.allclose(drawn, expected, atol=1e-6)


# -- ladders -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ladder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ladder(tmp_path_factory.mktemp("ladder"))


def load(folder: Path, *names: str, **changes: Any) -> Pool:
    return Pool.load([CandidateConfig(name=name, model=str(folder / name), **changes) for name in names])


def test_a_ladder(ladder_folder: Path) -> None:
    pool = load(ladder_folder, "base", "tuned", "aligned")
    assert pool.names == ["base", "tuned", "aligned"] and len(pool) == 3
    assert len(pool.vocabularies) == 1
    assert [candidate.prompt for candidate in pool] == ["{query}\n{trace}", "chat", "chat"]
    assert pool.index("tuned") == 1
    with pytest.raises(ConfigError, match=r"'tunes' \(did you mean 'tuned'\?\); allowed: base, tuned, aligned"):
        pool.index("tunes")


def test_prompt_styles(ladder_folder: Path) -> None:
    template = "Question: {query}\nAnswer:\n{trace}"
    pool = load(ladder_folder, "tuned", prompt=template)
    assert pool.candidates[0].vocabulary.decode(pool.candidates[0].prompt_ids(QUERIES[0])) == (
        "Question: How old is Vudak?\nAnswer:\n"
    )
    assert load(ladder_folder, "tuned", prompt="plain").candidates[0].prompt == "{query}\n{trace}"
    with pytest.raises(ModelError, match="base: prompt is chat, but .* has no chat template; use plain"):
        load(ladder_folder, "base", prompt="chat")


@pytest.mark.parametrize("dtype", ["auto", "float32", "float64", "bfloat16"])
def test_dtypes(ladder_folder: Path, dtype: str) -> None:
    (candidate,) = load(ladder_folder, "aligned", dtype=dtype)
    expected = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert candidate.engine.model.dtype == expected  # type: ignore[attr-defined]
    assert not any(p.requires_grad for p in candidate.engine.model.parameters())  # type: ignore[attr-defined]


def test_stored_half_precision_runs_in_float32_on_a_cpu(tmp_path: Path) -> None:
    model = make_model("llama", 396, seed=0, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    if not torch.cuda.is_available():
        assert load(tmp_path, "base").candidates[0].engine.model.dtype == torch.float32  # type: ignore[attr-defined]


def test_the_same_model_is_loaded_once(ladder_folder: Path) -> None:
    store = ModelStore()
    model = str(ladder_folder / "aligned")
    pool = Pool.load([CandidateConfig(name=name, model=model) for name in ("one", "two")], models=store)
    one, two = (candidate.engine for candidate in pool)
    assert one is not two and one.model is two.model  # type: ignore[attr-defined]
    switcher = pool.load_switcher(SwitcherConfig())
    assert switcher.engine.model is one.model and switcher.engine.name == "switcher"  # type: ignore[attr-defined]
    other = Pool.load([CandidateConfig(name="one", model=model, dtype="float64")], models=store)
    assert other.candidates[0].engine.model is not one.model  # type: ignore[attr-defined]


def test_a_switcher_with_a_precision_of_its_own(folder: Path) -> None:
    """`switcher.dtype` used to be passed over where the switcher's base is a candidate."""
    pool = Pool.load(configs(folder, None, "a"))
    switcher = pool.load_switcher(SwitcherConfig(base="base", dtype="float32"))
    assert switcher.engine.model.dtype == torch.float32  # type: ignore[attr-defined]
    assert pool.candidates[0].engine.model.dtype == torch.float64  # type: ignore[attr-defined]


def test_contexts_end_where_positions_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """LongRoPE (Phi 3's long contexts): beyond 32 tokens here a row would depend on its batch mates."""
    save_member(tmp_path / "base", make_tokenizer(), kind="phi3-longrope")
    pool = load(tmp_path, "base", dtype="float64")
    engine = pool.candidates[0].engine
    assert engine.max_positions == 32 and "contexts are limited to 32 tokens" in caplog.text
    loop = Loop(pool, FixedPolicy(0, "base"), DecodingConfig(max_new_tokens=100, segment=4))
    rows = [Row(pool, Query.from_text("x" * length, str(length)), 1) for length in (1, 3, 8, 40)]
    finished = {row.trace.query.id: row.trace for row in loop.run(rows)}
    assert finished["40"].finish == "too_long"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64).eval()
    for row in rows[:3]:
        ids = row.prompt_ids(0) + [index for segment in row.trace.segments for index in segment.ids]
        assert len(ids) <= 32
        alone = Loop(pool, FixedPolicy(0, "base"), loop.decoding).run([Row(pool, row.trace.query, 1)])
        assert [other.trace.segments for other in alone] == [row.trace.segments]
        context = Context(ids)
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([ids])).logits[0, -1]
            assert torch.allclose(engine.begin([context]).logits()[0], expected, atol=1e-9)
        engine.release(context)


def test_stop_tokens(tmp_path: Path) -> None:
    """The generation config's end-of-text ids and the tokenizer's own; no other control token ends a text."""
    tokenizer = make_tokenizer()
    save_member(tmp_path / "base", tokenizer)
    config = json.loads((tmp_path / "base" / "generation_config.json").read_text())
    config["eos_token_id"] = [0, tokenizer.eos_token_id]
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(config))
    engine = load(tmp_path, "base").candidates[0].engine
    assert engine.stop_ids == {0, tokenizer.eos_token_id}
    assert set(engine.banned_ids.tolist()) == engine.vocabulary.control_ids - engine.stop_ids


def test_padded_rows_are_never_drawn(tmp_path: Path) -> None:
    """Embeddings are often padded to a round number; sizes differ inside one family and mean nothing."""
    tokenizer = make_tokenizer()
    for name, extra in (("base", 0), ("aligned", 116)):
        make_model("llama", len(tokenizer) + extra, seed=0).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    pool = load(tmp_path, "base", "aligned")
    assert len(pool.vocabularies) == 1
    banned = set(pool.candidates[1].engine.banned_ids.tolist())
    assert set(range(len(tokenizer), len(tokenizer) + 116)) <= banned


# -- what cannot be loaded ---------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])


def pickled(path: Path) -> None:
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")


def without(*parts: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        weights = load_file(path / "adapter_model.safetensors")
        kept = {name: value for name, value in weights.items() if not all(part in name for part in parts)}
        assert len(kept) < len(weights)
        save_file(kept, path / "adapter_model.safetensors")

    return spoil


def with_extra(path: Path) -> None:
    weights = load_file(path / "adapter_model.safetensors")
    weights["base_model.model.model.embed_tokens.weight"] = torch.zeros(396, 32)
    save_file(weights, path / "adapter_model.safetensors")


def with_rank(rank: int) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**config, "r": rank}))

    return spoil


def with_targets(*targets: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": list(targets)}))

    return spoil


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights cut off": (truncated, "does not fit"),
    "a layer's weights missing": (without("layers.1", "v_proj"), "expects a weight that it lacks: '.*layers.1.*v_proj"),
    "weights of the base, too": (with_extra, "has no place for its weight '.*embed_tokens"),
    "another rank": (with_rank(8), "does not fit"),
    "other modules": (with_targets("query", "value"), "does not fit"),
    "fewer modules": (with_targets("q_proj"), "has no place for its weight"),
    "no config": (lambda path: (path / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    "pickled": (pickled, "holds no adapter_model.safetensors"),
    "config is no JSON": (lambda path: (path / "adapter_config.json").write_text("{"), "does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_adapters_that_do_not_fit(name: str, folder: Path, tmp_path: Path) -> None:
    """PEFT takes what it finds and warns at most: half an adapter would be a silent loss."""
    spoil, message = BROKEN[name]
    adapter = save_adapter(folder / "base", tmp_path / "spoilt", 3)
    spoil(adapter)
    with pytest.raises(ModelError, match=message) as caught:
        Pool.load([CandidateConfig(name="x", model=str(folder / "base"), adapter=str(adapter))])
    assert str(adapter) in str(caught.value)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A hub's cache; returns the folder of a repository in it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def repository(name: str, revision: str = "main") -> Path:
        place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True, exist_ok=True)
        commit = f"{len(list((place / 'refs').iterdir())):040}"
        (place / "refs" / revision).write_text(commit)
        return place / "snapshots" / commit

    return repository


def test_adapters_of_the_hub(folder: Path, hub: Callable[..., Path]) -> None:
    """They are what they would be as folders, their tokenizers with them; a revision may be named."""
    ids = [5, 6, 7, 8]
    for seed, name in enumerate(("org/adapter", "org/adapter@v2")):
        adapter = save_adapter(folder / "base", hub(*name.split("@")), seed)
        make_tokenizer().save_pretrained(adapter)
        logits = []
        for place in (str(adapter), name):
            pool = Pool.load([CandidateConfig(name="x", model=str(folder / "base"), adapter=place, dtype="float64")])
            assert pool.candidates[0].vocabulary.source == str(adapter)
            with torch.inference_mode():
                logits.append(pool.candidates[0].engine.begin([Context(list(ids))]).logits())
        assert torch.equal(*logits)


def test_a_switcher_of_the_hub_says_whom_it_was_trained_for(folder: Path, hub: Callable[..., Path]) -> None:
    adapter = save_adapter(folder / "base", hub("org/switcher"), 0)
    (adapter / "switchgen.json").write_text('{"candidates": ["a", "b", "c"]}')
    pool = Pool.load(configs(folder, None, "a"))
    with pytest.raises(ConfigError, match="org/switcher: this switcher chooses between 3 candidates"):
        pool.load_switcher(SwitcherConfig(base="base", adapter="org/switcher"))


def test_pickled_adapters_of_the_hub_are_not_read(folder: Path, hub: Callable[..., Path]) -> None:
    """PEFT takes what it finds, and of the hub a pickle where there is nothing else."""
    pickled(save_adapter(folder / "base", hub("org/adapter"), 0))
    with pytest.raises(ModelError, match="holds no adapter_model.safetensors"):
        Pool.load([CandidateConfig(name="x", model=str(folder / "base"), adapter="org/adapter")])
    with pytest.raises(ModelError, match="adapter 'org/other': 'org/other' cannot be fetched"):
        Pool.load([CandidateConfig(name="x", model=str(folder / "base"), adapter="org/other")])


def test_adapters_that_learn_prompts_are_refused(folder: Path, tmp_path: Path) -> None:
    """They change no weights: a model with one would have written as if it had none."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(model, settings).save_pretrained(tmp_path / "soft")
    with pytest.raises(ModelError, match="learns prompts; allowed: adapters over weights"):
        Pool.load([CandidateConfig(name="x", model=str(folder / "base"), adapter=str(tmp_path / "soft"))])


def test_a_switcher_needs_a_choice_and_a_whole_model(folder: Path) -> None:
    with pytest.raises(ModelError, match="chooses between candidates; the pool has only 'base'"):
        Pool.load(configs(folder, None)).load_switcher(SwitcherConfig())
    pool = Pool.load(configs(folder, None, "a"))
    with pytest.raises(ModelError, match="'a' is itself an adapter .*; a switcher adapter needs a whole model"):
        pool.load_switcher(SwitcherConfig(base="a", adapter=str(folder / "judge")))
    many = [config.model_copy(update={"name": f"c{index}"}) for index, config in enumerate(configs(folder, None) * 11)]
    with pytest.raises(ModelError, match="chooses between at most 10 candidates; the pool has 11"):
        Pool.load(many).load_switcher(SwitcherConfig())
    with pytest.raises(ModelError, match="at least one candidate"):
        Pool.load([])


def test_settings_without_effect_warn(ladder_folder: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = CandidateConfig(name="base", model=str(ladder_folder / "base"), device="cpu", device_map={"": "cpu"})
    pool = Pool.load([config, config.model_copy(update={"name": "again", "device_map": None})])
    assert caplog.messages == ["base: device has no effect: device_map says where its parts go"]
    caplog.clear()
    pool.load_switcher(SwitcherConfig(revision="main"))
    assert caplog.messages == ["switcher.revision and switcher.trust_remote_code have no effect: its base is the "
                               "candidate again, whose own count"]  # fmt: skip


def test_a_switcher_of_another_pool(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Labels are places on the ladder: in another order they mean other candidates, and nothing else would tell."""
    (tmp_path / "switchgen.json").write_text('{"candidates": ["base", "aligned"], "format": "released"}')
    check_trained_for(str(tmp_path), ["base", "aligned"], SwitcherConfig())
    assert not caplog.messages
    check_trained_for(str(tmp_path), ["aligned", "base"], SwitcherConfig())
    assert "trained for base, aligned, in this order; its labels now mean aligned, base" in caplog.text
    with pytest.raises(ConfigError, match=r"chooses between 2 candidates \(base, aligned\); the pool has 3"):
        check_trained_for(str(tmp_path), ["base", "middle", "aligned"], SwitcherConfig())
    with pytest.raises(ConfigError, match="was trained with switcher.format: released"):
        check_trained_for(str(tmp_path), ["base", "aligned"], SwitcherConfig(format="compact"))


def test_a_tokenizer_larger_than_its_model(tmp_path: Path) -> None:
    make_model("llama", 100, seed=0).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="base: the tokenizer of .* has 396 tokens, the model .* only 100"):
        load(tmp_path, "base")


def test_models_that_are_not_there(tmp_path: Path, ladder_folder: Path) -> None:
    for model, message in (
        (tmp_path / "nowhere", "x: no model folder at"),
        (tmp_path, "x: .* is a folder without config.json"),
    ):
        with pytest.raises(ModelError, match=message):
            Pool.load([CandidateConfig(name="x", model=str(model))])
    aligned = CandidateConfig(name="x", model=str(ladder_folder / "aligned"))
    for change, message in (
        ({"device": "gpu"}, "x: unknown device 'gpu'; allowed: auto, cpu, cuda, cuda:N"),
        ({"device": "cuda:99"}, "x: device 'cuda:99' is not here; this machine has"),
        ({"adapter": "./nowhere"}, "adapter './nowhere': no such folder"),
    ):
        with pytest.raises(ModelError, match=message):
            Pool.load([aligned.model_copy(update=change)])


def spoilt(name: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        settings = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps({**settings, **changes}))

    return spoil


BROKEN_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    # Loaded with a third layer of random weights, and not a word of it, until it was looked for.
    "layers missing": (spoilt("config.json", num_hidden_layers=3), r"lacks weights: model.layers.2.* and \d more"),
    "a text where a number stands": (spoilt("config.json", hidden_size="32"), "cannot be loaded: .*hidden_size"),
    "a tokenizer of another kind": (spoilt("tokenizer.json", model={"type": "BPE", "vocab": 3}), "cannot be loaded"),
    "its config a list": (lambda path: (path / "tokenizer_config.json").write_text("[]"), "tokenizer of .* cannot be"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_broken_models(name: str, ladder_folder: Path, tmp_path: Path) -> None:
    spoil, message = BROKEN_MODELS[name]
    folder = shutil.copytree(ladder_folder / "aligned", tmp_path / "model")
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        Pool.load([CandidateConfig(name="x", model=str(folder))])


def test_weights_without_a_place_warn(ladder_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(ladder_folder / "aligned", tmp_path / "model")
    spoilt("config.json", num_hidden_layers=1)(folder)
    Pool.load([CandidateConfig(name="x", model=str(folder))])
    assert "has weights that a LlamaForCausalLM has no place for: model.layers.1" in caplog.text


def test_weights_that_give_no_numbers(tmp_path: Path, ladder_folder: Path) -> None:
    """An overflow, as half precision makes them: at loading, and later, in whoever reads the logits."""
    spoilt_folder = shutil.copytree(ladder_folder / "aligned", tmp_path / "model")
    weights = load_file(spoilt_folder / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, spoilt_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="x: its logits are no numbers .NaN.; half precision"):
        Pool.load([CandidateConfig(name="x", model=str(spoilt_folder))])
    names = ("base", "aligned")
    pool = Pool.load([CandidateConfig(name=name, model=str(ladder_folder / "aligned")) for name in names])
    switcher = pool.load_switcher(SwitcherConfig())
    pool.candidates[0].engine.model.model.norm.weight[0] = torch.nan  # type: ignore[attr-defined]
    for policy in ("base", "baco-rand@0.5", "switcher"):
        if policy == "switcher":
            switcher.engine.model.model.norm.weight[0] = torch.nan  # type: ignore[attr-defined]
        with pytest.raises(ModelError, match="its logits are no numbers"):
            generate(pool, ["How old is Vudak?"], policy, switcher=switcher)


def test_two_candidates_of_one_name(ladder_folder: Path) -> None:
    config = CandidateConfig(name="x", model=str(ladder_folder / "aligned"))
    with pytest.raises(ConfigError, match="two candidates are called 'x'"):
        Pool.load([config, config])


def test_reloading_leaves_the_reference_alone(folder: Path) -> None:
    """A pool's engines change the attention of their own models only."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    before = copy.deepcopy(model.state_dict())
    Pool.load(configs(folder, None, "a"))
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
