"""Log-probabilities of tokens that are there already, by one plain forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class TokenScore:
    """What a model thought of one token, given everything before it."""

    token: int
    logprob: float | None
    """Natural logarithm, temperature 1; None for a text's first token, which nothing stands before."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens there and their log-probabilities, best first."""


@torch.inference_mode()
def score_tokens(
    model: PreTrainedModel, device: torch.device, ids: Sequence[int], first: int, num_top: int
) -> list[TokenScore]:
    """Scores of `ids[first:]`, without a cache.

    Args:
        model: with the right adapter switched on.
        device: where it takes its token ids.
        num_top: how many of the likeliest tokens each score names.
    """
    start = max(first, 1)
    scores = [TokenScore(ids[0], None)] if first == 0 else []
    if len(ids) <= start:
        return scores
    ids_1T = torch.tensor([list(ids)], device=device)
    kept = len(ids) - start + 1
    logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0, -kept:-1]
    logprobs_TV = torch.log_softmax(logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)), dim=-1)
    own_T = logprobs_TV.gather(1, ids_1T[0, start:, None])[:, 0].tolist()
    best = logprobs_TV.topk(min(num_top, logprobs_TV.shape[1]), dim=-1)
    values, indices = best.values.tolist(), best.indices.tolist()
    for row, token in enumerate(ids[start:]):
        scores.append(TokenScore(token, own_T[row], tuple(zip(indices[row], values[row], strict=True))))
    return scores
