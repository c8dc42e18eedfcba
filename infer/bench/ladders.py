"""Ladders with random weights, built in memory: nothing is downloaded, only the shapes matter.

Every member has the same vocabulary: byte-level BPE trained here on invented words. It is all ASCII, so that whatever
random weights write is whole characters, and every case writes the same number of tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from switchgen.candidates import Candidate, Pool, Switcher
from switchgen.engines.build import build_engine, stop_ids
from switchgen.engines.transformers import SlotEngine
from switchgen.errors import ConfigError
from switchgen.prompts import PLAIN_TEMPLATE, RELEASED, SwitcherPrompt
from switchgen.trace import Query
from switchgen.vocabulary import Vocabulary

NAMES = ("pretrained", "finetuned", "aligned")

_CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """A model's shape."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    """Tokens the model has rows for; the tokenizer may have fewer."""
    dtype: torch.dtype = torch.float32
    max_positions: int = 8192

    def config(self, **changes: Any) -> LlamaConfig:
        """A Llama-type config; no token ends a text."""
        shape = {name: getattr(self, name) for name in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "vocab_size")}  # fmt: skip
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        return LlamaConfig(**{**shape, **tokens, "max_position_embeddings": self.max_positions, **changes})


SIZES = {
    "tiny": Size("tiny", 256, 768, 6, 4, 2, 2048),
    "small": Size("small", 768, 2048, 10, 12, 2, 4096),
    "8b": Size("8b", 4096, 14336, 32, 32, 8, 128256, torch.bfloat16),
}


@dataclass
class BenchLadder:
    """A pool of random models with a switcher of the same shape."""

    size: Size
    pool: Pool
    switcher: Switcher
    models: list[PreTrainedModel]
    """The candidates' models, then the switcher's."""

    @property
    def engines(self) -> list[SlotEngine]:
        """The candidates' engines, then the switcher's."""
        found = [*(candidate.engine for candidate in self.pool), self.switcher.engine]
        return [engine for engine in found if isinstance(engine, SlotEngine)]

    @property
    def vocabulary(self) -> Vocabulary:
        """The one vocabulary."""
        return self.pool.vocabularies[0]


def make_ladder(
    size: Size,
    *,
    device: str = "cpu",
    max_slots: int = 128,
    dtype: torch.dtype | None = None,
    compiled: bool = False,
    **changes: Any,
) -> BenchLadder:
    """Three candidates and a switcher with random weights.

    Args:
        max_slots: rows whose caches each model keeps.
        dtype: other than the size's own.
        compiled: decode steps by `torch.compile`.
        changes: to the models' config.

    Raises:
        ConfigError: the size needs a CUDA device and there is none.
    """
    if size.dtype == torch.bfloat16 and not device.startswith("cuda"):
        raise ConfigError(f"bench: size {size.name} needs a CUDA device; allowed here: tiny, small")
    tokenizer = make_tokenizer(min(size.vocab_size, 4096))
    plain, chat = Vocabulary(tokenizer(chat=False), size.name), Vocabulary(tokenizer(chat=True), size.name)
    models = [_make_model(size, seed, device, dtype or size.dtype, changes) for seed in range(len(NAMES) + 1)]
    candidates = []
    for index, name in enumerate(NAMES):
        vocabulary = chat if index else plain
        engine = _engine(name, models[index], vocabulary, max_slots, size)
        candidates.append(Candidate(name, engine, "chat" if index else PLAIN_TEMPLATE))
    pool = Pool(candidates)
    engine = _engine("switcher", models[-1], chat, max_slots, size)
    ladder = BenchLadder(size, pool, Switcher(engine, SwitcherPrompt(chat, len(NAMES), chat=True)), models)
    if compiled:
        for engine in ladder.engines:
            engine.compile()
    return ladder


def _engine(name: str, model: PreTrainedModel, vocabulary: Vocabulary, max_slots: int, size: Size) -> SlotEngine:
    stops = stop_ids(model, vocabulary)
    engine = build_engine(
        name, model, vocabulary, stop_ids=stops, max_positions=size.max_positions, max_slots=max_slots
    )
    assert isinstance(engine, SlotEngine)
    # An end of text is never drawn, so that all cases write the same number of tokens.
    engine.banned_ids = torch.cat([engine.banned_ids, torch.tensor(sorted(stops), device=engine.device)])
    return engine


def _make_model(size: Size, seed: int, device: str, dtype: torch.dtype, changes: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(size.config(**changes), dtype=dtype)
    # With the library's initial scale all tokens are about equally likely; trained models are surer than that.
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    return model.eval().requires_grad_(False)


@cache
def make_tokenizer(vocab_size: int) -> Any:
    """A trained tokenizer's maker: `(chat=…)` gives it with or without a chat template; the ids are the same."""
    draw = random.Random(0)
    syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.choice((1, 2, 2, 3, 3, 4)))) for _ in range(vocab_size)]
    lines = [" ".join(draw.choices(words, k=12)).capitalize() + "." for _ in range(vocab_size)]
    # The switcher's own words are frequent in its prompts, as the public tokenizers' words are in theirs.
    frame = [RELEASED.signature(writer, "x") + RELEASED.question(3) for writer in range(10)] * 50
    printable = "".join(chr(code) for code in range(32, 127)) + "\n"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, show_progress=False)
    backend.train_from_iterator([*lines, *frame, printable], trainer)

    def build(*, chat: bool) -> PreTrainedTokenizerFast:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            eos_token="<|end|>" if chat else "<|endoftext|>",
            pad_token="<|endoftext|>",
            additional_special_tokens=specials[1:],
            clean_up_tokenization_spaces=False,
        )
        if chat:
            tokenizer.chat_template = _CHAT
        return tokenizer

    return build


def make_queries(ladder: BenchLadder, count: int, *, seed: int = 0) -> Iterator[Query]:
    """Questions of 24 to 96 tokens of invented words, always the same."""
    draw = random.Random(seed)
    for row in range(count):
        yield Query.from_text(random_text(ladder, draw, draw.randint(24, 96)), id=str(row))


def random_text(ladder: BenchLadder, draw: random.Random, num_tokens: int) -> str:
    """Text of that many random tokens (read again, it may have a few more or fewer)."""
    return ladder.vocabulary.decode(random_ids(ladder, draw, num_tokens))


def random_ids(ladder: BenchLadder, draw: random.Random, num_tokens: int) -> list[int]:
    """Random tokens of text."""
    first = len(ladder.vocabulary.control_ids)
    return [draw.randrange(first, len(ladder.vocabulary)) for _ in range(num_tokens)]
