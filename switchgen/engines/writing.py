"""Writing segments with a session: feed, sample, append, and see whose segment ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from switchgen.engines.base import EngineStats, Session, WriteItem, Written
from switchgen.errors import no_number
from switchgen.sampling import NO_NUMBER, SamplingParams, sample_tokens
from switchgen.segmentation import SegmentRule
from switchgen.vocabulary import Vocabulary


@dataclass(slots=True)
class Pen:
    """One row while its segment is written."""

    item: WriteItem
    ids: list[int] = field(default_factory=list)
    text: bytes = b""


def write_segments(
    session: Session,
    items: Sequence[WriteItem],
    params: SamplingParams,
    rule: SegmentRule,
    stop: Sequence[bytes],
    vocabulary: Vocabulary,
    stop_ids: frozenset[int],
    banned_ids: torch.Tensor,
    stats: EngineStats,
) -> list[Written]:
    """Step the session until every row's segment has ended.

    Control tokens other than the writer's own end of text are never drawn: another model must not read them as control.
    """
    written: list[Written | None] = [None] * len(items)
    rows = list(session.order)
    pens = [Pen(items[index]) for index in rows]
    device = banned_ids.device
    # What sampling and the next forward need stays on the device; what comes back is the tokens, and who was unsure.
    seeds_N = torch.tensor([pen.item.seed for pen in pens], device=device)
    index_N = torch.tensor([pen.item.token_index for pen in pens], device=device)
    ids_N: torch.Tensor | None = None
    while rows:
        logits_NV = session.logits(ids_N).index_fill_(1, banned_ids, float("-inf"))
        ids_N = sample_tokens(logits_NV, seeds_N, index_N, params)
        unsure = rule.unsure(logits_NV) or [False] * len(rows)
        index_N = index_N + 1
        tokens = ids_N.tolist()
        if NO_NUMBER in tokens:
            raise no_number(vocabulary.source)
        stats.steps += 1
        stats.decoded_tokens += len(tokens)
        going = []
        for row, (pen, token) in enumerate(zip(pens, tokens, strict=True)):
            result = advance(pen, token, rule, stop, vocabulary, stop_ids, unsure=unsure[row])
            if result is None:
                going.append(row)
            else:
                written[rows[row]] = result
        if len(going) < len(rows):
            going = session.keep(going)
            rows, pens = [rows[row] for row in going], [pens[row] for row in going]
            kept_N = torch.tensor(going, dtype=torch.long, device=device)
            seeds_N, index_N, ids_N = seeds_N[kept_N], index_N[kept_N], ids_N[kept_N]
    return [result for result in written if result is not None]


def advance(
    pen: Pen,
    token: int,
    rule: SegmentRule,
    stop: Sequence[bytes],
    vocabulary: Vocabulary,
    stop_ids: frozenset[int],
    *,
    unsure: bool = False,
) -> Written | None:
    """Append one drawn token to its row; the finished segment if this ends it.

    Args:
        unsure: whether the writer was unsure when it drew the token.
    """
    if token in stop_ids:
        return Written(pen.ids, "eos")
    if rule.ends_before(vocabulary, pen.ids, token, pen.item.max_tokens, unsure=unsure):
        return Written(pen.ids, "boundary")
    pen.ids.append(token)
    pen.item.context.ids.append(token)
    if pen.item.listener is not None:
        pen.item.listener(len(pen.ids) - 1, vocabulary.token_bytes[token])
    if stop:
        pen.text += vocabulary.token_bytes[token]
        end = pen.item.tail + pen.text
        # Only what the writer had a part in: a cue's own text stops nothing.
        borders = [max(0, len(pen.item.tail) - len(string) + 1) for string in stop]
        found = [start for start in map(end.find, stop, borders) if start >= 0]
        if found:
            # Counted as the response's text will count them: bytes that are no UTF-8 stand there as U+FFFD.
            return Written(pen.ids, "stop", cut=len(end[min(found) :].decode("utf-8", errors="replace").encode()))
    ended, boundary = rule.ends_after(vocabulary, pen.ids, pen.item.max_tokens)
    if not ended:
        return None
    return Written(pen.ids, "boundary" if boundary else "length")
