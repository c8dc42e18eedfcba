"""Lexical diversity of several responses to one prompt: seven metrics.

All of them read the responses of one prompt together (n of them; at least two for the pairwise ones). Words are
lower-cased runs of letters, digits and marks; every other character that is not white space is a word of its own.
Self-BLEU uses sacrebleu's tokenizer.

    distinct_1/2/3      share of different n-grams among all                                      more is more diverse
    adjusted_distinct   different tokens ÷ the number that chance would give                      more
    self_bleu           BLEU of each response against the others                                  less
    ngram_overlap       mean Jaccard overlap of the n-gram sets (n = 1 … 4) of two responses      less
    compression_ratio   bytes ÷ bytes after compression                                           less
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from itertools import combinations
from typing import Any

_WORD = re.compile(r"\w+|[^\w\s]")
_LONGEST = 4  # n-grams of the overlap, as in BLEU


def words(text: str) -> list[str]:
    """A text's words and punctuation marks, in lower case."""
    return _WORD.findall(text.lower())


def ngrams(units: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """All runs of n units, in order."""
    return [tuple(units[start : start + n]) for start in range(len(units) - n + 1)]


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams of all responses together ÷ all their n-grams (Li et al. 2016, arXiv 1510.03055, §5.2).

    Returns:
        A share in (0, 1]; None where no response has n words.
    """
    grams = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else None


def adjusted_distinct(units: Sequence[Sequence[Hashable]], vocabulary_size: int) -> float | None:
    """Expectation-adjusted distinct (Liu et al. 2022, arXiv 2202.13587, eq. 3): N / (V (1 − ((V − 1) / V)^C)).

    N different ones among C tokens; the denominator is how many different ones C uniform draws from V tokens give. So
    the figure does not fall merely because responses are longer. It may be above 1.

    Args:
        units: the tokens of each response.
        vocabulary_size: V, the size of the vocabulary that the tokens are from.

    Returns:
        None where there is no token.
    """
    tokens = [unit for response in units for unit in response]
    if not tokens:
        return None
    if vocabulary_size < 1:
        raise ValueError(f"vocabulary_size is {vocabulary_size}; at least 1")
    expected = vocabulary_size * (1 - ((vocabulary_size - 1) / vocabulary_size) ** len(tokens))
    return len(set(tokens)) / expected


def self_bleu(texts: Sequence[str]) -> float | None:
    """Mean BLEU of each response with all others as references (Zhu et al. 2018, arXiv 1802.01886, §3.3), 0 to 1.

    sacrebleu's sentence BLEU with its own settings (up to 4-grams, tokenizer 13a, exponential smoothing, only the
    orders that a short response has).

    Returns:
        None for fewer than two responses.
    """
    if len(texts) < 2:
        return None
    bleu = _bleu()
    scored: dict[str, float] = {}
    for index, text in enumerate(texts):
        # Equal responses have equal others.
        if text not in scored:
            others = [*texts[:index], *texts[index + 1 :]]
            scored[text] = bleu.sentence_score(text, others).score / 100
    return sum(scored[text] for text in texts) / len(texts)


@lru_cache(maxsize=1)
def _bleu() -> Any:
    from sacrebleu.metrics import BLEU  # noqa: PLC0415

    return BLEU(effective_order=True)


def self_bleu_missing() -> str | None:
    """Why self-BLEU cannot be had here; None if it can."""
    try:
        _bleu()
    except ImportError:
        return "sacrebleu is not installed (pip install 'switchgen[eval]')"
    return None


def ngram_overlap(texts: Sequence[str]) -> float | None:
    """Mean over pairs of the Jaccard overlap |A ∩ B| ÷ |A ∪ B| of their word n-gram sets, n = 1 … 4 together.

    The pairwise homogeneity of Padmakumar and He 2024 (arXiv 2309.05196, §3), over n-gram sets. Two empty responses
    overlap wholly.

    Returns:
        None for fewer than two responses.
    """
    if len(texts) < 2:
        return None
    sets = [_gram_set(text) for text in texts]
    return _mean(1.0 if not a | b else len(a & b) / len(a | b) for a, b in combinations(sets, 2))


def _gram_set(text: str) -> frozenset[tuple[Hashable, ...]]:
    units = words(text)
    return frozenset(gram for n in range(1, _LONGEST + 1) for gram in ngrams(units, n))


def compression_ratio(texts: Sequence[str]) -> float | None:
    """Bytes of all responses, one a line, ÷ their bytes after gzip -9 (Shaib et al. 2024, arXiv 2403.00553, §3).

    Returns:
        None where there is no text.
    """
    raw = "\n".join(texts).encode()
    return len(raw) / len(gzip.compress(raw, 9, mtime=0)) if raw else None


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
