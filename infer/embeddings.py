"""Embeddings of texts: an encoder's hidden states, averaged over each text's tokens.

Shapes: B texts of a batch, T tokens, D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from switchgen.errors import ConfigError

FloatArray = npt.NDArray[np.float64]


class Embedder:
    """A transformers encoder with mean pooling (Reimers and Gurevych 2019, arXiv 1908.10084, §3).

    Any folder or hub name that `AutoModel` loads will do, those of sentence-transformers included, whose usual pooling
    this is. Loaded on first use, from safetensors, without running code of the hub.

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
            tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 1 << 20
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
            mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
            found.update(zip(batch, mean_BD.double().cpu().numpy(), strict=True))
        return np.stack([found[text] for text in texts]) if texts else np.zeros((0, 0))

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
