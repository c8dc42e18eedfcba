"""Which of the lettered options a response chooses: an anchored label first, then an option's text.

A label never counts inside a word, nor where it may be an article or a pronoun (`A dog…`, `I think…`); two labels
(`A or B`) choose nothing, nor does taking the options one after the other, unless just one of them is called right or
a last line concludes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from switchgen.scoring.extraction import find_answer, first_sentence
from switchgen.scoring.text import normalise

_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}|\$|\\[()\[\]]")
_REASON = r"(?:because|since|as|for|due)\b"
_JUDGED_RIGHT = re.compile(r"(?<!not )(?<!n't )(?<!not the )\b(?:correct|right|true)\b(?!\s*\?)|[✓✔✅]", re.IGNORECASE)
_OPTION_LINE = re.compile(r"^[ \t]*\(?([A-Z])[).:][ \t]*(\S.*?)[ \t]*$", re.MULTILINE)


def options_in(text: str) -> dict[str, str]:
    """The lettered options that a query spells out, one a line: `(A) red` → `{"A": "red"}`. They must run A, B, C …"""
    options = dict(_OPTION_LINE.findall(text))
    return options if list(options) == [chr(ord("A") + i) for i in range(len(options))] else {}


def extract_choice(
    response: str, choices: Mapping[str, str], *, marker: str | None = None, strict: bool = False
) -> str | None:
    """The label of the option that `response` chooses, or None."""
    answer = find_answer(response, marker=marker, strict=strict)
    if answer.text is None:
        return None
    text = _LATEX_TEXT.sub(lambda match: match[1] or "", answer.text).strip()
    if answer.marked:
        return _read_answer(text, choices, strict=strict)
    return _read_unmarked(text, choices)


def _read_answer(text: str, choices: Mapping[str, str], *, strict: bool) -> str | None:
    """`text` is what follows a marker: it begins with the label or says the option's text."""
    if (label := _whole_option(text, choices)) is not None:
        return label
    if (label := _leading_label(text, choices)) is not None:
        return label
    if _leading_pair(text, choices):
        return None
    return _option_text(text if strict else first_sentence(text), choices)


def _read_unmarked(text: str, choices: Mapping[str, str]) -> str | None:
    """No marker: an option's whole text, a sentence that names the choice, a leading label, a last line that is a
    label, the only option whose text is said."""
    if (label := _whole_option(text, choices)) is not None:
        return label
    lines = [line.strip(" *_`") for line in text.splitlines() if line.strip(" *_`")]
    if not lines:
        return None
    if (label := _stated(text, choices)) is not None:
        return label
    if (walk := _walk(lines, choices)) is not None:
        judged = [label for label, line in walk.items() if _called_right(line, choices[label])]
        if judged or lines[-1] in walk.values():
            return judged[0] if len(judged) == 1 else None
    elif (label := _leading_label(lines[0], choices)) is not None:
        return label
    if len(lines) > 1:
        label = _whole_option(lines[-1], choices) or _leading_label(lines[-1], choices)
        if label is not None:
            return label
    return None if _leading_pair(lines[0], choices) else _option_text(text, choices)


def _walk(lines: Sequence[str], choices: Mapping[str, str]) -> dict[str, str] | None:
    """Label → line of each option, where a response takes one after the other; None where it does not.

    They stand a line each, `A. Paris - wrong`, from the first option on: naming one first and the others after it is
    an answer with its reasons.
    """
    led = [(label, line) for line in lines if (label := _leading_label(line, choices)) is not None]
    if led and led[-1][0] in dict(led[:-1]):  # a conclusion
        led.pop()
    in_order = [label for label, _ in led] == list(choices)[: len(led)]
    return dict(led) if len(led) > 1 and in_order else None


def _called_right(line: str, option: str) -> bool:
    """Whether an option's line says so, beside the option's own text."""
    own = normalise(option)
    said = normalise(line)
    return _JUDGED_RIGHT.search(said.replace(own, " ", 1) if own else said) is not None


def _labels(choices: Mapping[str, str]) -> str:
    return "(?:" + "|".join(re.escape(label) for label in sorted(choices, key=len, reverse=True)) + ")"


def _as_label(text: str, choices: Mapping[str, str]) -> str | None:
    return next((label for label in choices if label.casefold() == text.casefold()), None)


def _whole_option(text: str, choices: Mapping[str, str]) -> str | None:
    """`text` is nothing but a label, or nothing but one option's text (then even `A. Smith` is that option)."""
    bare = text.strip().strip("()[]*\"'`.:, ")
    if (label := _as_label(bare, choices)) is not None:
        return label
    wanted = normalise(text)
    same = [label for label, option in choices.items() if normalise(option) == wanted]
    return same[0] if wanted and len(same) == 1 else None


