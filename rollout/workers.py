"""One worker's share of a rollout: its questions, its shards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rollout.budgets import budget_of
from rollout.labelling import Labelling
from rollout.loop import BranchingLoop
from rollout.questions import Question
from rollout.scoring import Scorer
from switchgen.assembly import load_writers
from switchgen.files import Shard
from switchgen.workers import Report, Share, Spent, Stopwatch


@dataclass(frozen=True)
class LabelWork:
    """What a worker labels."""

    questions: Sequence[Question]
    done: Collection[str]
    """Ids of their states that need no work."""


def label_share(share: Share[LabelWork], report: Report) -> Spent:
    """Label a share's questions; a state is reported when its record is safe, with the tokens that it cost."""
    run, work = share.run, share.work
    settings = run.recipe.rollout
    watch = Stopwatch()
    scorer = Scorer(settings.reward_model)
    scorer.warm_up(work.questions)
    writer = load_writers(run, [settings.policy])[settings.policy]
    loop = BranchingLoop(writer.pool, writer.policy, run.recipe.decoding, max_rows=run.recipe.engine.max_rows)
    watch.loaded()
    with (
        Shard(share.folder / f"labels-{share.worker}.jsonl") as labels,
        Shard(share.folder / f"left_out-{share.worker}.jsonl") as left_out,
    ):

        def into(shard: Shard) -> Callable[[dict[str, Any]], None]:
            def add(record: dict[str, Any]) -> None:
                shard.append(record)
                report(record.get("tokens", 0))

            return add

        # A share that another worker began is gone on with.
        done = {*work.done, *labels.done, *left_out.done}
        labelling = Labelling(
            loop, settings, scorer, budget_of(settings), done=done, emit=into(labels), leave_out=into(left_out),
            round_index=run.round,
        )  # fmt: skip
        labelling.run(work.questions)
    return watch.spent({engine.name: asdict(engine.stats) for _, engine in loop.readers})
