"""Numbers in text, as exact fractions.

Understood: signs (`-`, `−`, `minus`), thousands (`1,234`, `1{,}234`), decimals, fractions and mixed numbers (`3/4`,
`2 1/2`, `\\frac{3}{4}`), powers of ten (`1.5e3`, `2×10^5`), scale words (`1.2 million`), currencies and units beside
the number. Not numbers: digits inside words (`x2`, `COVID-19`), versions, dates, times, `1,2,3`.
"""

from __future__ import annotations

import re
from fractions import Fraction

_LATEX = (
    (re.compile(r"\\left|\\right|\\displaystyle|\\!|\\,|\\;|\\:|\\ "), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\[dtc]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r" \1/\2"),
    (re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)"), r" \1/\2"),
    (re.compile(r"\\times|\\cdot"), "×"),
    (re.compile(r"\^\{?\\circ\}?|\\degree"), "°"),
    (re.compile(r"\\([$%€£])"), r"\1"),
    (re.compile(r"\\[()\[\]]|\$(?=\s*$)|\$(?=[\s.,;:!?)])"), " "),
)
_SIGNS = str.maketrans(
    {"−": "-", "–": "-", "—": "-", "‑": "-", "﹣": "-", "－": "-", "＋": "+", "⁄": "/", "\u202f": ",", "’": "'"}
)
_VULGAR = {
    "½": "1/2",
    "⅓": "1/3",
    "⅔": "2/3",
    "¼": "1/4",
    "¾": "3/4",
    "⅕": "1/5",
    "⅛": "1/8",
    "⅜": "3/8",
    "⅝": "5/8",
    "⅞": "7/8",
}
_UNITS = r"(?:[kcm]?m|[km]?g|lbs?|oz|km/h|mph|mi|ft|in|hrs?|h|mins?|s|secs?|ms|m?l|am|pm|px|USD|EUR)"
_SCALE = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_NUMBER = re.compile(
    r"(?<![\w./^])(?<!\d[,:])(?<![A-Za-z]-)"
    r"(?P<sign>(?<![\d)\]])[-+]|\b(?:minus|negative)\s+)?[$€£¥₹]?\s?(?P<sign2>(?<=[$€£¥₹])-)?"
    r"(?:(?:(?P<whole>\d{1,18})\s+)?(?P<top>\d{1,18})\s?/\s?(?P<bottom>\d{1,18})"
    r"|(?P<digits>(?:\d{1,3}(?:,\d{3}){1,99}|\d{1,300})(?:\.\d{1,300})?|\.\d{1,300})"
    r"(?:[eE](?P<exp>[-+]?\d{1,3})|\s?[x×*]\s?10(?:\^|\*\*)\{?(?P<exp2>[-+]?\d{1,3})\}?)?"
    r"(?:[\s-](?P<scale>hundred|thousand|million|billion|trillion)\b)?)"
    rf"(?={_UNITS}\b|(?![\w^]|[.,:/]\d))",
    re.IGNORECASE,
)
_UNDER_20 = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    "|eighteen|nineteen"
)
_FROM_20 = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
_WORDS = {word: value for value, word in enumerate(_UNDER_20.split("|"))}
_TENS = {word: 10 * n for n, word in enumerate(_FROM_20.split("|"), 2)}
_BELOW_100 = rf"(?:(?:{_FROM_20})(?:[-\s](?:{_UNDER_20[5:]}))?|{_UNDER_20})"
_BELOW_1000 = rf"{_BELOW_100}(?:\s+hundred(?:(?:\s+and)?\s+{_BELOW_100})?)?"
_SPELLED = re.compile(
    rf"(?P<sign>(?:minus|negative)\s+)?"
    rf"(?P<words>{_BELOW_1000}(?:\s+(?:thousand|million|billion|trillion)\b(?:,?(?:\s+and)?\s+{_BELOW_1000})?)*)"
    rf"(?![-\w])(?!,?\s+(?:(?:and|or|to)\s+)?(?:{_BELOW_100}|\d))",
    re.IGNORECASE,
)
# What makes the first number only the beginning of an expression, a range or an enumeration.
_GOES_ON = re.compile(
    r"\s*(?:[-+*/×÷^=<>]\s*[\d$(.]|(?:,\s*)?(?:and|or|to)\s+[\d$-]|,\s+[\d$-]|\s+\d|=|[-+*/×÷^])", re.IGNORECASE
)
_BEFORE = re.compile(
    r"^[\s\"'(\[*:≈~]*(?:(?:about|approximately|exactly|only|equal\s+to|x\s*=|a\s+total\s+of)\s+)?", re.IGNORECASE
)


