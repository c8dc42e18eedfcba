"""BACo: a base and an aligned model, routed token by token (arXiv 2511.05650).

P(y_t) = w P_base + (1 - w) P_aligned with w in {0, 1}: both models see every token, a router picks one, the token is
sampled from the picked model. No training.

Rules, by name (γ after `@`, else the recipe's `router.gamma`):
    p        base if max P_base < γ
    h        base if the entropy of P_base (nats) > γ
    rand     base with probability γ
    punc     aligned if the predicted token is punctuation or format, else base
    fc       aligned if the predicted token is a function word (an English list, or `router.function_words`), else base
    p-punc, h-punc, p-fc, h-fc   aligned if the content rule fires, else the logit rule
    judge    an external model decides (`policies.judge`)

The predicted token is the aligned model's most likely one; `+base` in a name (`baco-punc+base`) takes the base's (the
paper leaves it open). P_base is the distribution at temperature 1.

Two neighbours go through the same decision, as baselines:
    nudging  aligned if max P_base < γ, else base: the base writes, the aligned model writes the next word where the
             base is unsure (Fei et al. 2025, arXiv 2410.09300, §3; there the base is greedy, here it samples)
    contrast tokens are drawn from the softmax of (1 + γ) l_aligned - γ l_base over the tokens that are plausible to the
             aligned model, p_aligned >= 0.1 max p_aligned (contrastive decoding, Li et al. 2023, arXiv 2210.15097, with
             the base as the amateur); signed by the aligned model
    average  no choice at all: tokens are drawn from the softmax of γ l_base + (1 - γ) l_aligned, l the logits at
             temperature 1 (the geometric mean of the two distributions); signed by the model of the larger weight

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from switchgen.config import DATA_DIR, RouterConfig, nearest
from switchgen.errors import ConfigError
from switchgen.rows import Row
from switchgen.sampling import Purpose, is_unsure, uniform
from switchgen.vocabulary import Vocabulary

LogitRule = Literal["p", "h", "rand", "nudge", "average", "contrast", "judge"]
ContentRule = Literal["punc", "fc"]
Predictor = Literal["aligned", "base"]

JUDGE = "baco-judge"
RULES: dict[str, tuple[LogitRule | None, ContentRule | None]] = {
    "baco-p": ("p", None),
    "baco-h": ("h", None),
    "baco-rand": ("rand", None),
    "baco-punc": (None, "punc"),
    "baco-fc": (None, "fc"),
    "baco-p-punc": ("p", "punc"),
    "baco-h-punc": ("h", "punc"),
    "baco-p-fc": ("p", "fc"),
    "baco-h-fc": ("h", "fc"),
    JUDGE: ("judge", None),
    "nudging": ("nudge", None),
    "average": ("average", None),
    "contrast": ("contrast", None),
}
_SHARES = ("rand", "average")
"""Rules whose γ is a share, from 0 to 1."""

LOG_PLAUSIBLE = math.log(0.1)
"""How far below the aligned model's likeliest token a contrast may draw, in nats."""

_EMOJI_JOINERS = re.compile("[\u200d\u20e3\ufe0e\ufe0f\U000e0020-\U000e007f]")
"""What stands within emoji without being one: joiner, keycap, variation selectors, tags (Unicode TS 51)."""
_LIST_MARK = re.compile(r"(?:\d{1,3}|[a-zA-Z])[.)]")


@dataclass(frozen=True)
class RouterName:
    """A router's name taken apart: `baco-p-punc+base@0.3`."""

    rule: str
    gamma: float | None
    predictor: Predictor | None = None
    """Whose most likely token the content rules look at; None where the name does not say."""


@dataclass(frozen=True)
class Asked:
    """A row at a word boundary, for routers that read the text."""

    row: Row
    text: bytes
    """The response so far."""


def is_router(name: str) -> bool:
    """Whether a policy's name means a token router, well formed or not."""
    return name.startswith("baco") or re.split("[@+]", name)[0] in RULES


def parse_router(name: str, default: float | None = None) -> RouterName:
    """Take a router's name apart.

    Args:
        default: γ where the name has none (`router.gamma`).

    Raises:
        ConfigError: unknown rule, γ missing, not a number, or given to a rule that has none; a predictor where nothing
            is predicted.
    """
    head, at, text = name.partition("@")
    rule, plus, predictor = head.partition("+")
    if rule not in RULES:
        raise ConfigError(f"unknown router {name!r}{nearest(rule, list(RULES))}; allowed: {', '.join(RULES)}")
    logit_rule, content_rule = RULES[rule]
    if plus and (content_rule is None or predictor not in ("aligned", "base")):
        raise ConfigError(
            f"router {name!r}: after + stands whose predicted token the content rule looks at, aligned or base, and "
            f"only in {', '.join(r for r, (_, content) in RULES.items() if content is not None)}"
        )
    whose: Predictor | None = "base" if predictor == "base" else "aligned" if plus else None
    if logit_rule in (None, "judge"):
        if at:
            raise ConfigError(f"router {name!r}: {rule} has no γ; write {head}")
        return RouterName(rule, None, whose)
    if not at and default is None:
        raise ConfigError(f"router {name!r} has no γ: write it after @, e.g. {head}@0.3, or set router.gamma")
    try:
        gamma = float(text) if at or default is None else default
    except ValueError:
        gamma = math.nan
    too_low = logit_rule == "contrast" and not 0 <= gamma < math.inf
    if math.isnan(gamma) or too_low or (logit_rule in _SHARES and not 0 <= gamma <= 1):
        allowed = "a number" + (" from 0 to 1" if logit_rule in _SHARES else ", at least 0" if too_low else "")
        where = "after @ stands γ" if at else f"router.gamma ({default}) is γ"
        raise ConfigError(f"router {name!r}: {where}, {allowed}, e.g. {head}@0.3")
    return RouterName(rule, gamma, whose)


