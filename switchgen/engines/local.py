"""What the engines in this process have in common: a model, where its input goes, and the ids that it never draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from switchgen.engines.base import EngineStats
from switchgen.engines.scoring import TokenScore, score_tokens
from switchgen.vocabulary import Vocabulary

# Two ways to the same logits may differ by this share of their range, by dtype. (Some of transformers' own attention
# computes its softmax in float32 whatever the model's dtype.)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.05}


class LocalEngine:
    """An engine's model.

    Args:
        model: a causal LM in eval mode.
        activate: called before every forward; switches the right adapter on where several engines share one model.
    """

    halved = False
    """Whether its rows have been made fewer for want of memory."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        *,
        stop_ids: frozenset[int],
        max_positions: int,
        activate: Callable[[], None] | None,
    ) -> None:
        self.name = name
        self.model = model
        self.vocabulary = vocabulary
        self.stop_ids = stop_ids
        self.max_positions = max_positions
        self.hidden_size: int = model.config.get_text_config().hidden_size
        self.stats = EngineStats()
        self.device = input_device(model)
        self.activate = activate or (lambda: None)
        logits_size = model.get_output_embeddings().weight.shape[0]
        self.banned_ids = torch.tensor(
            banned_tokens(vocabulary, stop_ids, logits_size), dtype=torch.long, device=self.device
        )

    def token_scores(self, ids: Sequence[int], first: int, num_top: int) -> list[TokenScore]:
        """Log-probabilities of `ids[first:]`; see `scoring.score_tokens`."""
        self.activate()
        return score_tokens(self.model, self.device, ids, first, num_top)


def banned_tokens(vocabulary: Vocabulary, stop_ids: frozenset[int], logits_size: int) -> list[int]:
    """Ids that are never drawn: control tokens that are not the writer's end of text, and rows that are no token's."""
    tokens = set(vocabulary.tokenizer.get_vocab().values()) - (vocabulary.control_ids - stop_ids)
    return sorted(set(range(logits_size)) - tokens)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its token ids.

    Weights that accelerate keeps elsewhere (`device_map` with cpu or disk) are on no device until its hook brings them
    to the one where they are used.
    """
    embeddings = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    if device.type == "meta":
        place = embeddings._hf_hook.execution_device
        return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    return device
