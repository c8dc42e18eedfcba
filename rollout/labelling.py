"""From questions to label records: traces, cuts, branches, completions, scores.

All rows go through one loop. Whatever is ready is written next, oldest state first; when nothing is, the next
question's traces are begun, so that the engines' batches stay full to the end. A state's prefix is its trace's row, cut
back; its branches are forks of it and their completions forks of the branches: each model reads a prefix once, and what
it read or wrote of it in the trace is not read again.

Seeds derive from (rollout seed, question, state). Branches of one state share a seed, and so do the j-th completions of
all its branches: common random numbers, which make the branches' scores comparable with fewer completions.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Any

from rollout.budgets import Budget
from rollout.loop import BranchingLoop
from rollout.questions import Question
from rollout.scoring import Scorer
from rollout.states import NOT_SCORED, Branch, Prefix, State, draw_border, find_twins, prefix_of
from switchgen.config import RolloutConfig
from switchgen.ids import derive_seed
from switchgen.records import label_record
from switchgen.rows import Row

Record = dict[str, Any]


class Labelling:
    """Labels the states of questions.

    Args:
        loop: writes with the rollout's policy.
        scorer: scores finished responses.
        budget: how many completions each branch gets.
        done: ids of states that need no work; their question's traces are written again if another state does.
        emit: takes each label record (`records.label_record`, with `border`, `finished` and more) when it is done.
        leave_out: takes a record of each state that came to nothing: id, query_id, task, reason.
        round_index: noted in the records.
    """

    def __init__(
        self,
        loop: BranchingLoop,
        settings: RolloutConfig,
        scorer: Scorer,
        budget: Budget,
        *,
        done: Collection[str],
        emit: Callable[[Record], None],
        leave_out: Callable[[Record], None],
        round_index: int = 0,
    ) -> None:
        self.loop = loop
        self.settings = settings
        self.scorer = scorer
        self.budget = budget
        self.done = done
        self.emit = emit
        self.leave_out = leave_out
        self.round_index = round_index
        self._ready: deque[Row] = deque()
        self._then: dict[Row, Callable[[Row], None]] = {}

    def run(self, questions: Iterable[Question]) -> None:
        """Label every state of the questions."""
        for row in self.loop.run(self._rows(iter(questions)), release=False):
            self._then.pop(row)(row)

    def _rows(self, questions: Iterator[Question]) -> Iterator[Row | None]:
        while True:
            while self._ready:
                yield self._ready.popleft()
            question = next(questions, None)
            if question is not None:
                self._begin(question)
            elif self._then:
                # Rows in flight will make more work.
                yield None
            else:
                return

    def _submit(self, row: Row, then: Callable[[Row], None]) -> None:
        self._ready.append(row)
        self._then[row] = then

    def _seed(self, question: Question, state: int, *purpose: str | int) -> int:
        return derive_seed(self.settings.seed, question.query.id, state, *purpose)

    # -- traces and states ----------------------------------------------------------------------------------------

    def _begin(self, question: Question) -> None:
        traces = [
            Row(self.loop.pool, question.query, self._seed(question, index, "prefix"))
            for index in range(self.settings.states)
        ]
        waiting = set(traces)
        for row in traces:
            self._submit(row, partial(self._trace_done, question, traces, waiting))

    def _trace_done(self, question: Question, traces: list[Row], waiting: set[Row], row: Row) -> None:
        waiting.remove(row)
        if not waiting:
            self._cut(question, traces)

    def _cut(self, question: Question, traces: list[Row]) -> None:
        """Make states of a question's traces. Later ones avoid the prefixes of earlier ones, done or not."""
        taken: set[Prefix] = set()
        for index, (state_id, row) in enumerate(zip(question.state_ids(len(traces)), traces, strict=True)):
            drawn = draw_border(row.trace, self.loop.decoding, self.settings.prefix, taken)
            if not isinstance(drawn, str):
                taken.add(prefix_of(row.trace.segments[: drawn[0]]))
            if isinstance(drawn, str) or state_id in self.done:
                row.release(self.loop.readers)
            if state_id in self.done:
                continue
            if isinstance(drawn, str):
                self._leave_out(state_id, question, drawn)
                continue
            (border, share), tokens = drawn, row.num_written
            row.rewind(border, self.loop.readers)
            self._branch(State(state_id, index, question, row, border, share, tokens))

    def _leave_out(self, state_id: str, question: Question, reason: str) -> None:
        self.leave_out({"id": state_id, "query_id": question.query.id, "task": question.task, "reason": reason})

    # -- branches and completions ---------------------------------------------------------------------------------

    def _branch(self, state: State) -> None:
        state.branches = [Branch(writer) for writer in range(len(self.loop.pool))]
        if self.settings.branch == "fresh":
            self._spend(state)
            return
        seed = self._seed(state.question, state.index, "branch")
        for branch in state.branches:
            branch.row = state.prefix.fork(seed)
            self.loop.branch_writers[branch.row] = branch.writer
            self.loop.pausing.add(branch.row)
            self._submit(branch.row, partial(self._branch_done, state))
        state.in_flight = len(state.branches)

    def _branch_done(self, state: State, row: Row) -> None:
        self.loop.branch_writers.pop(row, None)
        self.loop.pausing.remove(row)
        state.tokens += row.num_written - state.prefix.num_written
        self._landed(state)

    def _complete(self, state: State, branch: Branch) -> None:
        """Begin one more completion of a branch."""
        index = len(branch.responses)
        branch.responses.append("")
        start = branch.row or state.prefix
        row = start.fork(self._seed(state.question, state.index, "completion", index))
        if branch.row is None:
            self.loop.branch_writers[row] = branch.writer
        self._submit(row, partial(self._completed, state, branch, index))
        state.in_flight += 1

    def _completed(self, state: State, branch: Branch, index: int, row: Row) -> None:
        row.release(self.loop.readers)
        self.loop.branch_writers.pop(row, None)
        branch.responses[index] = row.trace.text
        # A stop string that straddles the border takes some of what stood before away.
        tokens = max(0, row.num_written - (branch.row or state.prefix).num_written)
        state.tokens += tokens
        state.completion_tokens += tokens
        self._landed(state)

    def _landed(self, state: State) -> None:
        """One of the state's rows is done. When all are, score them, and see whether the state needs more."""
        state.in_flight -= 1
        if state.in_flight:
            return
        if self._blind and not any(branch.responses for branch in state.branches):
            find_twins(state.branches)
        if not self._score(state):
            self._leave_out(state.id, state.question, NOT_SCORED)
            self._release(state)
            return
        self._spend(state)
        if not state.in_flight:
            self.emit(self._record(state))
            self._release(state)

    @property
    def _blind(self) -> bool:
        """Whether a completion depends on the text before it alone, not on who wrote it."""
        single = len(self.loop.pool.vocabularies) == 1
        return self.settings.branch == "shared" and self.loop.policy.engine is None and single

    def _spend(self, state: State) -> None:
        """Begin the completions that the budget allows."""
        racing = [branch for branch in state.branches if branch.twin_of is None]
        counts = self.budget.more([branch.scores for branch in racing], [branch.ended for branch in racing])
        for branch, count in zip(racing, counts, strict=True):
            for _ in range(count):
                self._complete(state, branch)

    def _score(self, state: State) -> bool:
        """Score the responses that are new; False where one of them has no score."""
        for branch in state.branches:
            if branch.row is not None and branch.ended and not branch.responses:
                branch.responses.append(branch.row.trace.text)
        new = [
            (branch, text)
            for branch in state.branches
            if branch.twin_of is None
            for text in branch.responses[len(branch.scores) :]
        ]
        values = self.scorer.scores(state.question, [text for _, text in new])
        for (branch, _), value in zip(new, values, strict=True):
            branch.scores.append(value)
        return not any(map(math.isnan, values))

    def _release(self, state: State) -> None:
        for row in (state.prefix, *(branch.row for branch in state.branches)):
            if row is not None:
                row.release(self.loop.readers)

    def _record(self, state: State) -> Record:
        firsts = [branch.writer if branch.twin_of is None else branch.twin_of for branch in state.branches]
        racing = [index for index, first in enumerate(firsts) if first == index]
        verdict = self.budget.verdict(
            [state.branches[index].scores for index in racing], [state.branches[index].ended for index in racing]
        )
        label = racing[verdict.label]
        shared = firsts.count(label) > 1
        record = label_record(
            state_id=state.id,
            query=state.question.query,
            task=state.question.task,
            prefix=state.prefix.trace.signed(),
            names=self.loop.pool.names,
            scores=[state.branches[first].scores for first in firsts],
            tokens=state.tokens,
            label=label,
            outcome="tie" if shared and verdict.outcome == "winner" else verdict.outcome,
            confidence=0.0 if shared else verdict.confidence,
            round_index=self.round_index,
        )
        ended = [branch.ended for branch in state.branches]
        twins = [branch.twin_of for branch in state.branches]
        return {
            **record,
            "completion_tokens": state.completion_tokens,
            "border": state.border,
            "share": state.share,
            "finished": ended,
            "twin_of": twins,
        }
