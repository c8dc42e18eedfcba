"""What the loop and an engine say to each other.

An engine owns one model. The loop hands it contexts (what that model reads of each row) and asks it to write segments
or to score labels. Contexts only ever grow; what of them sits in a cache is the engine's own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from switchgen.engines.scoring import TokenScore
from switchgen.sampling import SamplingParams
from switchgen.segmentation import SegmentRule
from switchgen.trace import SegmentFinish
from switchgen.vocabulary import Vocabulary


@dataclass(slots=True, eq=False)
class Context:
    """What one model reads of one row: prompt and trace tokens, only ever appended.

    A fork names its parent and how many of the first tokens it shares with it: an engine reads those once, for the
    parent, and copies them. A parent does not grow after it was forked.
    """

    ids: list[int]
    parent: Context | None = None
    shared: int = 0
    expected: int = 0
    """Tokens it will have in the end, as far as that is known; caches are sized for it at once."""
    slot: int | None = None
    """Where the engine caches it; None if it does not."""
    cached: int = 0
    """Tokens in the cache: the first `cached` of `ids`."""
    last_used: int = 0
    """The engine's clock when it was last needed."""

    @property
    def place(self) -> int:
        """Its slot, where it surely has one."""
        assert self.slot is not None, "a context that was not given a slot, or has lost it"
        return self.slot


Listener = Callable[[int, bytes], None]
"""Told of a token: its index in the segment, and its bytes. A batch that is tried again tells of its tokens again."""


@dataclass(slots=True)
class WriteItem:
    """One row's order to an engine: write a segment after `context`."""

    context: Context
    max_tokens: int
    """Where the segment ends at the latest, in tokens."""
    seed: int
    """The row's seed."""
    token_index: int
    """Tokens of the response so far: index of the first random number."""
    tail: bytes = b""
    """The response's last bytes, for stop strings that straddle a border."""
    listener: Listener | None = None


@dataclass(slots=True)
class Written:
    """What the engine wrote: tokens (also appended to the context) and why it stopped."""

    ids: list[int]
    finish: SegmentFinish
    cut: int = 0
    """Bytes at the response's end that belong to a stop string or follow it."""


@dataclass
class EngineStats:
    """What an engine did."""

    read_tokens: int = 0
    """Tokens fed without a token being drawn after them."""
    decoded_tokens: int = 0
    """Tokens drawn, dropped ones and ends of text included."""
    scored_tokens: int = 0
    """Tokens of questions that were read, scored and rewound."""
    steps: int = 0
    """Decode steps; `decoded_tokens / steps` is the mean batch."""
    copied_rows: int = 0
    """Cache rows copied by forks."""
    evicted_rows: int = 0
    """Cache rows dropped for want of room; they are read again when needed."""
    read_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def mean_batch(self) -> float:
        """Rows per decode step."""
        return self.decoded_tokens / self.steps if self.steps else 0.0


class Session(Protocol):
    """A resident batch that is stepped token by token."""

    order: list[int]
    """For each row of the batch, its index in the list that `begin` was given."""
    contexts: list[Context]

    def logits(self, ids_N: torch.Tensor | None = None) -> torch.Tensor:
        """Feed every row's last token; logits of the next one, shape [rows, vocabulary].

        Args:
            ids_N: these tokens, where the caller has them on the device already.
        """

    def keep(self, rows: list[int]) -> list[int]:
        """Go on with these rows only; returns them in their new order."""


class Family(Protocol):
    """Weights that several engines share, each with an adapter of its own (or none)."""

    together: bool
    """Whether their rows may be stepped in one forward."""

    def forward_each(self, adapters: Sequence[str | None], **kwargs: Any) -> Any:
        """The model's forward with an adapter (None: the bare weights) for each row of the batch."""


class Engine(Protocol):
    """One model that reads contexts and writes after them."""

    name: str
    vocabulary: Vocabulary
    stop_ids: frozenset[int]
    max_positions: int
    """Longest context in tokens."""
    max_slots: int
    """Rows that it works on at a time."""
    hidden_size: int
    """Numbers in a hidden state."""
    stats: EngineStats
    banned_ids: torch.Tensor
    """Ids that are never drawn."""

    def begin(self, contexts: Sequence[Context]) -> Session:
        """Make the contexts a batch that is stepped token by token; the caller appends the tokens to them."""

    def write(
        self, items: Sequence[WriteItem], params: SamplingParams, rule: SegmentRule, stop: Sequence[bytes] = ()
    ) -> list[Written]:
        """Write one segment per item; results in the items' order, contexts grown by what was written."""

    def label_logits(self, contexts: Sequence[Context], suffix: Sequence[int], labels: Sequence[int]) -> torch.Tensor:
        """Logits of the label tokens after context + suffix, which is rewound; [rows, labels], float64 on CPU."""

    def token_scores(self, ids: Sequence[int], first: int, num_top: int) -> list[TokenScore]:
        """Log-probabilities of `ids[first:]`; see `scoring.score_tokens`."""

    def hidden(self, contexts: Sequence[Context]) -> torch.Tensor:
        """The state that the LM head reads, after each context's last token; [rows, hidden], float64 on CPU."""

    def release(self, context: Context) -> None:
        """Forget a context: its row is finished."""

    def clear(self) -> None:
        """Forget all contexts; they are read again when they are needed."""


@dataclass
class Usage:
    """Totals of a run, by engine name."""

    engines: dict[str, EngineStats] = field(default_factory=dict)
