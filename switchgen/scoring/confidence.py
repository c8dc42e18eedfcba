"""The confidence that a response states: how sure its writer says to be of the answer."""

from __future__ import annotations

import re

# Blanks and emphasis between the parts.
_GAP = r"[*_\s]{0,9}"
_UNIT = r"(?:\s?(?P<{0}_unit>%|percent\b)|\s?(?:/|\bout\s+of\b)\s?(?P<{0}_top>\d{{1,3}}))"
_SCALE = r"(?:[(\[]\s?(?:(?:\d{1,3}\s?(?:-|–|to)\s?|out\s+of\s+)(?P<scale>\d{1,3})\s?%?|%|in\s+percent)\s?[)\]])?"
_STATED = re.compile(
    r"[*_]{0,3}(?:\b(?:my|with)\s+)?(?:\b(?:a|the)\s+)?\bconfiden(?:ce|t)\b(?:\s+(?:level|score|rating))?"
    + _GAP + _SCALE + _GAP + r"(?:[:=]|\bis\b|\bof\b|\bin\s+this\b|\bat\b)?" + _GAP + r"(?:(?:about|around)\s+)?"
    + r"(?P<after>\d{1,3}(?:\.\d+)?|\.\d+)" + _UNIT.format("after") + r"?[*_]{0,3}[.!]?"
    # Before the word a number counts only with a unit or below 1: `2 likely reasons` states nothing.
    + r"|(?:\b(?:I\s?['’]?\s?a?m|with)\s+)?(?:(?:about|around)\s+)?(?<![\d.])"
    + r"(?:(?P<before>\d{1,3}(?:\.\d+)?)" + _UNIT.format("before") + r"|(?P<share>[01]?\.\d+))"
    + r"\s*(?:sure|certain|confident|confidence|likely|probab\w+)\b(?:\s+that\b|[.!])?",
    re.IGNORECASE,
)  # fmt: skip


def split_confidence(response: str) -> tuple[str, float | None]:
    """A response without its statements of confidence, and the last one's value, 0 to 1.

    Read are `Confidence: 85%`, `I am 85% sure`, `confidence of 0.85`, `Confidence: 8/10`, `8 out of 10`, `Confidence
    (0-100): 85`; above 1 and without a scale it is per cent. None: none is stated, or one outside 0 to 1.
    """
    value = None
    for match in _STATED.finditer(response):
        value = _value(match)
    return _STATED.sub("", response), value


def _value(match: re.Match[str]) -> float | None:
    side = "before" if match["before"] else "after"
    value = float(match["share"] or match[side])
    per_cent = match[f"{side}_unit"] is not None
    top = float(100 if per_cent else match[f"{side}_top"] or match["scale"] or (100 if value > 1 else 1))
    return value / top if value <= top and top > 0 else None