def check_router(name: str, settings: RouterConfig) -> None:
    """See that a router of this name can work.

    Raises:
        ConfigError: see `parse_router`; or it needs function words, and their file is none.
    """
    if RULES[parse_router(name, settings.gamma).rule][1] == "fc":
        function_words(settings.function_words)


class RouterPolicy:
    """A token router over two candidates of one vocabulary.

    Args:
        base, aligned: places on the ladder.
        settings: γ and whose most likely token the content rules look at, where the name does not say, and the function
            words.
    """

    engine = None
    reads_text = False
    """Whether `pick_base` wants to see the rows' text."""

    def __init__(
        self,
        name: str,
        vocabulary: Vocabulary,
        *,
        base: int = 0,
        aligned: int = 1,
        settings: RouterConfig | None = None,
    ) -> None:
        settings = settings or RouterConfig()
        parsed = parse_router(name, settings.gamma)
        self.name = name
        self.gamma = parsed.gamma
        self.logit_rule, content_rule = RULES[parsed.rule]
        self.base = base
        self.aligned = aligned
        self.predictor = parsed.predictor or settings.predictor
        self.vocabulary = vocabulary
        words = function_words(settings.function_words) if content_rule == "fc" else frozenset()
        self.fires_V = None if content_rule is None else content_flags(vocabulary, content_rule, words)

    @property
    def weight(self) -> float | None:
        """The base's share in the logits that tokens are drawn from; None where each model draws from its own.

        Negative where the base is what the aligned model is contrasted with.
        """
        if self.logit_rule == "contrast":
            assert self.gamma is not None
            return -self.gamma
        return self.gamma if self.logit_rule == "average" else None

    def writers(self, num_candidates: int) -> list[int]:
        """The two models it routes between."""
        return [self.base, self.aligned]

    def pick_base(
        self,
        base_logits_NV: torch.Tensor,
        aligned_logits_NV: torch.Tensor,
        seeds_N: torch.Tensor,
        index_N: torch.Tensor,
        asked: Sequence[Asked] = (),
    ) -> torch.Tensor:
        """Whether the base model is picked, per row (bool, shape N).

        Args:
            seeds_N, index_N: the rows' seeds and the indices of their next tokens.
            asked: the rows' texts, for routers that read them.
        """
        picked_N = self._logit_rule(base_logits_NV, seeds_N, index_N)
        if self.fires_V is None:
            return picked_N
        predicted_NV = aligned_logits_NV if self.predictor == "aligned" else base_logits_NV
        predicted_N = predicted_NV.argmax(dim=-1)
        # Moved once: a copy from the host for every token would make the device wait.
        self.fires_V = self.fires_V.to(predicted_N.device)
        return picked_N & ~self.fires_V[predicted_N]

    def _logit_rule(self, base_logits_NV: torch.Tensor, seeds_N: torch.Tensor, index_N: torch.Tensor) -> torch.Tensor:
        if self.logit_rule is None:
            return torch.ones(len(seeds_N), dtype=torch.bool, device=base_logits_NV.device)
        assert self.gamma is not None
        if self.logit_rule == "rand":
            return uniform(seeds_N, Purpose.ROUTER, index_N) < self.gamma
        if self.weight is not None:
            return torch.full((len(seeds_N),), self.weight > 0.5, device=base_logits_NV.device)
        is_unsure_N = is_unsure(base_logits_NV, "h" if self.logit_rule == "h" else "p", self.gamma)
        return ~is_unsure_N if self.logit_rule == "nudge" else is_unsure_N

    def release(self, row: Row) -> None:
        """Forget a row that is finished."""


def content_flags(vocabulary: Vocabulary, rule: ContentRule, words: frozenset[str]) -> torch.Tensor:
    """Per token, whether a content rule fires on it (bool, shape V).

    `punc`: the token is white space, or holds only characters of the Unicode categories P* and S* beside white space
    (so brackets, quotes, code fences, bullets, emoji with what joins their parts), or is a list mark such as `1.` or
    `b)`.
    `fc`: the token without white space, in lower case, is one of the function words.
    A token that holds a part of a character is neither: what it will be is not said yet.
    """
    flags = torch.zeros(len(vocabulary), dtype=torch.bool)
    for index, raw in enumerate(vocabulary.token_bytes):
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if not text or index in vocabulary.control_ids:
            continue
        flags[index] = text.strip().lower() in words if rule == "fc" else is_format(text)
    return flags


def is_format(text: str) -> bool:
    """Whether a token is punctuation or format: letters, digits, marks only in list marks and within emoji."""
    visible = "".join(text.split())
    if not visible or _LIST_MARK.fullmatch(visible):
        return True
    signs = _EMOJI_JOINERS.sub("", visible)
    return bool(signs) and all(unicodedata.category(character)[0] in "PS" for character in signs)


def function_words(file: str | None = None) -> frozenset[str]:
    """The words of a file, in lower case, or the packaged English list; lines that begin with # say where it is from.

    Raises:
        ConfigError: the file is not there, not UTF-8, or empty.
    """
    path = DATA_DIR / "words" / "function_words_en.txt" if file is None else Path(file).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"router.function_words: {path}: {error}; allowed: a UTF-8 file, one word a line") from None
    words = frozenset(word.lower() for line in lines if not line.startswith("#") for word in line.split())
    if not words:
        raise ConfigError(f"router.function_words: {path} holds no words; allowed: a UTF-8 file, one word a line")
    return words
