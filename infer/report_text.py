"""Markdown for terminals and pull requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns line up."""
    rows = [[line_of(cell) for cell in row] for row in (head, *lines)]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(head))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    text = [f"| {' | '.join(row)} |" for row in padded]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])


def line_of(text: object) -> str:
    """One table cell: no line break, no column border."""
    return " ".join(str(text).split()).replace("|", "\\|")
