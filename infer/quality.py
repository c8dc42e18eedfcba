"""Quality of responses: likelihood under the aligned model. (The other quality metrics are a reward model's score,
`switchgen.scoring.reward`, and, where a task has right answers, the task's own score.)

Shapes: B responses of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from switchgen.candidates import Candidate
from switchgen.engines.base import Context
from switchgen.trace import Query

_MAX_LOGITS = 1 << 25  # numbers of one batch's logits: 128 MB in float32


def mean_log_probs(candidate: Candidate, queries: Sequence[Query], outputs: Sequence[str]) -> list[float | None]:
    """Mean log-probability (nats per token) of each response under a candidate, at temperature 1.

    (1/T) Σ log p(y_t | query, y_<t), the response tokenized as a text by itself, end of text not counted. It is the
    quality axis of BACo's planes where no reward model is at hand (METHOD §2): minus the log of the perplexity.

    Returns:
        One figure per response, at most 0; None for an empty response or one beyond the context.
    """
    import torch  # noqa: PLC0415

    engine = candidate.engine
    prompts = [candidate.prompt_ids(query) for query in queries]
    texts = [candidate.vocabulary.encode_text(output) for output in outputs]
    found: dict[tuple[int, ...], float] = {}
    wanted: dict[tuple[int, ...], int] = {}  # prompt and response → tokens of the prompt
    keys: list[tuple[int, ...] | None] = []
    for prompt, text in zip(prompts, texts, strict=True):
        fits = bool(text) and len(prompt) + len(text) <= engine.max_positions
        keys.append((*prompt, *text) if fits else None)
        if fits:
            wanted[(*prompt, *text)] = len(prompt)
    order = sorted(wanted, key=len, reverse=True)
    _make_active(candidate)
    model = engine.model  # type: ignore[attr-defined]
    start = 0
    while start < len(order):
        width = len(order[start])
        count = max(1, _MAX_LOGITS // (width * len(candidate.vocabulary)))
        batch = order[start : start + count]
        start += len(batch)
        ids_BT = torch.zeros(len(batch), width, dtype=torch.long)
        mask_BT = torch.zeros(len(batch), width, dtype=torch.long)
        for index, ids in enumerate(batch):
            ids_BT[index, : len(ids)] = torch.tensor(ids)
            mask_BT[index, : len(ids)] = 1
        device = model.device
        with torch.inference_mode():
            logits_BTV = model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False).logits
            logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
            next_BT1 = ids_BT[:, 1:, None].to(device)
            log_probs_BT = (logits_BTV[:, :-1].gather(2, next_BT1)[..., 0] - logits_BTV[:, :-1].logsumexp(-1)).cpu()
        for row_T, ids in zip(log_probs_BT, batch, strict=True):
            first = wanted[ids] - 1
            found[ids] = float(row_T[first : len(ids) - 1].double().mean())
    return [None if key is None else found[key] for key in keys]


def _make_active(candidate: Candidate) -> None:
    """Have the engine switch its adapter on, where candidates share weights: beginning a batch does that."""
    context = Context(candidate.prompt_ids(Query.from_text("x"))[:1])
    candidate.engine.begin([context])
    candidate.engine.release(context)


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is there; None if nothing is."""
    there = [value for value in values if value is not None and not math.isnan(value)]
    return sum(there) / len(there) if there else None
