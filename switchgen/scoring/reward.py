"""A reward model's score of whole responses, in batches."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from switchgen.errors import ConfigError, DataError, one_line

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("switchgen")

Messages = Sequence[Mapping[str, str]]


class RewardModelScorer:
    """Scores responses with a sequence-classification reward model (one logit, unbounded).

    The model sees prompt and response once each: through its chat template where it has one, else as a
    pair of texts (a tokenizer with a separator token), else with an empty line between them. It is
    loaded on first use, from safetensors, without running code of the hub.
    """

    def __init__(
        self,
        model: str,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 8,
        *,
        max_length: int | None = None,
        too_long: Literal["error", "nan"] = "error",
    ) -> None:
        """model: hub name or folder; device: `auto`, `cpu`, `cuda:1` …; dtype: `auto`, `float32`, `bfloat16` …;
        max_length: tokens, the model's own limit by default; too_long: a longer dialogue is never cut: it is an error,
        or scores NaN with a warning."""
        if batch_size < 1:
            raise ConfigError(f"reward model {model!r}: batch_size must be at least 1, got {batch_size}")
        self.name = model
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.max_length = max_length
        self.too_long = too_long
        self._loaded: tuple[Any, Any] | None = None

    def score_batch(self, messages_list: Sequence[Messages], responses: Sequence[str]) -> list[float]:
        """One score per (messages, response), in order. Raises ConfigError where the model cannot be used, DataError
        with the positions of all dialogues beyond its context."""
        if len(messages_list) != len(responses):
            raise ValueError(f"got {len(messages_list)} prompts and {len(responses)} responses")
        if not responses:
            return []
        model, tokenizer = self._load()
        ids = [self._encode(tokenizer, *pair) for pair in zip(messages_list, responses, strict=True)]
        limit = self._limit(model, tokenizer)
        long = [i for i, row in enumerate(ids) if len(row) > limit]
        if long:
            rows = ", ".join(f"{i} ({len(ids[i])} tokens)" for i in long[:20])
            if self.too_long == "error":
                raise DataError(f"reward model {self.name!r} reads up to {limit} tokens; longer: rows {rows}")
            _log.warning("reward model %s reads up to %d tokens; not scored: rows %s", self.name, limit, rows)
        # Longest first: little padding, and memory runs out at once or never.
        order = sorted((i for i, row in enumerate(ids) if len(row) <= limit), key=lambda i: -len(ids[i]))
        scores = [math.nan] * len(ids)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for i, value in zip(batch, self._forward(model, tokenizer, [ids[i] for i in batch]), strict=True):
                scores[i] = value
        return scores

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            import torch  # noqa: PLC0415
            from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: PLC0415

            from switchgen.loading import missing_weights  # noqa: PLC0415

            try:
                tokenizer = AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    self.name, dtype=self.dtype, trust_remote_code=False, use_safetensors=True,
                    output_loading_info=True,
                )  # fmt: skip
            except Exception as error:  # a broken file makes the libraries raise whatever they stumble over
                raise ConfigError(f"reward model {self.name!r} cannot be loaded: {one_line(error)}") from None
            if incomplete := missing_weights(info):
                raise ConfigError(f"reward model {self.name!r} {incomplete}")
            if model.config.num_labels != 1:
                raise ConfigError(
                    f"reward model {self.name!r} has {model.config.num_labels} outputs; a reward model has one"
                )
            device = self.device
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            self._loaded = model.to(device).eval(), tokenizer
        return self._loaded

    def _limit(self, model: Any, tokenizer: Any) -> int:
        positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
        return self.max_length or min(positions, tokenizer.model_max_length)

    def _encode(self, tokenizer: Any, messages: Messages, response: str) -> list[int]:
        """Token ids of one dialogue. Control tokens written in the texts stay text."""
        if tokenizer.chat_template:
            return _encode_turns(tokenizer, [*map(dict, messages), {"role": "assistant", "content": response}])
        prompt = "\n\n".join(message["content"] for message in messages)
        texts = (prompt, response) if tokenizer.sep_token is not None else (f"{prompt}\n\n{response}",)
        return list(tokenizer(*texts, split_special_tokens=True)["input_ids"])

    def _forward(self, model: Any, tokenizer: Any, rows: list[list[int]]) -> list[float]:
        import torch  # noqa: PLC0415

        width = max(map(len, rows))
        pad = next(
            (i for i in (model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0
        )
        if model.config.pad_token_id is None and len({len(row) for row in rows}) > 1:
            model.config.pad_token_id = pad  # the classification head looks for the last token that is no padding
        ids_BT = torch.full((len(rows), width), pad, dtype=torch.long)
        mask_BT = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            ids_BT[i, : len(row)] = torch.tensor(row)
            mask_BT[i, : len(row)] = 1
        with torch.inference_mode():
            logits: torch.Tensor = model(
                input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device)
            ).logits
        return [float(value) for value in logits[:, 0].float().cpu()]


_SLOT = "\ue000{}\ue001"  # private-use characters stand where a turn's text goes while the template is rendered


def _encode_turns(tokenizer: Any, turns: list[dict[str, str]]) -> list[int]:
    """The dialogue in the chat template, tokenized as one string, as the model was trained. Where a text holds a
    control token's string, template and texts are tokenized piece by piece instead, texts without control tokens."""
    rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
    control = [str(token) for token in tokenizer.all_special_tokens]
    control += [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if not any(token in turn["content"] for token in control for turn in turns):
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    slots = [_SLOT.format(i) for i in range(len(turns))]
    rest = tokenizer.apply_chat_template(
        [{**turn, "content": slot} for turn, slot in zip(turns, slots, strict=True)], tokenize=False
    )
    ids: list[int] = []
    for turn, slot in zip(turns, slots, strict=True):
        head, found, rest = rest.partition(slot)
        if not found:
            raise ConfigError(
                f"{tokenizer.name_or_path!r}: its chat template leaves out a turn of role {turn['role']!r}"
            )
        ids += tokenizer(head, add_special_tokens=False)["input_ids"]
        ids += tokenizer(turn["content"].strip(), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids + list(tokenizer(rest, add_special_tokens=False)["input_ids"])
