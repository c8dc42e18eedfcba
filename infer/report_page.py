"""The page: views in, one self-contained HTML file out.

The template escapes everything it is given. What models wrote is never in the markup: it travels as JSON in a data
element and the page's script shows it through `textContent`. The content security policy names the script and the style
by their hashes and forbids everything else, network included.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from infer.report_data import CUE_WRITER, Responses, safe_json
from infer.report_facts import flat, notes_of, tables_of
from infer.report_sweep import sweep_view
from infer.report_view import (
    MEAN,
    Compared,
    Panel,
    Table,
    comparisons_of,
    focus_and_rival,
    number,
    outcomes_of,
    panels_of,
    price,
    rivals_of,
    shares_of,
    surplus_of,
    table_of,
)

TEMPLATES = Path(__file__).resolve().parent / "templates"
NUM_COLOURS = 8  # writer colours and patterns in the style sheet; further writers begin again with other codes
_PANEL = (300.0, 96.0)  # width and height of a who-writes-where plot, in its own units

_FACTS = ("date", "hardware", "world_seed", "seeds", "version")  # meta data that stand under the title
_ELSEWHERE = (
    "distillation",
    "weights_bytes",
    "recipe",
    "notes",
    "not_answered",
    "evaluated",
    *_FACTS,
)  # meta data that have their own place


def render_page(
    results: Mapping[str, Any],
    responses: Responses | None,
    sweep: Mapping[str, Any] | None = None,
    analyses: Sequence[Mapping[str, Any]] = (),
) -> str:
    """`report/index.html` as text; the same input gives the same page.

    Args:
        sweep: the document of `sweep/results.json`, if there is one.
        analyses: sections of tables (`report_analyses`).
    """
    meta = dict(results.get("meta") or {})
    candidates = list(meta.get("candidates") or [])
    table = table_of(results)
    focus, rival = focus_and_rival(table, candidates)
    writers = _writers(responses.writers if responses else candidates)
    script, style = (TEMPLATES / "report.js").read_text("utf-8"), (TEMPLATES / "report.css").read_text("utf-8")
    rivals = rivals_of(table, candidates)
    return _environment().get_template("report.html.jinja").render(
        title=str(meta.get("recipe") or "run"),
        policy=_content_policy(script, style),
        script=Markup(script),
        style=Markup(style),
        facts=_facts(meta),
        lead=_lead(results, table, focus, rival),
        table=table,
        price_scale={
            key: max((getattr(row, key) or 0.0 for row in table.rows), default=0.0)
            for key in ("tokens", "seconds", "weights")
        },
        comparisons=_by_policy(results, focus),
        notes=notes_of(results),
        num_comparisons=len(results.get("comparisons") or []),
        writers=writers,
        panels=[
            {**_drawn(whole, writers), "parts": [_drawn(part, writers) for part in parts]}
            for whole, parts in (panels_of(responses) if responses else [])
        ],
        panel_size=_PANEL,
        focus=focus,
        rival=rival,
        outcomes=outcomes_of(responses, focus, rivals) if responses and focus else [],
        surplus=surplus_of(responses, focus, candidates) if responses and focus else {},
        sweep=None if sweep is None else sweep_view(dict(sweep)),
        analyses=analyses,
        distillation=tables_of(meta.get("distillation"), shares_of(results)),
        responses=responses,
        embedded=Markup(safe_json(responses.shown)) if responses else None,
        settings=Markup(safe_json({"focus": focus, "rivals": rivals, "writers": writers})),
        details=flat({key: value for key, value in meta.items() if key not in _ELSEWHERE}),
    )  # fmt: skip


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["share"] = lambda value: number(float(value), percent=True)
    environment.filters["price"] = price
    environment.filters["signed_share"] = lambda value: number(float(value), percent=True, sign=True)
    return environment


def _content_policy(script: str, style: str) -> str:
    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {source(script)}",
            f"style-src {source(style)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _writers(names: Sequence[str]) -> list[dict[str, Any]]:
    """Name, short code and colour number of each writer; codes differ, colours only among the first eight."""
    writers: list[dict[str, Any]] = []
    colour = 0
    for name in names:
        codes = {writer["code"] for writer in writers}
        first = name[:1].upper() or "?"
        code = next(c for c in (first, *(f"{first}{i}" for i in range(2, len(names) + 2))) if c not in codes)
        is_cue = name == CUE_WRITER
        writers.append({"name": name, "code": code, "colour": "cue" if is_cue else colour % NUM_COLOURS})
        colour += not is_cue
    return writers


def _facts(meta: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The line under the title: short facts only; the rest stands at the page's end."""
    facts = []
    for key in _FACTS:
        value = meta.get(key)
        if isinstance(value, list):
            value = ", ".join(str(item) for item in value)
        if value not in (None, "") and not isinstance(value, dict):
            facts.append((key.replace("_", " ").capitalize(), str(value)))
    return facts


def _lead(results: Mapping[str, Any], table: Table, focus: str | None, rival: str | None) -> dict[str, Any] | None:
    """The headline: focus against the best single candidate, over all tasks."""
    ours, theirs = table.row(focus), table.row(rival)
    if ours is None or theirs is None or not table.tasks:
        return None
    task = table.tasks[0]
    pair = next(
        (c for c in comparisons_of(results) if (c.policy, c.against, c.task) == (focus, rival, task)),
        None,
    )
    ratio = ours.seconds / theirs.seconds if ours.seconds and theirs.seconds else None
    return {"task": task, "ours": ours, "theirs": theirs, "pair": pair, "ratio": ratio}


def _by_policy(results: Mapping[str, Any], focus: str | None) -> list[tuple[str, list[Compared]]]:
    """Comparisons by policy, the page's own first; the means before the tasks."""
    policies: dict[str, list[Compared]] = {}
    for compared in comparisons_of(results):
        policies.setdefault(compared.policy, []).append(compared)
    for policy, lines in policies.items():
        order = list(dict.fromkeys([MEAN, *(line.task for line in lines)]))
        policies[policy] = sorted(lines, key=lambda line: order.index(line.task))
    return sorted(policies.items(), key=lambda item: item[0] != focus)


def _drawn(panel: Panel, writers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stacked areas of one panel as SVG paths, a label where its band is high enough, and the numbers for a table."""
    width, height = _PANEL
    bins = len(panel.share_BW)
    bands = []
    floor_B = [0.0] * bins
    for writer in panel.present:
        top_B = [low + float(panel.share_BW[b, writer]) for b, low in enumerate(floor_B)]
        upper = " ".join(
            f"{x * width / bins:.4g},{height * (1 - top_B[b]):.4g}" for b in range(bins) for x in (b, b + 1)
        )
        lower = " ".join(
            f"{x * width / bins:.4g},{height * (1 - floor_B[b]):.4g}" for b in reversed(range(bins)) for x in (b + 1, b)
        )
        b = max(range(bins), key=lambda i: panel.share_BW[i, writer] - 0.004 * abs(i - bins / 2))
        share = float(panel.share_BW[b, writer])
        label = None
        if share > 0.2:
            x = min(max((b + 0.5) * width / bins, 40), width - 40)
            label = {"x": round(x, 1), "y": round(height * (1 - floor_B[b] - share / 2) + 3.5, 1)}
        bands.append({**writers[writer], "path": f"M{upper} L{lower}Z", "label": label,
                      "share": float(panel.overall_W[writer]), "thirds": panel.thirds(writer)})  # fmt: skip
        floor_B = top_B
    return {"policy": panel.policy, "task": panel.task, "count": panel.num_responses, "bands": bands,
            "switches": panel.switches}  # fmt: skip