def plain(text: str) -> str:
    """`text` with LaTeX, Unicode signs and vulgar fractions written plainly."""
    for sign, fraction in _VULGAR.items():
        text = text.replace(sign, f" {fraction}")
    text = text.translate(_SIGNS)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


def is_number(text: str) -> bool:
    """Whether `text` is a number and nothing else (a currency or per cent sign aside)."""
    match = _NUMBER.match(text := plain(text).strip())
    return match is not None and _has_value(match) and not text[match.end() :].strip(" %")


def all_numbers(text: str) -> list[Fraction]:
    """Every number in `text`, in order."""
    return [_value(match) for match in _NUMBER.finditer(plain(text)) if _has_value(match)]


def parse_number(text: str) -> Fraction | None:
    """The one number that `text`, a short answer, states; None where it states none or several.

    In order: the number it begins with, unless an expression, a range or an enumeration goes on from there; what
    follows its last equals sign; a number word; the only value in it.
    """
    text = plain(text)
    after = _BEFORE.match(text).end()  # type: ignore[union-attr]  # every part is optional, so it always matches
    lead = _NUMBER.match(text, after)
    if lead and not _GOES_ON.match(text, lead.end()) and _has_value(lead):
        return _value(lead)
    if "=" in text and (tail := text.rsplit("=", 1)[1].strip()):
        return parse_number(tail)
    if (word := _word_value(text[after:])) is not None:
        return word
    values = set(all_numbers(text))
    return values.pop() if len(values) == 1 else None


def last_number(text: str) -> Fraction | None:
    """The last number of a text: what is read where no marker or phrasing announces the answer. A number word counts
    only where there are no digits."""
    values = all_numbers(text)
    return values[-1] if values else parse_number(text)


def _has_value(match: re.Match[str]) -> bool:
    """Whether it is no fraction over nothing: `3/0`, `3/00`."""
    return match["bottom"] is None or int(match["bottom"]) != 0


def _value(match: re.Match[str]) -> Fraction:
    if match["bottom"] is not None:
        value = Fraction(int(match["top"]), int(match["bottom"])) + int(match["whole"] or 0)
    else:
        value = Fraction(match["digits"].replace(",", "")) * Fraction(10) ** int(match["exp"] or match["exp2"] or 0)
        value *= _SCALE[match["scale"].lower()] if match["scale"] else 1
    sign = (match["sign"] or match["sign2"] or "").strip().lower()
    return -value if sign in {"-", "minus", "negative"} else value


def _word_value(text: str) -> Fraction | None:
    """The number that `text` begins with in words: `minus five`, `two hundred and twelve apples`; not `five-ish`, and
    not the first of several (`five and six`)."""
    match = _SPELLED.match(text.strip())
    if match is None:
        return None
    total = current = 0
    for word in re.findall(r"[a-z]+", match["words"].lower()):
        if word == "hundred":
            current *= 100
        elif word in _SCALE:
            total, current = total + current * _SCALE[word], 0
        else:
            current += _WORDS.get(word, _TENS.get(word, 0))
    return Fraction(-(total + current) if match["sign"] else total + current)
