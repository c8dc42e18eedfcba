"""The cases (a)-(d) and (f): the same queries, the same number of new tokens (released.py has (e))."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, StaticCache

from infer.bench.ladders import BenchLadder, make_queries, random_ids
from infer.bench.stopwatch import ForwardClock, Taken, timed
from switchgen.api import response_seed
from switchgen.config import DecodingConfig
from switchgen.ids import derive_seed
from switchgen.loop import Loop
from switchgen.policies import Choice, FixedPolicy, Policy, RandomPolicy, SwitcherPolicy
from switchgen.rows import Reader, Row
from switchgen.trace import Query, Segment

SOLO = 2
"""The candidate that writes alone in (a) and (b)."""
COMPLETIONS = 8


@dataclass(frozen=True)
class Cell:
    """One setting of the table."""

    size: str
    rows: int
    """In flight."""
    new_tokens: int
    """Length of a response."""
    cases: str
    repeats: int
    written: int = 0
    """Tokens of each response that are there already, read by every model before the clock starts."""
    queries: int = 0
    """Queries in all; 0 means as many as rows in flight. More of them take the places of finished ones."""
    segment: int = 50
    limited: bool = True
    """Whether rates are measured, too, for L."""
    static: bool = True
    """Whether (a) is timed with a preallocated cache, too: how it grows is a matter of `generate`."""

    @property
    def total(self) -> int:
        """Queries in all."""
        return self.queries or self.rows


class Bench:
    """A ladder ready to be timed."""

    def __init__(self, ladder: BenchLadder) -> None:
        self.ladder = ladder
        self.clock = ForwardClock(ladder.models)
        for engine in ladder.engines:
            self.clock.watch(engine)
        self.device = ladder.engines[0].device
        self._read: tuple[Cell, list[Row]] | None = None
        """Rows whose first tokens every model has read, and whose cell they are."""

    def queries(self, cell: Cell) -> list[Query]:
        """The cell's queries, the same for every case."""
        return list(make_queries(self.ladder, cell.total))

    def decoding(self, cell: Cell) -> DecodingConfig:
        """The method's settings."""
        return DecodingConfig.model_validate({"max_new_tokens": cell.new_tokens, "segment": cell.segment})

    def rows(self, cell: Cell) -> list[Row]:
        """The cell's rows, with what is written already; that much of them has been read by every model."""
        if not cell.written:
            return self._new_rows(cell)
        if self._read is None or self._read[0] != cell:
            self.start()
            self._read = (cell, self._new_rows(cell))
            self.read(self._read[1])
        return [row.fork(row.trace.seed) for row in self._read[1]]

    def _new_rows(self, cell: Cell) -> list[Row]:
        rows = []
        for query in self.queries(cell):
            row = Row(self.ladder.pool, query, response_seed(0, query.id))
            draw = random.Random(row.trace.seed)
            for start in range(0, cell.written, cell.segment):
                ids = random_ids(self.ladder, draw, min(cell.segment, cell.written - start))
                text = self.ladder.vocabulary.decode(ids)
                row.append(Segment(draw.randrange(len(self.ladder.pool)), text, tuple(ids), "length"))
            row.expected = (cell.new_tokens, -(-cell.new_tokens // cell.segment))
            rows.append(row)
        return rows

    # -- (a) ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def alone(self, cell: Cell, *, static: bool, rows: int | None = None) -> Taken:
        """(a): transformers' `generate`, as users call it or with a preallocated cache.

        Args:
            rows: a batch other than the cell's.
        """
        model = self.ladder.models[SOLO]
        ours = model.config._attn_implementation
        model.set_attn_implementation("sdpa")
        prompts = self._prompts(cell)
        prompts = [prompts[row % len(prompts)] for row in range(rows or cell.rows)]
        ids_BT, mask_BT = padded(prompts, self.device)
        new_tokens = cell.new_tokens - cell.written
        total = ids_BT.shape[1] + new_tokens
        cache = StaticCache(config=model.config, max_cache_len=total) if static else DynamicCache(config=model.config)
        if cell.written:
            model(input_ids=ids_BT[:, :-1], attention_mask=mask_BT[:, :-1], past_key_values=cache, logits_to_keep=1)
        first = FirstToken()
        settings = sampled(new_tokens)
        with timed(self.clock, self.device) as taken:
            out = model.generate(
                ids_BT, attention_mask=mask_BT, generation_config=settings, past_key_values=cache,
                logits_processor=LogitsProcessorList([first]),
            )  # fmt: skip
            wall, cpu = time.perf_counter(), time.process_time()
        model.set_attn_implementation(ours)
        assert out.shape[1] == total
        taken.decode_s, taken.decode_cpu_s = wall - first.wall, cpu - first.cpu
        taken.new_tokens = taken.decoded_tokens = len(prompts) * new_tokens
        taken.read_tokens = 0 if cell.written else int(mask_BT.sum())
        taken.mean_batch = float(len(prompts))
        return taken

    def _prompts(self, cell: Cell) -> list[list[int]]:
        return [row.context(SOLO).ids for row in self.rows(cell)]

    # -- (b), (c), (d) ----------------------------------------------------------------------------------------------

    def ours(self, cell: Cell, case: str) -> Taken:
        """Our loop with one candidate (b), random choice (c) or the switcher (d)."""
        policy = self.policy(case)
        loop = Loop(self.ladder.pool, policy, self.decoding(cell), max_rows=cell.rows)
        if not cell.written:
            self.start()
        rows = self.rows(cell)
        if cell.written:
            self.read(rows)
        before, refilled = self._counts(), Taken()

        def source() -> Iterator[Row]:
            yield from rows
            self._count(refilled, before)

        with timed(self.clock, self.device) as taken:
            done = list(loop.run(source()))
        assert all(row.num_written == cell.new_tokens for row in done), "a row ended early"
        assert not any(engine.stats.evicted_rows for engine in self.ladder.engines), "a cache was dropped"
        taken.new_tokens = len(done) * (cell.new_tokens - cell.written)
        self._count(taken, before)
        taken.refilled_batch = refilled.mean_batch if cell.total > cell.rows else None
        if isinstance(policy, TimedSwitcher):
            taken.switcher_s = policy.seconds
        return taken

    def policy(self, case: str) -> Policy:
        """The policy of a case."""
        if case == "b":
            return FixedPolicy(SOLO, self.ladder.pool.names[SOLO])
        return TimedSwitcher(self.ladder.switcher) if case == "d" else RandomPolicy()

    def read(self, rows: Sequence[Row]) -> None:
        """Every model reads all that is written of the rows; of forks, what their parents have not read."""
        prompt = self.ladder.switcher.prompt
        for index, engine in enumerate(self.ladder.engines):
            if index == len(self.ladder.pool):
                engine.read([row.switcher_context(prompt.query_ids, prompt.segment_ids) for row in rows])
            else:
                # The next token is drawn after the last one, which is fed then.
                engine.read([row.context(index) for row in rows], leave=1)

    # -- (f) ------------------------------------------------------------------------------------------------------

    def rollouts(self, cell: Cell) -> Taken:
        """(f): prefixes of nearly half a response, a branch by each candidate, 8 completions of each branch.

        Caches are kept until all is done, and what they hold is compared with what was fed: see `notes`.
        """
        pool, decoding, names = self.ladder.pool, self.decoding(cell), self.ladder.pool.names
        prefix_segments = max(1, cell.new_tokens // cell.segment // 2 - 1)
        self.start()
        before = self._counts()
        fed = FedTokens(self.ladder)
        prefixes = self.rows(cell)[: max(1, cell.rows // (len(pool) * COMPLETIONS))]
        with timed(self.clock, self.device) as taken:

            def grow(rows: list[Row], policy: Policy, to: int | None) -> list[Row]:
                loop = Loop(pool, policy, decoding, max_rows=cell.rows, max_segments=to)
                return sorted(loop.run(rows, release=False), key=rows.index)

            grow(prefixes, RandomPolicy(), prefix_segments)
            branches: list[Row] = []
            for writer, name in enumerate(names):
                forks = [prefix.fork(derive_seed(prefix.trace.seed, "branch")) for prefix in prefixes]
                branches += grow(forks, FixedPolicy(writer, name), prefix_segments + 1)
            seeds = [(branch, derive_seed(branch.trace.seed, k)) for branch in branches for k in range(COMPLETIONS)]
            completions = grow([branch.fork(seed) for branch, seed in seeds], RandomPolicy(), None)
        rows = [*prefixes, *branches, *completions]
        self._count(taken, before)
        taken.new_tokens = sum(row.num_written - (row.parent.num_written if row.parent else 0) for row in rows)
        taken.notes = {"prefixes": len(prefixes), "completions": len(completions), **fed.compare(rows)}
        fed.remove()
        self.start()
        return taken

    # -- counts ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Empty caches."""
        self._read = None
        for engine in self.ladder.engines:
            engine.clear()

    def _counts(self) -> list[tuple[int, int, int]]:
        return [
            (engine.stats.read_tokens + engine.stats.scored_tokens, engine.stats.decoded_tokens, engine.stats.steps)
            for engine in self.ladder.engines
        ]

    def _count(self, taken: Taken, before: list[tuple[int, int, int]]) -> None:
        grown = [
            tuple(now - then for now, then in zip(after, start, strict=True))
            for after, start in zip(self._counts(), before, strict=True)
        ]
        reads, decoded, steps = (sum(column) for column in zip(*grown, strict=True))
        taken.read_tokens, taken.decoded_tokens = reads, decoded
        taken.mean_batch = decoded / steps if steps else 0.0


class TimedSwitcher(SwitcherPolicy):
    """The switcher, timed."""

    seconds = 0.0

    def choose(self, rows: Sequence[Row]) -> Choice:
        """A candidate drawn from each row's nucleus."""
        started = time.perf_counter()
        choice = super().choose(rows)
        self.seconds += time.perf_counter() - started
        return choice


class FirstToken(LogitsProcessor):  # type: ignore[misc]
    """Notes when `generate` has read its prompts and is about to draw."""

    wall = cpu = 0.0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Changes nothing."""
        if not self.wall:
            self.wall, self.cpu = time.perf_counter(), time.process_time()
        return scores


class FedTokens:
    """Counts what models are fed, at their embeddings, and compares it with what their caches then hold."""

    def __init__(self, ladder: BenchLadder) -> None:
        self.ladder = ladder
        self.fed = [0] * len(ladder.models)
        self.scored = [engine.stats.scored_tokens for engine in ladder.engines]
        self._hooks = [
            model.get_input_embeddings().register_forward_pre_hook(self._counter(index))
            for index, model in enumerate(ladder.models)
        ]

    def _counter(self, index: int) -> Any:
        def count(_: Any, args: Any) -> None:
            self.fed[index] += args[0].numel()

        return count

    def remove(self) -> None:
        """Count no longer."""
        for hook in self._hooks:
            hook.remove()

    def compare(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Tokens fed, and tokens that the rows' caches hold: each once, what a fork inherits not counted again.

        The two agree exactly when nothing was read twice.
        """
        fed, held = [], []
        for index, engine in enumerate(self.ladder.engines):
            reader: Reader = "switcher" if index == len(self.ladder.pool) else index
            fed.append(self.fed[index] - (engine.stats.scored_tokens - self.scored[index]))
            held.append(sum(_own_tokens(row, reader) for row in rows))
        return {"fed_tokens": fed, "held_tokens": held, "read_twice": sum(fed) - sum(held)}


def _own_tokens(row: Row, reader: Reader) -> int:
    """Tokens in a reader's cache of a row that the row's parent had not fed."""
    context = row.contexts.get(reader)
    if context is None or context.slot is None:
        return 0
    if row.parent is None:
        return context.cached
    own = row.trace.segments[len(row.parent.trace.segments) :]
    # Who writes right after a fork draws from the last shared token, which is fed for that.
    return context.cached - (context.shared - (bool(own) and own[0].writer == reader))


def padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts padded on the left, as `generate` wants them, and their attention mask."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def sampled(new_tokens: int) -> GenerationConfig:
    """Sampling as the method does it; no token ends a text."""
    return GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.9, top_k=0, max_new_tokens=new_tokens, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
