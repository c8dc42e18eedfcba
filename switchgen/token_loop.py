"""The loop for policies that choose at every token: two models step on the same rows, one of them writes.

Both models are fed every token, once; the token is sampled from logits that are there already. Nothing is re-tokenized,
and caches are copied only when the batch's members change.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from switchgen.candidates import Pool
from switchgen.config import DecodingConfig
from switchgen.engines.base import Engine, Session
from switchgen.engines.fitting import does_not_fit, make_fewer, out_of_memory
from switchgen.engines.snapshot import SnapshotEngine
from switchgen.engines.transformers import SlotEngine
from switchgen.errors import no_number
from switchgen.policies.routers import LOG_PLAUSIBLE, Asked, RouterPolicy
from switchgen.rows import Reader, Row
from switchgen.sampling import NO_NUMBER, SamplingParams, sample_tokens
from switchgen.token_pen import TokenPen
from switchgen.vocabulary import MAX_UTF8_EXTRA, continues_word


class TokenLoop:
    """Writes rows with a token router; same contract as `loop.Loop`.

    Word boundaries (docs/baco.md): the writer of the previous token samples; if its token goes on with a word it
    stands, else the router is asked, and if it picks the other model that one samples with the same random number.
    """

    def __init__(self, pool: Pool, policy: RouterPolicy, decoding: DecodingConfig, *, max_rows: int = 64) -> None:
        self.pool = pool
        self.policy = policy
        self.decoding = decoding
        self.max_rows = max_rows
        self.params = SamplingParams(decoding.temperature, decoding.top_p)
        self.places = (policy.base, policy.aligned)
        self.engines = [_local(pool.candidates[place].engine) for place in self.places]
        self.vocabulary = policy.vocabulary
        self._stop = [string.encode() for string in decoding.stop]
        # Between the extremes of an average either model's end of text ends the row; else each knows its own only.
        self._mixes = policy.weight is not None and policy.weight not in (0, 1)
        self._contrasts = policy.weight is not None and policy.weight < 0
        self._stop_ids = [engine.stop_ids for engine in self.engines]
        # Both models' logits are brought to where the base's are.
        device = self.engines[0].device
        banned = [engine.banned_ids.to(device) for engine in self.engines]
        self._banned_ids = [ids[ids < len(self.vocabulary)] for ids in banned]
        if self._mixes and not self._contrasts:
            ids, others = self._banned_ids
            self._banned_ids = [ids[torch.isin(ids, others)]]
            self._stop_ids = [frozenset().union(*self._stop_ids)] * 2

    @property
    def readers(self) -> list[tuple[Reader, Engine]]:
        """Every engine that may hold caches of a row."""
        return [(place, engine) for place, engine in zip(self.places, self.engines, strict=True)]

    def run(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Write every row to its end; yields rows as they finish."""
        for done in self.rounds(rows):
            yield from done

    @torch.inference_mode()
    def rounds(self, rows: Iterable[Row | None], *, live: bool = False) -> Iterator[list[Row]]:
        """The same, round by round; yields the rows that finished.

        Args:
            rows: None stands for "nobody waits at the moment": the next one is asked for a segment's length later.
            live: whether somebody waits for each row: no round is longer than a segment.
        """
        pens: list[TokenPen] = []
        try:
            yield from self._rounds(iter(rows), pens, live)
        finally:
            # Who asks for no more rounds, or an error, takes the rows in flight along.
            for pen in pens:
                self._forget(pen.row)

    def _rounds(self, source: Iterator[Row | None], pens: list[TokenPen], live: bool) -> Iterator[list[Row]]:
        exhausted = False
        while pens or not exhausted:
            finished: list[Row] = []
            while not exhausted and len(pens) < self._room:
                try:
                    row = next(source)
                except StopIteration:
                    exhausted = True
                    break
                if row is None:
                    break
                if self._admit(row):
                    pens.append(TokenPen(row, tuple(row.context(place) for place in self.places)))
                else:
                    finished.append(row)
            if pens:
                done, pens[:] = self._turn(pens, exhausted=exhausted, live=live)
                for pen in done:
                    pen.sign(self.vocabulary, self.places, self._stop)
                    self._forget(pen.row)
                finished += [pen.row for pen in done]
            yield finished

    def _forget(self, row: Row) -> None:
        row.release(self.readers)
        self.policy.release(row)

    @property
    def _room(self) -> int:
        """Rows that are stepped together: both models keep the caches of all of them."""
        return min(self.max_rows, *(engine.max_slots for engine in self.engines))

    def _turn(self, pens: list[TokenPen], *, exhausted: bool, live: bool) -> tuple[list[TokenPen], list[TokenPen]]:
        """Step as many rows as there is room for; (done, still going). Half as many where they do not fit in memory.

        Args:
            exhausted: whether no more rows come.
            live: whether to come back after a segment's length even where no other row could come in.

        Raises:
            ModelError: not even a single row fits.
        """
        room = self._room
        now, later = pens[:room], pens[room:]
        comes_back = live or (not exhausted and len(pens) < room)
        steps = self.decoding.segment.tokens if comes_back else None
        try:
            done, now = self._step_until_done(now, refill=not exhausted or bool(later), max_steps=steps)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if room == 1:
                names = " and ".join(engine.name for engine in self.engines)
                raise does_not_fit(names, now[0].row.num_written) from error
        else:
            return done, [*now, *later]
        # A token is appended for both models or for neither, so what the rows have got stands.
        for engine in self.engines:
            make_fewer(engine)
        ended = [pen for pen in pens if pen.row.trace.finish is not None]
        return ended, [pen for pen in pens if pen.row.trace.finish is None]

    def _admit(self, row: Row) -> bool:
        needed = self.decoding.max_new_tokens + MAX_UTF8_EXTRA
        row.expected = (needed, 1)
        for place, engine in zip(self.places, self.engines, strict=True):
            if len(row.prompt_ids(place)) + needed > engine.max_positions:
                row.trace.finish = "too_long"
        return row.trace.finish is None

    def _step_until_done(
        self, pens: list[TokenPen], *, refill: bool, max_steps: int | None
    ) -> tuple[list[TokenPen], list[TokenPen]]:
        """Step the batch until a row is done and another may take its place (or all are); (done, still going).

        Args:
            max_steps: stop after so many steps: there is room for rows that come in the meantime.
        """
        sessions: list[Session] = [
            engine.begin([pen.contexts[side] for pen in pens]) for side, engine in enumerate(self.engines)
        ]
        # The pens stand in the first session's order; `place_in[1]` says where each of them is in the second.
        pens = [pens[index] for index in sessions[0].order]
        place_in = _places(sessions)
        done: list[TokenPen] = []
        steps = 0
        while pens and steps != max_steps:
            ended = self._advance(pens, self._logits(sessions, place_in))
            steps += 1
            if not ended:
                continue
            done += [pens[index] for index in sorted(ended)]
            going = [index for index in range(len(pens)) if index not in ended]
            if refill or not going:
                return done, [pens[index] for index in going]
            order = sessions[0].keep(going)
            second = sessions[1].keep(sorted(place_in[index] for index in going))
            where = {old: new for new, old in enumerate(second)}
            pens, place_in = [pens[index] for index in order], [where[place_in[index]] for index in order]
        return done, pens

    def _logits(self, sessions: list[Session], place_in: list[int]) -> list[torch.Tensor]:
        """Both models' next-token logits in the pens' order, banned tokens at -inf; each [N, V].

        Under an average both are the same mixture.
        """
        base_NV, aligned_NV = (session.logits()[:, : len(self.vocabulary)] for session in sessions)
        aligned_NV = aligned_NV.to(base_NV.device)
        if place_in != list(range(len(place_in))):
            aligned_NV = aligned_NV[place_in]
        if self._mixes:
            assert self.policy.weight is not None
            # In float32 at least: half precision would round the sum.
            base_NV = base_NV.to(torch.promote_types(base_NV.dtype, torch.float32))
            mixed_NV = torch.lerp(aligned_NV.to(base_NV.dtype), base_NV, self.policy.weight)
            mixed_NV.index_fill_(1, self._banned_ids[-1], float("-inf"))
            if self._contrasts:
                aligned_NV.index_fill_(1, self._banned_ids[-1], float("-inf"))
                least_N1 = aligned_NV.max(dim=-1, keepdim=True).values + LOG_PLAUSIBLE
                mixed_NV.masked_fill_(aligned_NV < least_N1, float("-inf"))
            return [mixed_NV, mixed_NV]
        for logits_NV, banned in zip((base_NV, aligned_NV), self._banned_ids, strict=True):
            logits_NV.index_fill_(1, banned, float("-inf"))
        return [base_NV, aligned_NV]

    def _advance(self, pens: list[TokenPen], logits: list[torch.Tensor]) -> set[int]:
        """Draw and append one token per row; indices of the rows that ended."""
        device = logits[0].device
        seeds_N = torch.tensor([pen.row.trace.seed for pen in pens], device=device)
        index_N = torch.tensor([len(pen.ids) for pen in pens], device=device)

        writers = [pen.writers[-1] if pen.writers else -1 for pen in pens]
        tokens = [-1] * len(pens)
        self._draw(range(len(pens)), writers, tokens, logits, seeds_N, index_N)
        asked = [index for index, pen in enumerate(pens) if not self._stands(pen, writers[index], tokens[index])]
        if asked:
            picked = self._pick(pens, asked, logits, seeds_N, index_N)
            switched = [index for index, writer in zip(asked, picked, strict=True) if writer != writers[index]]
            for index, writer in zip(asked, picked, strict=True):
                writers[index] = writer
            self._draw(switched, writers, tokens, logits, seeds_N, index_N)
        return {
            index
            for index, (pen, writer, token) in enumerate(zip(pens, writers, tokens, strict=True))
            if self._append(pen, writer, token)
        }

    def _stands(self, pen: TokenPen, writer: int, token: int) -> bool:
        """Whether the token that the previous token's writer drew goes on with a word, so that nobody is asked."""
        if writer < 0 or token in self._stop_ids[writer]:
            return False
        return continues_word(pen.text[-4:], self.vocabulary.token_bytes[token])

    def _draw(
        self,
        rows: Iterable[int],
        writers: list[int],
        tokens: list[int],
        logits: list[torch.Tensor],
        seeds_N: torch.Tensor,
        index_N: torch.Tensor,
    ) -> None:
        """Draw the next token of each of the rows from its writer's logits, into `tokens`; writer -1 draws nothing."""
        sides: tuple[list[int], list[int]] = ([], [])
        for row in rows:
            if writers[row] >= 0:
                sides[writers[row]].append(row)
        for side, own in enumerate(sides):
            if not own:
                continue
            own_logits_NV, own_seeds_N, own_index_N = _of_rows(own, logits[side], seeds_N, index_N)
            drawn_N = sample_tokens(own_logits_NV, own_seeds_N, own_index_N, self.params)
            for row, token in zip(own, drawn_N.tolist(), strict=True):
                if token == NO_NUMBER:
                    raise no_number(self.engines[side].name)
                tokens[row] = token

    def _pick(
        self,
        pens: list[TokenPen],
        asked: list[int],
        logits: list[torch.Tensor],
        seeds_N: torch.Tensor,
        index_N: torch.Tensor,
    ) -> list[int]:
        """Whom the router picks for each of the rows that are at a word boundary."""
        texts = [Asked(pens[row].row, pens[row].text) for row in asked] if self.policy.reads_text else ()
        base_NV, aligned_NV, own_seeds_N, own_index_N = _of_rows(asked, *logits, seeds_N, index_N)
        base_N = self.policy.pick_base(base_NV, aligned_NV, own_seeds_N, own_index_N, texts)
        return [0 if base else 1 for base in base_N.tolist()]

    def _append(self, pen: TokenPen, writer: int, token: int) -> bool:
        """Append a token for both models; whether the row ended."""
        trace = pen.row.trace
        if pen.row.cancelled:
            trace.finish = "cancelled"
            return True
        if token in self._stop_ids[writer]:
            trace.finish = "eos"
            # An empty response has a writer, too.
            if not pen.writers:
                pen.writers.append(writer)
            return True
        pen.ids.append(token)
        pen.writers.append(writer)
        pen.text += self.vocabulary.token_bytes[token]
        for context in pen.contexts:
            context.ids.append(token)
        if pen.row.listener is not None:
            pen.row.listener(len(pen.ids) - 1, self.vocabulary.token_bytes[token])
        if any(string in pen.text for string in self._stop):
            trace.finish = "stop"
            return True
        over = len(pen.ids) - self.decoding.max_new_tokens
        if over >= MAX_UTF8_EXTRA or (over >= 0 and not self.vocabulary.ends_inside_character(pen.ids)):
            trace.finish = "length"
            return True
        return False


def _local(engine: Engine) -> SlotEngine | SnapshotEngine:
    assert isinstance(engine, SlotEngine | SnapshotEngine), "a router reads logits: checked by make_router"
    return engine


def _places(sessions: list[Session]) -> list[int]:
    """For each row of the first session, its place in the second."""
    where = {index: place for place, index in enumerate(sessions[1].order)}
    return [where[index] for index in sessions[0].order]


def _of_rows(rows: list[int], *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors' rows of these indices; as they are where that is all of them."""
    if len(rows) == len(tensors[0]):
        return list(tensors)
    index = torch.tensor(rows, device=tensors[0].device)
    return [tensor[index] for tensor in tensors]
