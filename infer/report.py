"""The report: one self-contained page to look at, and its Markdown twin for terminals and pull requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infer.report_analyses import analyses_markdown, analyses_of, read_analyses
from infer.report_data import Responses, check_results, read_responses, read_results
from infer.report_facts import notes_of, tables_of
from infer.report_page import render_page
from infer.report_sections import losses_markdown, writers_markdown
from infer.report_sweep import read_sweep, sweep_table
from infer.report_text import line_of, markdown_table
from infer.report_view import MEAN, Compared, Table, comparisons_of, price, shares_of, table_of
from switchgen.files import write_atomic


def write_report(run_dir: Path) -> Path:
    """Writes `report/index.html` and `report/results.md` from the run's `evaluation/` and `sweep/` folders.

    Args:
        run_dir: a run folder in which `evaluate` or `sweep` has finished; without response files the page has no
            browser.

    Returns:
        The path of the page.

    Raises:
        DataError: results are missing, or a file holds something else than its schema says.
        StorageError: the folder cannot be written.
    """
    sweep, documents = read_sweep(run_dir), read_analyses(run_dir)
    if sweep is not None and not (run_dir / "evaluation" / "results.json").is_file():
        meta = {key: sweep[key] for key in ("recipe", "date", "hardware", "candidates")}
        results: dict[str, Any] = {"schema": 1, "rows": [], "comparisons": [], "meta": meta}
        return _write(run_dir, results, None, sweep, documents)
    results = read_results(run_dir)
    meta = results.get("meta") or {}
    policies = list(dict.fromkeys(row["policy"] for row in results["rows"]))
    tasks = list(dict.fromkeys(row["task"] for row in results["rows"]))
    shown = [task for task in tasks if task != MEAN]
    responses = read_responses(run_dir, meta.get("candidates") or [], policies, shown, evaluated=meta.get("evaluated"))
    return _write(run_dir, results, responses, sweep, documents)


def _write(
    run_dir: Path,
    results: dict[str, Any],
    responses: Responses | None,
    sweep: dict[str, Any] | None,
    documents: dict[str, Any],
) -> Path:
    folder = run_dir / "report"
    analyses = analyses_of(results, responses, documents)
    write_atomic(folder / "results.md", results_markdown(results, responses, sweep, analyses))
    page = folder / "index.html"
    write_atomic(page, render_page(results, responses, sweep, analyses))
    return page


def results_table(results: dict[str, Any]) -> str:
    """The result table as Markdown that also lines up in a terminal: policies × tasks, with 95% intervals.

    Args:
        results: the document of `evaluation/results.json`.

    Raises:
        DataError: not a results document of schema 1.
    """
    check_results(results)
    return _table_lines(table_of(results))


def results_markdown(
    results: dict[str, Any],
    responses: Responses | None = None,
    sweep: dict[str, Any] | None = None,
    analyses: Sequence[dict[str, Any]] = (),
) -> str:
    """The whole Markdown twin: the page's tables and notes, and a few cases where switching loses."""
    meta = results.get("meta") or {}
    parts = [f"# Results: {line_of(meta.get('recipe', 'run'))}", ""]
    if results["rows"]:
        parts += [_table_lines(table_of(results)), ""]
        parts += [
            "Percent where the metric is a share. In brackets: 95% bootstrap intervals over questions, all run seeds "
            "of a question together. The mean weighs each task the same.",
            "",
        ]
    if notes := notes_of(results):
        parts += [*(f"- {line_of(note)}" for note in notes), ""]
    if sweep is not None:
        parts += ["## Diversity and quality", "", sweep_table(sweep), ""]
    compared = comparisons_of(results)
    if compared:
        parts += ["## Comparisons", "", _comparison_lines(compared), ""]
        parts += [
            "Effect: Cohen's d_z. p: paired sign-flip permutation test. Corrected: Holm, over all comparisons in this "
            "table; clear at 0.05 or below.",
            "",
        ]
    if responses is not None:
        parts += [*writers_markdown(responses), *losses_markdown(results, responses)]
    if analyses:
        parts.append(analyses_markdown(analyses))
    if distillation := tables_of(meta.get("distillation"), shares_of(results)):
        parts += ["## Distillation", ""]
        for table in distillation:
            parts += [f"**{line_of(table['title'])}**", "", markdown_table(table["head"], table["rows"]), ""]
    return "\n".join(parts)


def _table_lines(table: Table) -> str:
    head = ["policy", *table.tasks]
    titles = {"tokens": "tokens / response", "seconds": "seconds / response", "weights": "weights, MB"}
    priced = [key for key in titles if any(getattr(row, key) is not None for row in table.rows)]
    head += [titles[key] for key in priced]
    lines = []
    for row in table.rows:
        cells = [_with_interval(cell.text, cell.interval) for cell in row.cells]
        lines.append([row.policy, *cells, *(price(getattr(row, key)) for key in priced)])
    return markdown_table(head, lines)


def _comparison_lines(compared: Sequence[Compared]) -> str:
    head = ["policy", "against", "task", "difference", "effect", "p", "corrected", "verdict"]
    lines = [
        [c.policy, c.against, c.task, _with_interval(c.difference, c.interval), c.effect, c.p, c.corrected, c.verdict]
        for c in compared
    ]
    return markdown_table(head, lines)


def _with_interval(value: str, interval: str) -> str:
    return f"{value} [{interval.replace(' to ', ', ')}]" if interval else value
