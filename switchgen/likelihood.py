"""Log-probabilities of given texts under a candidate, at temperature 1 and before any top-p.

Shapes: B contexts of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from switchgen.candidates import Candidate
from switchgen.engines.local import LocalEngine
from switchgen.engines.remote import RemoteEngine
from switchgen.errors import ConfigError

_MAX_LOGITS = 1 << 25
"""Numbers of one batch's logits: 128 MB in float32."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a candidate finds a continuation."""

    log_prob: float
    """Σ log p(y_t | context, y_<t), in nats."""
    num_tokens: int
    is_greedy: bool
    """Whether every token is the most likely one in its place."""

    @property
    def per_token(self) -> float:
        """Mean over the tokens, in nats: minus the log of the perplexity."""
        return self.log_prob / self.num_tokens


def likelihoods(candidate: Candidate, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood | None]:
    """Likelihood of each (context, continuation), both as token ids of the candidate.

    Equal pairs are read once; longer ones first, right-padded, so that memory runs out at once or never.

    Raises:
        ConfigError: the candidate is behind a server, which writes only.

    Returns:
        One per pair; None for an empty context or continuation, or where both together are beyond the model's context.
        (Their last token is not read: nothing comes after it.)
    """
    if isinstance(candidate.engine, RemoteEngine):
        raise ConfigError(
            f"{candidate.name}: a candidate behind a server (engine: openai) gives no likelihood of given texts; "
            "allowed: engine transformers"
        )
    limit = candidate.engine.max_positions + 1
    keys = [
        (tuple(context), tuple(continuation)) if context and continuation and len(context) + len(continuation) <= limit
        else None
        for context, continuation in pairs
    ]  # fmt: skip
    order = sorted({key for key in keys if key is not None}, key=lambda key: (-len(key[0]) - len(key[1]), key))
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], Likelihood] = {}
    start = 0
    while start < len(order):
        width = len(order[start][0]) + len(order[start][1]) - 1
        batch = order[start : start + max(1, _MAX_LOGITS // (width * len(candidate.vocabulary)))]
        found.update(zip(batch, _read(candidate, batch, width), strict=True))
        start += len(batch)
    return [None if key is None else found[key] for key in keys]


@torch.inference_mode()
def _read(
    candidate: Candidate, batch: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], width: int
) -> list[Likelihood]:
    """One forward over the batch, right-padded to `width`."""
    ids_BT = torch.zeros(len(batch), width + 1, dtype=torch.long)
    mask_BT = torch.zeros(len(batch), width, dtype=torch.long)
    for index, (context, continuation) in enumerate(batch):
        length = len(context) + len(continuation)
        ids_BT[index, :length] = torch.tensor([*context, *continuation])
        mask_BT[index, : length - 1] = 1
    assert isinstance(candidate.engine, LocalEngine), "checked by the caller"
    candidate.engine.activate()
    model, device = candidate.engine.model, candidate.engine.device
    read_BT, next_BT = ids_BT[:, :-1].to(device), ids_BT[:, 1:].to(device)
    logits_BTV = model(input_ids=read_BT, attention_mask=mask_BT.to(device), use_cache=False).logits
    logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    log_probs_BT = logits_BTV.gather(2, next_BT[..., None])[..., 0] - logits_BTV.logsumexp(-1)
    greedy_BT = (logits_BTV.argmax(-1) == next_BT).cpu()
    log_probs_BT = log_probs_BT.cpu().double()
    read = []
    for index, (context, continuation) in enumerate(batch):
        span = slice(len(context) - 1, len(context) - 1 + len(continuation))
        read.append(
            Likelihood(float(log_probs_BT[index, span].sum()), len(continuation), bool(greedy_BT[index, span].all()))
        )
    return read
