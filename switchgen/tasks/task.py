"""A task: queries with what is needed to score their responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from switchgen.scoring import Score, score
from switchgen.scoring.choice import options_in
from switchgen.scoring.voting import AnswerForm

CHOICE_METRICS = ("multiple_choice", "choice_likelihood")


@dataclass(frozen=True)
class Example:
    """One query.

    >>> Example("17", ({"role": "user", "content": "2 + 3 = ?"},), {"input": "2 + 3 = ?", "output": "5"}).query
    '2 + 3 = ?'
    """

    id: str
    """The file's id where it is unique; else made from the row's content. Stable over runs."""
    messages: tuple[dict[str, str], ...]
    """Chat turns, `{"role", "content"}`; the last one is the user's."""
    item: dict[str, Any]
    """The row, for scoring: `output`, `answers`, or `choices` and `answer`, and whatever else it holds."""

    @property
    def query(self) -> str:
        """The user's text; several user turns are joined by an empty line."""
        return "\n\n".join(message["content"] for message in self.messages if message["role"] == "user")


@dataclass(frozen=True)
class Task:
    """Queries from one split of one source, and how responses to them are scored."""

    name: str
    metric: str
    """A name in `switchgen.scoring.METRICS`."""
    examples: tuple[Example, ...]
    marker: str | None = None
    """What announces the final answer, for example `Answer:`."""
    strict: bool = False
    """A response without the marker is wrong."""
    confidence: bool = False
    """Responses state how sure they are of their answer (`evaluate` compares that with their being right)."""
    file: str | None = None
    """Where the rows came from: a path, or `hub:NAME[/CONFIG]`."""
    split: str | None = None
    sha256: str | None = None
    """Of the file's bytes; of the rows as JSON for a hub data set."""
    unanswered: tuple[str, ...] = ()
    """Ids of rows that were left out because their answer is null."""

    def form(self, example: Example) -> AnswerForm:
        """How answers to an example stand in responses."""
        choices = None
        if self.metric in CHOICE_METRICS:
            choices = example.item["choices"]
        elif self.metric == "string":
            choices = options_in(example.query)
        return AnswerForm(self.marker, self.strict, choices, self.confidence, self.metric)

    def score(self, response: str, example: Example) -> Score:
        """Score one response by this task's metric, marker and strictness."""
        return score(
            self.metric,
            response,
            example.item,
            marker=self.marker,
            strict=self.strict,
            confidence=self.confidence,
        )