def _leading_label(text: str, choices: Mapping[str, str]) -> str | None:
    """A label at the very beginning, set off as one: `(B) …`, `B. …`, `B) …`, `B: …`, `option B`, `B because …`."""
    labels = _labels(choices)
    match = re.match(
        rf"(?:(?i:option|choice|letter|answer)\s+)?[*\"']*(?:[(\[](?P<inside>(?i:{labels}))[)\]]"
        rf"|(?P<set_off>{labels})[*\"']*(?:\s*\)|\s*[.:\]](?!\w)|\s*,|\s+[-–—]\s|\s*$|\s+{_REASON}|\s+(?:is|seems)\s+(?:the\s+)?(?:correct|right|best)|\n)"
        rf"|(?P<lower>(?i:{labels}))\)(?=\s|$))",
        text,
    ) or re.match(rf"(?i:option|choice|letter)\s+[*\"'(]*(?P<inside>{labels})\b", text)
    if match is None:
        spelled = re.match(rf"(?P<label>{labels})\s+(?P<rest>\S.*)", text, re.DOTALL)
        if spelled and normalise(first_sentence(spelled["rest"])).startswith(
            normalise(choices[spelled["label"]]) or "\0"
        ):
            return spelled["label"]
        return None
    if _leading_pair(text, choices) or re.match(r"I,?\s+[a-z]", text):
        return None
    found = match.groupdict()
    return _as_label(found.get("inside") or found.get("set_off") or found.get("lower") or "", choices)


def _leading_pair(text: str, choices: Mapping[str, str]) -> bool:
    """Two different labels in one breath, `A or B`, `both (A) and (C)`, `A, B`: nobody chose."""
    labels = _labels(choices)
    pair = re.match(
        rf"(?i:both\s+|either\s+|options?\s+)*[(\[*]*({labels})[)\]*]*\s*(?:,|/|&|(?i:and|or)\b)[\s,]*(?i:(?:and|or)\s+)?(?i:option\s+)?[(\[*]*({labels})[)\]*]*(?!\w)(?!\s+\w)",
        text,
    )
    return pair is not None and pair[1] != pair[2]


def _stated(text: str, choices: Mapping[str, str]) -> str | None:
    """The last sentence of the kind `I choose B`, `option (C) is correct`, `so it must be (D)`."""
    labels = _labels(choices)
    label = rf"[*\"']*(?:\((?P<{{0}}p>(?i:{labels}))\)|(?P<{{0}}l>{labels})(?![\w'’]))"
    patterns = (
        rf"\b(?i:i(?:'d|\s+would|\s+will)?\s+(?:choose|chose|pick|select|go\s+with))\s+(?i:(?:option|choice|answer|letter)\s+)?{label.format('a')}(?!\s+[a-z])",
        rf"(?:(?i:\b(?:option|choice|answer|letter))\s+)?(?<!\w)(?<!not\s){label.format('b')}[*\"']*\s+(?i:is|seems)\s+(?i:(?:the\s+)?(?:correct|right|best|most\s+\w+))\b(?!\s+not)",
        rf"\b(?i:must\s+be|has\s+to\s+be|therefore|thus|hence|so)\s*,?\s+(?i:it(?:'s|\s+is)\s+)?(?i:(?:option|choice|letter)\s+)?{label.format('c')}(?=\s*(?:[.,;:)]|$))",
    )
    found = [match for pattern in patterns for match in re.finditer(pattern, text)]
    if not found:
        return None
    last = max(found, key=lambda match: match.end())
    return _as_label(next(group for group in last.groupdict().values() if group), choices)


def _option_text(text: str, choices: Mapping[str, str]) -> str | None:
    """The one option whose text stands in `text` as whole words and is not negated. A text inside a longer option that
    also stands there (`iron` in `iron oxide`) does not count; two options choose nothing."""
    labels: dict[str, set[str]] = {}
    for label, option in choices.items():
        if needle := normalise(option):
            labels.setdefault(needle, set()).add(label)
    if not labels:
        return None
    needles = "|".join(re.escape(needle) for needle in sorted(labels, key=len, reverse=True))
    said = re.finditer(rf"(?<!\w)(?<!not )(?<!n't )(?:{needles})(?!\w)", normalise(text))
    chosen = set().union(*(labels[match[0]] for match in said))
    return chosen.pop() if len(chosen) == 1 else None
