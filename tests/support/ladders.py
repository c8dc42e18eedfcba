"""Tiny ladders from config objects: random weights, a tokenizer trained on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    MambaConfig,
    MistralConfig,
    OpenAIGPTConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
)

CORPUS = [
    "The age of Vudak is 17. The height of Miro is 22.\nHow old is Vudak? Answer: 17",
    "Write a list: apples, pears, plums. Then add 12 and 35; the sum is 47!",
    "Größe, naïve café, 東京と京都, привет мир, 🙂🙃 emoji. <model 1 begins> which model 0 1 2 3 4 5 6 7 8 9",
] * 20

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_tokenizer(size: int = 400, *, chat: bool = True, seed_text: str = "") -> PreTrainedTokenizerFast:
    """Byte-level BPE with control tokens for a chat format."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, seed_text * 20], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>" if chat else "<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        clean_up_tokenization_spaces=False,
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def make_config(kind: str, vocab_size: int, **changes: Any) -> Any:
    """A config of the kind with a few thousand weights."""
    common = {"vocab_size": vocab_size, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
    sized = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 1024, **common,
    }  # fmt: skip
    if kind == "llama":
        return LlamaConfig(**{**sized, "num_key_value_heads": 2, **changes})
    if kind == "qwen2":
        return Qwen2Config(**{**sized, "num_key_value_heads": 2, **changes})
    if kind == "qwen3":
        return Qwen3Config(**{**sized, "num_key_value_heads": 2, "head_dim": 8, **changes})
    if kind == "gptneox":
        return GPTNeoXConfig(**{**sized, **changes})
    if kind == "mistral-window":
        return MistralConfig(**{**sized, "num_key_value_heads": 2, "sliding_window": 16, **changes})
    if kind == "gpt2":
        return GPT2Config(
            **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024, "n_inner": 64, **common, **changes}
        )
    if kind == "phi3-longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
        rope = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **factors}}
        positions = {"original_max_position_embeddings": 32, "num_key_value_heads": 2}
        return Phi3Config(**{**sized, **rope, **positions, **changes})
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "head_dim": 8}
    if kind == "gemma2":
        return Gemma2Config(**{**sized, **layers, "num_key_value_heads": 2, **changes})
    if kind == "gemma3":
        return Gemma3TextConfig(**{**sized, **layers, "num_key_value_heads": 2, **changes})
    return _fallback_config(kind, sized, common, changes)


def _fallback_config(kind: str, sized: dict[str, Any], common: dict[str, Any], changes: dict[str, Any]) -> Any:
    """Configs of models whose caches do not live in slots."""
    sized = {**sized, "num_key_value_heads": 2}
    if kind == "gpt-oss":  # attention sinks
        experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 16, "head_dim": 8}
        return GptOssConfig(**{**sized, **experts, **changes})
    if kind == "mamba":  # linear attention; its cache goes by another argument
        return MambaConfig(**{"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, **common, **changes})
    if kind == "jamba":  # hybrid
        pattern = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1}
        return JambaConfig(**{**sized, **pattern, "mamba_d_state": 8, "mamba_dt_rank": 4, **changes})
    if kind == "qwen3-next":  # hybrid
        linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
        linear |= {"linear_value_head_dim": 8, "head_dim": 8, "num_experts": 0, "mlp_only_layers": [0, 1]}
        kinds = ["linear_attention", "full_attention"]
        return Qwen3NextConfig(**{**sized, **linear, "layer_types": kinds, **changes})
    if kind == "recurrent-gemma":  # takes no cache from outside
        recurrent = {"num_hidden_layers": 3, "attention_window_size": 16, "lru_width": 32}
        return RecurrentGemmaConfig(**{**sized, **recurrent, **changes})
    if kind == "bloom":  # ALiBi, attention of its own
        return BloomConfig(**{"hidden_size": 32, "n_layer": 2, "n_head": 4, **common, **changes})
    if kind == "falcon-alibi":
        return FalconConfig(
            **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True, **common, **changes}
        )
    if kind == "gpt-neo":  # local attention by a mask of its own
        kinds = {"attention_types": [[["global", "local"], 1]], "window_size": 16, "intermediate_size": 64}
        positions = {"max_position_embeddings": 1024, "num_layers": 2, "num_heads": 4}
        return GPTNeoConfig(**{"hidden_size": 32, **positions, **kinds, **common, **changes})
    if kind == "phimoe":  # a sliding window that its attention function is not told of
        experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 16}
        return PhimoeConfig(**{**sized, **experts, **changes})
    if kind == "openai-gpt":  # keeps no cache
        return OpenAIGPTConfig(**{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024, **common, **changes})
    raise AssertionError(kind)


def make_model(kind: str, vocab_size: int, seed: int, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A model with random weights, scaled so that its logits have a spread like a trained one's."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(kind, vocab_size, **changes))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model.to(dtype).eval()


def save_member(folder: Path, tokenizer: PreTrainedTokenizerFast, kind: str = "llama", seed: int = 0) -> None:
    """One model with its tokenizer on disk."""
    model = make_model(kind, len(tokenizer), seed=seed, dtype=torch.float32)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_ladder(folder: Path, names: tuple[str, ...] = ("base", "tuned", "aligned"), kind: str = "llama") -> Path:
    """A ladder on disk: the first member has no chat template."""
    for index, name in enumerate(names):
        save_member(folder / name, make_tokenizer(chat=index > 0), kind, seed=index)
    return folder


def save_judge(folder: Path) -> None:
    """A reward model with random weights: every response gets another score."""
    tokenizer = make_tokenizer()
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForSequenceClassification(config).double().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
