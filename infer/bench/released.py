"""Case (e): the released algorithm's way, for comparison (written by us, from its description).

All rows go through rounds together. In every round the whole prompt of every row is made as text, tokenized and read
again: by the switcher, which samples up to 50 tokens in which a digit is looked for, and by the chosen candidate, which
writes a segment.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from infer.bench.cases import Bench, Cell, padded, sampled
from infer.bench.stopwatch import Taken, timed
from switchgen.prompts import RELEASED
from switchgen.trace import Query

_SWITCHER_TOKENS = 50


@torch.inference_mode()
def released(bench: Bench, cell: Cell) -> Taken:
    """Every segment reads query and trace again; returns what it took."""
    ladder = bench.ladder
    queries = bench.queries(cell)
    traces: list[list[tuple[int, str]]] = [[] for _ in queries]
    implementations = [model.config._attn_implementation for model in ladder.models]
    for model in ladder.models:
        model.set_attn_implementation("sdpa")
    draw = random.Random(0)
    with timed(bench.clock, bench.device) as taken:
        for start in range(0, cell.new_tokens, cell.segment):
            writers = [_digit(text, len(ladder.pool), draw) for text in _answers(bench, queries, traces, taken)]
            for writer in sorted(set(writers)):
                rows = [row for row, chosen in enumerate(writers) if chosen == writer]
                prompts = [_candidate_prompt(bench, queries[row], traces[row], writer) for row in rows]
                count = min(cell.segment, cell.new_tokens - start)
                for row, text in zip(rows, _generate(bench, writer, prompts, count, taken), strict=True):
                    traces[row].append((writer, text))
    for model, implementation in zip(ladder.models, implementations, strict=True):
        model.set_attn_implementation(implementation)
    taken.new_tokens = len(queries) * cell.new_tokens
    taken.mean_batch = taken.decoded_tokens / taken.notes.pop("steps")
    return taken


def _answers(
    bench: Bench, queries: Sequence[Query], traces: Sequence[Sequence[tuple[int, str]]], taken: Taken
) -> list[str]:
    """What the switcher says, per row."""
    ladder = bench.ladder
    prompts = []
    for query, trace in zip(queries, traces, strict=True):
        text = RELEASED.prompt(query.text, trace, len(ladder.pool))
        prompts.append(_chat(bench, len(ladder.pool), text))
    return _generate(bench, len(ladder.pool), prompts, _SWITCHER_TOKENS, taken)


def _candidate_prompt(bench: Bench, query: Query, trace: Sequence[tuple[int, str]], writer: int) -> list[int]:
    """Query and trace as one text, in the user's turn where the candidate has a chat template."""
    written = "".join(text for _, text in trace)
    if bench.ladder.pool.candidates[writer].prompt == "chat":
        return _chat(bench, writer, f"{query.text}\n{written}")
    return list(bench.ladder.vocabulary.tokenizer(f"{query.text}\n{written}")["input_ids"])


def _chat(bench: Bench, model: int, text: str) -> list[int]:
    tokenizer = bench.ladder.engines[model].vocabulary.tokenizer
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def _generate(bench: Bench, model: int, prompts: list[list[int]], count: int, taken: Taken) -> list[str]:
    """A batch of texts by `generate`, its cache begun anew."""
    ids_BT, mask_BT = padded(prompts, bench.device)
    out_BT = bench.ladder.models[model].generate(ids_BT, attention_mask=mask_BT, generation_config=sampled(count))
    tokenizer = bench.ladder.engines[model].vocabulary.tokenizer
    taken.read_tokens += sum(map(len, prompts))
    taken.decoded_tokens += len(prompts) * count
    taken.notes["steps"] = taken.notes.get("steps", 0) + count
    return list(tokenizer.batch_decode(out_BT[:, ids_BT.shape[1] :], skip_special_tokens=True))


def _digit(text: str, count: int, draw: random.Random) -> int:
    """The first candidate whose number stands in the text, lowest first; anyone if none does."""
    return next((index for index in range(count) if str(index) in text), draw.randrange(count))
