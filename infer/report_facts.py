"""What is known of an evaluation beside its figures, in words and tables: for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infer.report_view import number, p_text
from switchgen.scoring import METRICS

_SHOWN_IDS = 12
_SHOWN_ITEMS = 20


def notes_of(results: Mapping[str, Any]) -> list[str]:
    """What the figures leave out, in words."""
    meta = results.get("meta") or {}
    notes = [str(note) for note in meta.get("notes") or []]
    metrics = {row["task"]: row.get("metric") for row in results.get("rows") or []}
    for task, ids in (meta.get("not_answered") or {}).items():
        metric = METRICS.get(str(metrics.get(task)))
        counted = "are left out" if metric is not None and metric.score is None else "count as wrong"
        shown = ", ".join(map(str, ids[:_SHOWN_IDS])) + (f" and {len(ids) - _SHOWN_IDS} more" * (len(ids) > _SHOWN_IDS))
        notes.append(f"{task}: {len(ids)} questions are longer than the context and {counted}: {shown}")
    return notes


def tables_of(value: Any, shares: Mapping[str, bool]) -> list[dict[str, Any]]:
    """A free-form part of the meta data as tables: lists of records, and what else there is as key and value.

    Args:
        shares: tasks → whether their values are shown in percent.
    """
    if not isinstance(value, Mapping):
        return []
    tables: list[dict[str, Any]] = []
    loose: dict[str, Any] = {}
    for key, part in value.items():
        if isinstance(part, list) and part and all(isinstance(row, Mapping) for row in part):
            tables.append({"title": str(key).replace("_", " "), **_records(part, shares)})
        else:
            loose[str(key)] = part
    if loose:
        tables.append({"title": "figures", "head": ["figure", "value"], "rows": [list(pair) for pair in flat(loose)]})
    return tables


def _records(rows: Sequence[Mapping[str, Any]], shares: Mapping[str, bool]) -> dict[str, Any]:
    """Records as head and rows; `low` and `high` become the interval of the value before them."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("low", "high")]
    lines = []
    for row in rows:
        line = []
        for key in keys:
            value = row.get(key)
            signed = key == "difference"
            if key in ("difference", "value") and isinstance(value, int | float):
                percent = shares.get(str(row.get("task")), abs(value) <= 1)
                text = number(value, percent, sign=signed)
                if row.get("low") is not None and row.get("high") is not None:
                    low, high = (number(row[end], percent, sign=signed) for end in ("low", "high"))
                    text += f" [{low} to {high}]"
                line.append(text)
            else:
                line.append(p_text(value) if key == "p" else _plain(value))
        lines.append(line)
    return {"head": [str(key).replace("_", " ") for key in keys], "rows": lines}


def flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested facts as (path, value) pairs."""
    if isinstance(value, Mapping):
        return [pair for key, part in value.items() for pair in flat(part, f"{name} › {key}" if name else str(key))]
    return [(name.replace("_", " "), _plain(value))]


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        more = f" … and {len(value) - _SHOWN_ITEMS} more" if len(value) > _SHOWN_ITEMS else ""
        return ", ".join(_plain(item) for item in value[:_SHOWN_ITEMS]) + more
    return str(value)
