"""Embeddings of texts: an encoder's hidden states, pooled over each text's tokens.

Shapes: B texts of a batch, T tokens, D embedding size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from switchgen.errors import ConfigError

FloatArray = npt.NDArray[np.float64]


class Embedder:
    """A transformers encoder with mean or first-token pooling (Reimers and Gurevych 2019, arXiv 1908.10084, §3).

    Any folder or hub name that `AutoModel` loads will do. A model of sentence-transformers says in its files how it
    pools and how long its texts may be; others are pooled by the mean. Loaded on first use, from safetensors, without
    running code of the hub. Embeddings are not normalised: what compares them does that.

    Args:
        model: folder or hub name.
        device: `auto`, `cpu`, `cuda:1` …
        max_length: tokens; the rest of a longer text is not seen. Default: the model's own limit.
    """

    def __init__(self, model: str, device: str = "auto", batch_size: int = 32, max_length: int | None = None) -> None:
        self.name = model
        self.device = device
        self.batch_size = batch_size
        self.max_length = max_length
        self._loaded: tuple[Any, Any] | None = None

    def embed(self, texts: Sequence[str]) -> FloatArray:
        """One embedding per text, shape [texts, D].

        Raises:
            ConfigError: the model cannot be loaded.
        """
        import torch  # noqa: PLC0415

        model, tokenizer = self.load()
        limit = self.max_length or min(
            self._max_seq_length,
            tokenizer.model_max_length,
            getattr(model.config, "max_position_embeddings", None) or 1 << 20,
        )
        # Equal texts are embedded once; longest first, so that batches hold little padding.
        unique = sorted(set(texts), key=lambda text: (-len(text), text))
        found: dict[str, FloatArray] = {}
        for start in range(0, len(unique), self.batch_size):
            batch = unique[start : start + self.batch_size]
            # An empty text may have no token at all: a space stands in for it.
            inputs = tokenizer(
                [text or " " for text in batch], return_tensors="pt", padding=True, truncation=True, max_length=limit
            ).to(model.device)
            with torch.inference_mode():
                hidden_BTD = model(**inputs).last_hidden_state
            mask_BT1 = inputs["attention_mask"].unsqueeze(-1).to(hidden_BTD.dtype)
            if self._pooling == "cls":
                first_B = mask_BT1[:, :, 0].argmax(1)  # padding may be on the left
                pooled_BD = hidden_BTD[torch.arange(len(batch), device=hidden_BTD.device), first_B]
            else:
                pooled_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
            found.update(zip(batch, pooled_BD.double().cpu().numpy(), strict=True))
        return np.stack([found[text] for text in texts]) if texts else np.zeros((0, 0))

    @cached_property
    def _max_seq_length(self) -> int:
        """Tokens, as sentence-transformers' files say."""
        return int(self._described("sentence_bert_config.json").get("max_seq_length") or 1 << 20)

    @cached_property
    def _pooling(self) -> str:
        """`mean` or `cls`, as sentence-transformers' files say; without them `mean`.

        Raises:
            ConfigError: they say something else.
        """
        described = self._described("1_Pooling/config.json")
        modes = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
        chosen = [modes.get(key, key) for key, on in described.items() if key.startswith("pooling_mode_") and on]
        chosen = chosen or [described.get("pooling_mode", "mean")]
        if chosen not in (["mean"], ["cls"]):
            raise ConfigError(f"embedding model {self.name!r} pools by {', '.join(chosen)}; allowed: mean or cls")
        return chosen[0]

    def _described(self, file: str) -> dict[str, Any]:
        """A JSON file of sentence-transformers beside the weights; empty where the model has none."""
        from transformers.utils import cached_file  # noqa: PLC0415

        path = cached_file(
            self.name, file, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
        )  # fmt: skip
        return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}

    def load(self) -> tuple[Any, Any]:
        """Load model and tokenizer, once.

        Raises:
            ConfigError: they cannot be loaded.
        """
        if self._loaded is None:
            import torch  # noqa: PLC0415
            from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415

            try:
                tokenizer = AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)
                model = AutoModel.from_pretrained(self.name, trust_remote_code=False, use_safetensors=True)
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())[:400]
                raise ConfigError(f"embedding model {self.name!r} cannot be loaded: {reason}") from error
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            device = self.device
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            self._loaded = model.to(device).eval(), tokenizer
        return self._loaded
