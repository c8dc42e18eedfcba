"""Scores of responses by their task's metric."""

from __future__ import annotations

from collections.abc import Sequence

from rollout.questions import REWARD_MODEL, Question
from switchgen.scoring import RewardModelScorer, score


class Scorer:
    """Scores responses; a reward model is loaded only where a task needs it.

    Args:
        reward_model: folder or hub name, for tasks of the metric `reward_model`.
    """

    def __init__(self, reward_model: str | None) -> None:
        self._judge = None if reward_model is None else RewardModelScorer(reward_model, too_long="nan")

    def warm_up(self, questions: Sequence[Question]) -> None:
        """Load what the questions need, so that a reward model that cannot be used is known before anything is written.

        Raises:
            ConfigError: it cannot be used.
        """
        judged = next((question for question in questions if question.metric == REWARD_MODEL), None)
        if judged is not None:
            self.scores(judged, [""])

    def scores(self, question: Question, responses: Sequence[str]) -> list[float]:
        """One score per response; NaN where a response does not fit the reward model's context."""
        if question.metric == REWARD_MODEL:
            assert self._judge is not None
            return self._judge.score_batch([question.query.messages] * len(responses), responses)
        return [
            score(
                question.metric,
                text,
                question.item,
                marker=question.marker,
                strict=question.strict,
                confidence=question.confidence,
            ).value
            for text in responses
        ]
