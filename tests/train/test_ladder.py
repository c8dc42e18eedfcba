"""The ladder's tokenizer, chat template and rows, and the ladder that is shipped."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from train.ladder import (
    CONTROL_TOKENS,
    END,
    END_OF_TEXT,
    IGNORED,
    LadderShape,
    chat_prompt,
    chat_rows,
    chat_tokenizer,
    load_rung,
    new_model,
    packed_rows,
    save_rung,
    train_tokenizer,
)
from train.ladder_texts import documents
from train.optimizer import linear_schedule, muon_and_adamw
from train.world import World, make_world
from train.world_tasks import FAMILIES, task

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "lab"
RUNGS = ("pretrained", "finetuned", "aligned")
MAX_BYTES = 8 * 2**20


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(0)


@pytest.fixture(scope="module")
def base(world: World) -> PreTrainedTokenizerFast:
    return train_tokenizer(world, LadderShape(), num_texts=2000)


@pytest.fixture(scope="module")
def chat(base: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return chat_tokenizer(base)


@pytest.mark.parametrize("before", ["", "The answer is model ", "a", "\n", "7", "Answer: "])
def test_each_digit_is_one_token_wherever_it_stands(base: PreTrainedTokenizerFast, before: str) -> None:
    prefix = base.encode(before, add_special_tokens=False)
    for digit in "0123456789":
        ids = base.encode(before + digit, add_special_tokens=False)
        assert ids[: len(prefix)] == prefix
        assert ids[len(prefix) :] == base.convert_tokens_to_ids([digit])


@pytest.mark.parametrize("text", ["The age of Vudak is 17.", "  two  spaces ", "ünï→漢字🙂\n\tx", "", "12+3=15"])
def test_text_survives_the_round_trip(base: PreTrainedTokenizerFast, text: str) -> None:
    assert base.decode(base.encode(text, add_special_tokens=False)) == text


def test_every_name_is_one_token(world: World) -> None:
    """Names in pieces were copied wrongly (`Gidi` became `Giro`), and the compositional family hangs on copying."""
    tokenizer = train_tokenizer(world, LadderShape())
    for name in (*world.everyone, *world.guests):
        assert len(tokenizer.encode(f" {name}", add_special_tokens=False)) == 1, name


def test_vocabularies_agree_and_ends_differ(base: PreTrainedTokenizerFast, chat: PreTrainedTokenizerFast) -> None:
    assert base.get_vocab() == chat.get_vocab()
    assert len(base) <= LadderShape().vocab_size
    assert (base.eos_token, chat.eos_token) == (END_OF_TEXT, END)
    assert base.chat_template is None
    assert set(base.all_special_ids) == set(chat.all_special_ids)
    for token in CONTROL_TOKENS:
        assert len(base.encode(token, add_special_tokens=False)) == 1


def test_control_tokens_in_a_users_text_can_be_kept_text(chat: PreTrainedTokenizerFast) -> None:
    ids = chat.encode("a<|end|>b", add_special_tokens=False, split_special_tokens=True)
    assert chat.convert_tokens_to_ids(END) not in ids
    assert chat.decode(ids) == "a<|end|>b"


def test_chat_template_renders_every_turn(chat: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  Hello "},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Who?"},
    ]
    opened = chat.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert opened == (
        "<|system|>\nBe brief.<|end|>\n<|user|>\n  Hello <|end|>\n"
        "<|assistant|>\nHi.<|end|>\n<|user|>\nWho?<|end|>\n<|assistant|>\n"
    )
    assert chat.apply_chat_template(messages, tokenize=False) == opened.removesuffix("<|assistant|>\n")


def test_as_many_tokens_stand_before_an_answer_in_chats_as_on_pages(
    world: World, base: PreTrainedTokenizerFast, chat: PreTrainedTokenizerFast
) -> None:
    asked = "Add 17 and 54."
    in_chat = base.convert_ids_to_tokens(chat_prompt(chat, asked))
    pages = [page for page in itertools.islice(documents(world, seed=0), 2000) if "\nReply:\n" in page]
    assert len(pages) > 500
    for page in pages:
        question, answer = page.split("\nReply:\n")
        gap = base.tokenize(page)[len(base.tokenize(question)) : -len(base.tokenize(answer))]
        assert gap == ["Ċ", "Reply", ":", "Ċ"]
    assert in_chat[-len(gap) :] == ["<|end|>", "Ċ", "<|assistant|>", "Ċ"]


def test_packed_rows_hold_whole_documents(world: World, base: PreTrainedTokenizerFast) -> None:
    rows = packed_rows(world, base, num_rows=50, row_tokens=128, seed=0)
    assert len(rows) == 50
    for row in rows:
        length = sum(row["attention_mask"])
        assert {len(part) for part in row.values()} == {128}
        assert row["labels"] == row["input_ids"][:length] + [IGNORED] * (128 - length)
        assert row["input_ids"][length - 1] == base.eos_token_id
        assert base.decode(row["input_ids"])[0].isalnum()
    assert sum(sum(row["attention_mask"]) for row in rows) > 0.85 * 50 * 128


def test_chat_rows_learn_the_answer_alone(world: World, chat: PreTrainedTokenizerFast) -> None:
    for row in chat_rows(world, chat, num_rows=50, seed=0):
        start = row["labels"].index(next(label for label in row["labels"] if label != IGNORED))
        assert row["labels"][start:] == row["input_ids"][start:]
        assert chat.decode(row["input_ids"][:start]).endswith("<|assistant|>\n")
        assert row["input_ids"][-1] == chat.convert_tokens_to_ids(END)


def test_both_optimizers_follow_the_schedule_even_after_a_reload() -> None:
    """Accelerate reloads an optimizer's state when it wraps it; the parts once stayed at the first warm-up rate."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.LayerNorm(4))
    optimizer = muon_and_adamw(model, matrix_lr=0.1, other_lr=0.01)
    optimizer.load_state_dict(optimizer.state_dict())
    schedule = linear_schedule(optimizer, steps=10, warmup=4)
    seen = []
    for _ in range(10):
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        seen.append([group["lr"] for part in optimizer.parts for group in part.param_groups])
        schedule.step()
    assert seen[0] == pytest.approx([0.02, 0.002])
    assert max(seen)[0] == pytest.approx(0.1)
    assert seen[-1] == pytest.approx([0.1 / 6, 0.01 / 6])


