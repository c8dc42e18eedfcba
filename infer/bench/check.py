"""Before anything is timed: what will be timed writes what the plain loop writes.

The plain loop keeps no cache: every token and every choice is one forward over everything, one row at a time. It runs
on the same shapes in float64, where both must agree token for token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from infer.bench.cases import Bench, Cell
from infer.bench.ladders import Size, make_ladder
from switchgen.loop import Loop
from switchgen.policies import SwitcherPolicy
from switchgen.policies.fixed import writer_numbers
from switchgen.rows import Row
from switchgen.sampling import SamplingParams, choose_nucleus, sample_tokens
from switchgen.trace import Segment

_CELL = {"rows": 3, "new_tokens": 24, "segment": 8, "cases": "d", "repeats": 1}
# Depth adds nothing to what is checked here, and the big size's float64 weights would not fit.
_MAX_LAYERS = 10


def check(size: Size, device: str, *, compiled: bool = False) -> int:
    """Compare the two loops on a size's shapes, case (d).

    Args:
        compiled: the loop's decode steps by `torch.compile`.

    Returns:
        Tokens compared, all of them equal.

    Raises:
        AssertionError: they differ.
    """
    layers = min(size.num_hidden_layers, _MAX_LAYERS if size.hidden_size < 2048 else 1)
    ladder = make_ladder(size, device=device, dtype=torch.float64, compiled=compiled, num_hidden_layers=layers)
    bench = Bench(ladder)
    cell = Cell(size.name, **_CELL)  # type: ignore[arg-type]
    rows = bench.rows(cell)
    policy = SwitcherPolicy(ladder.switcher)
    done = {row.trace.query.id: row for row in Loop(ladder.pool, policy, bench.decoding(cell)).run(rows)}
    plain = [_plain(bench, cell, Row(ladder.pool, row.trace.query, row.trace.seed)) for row in rows]
    count = 0
    for expected in plain:
        got = done[expected.trace.query.id].trace
        assert _signed(got.segments) == _signed(expected.trace.segments), (
            f"bench: size {size.name}: the loop and the plain loop differ on query {got.query.id}"
        )
        count += got.num_tokens
    return count


def _signed(segments: Sequence[Segment]) -> list[tuple[int, tuple[int, ...]]]:
    return [(segment.writer, segment.ids) for segment in segments]


@torch.inference_mode()
def _plain(bench: Bench, cell: Cell, row: Row) -> Row:
    """The collaboration on one row, without caches."""
    ladder, params = bench.ladder, SamplingParams()
    prompt = ladder.switcher.prompt
    seed_1 = torch.tensor([row.trace.seed], device=bench.device)
    while row.num_written < cell.new_tokens:
        asked = prompt.full_ids(row.trace.query, row.trace.signed())
        logits_V = _last_logits(bench, -1, asked)
        p_1C = torch.softmax(logits_V[list(prompt.label_ids)].double().cpu()[None], dim=-1)
        writer = int(choose_nucleus(p_1C, writer_numbers([row]), 0.9))
        engine = ladder.engines[writer]
        ids: list[int] = []
        for _ in range(min(cell.segment, cell.new_tokens - row.num_written)):
            context = [*row.prompt_ids(writer), *(token for part in row.trace.segments for token in part.ids), *ids]
            logits_V = _last_logits(bench, writer, context).index_fill(0, engine.banned_ids, float("-inf"))
            index_1 = torch.tensor([row.num_written + len(ids)], device=bench.device)
            ids.append(int(sample_tokens(logits_V[None], seed_1, index_1, params)))
        row.append(Segment(writer, ladder.vocabulary.decode(ids), tuple(ids), "length"))
    return row


def _last_logits(bench: Bench, model: int, ids: Sequence[int]) -> torch.Tensor:
    ids_1T = torch.tensor([list(ids)], device=bench.device)
    logits: torch.Tensor = bench.ladder.models[model](input_ids=ids_1T, use_cache=False, logits_to_keep=1).logits[0, -1]
    return logits
