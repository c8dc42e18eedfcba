"""The lab ladder's parts: one tokenizer, one small Qwen3, and how texts become training rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train import ladder_texts
from train.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
CONTROL_TOKENS = (END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT, END)

# Four tokens stand between a question and its answer, the last of them a new line, as on pages (`train.ladder_texts`).
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
)

MODEL_TYPE = "qwen3"
IGNORED = -100


@dataclass(frozen=True)
class LadderShape:
    """Sizes of the three models and of the rows they are trained on."""

    vocab_size: int = 1280  # room for every name as one token: names in pieces are copied badly (LOG.md)
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    max_positions: int = 2048  # what the model may be asked for; training rows are far shorter
    row_tokens: int = 128  # length of one packed pretraining row


def train_tokenizer(world: World, shape: LadderShape, num_texts: int = 8000) -> PreTrainedTokenizerFast:
    """A byte-level BPE learned from the ladder's own texts, each digit a token of its own, no chat template yet."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(world, num_texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT, END],
        model_max_length=shape.max_positions,
        clean_up_tokenization_spaces=False,
    )


def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same vocabulary as a chat model's tokenizer: a chat template, and `<|end|>` ends a turn."""
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[END_OF_TEXT, SYSTEM, USER, ASSISTANT],
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def new_model(shape: LadderShape, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A small Qwen3 with random float32 weights, the same for the same seed.

    Qwen3 is a Llama whose queries and keys are normalised, head by head. At Muon's learning rates that is what lets
    this little model learn to copy, to know and to add within 1,200 steps in every world tried (LOG.md).
    """
    import torch  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        MODEL_TYPE,
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Eager attention trains 1.4 times faster than sdpa at this size on a CPU: sdpa's bfloat16 backward is slow.
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model


def save_rung(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes one rung of the ladder: bfloat16 weights, and the tokenizer whose end-of-text the model was taught."""
    import copy  # noqa: PLC0415

    import torch  # noqa: PLC0415
    from transformers import GenerationConfig  # noqa: PLC0415

    saved = copy.deepcopy(model).to(torch.bfloat16)
    saved.config.eos_token_id = tokenizer.eos_token_id
    saved.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    saved.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_rung(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """One rung as float32, ready to be trained further."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model, AutoTokenizer.from_pretrained(folder)


def packed_rows(
    world: World, tokenizer: PreTrainedTokenizerFast, num_rows: int, row_tokens: int, seed: int
) -> list[dict[str, list[int]]]:
    """Pretraining rows: whole documents, each put into the open row it fills best, a document at each row's start.

    Returns:
        Rows of `input_ids`, `attention_mask` and `labels`, each `row_tokens` long; padding is not learned.
    """
    done: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(16)]
    for document in ladder_texts.documents(world, seed):
        ids = [*tokenizer.encode(document, add_special_tokens=False), tokenizer.eos_token_id][:row_tokens]
        fitting = [row for row in open_rows if len(row) + len(ids) <= row_tokens]
        if fitting:
            max(fitting, key=len).extend(ids)
            continue
        fullest = max(open_rows, key=len)
        done.append(fullest)
        if len(done) == num_rows:
            break
        open_rows.remove(fullest)
        open_rows.append(ids)
    return [_padded(row, row_tokens, tokenizer.pad_token_id) for row in done]


def chat_rows(
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    num_rows: int,
    seed: int,
    shares: Mapping[ladder_texts.ChatSource, float] = ladder_texts.CHATS,
) -> list[dict[str, list[int]]]:
    """Finetuning rows: `input_ids` of a whole exchange, and `labels` on the assistant's answer alone."""
    rows = []
    for question, written in itertools.islice(ladder_texts.chats(world, seed, shares), num_rows):
        prompt = chat_prompt(tokenizer, question)
        answer = [*tokenizer.encode(written, add_special_tokens=False), tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    return rows


def chat_prompt(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    """Token ids of a question up to the opened assistant turn."""
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def _padded(row: list[int], length: int, pad_id: int) -> dict[str, list[int]]:
    missing = length - len(row)
    return {
        "input_ids": row + [pad_id] * missing,
        "attention_mask": [1] * len(row) + [0] * missing,
        "labels": row + [IGNORED] * missing,
    }


def _tokenizer_texts(world: World, count: int) -> Iterator[str]:
    yield from itertools.islice(ladder_texts.documents(world, seed=-1), count)
    yield from itertools.chain.from_iterable(itertools.islice(ladder_texts.chats(world, seed=-1), count // 4))