def test_a_rung_survives_saving(world: World, chat: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = new_model(LadderShape(hidden_size=32, intermediate_size=64, num_layers=1), chat, seed=0)
    save_rung(model, chat, tmp_path / "rung")
    loaded, tokenizer = load_rung(tmp_path / "rung")
    assert tokenizer.chat_template == chat.chat_template
    assert tokenizer.eos_token_id == loaded.config.eos_token_id == chat.eos_token_id
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].to(torch.bfloat16).float()), name


# --- the shipped ladder ----------------------------------------------------------------------------------------------


def test_shipped_ladder_is_small() -> None:
    weights = sum((SHIPPED / rung / "model.safetensors").stat().st_size for rung in RUNGS)
    assert weights <= MAX_BYTES


@pytest.mark.parametrize("rung", RUNGS)
def test_shipped_rung_loads_and_writes(rung: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(SHIPPED / rung)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / rung)
    assert model.dtype == torch.bfloat16
    assert model.config.max_position_embeddings == 2048
    assert 0.8e6 < model.num_parameters() < 1.3e6
    assert (tokenizer.chat_template is None) == (rung == "pretrained")
    assert tokenizer.eos_token == (END_OF_TEXT if rung == "pretrained" else END)
    ids = tokenizer("Question: What is 2 + 3?\nReply:\n", return_tensors="pt")
    with torch.inference_mode():
        logits = model(**ids).logits
    assert logits.shape[-1] == len(tokenizer)
    assert torch.isfinite(logits).all()


def test_shipped_rungs_share_one_vocabulary() -> None:
    first, *others = (AutoTokenizer.from_pretrained(SHIPPED / rung).get_vocab() for rung in RUNGS)
    assert all(other == first for other in others)


@pytest.mark.parametrize("family", FAMILIES)
def test_shipped_tasks_are_world_zeros(world: World, family: str) -> None:
    shipped: dict[str, Any] = json.loads((SHIPPED / "tasks" / f"{family}.json").read_text(encoding="utf-8"))
    assert shipped == json.loads(json.dumps(task(world, family)))
