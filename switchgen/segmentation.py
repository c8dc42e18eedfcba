"""Where a segment ends: after a number of tokens, or earlier: at a sentence, at a line, where its writer is unsure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch

from switchgen.config import SegmentConfig
from switchgen.sampling import is_unsure
from switchgen.vocabulary import MAX_UTF8_EXTRA, Vocabulary, continues_word

# In pools of several vocabularies a segment waits at most this long for its word to end.
MAX_WORD_EXTRA = 8

Boundary = Literal["length", "sentence", "line", "p", "h"]


@dataclass(frozen=True)
class SegmentRule:
    """When the writer hands over.

    `end` names the boundary that ends a segment before its token limit: `length` has none; `sentence` ends before a
    token that begins with white space where the text before it ends with a sentence mark, and after a line break;
    `line` ends after a line break; `p` and `h` end before a word of which the writer is unsure, once the segment has
    `min_tokens` tokens. `whole_words` (pools of several vocabularies) lets a segment at its limit go on until a word
    ends. A segment never ends inside a character.

    *Unsure* is what BACo's routers P and H mean by it (arXiv 2511.05650) and Nudging (Fei et al. 2025,
    arXiv 2410.09300, §3): the likeliest next token has a probability below `gamma`, or the entropy is above it in nats,
    in the writer's own distribution at temperature 1 before top-p. There another model may write the next token; here
    another may write the next segment. As in BACo a token that goes on with a word is never asked about. What the
    writer was unsure of is drawn but not written: where it writes the next segment, too, it draws the same token again,
    so that a candidate alone writes what it would without the rule.
    """

    end: Boundary = "length"
    whole_words: bool = False
    gamma: float = 0.0
    min_tokens: int = 1

    @classmethod
    def of(cls, segment: SegmentConfig, *, closes: bool = False, whole_words: bool = False) -> SegmentRule:
        """The recipe's rule.

        Args:
            closes: whether the segment is the last writer's, which ends by its length alone: nobody comes after it.
        """
        if closes:
            return cls("length", whole_words)
        if segment.unsure is None:
            return cls(cast(Boundary, segment.end), whole_words)
        measure, gamma = segment.unsure
        return cls(measure, whole_words, gamma, segment.min_tokens)

    @property
    def max_extra(self) -> int:
        """How many tokens a segment may be longer than its limit."""
        return MAX_UTF8_EXTRA + (MAX_WORD_EXTRA if self.whole_words else 0)

    @property
    def reads_logits(self) -> bool:
        """Whether the boundary lies in the writer's distribution rather than in the text."""
        return self.end in ("p", "h")

    def unsure(self, logits_NV: torch.Tensor) -> list[bool] | None:
        """For each row, whether its writer is unsure of the next token; None where the rule does not ask."""
        if self.end != "p" and self.end != "h":
            return None
        unsure: list[bool] = is_unsure(logits_NV, self.end, self.gamma).tolist()
        return unsure

    def ends_before(
        self, vocabulary: Vocabulary, ids: list[int], token: int, max_tokens: int, *, unsure: bool = False
    ) -> bool:
        """Whether the segment `ids` is complete, seeing which `token` would follow; that token is then not written.

        Args:
            unsure: whether the writer was unsure when it drew the token.
        """
        if not ids:
            return False
        begins_word = bool(vocabulary.starts_with_space[token])
        if unsure and len(ids) >= self.min_tokens:
            before = vocabulary.decode_bytes(ids[-4:])
            if begins_word or not (self.whole_words or continues_word(before, vocabulary.token_bytes[token])):
                return True
        if not begins_word:
            return False
        if self.end == "sentence" and bool(vocabulary.ends_sentence[ids[-1]]):
            return True
        return self.whole_words and len(ids) >= max_tokens

    def ends_after(self, vocabulary: Vocabulary, ids: list[int], max_tokens: int) -> tuple[bool, bool]:
        """(whether the segment `ids` is complete, whether because of a boundary rather than its length)."""
        boundary = self.end in ("sentence", "line") and bool(vocabulary.has_newline[ids[-1]])
        limit = max_tokens + (MAX_WORD_EXTRA if self.whole_words else 0)
        if not boundary and len(ids) < limit:
            return False, False
        if len(ids) < limit + MAX_UTF8_EXTRA and vocabulary.ends_inside_character(ids):
            return False, False
        return True, boundary
