"""Markdown for terminals and pull requests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_SHOWN_CHARACTERS = 240


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns line up."""
    rows = [[line_of(cell) for cell in row] for row in (head, *lines)]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(head))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    text = [f"| {' | '.join(row)} |" for row in padded]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])


def line_of(text: object) -> str:
    """A name as one line of text or one table cell: no line break, no column border, no HTML."""
    return re.sub(r"[\\|]|<(?=[A-Za-z/!?])", r"\\\g<0>", _printable(str(text)))


def quoted(text: str) -> str:
    """What a model wrote, as a code span: nothing in it is markup, a mention or an address; long texts are cut."""
    line = _printable(text)
    if not line:
        return "(nothing)"
    if len(line) > _SHOWN_CHARACTERS:
        line = line[:_SHOWN_CHARACTERS] + " …"
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if "`" in (line[0], line[-1]) else ""
    return f"{fence}{space}{line}{space}{fence}"


def _printable(text: str) -> str:
    """One line without terminal codes, half surrogate pairs and marks that turn the direction of writing."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
