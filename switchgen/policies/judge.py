"""JUDGE: an external model decides who writes the next word (arXiv 2511.05650; its worst and slowest rule).

At every word boundary the judge reads the query and the response so far and is asked for a number, 0 for the base and 1
for the aligned model; the likelier of the two label tokens decides. Its context only grows: the question is rewound
after each decision.
"""

from __future__ import annotations

import codecs
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from switchgen.candidates import Pool, prompt_style
from switchgen.config import CandidateConfig, RouterConfig
from switchgen.engines.base import Context, Engine
from switchgen.errors import ModelError
from switchgen.policies.routers import Asked, RouterPolicy
from switchgen.prompts import chat_pieces, start_ids
from switchgen.rows import Row
from switchgen.vocabulary import Vocabulary

logger = logging.getLogger("switchgen")

_BETWEEN = "\n\nThe answer so far:\n"
_QUESTION = (
    "\n\nWho should write the next word: model 0, a base model with many ideas, or model 1, an aligned model with good "
    "manners? Please respond with a number from 0 to 1. The answer is model "
)


@dataclass
class Judge:
    """A model that is asked who writes; it may have a vocabulary of its own.

    Raises:
        ModelError: a label, "0" or "1", is not one of its tokens.
    """

    engine: Engine
    chat: bool

    def __post_init__(self) -> None:
        vocabulary = self.engine.vocabulary
        self.head_ids, tail = start_ids(vocabulary), []
        if self.chat:
            # An unlikely letter stands for the message; what the template puts around it is the head and the tail.
            self.head_ids, _, tail = chat_pieces(vocabulary, [{"role": "user", "content": "x"}])
        self.question_ids = [*vocabulary.encode_text(_QUESTION), *tail]
        self.label_ids = []
        for label in ("0", "1"):
            ids = vocabulary.encode_text(label)
            if len(ids) != 1:
                raise ModelError(f"{vocabulary.source}: the label {label!r} is not one token; a judge needs that")
            self.label_ids.append(ids[0])

    def start(self, row: Row) -> list[int]:
        """Tokens of the query."""
        return [
            *self.head_ids,
            *self.engine.vocabulary.encode_text(row.trace.query.text + _BETWEEN, opens=not self.chat),
        ]


def load_judge(pool: Pool, config: RouterConfig, *, max_slots: int = 128) -> Judge:
    """The judge of a recipe. A candidate's name, or a model that a candidate uses, shares that candidate's weights.

    Raises:
        ModelError: it cannot be loaded, or a label is not one of its tokens.
    """
    name = config.judge or pool.names[-1]
    source = pool.models.candidate_config(name) or CandidateConfig(name="judge", model=name)
    engine = pool.models.engine(source, max_slots=max_slots, name="judge")
    return Judge(engine, prompt_style(source, engine.vocabulary) == "chat")


@dataclass
class _Reading:
    """What the judge has been told of a row."""

    context: Context
    told: int = 0
    """Bytes of the response."""
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )
    """Keeps the first bytes of a character until its last one is written."""


class JudgePolicy(RouterPolicy):
    """The router `baco-judge`.

    Args:
        judge: the model that decides.
    """

    reads_text = True

    def __init__(self, name: str, vocabulary: Vocabulary, judge: Judge, *, base: int = 0, aligned: int = 1) -> None:
        super().__init__(name, vocabulary, base=base, aligned=aligned)
        self.judge = judge
        self._readings: dict[Row, _Reading] = {}
        self._warned = False

    def pick_base(
        self,
        base_logits_NV: torch.Tensor,
        aligned_logits_NV: torch.Tensor,
        seeds_N: torch.Tensor,
        index_N: torch.Tensor,
        asked: Sequence[Asked] = (),
    ) -> torch.Tensor:
        """Whether the judge finds label 0 likelier than label 1, per row. A row beyond its context goes on aligned."""
        judge = self.judge
        contexts = [self._context(row) for row in asked]
        room = judge.engine.max_positions - len(judge.question_ids)
        fits = [index for index, context in enumerate(contexts) if len(context.ids) <= room]
        if len(fits) < len(contexts) and not self._warned:
            self._warned = True
            logger.warning("%s: responses beyond the judge's context go on with the aligned model", self.name)
        picked_N = torch.zeros(len(contexts), dtype=torch.bool)
        if fits:
            logits_N2 = judge.engine.label_logits(
                [contexts[index] for index in fits], judge.question_ids, judge.label_ids
            )
            picked_N[fits] = logits_N2[:, 0] > logits_N2[:, 1]
        return picked_N

    def _context(self, asked: Asked) -> Context:
        """The row's context, brought up to the text that has been written."""
        reading = self._readings.get(asked.row)
        if reading is None:
            reading = self._readings[asked.row] = _Reading(Context(self.judge.start(asked.row)))
        new = reading.decoder.decode(asked.text[reading.told :])
        if new:
            reading.context.ids.extend(self.judge.engine.vocabulary.encode_text(new))
        reading.told = len(asked.text)
        return reading.context

    def release(self, row: Row) -> None:
        """Let the judge's engine forget a row."""
        reading = self._readings.pop(row, None)
        if reading is not None:
            self.judge.engine.release(reading.context)
