"""Sections of the Markdown twin that the page draws or browses: who writes where, and where switching loses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infer.report_data import RIGHT, Responses
from infer.report_text import line_of, markdown_table, quoted
from infer.report_view import focus_and_rival, number, outcomes_of, panels_of, rivals_of, surplus_of, table_of

_CASES = 2
"""Cases of each task that are shown."""

Segments = Sequence[Sequence[Any]]


@dataclass(frozen=True)
class _Case:
    """A question that the policy answers wrong and the best single candidate answers right."""

    question: str
    reference: str | None
    ours: Segments
    theirs: Segments


def writers_markdown(responses: Responses) -> list[str]:
    """Each writer's share of the tokens by relative position, under every policy with several writers."""
    rows = [
        [panel.policy, f"{panel.switches:.1f}", responses.writers[writer],
         *(f"{number(share, True)}%" for share in (float(panel.overall_W[writer]), *panel.thirds(writer)))]
        for panel, _ in panels_of(responses) for writer in panel.present
    ]  # fmt: skip
    if not rows:
        return []
    head = ["policy", "changes of writer", "writer", "all", "first third", "middle", "last third"]
    note = (
        "Each writer's share of the tokens, and of the first, middle and last third of the responses, in which every "
        "response weighs the same; all tasks together. Changes of writer: per response."
    )
    return ["## Who writes where", "", note, "", markdown_table(head, rows), ""]


def losses_markdown(results: Mapping[str, Any], responses: Responses) -> list[str]:
    """The page's policy and the best single candidate of each task on the same questions: counts, luck, a few cases."""
    candidates = list((results.get("meta") or {}).get("candidates") or [])
    table = table_of(results)
    focus, _ = focus_and_rival(table, candidates)
    if focus is None:
        return []
    rivals = rivals_of(table, candidates)
    outcomes = outcomes_of(responses, focus, rivals)
    if not outcomes:
        return []
    head = ["task", "best single", "both right", f"only {focus}", "only the best single", "neither"]
    rows = [[o.task, o.second, *map(str, (o.both, o.only_first, o.only_second, o.neither))] for o in outcomes]
    note = (
        f"The same questions and seeds under {line_of(focus)} and under the best single candidate of each task. Right "
        f"means a score of at least {RIGHT:g}."
    )
    lines = ["## Where it loses", "", note, "", markdown_table(head, rows), ""]
    return lines + _surplus(responses, focus, candidates) + _cases(responses, focus, rivals)


def _surplus(responses: Responses, focus: str, candidates: Sequence[str]) -> list[str]:
    rows = []
    for task, s in surplus_of(responses, focus, candidates).items():
        excess, low, high = (number(v, True, sign=True) for v in (s.excess.difference, s.excess.low, s.excess.high))
        rows.append([task, number(s.observed, True), number(s.by_chance, True), s.best_single,
                     f"{excess} [{low}, {high}]"])  # fmt: skip
    if not rows:
        return []
    note = (
        "Percent of responses that are right where no candidate alone is right in any other seed. By chance: the same "
        "for one more sample of the best single candidate; the excess is what taking turns adds."
    )
    head = ["task", focus, "by chance", "best single", "excess"]
    title = f"### Solved by {line_of(focus)} and by no single candidate"
    return [title, "", note, "", markdown_table(head, rows), ""]


def _cases(responses: Responses, focus: str, rivals: Mapping[str, str]) -> list[str]:
    lines = []
    for task, rival in rivals.items():
        found = [case for case, _ in zip(_lost(responses, focus, rival, task), range(_CASES), strict=False)]
        for case in found:
            reference = "" if case.reference is None else f"; right: {quoted(case.reference)}"
            lines.append(f"- {line_of(task)}: {quoted(case.question)}{reference}")
            for policy, segments in ((focus, case.ours), (rival, case.theirs)):
                lines.append(f"  - {line_of(policy)}{_written(segments, responses.writers)}")
    if not lines:
        return []
    return ["### Cases", "", f"Questions that the best single candidate gets right and {line_of(focus)} does not; the "
            f"first {_CASES} of each task.", "", *lines, ""]  # fmt: skip


def _lost(responses: Responses, focus: str, rival: str, task: str) -> Iterator[_Case]:
    """Cases of a task among the responses that the page carries."""
    shown = responses.shown
    by_question: dict[int, dict[str, dict[int, Sequence[Any]]]] = {}
    for response in shown["responses"]:
        policy = shown["policies"][response[1]]
        if policy in (focus, rival) and shown["tasks"][shown["questions"][response[0]][0]] == task:
            by_question.setdefault(response[0], {}).setdefault(policy, {})[response[2]] = response
    for number_, by_policy in by_question.items():
        theirs_of = by_policy.get(rival, {})
        for seed, ours in by_policy.get(focus, {}).items():
            # A policy with one seed stands for itself in all.
            theirs = theirs_of.get(seed) or (next(iter(theirs_of.values())) if len(theirs_of) == 1 else None)
            if theirs is None or None in (ours[3], theirs[3]):
                continue
            if ours[3] < RIGHT <= theirs[3]:
                _, _, question, reference = shown["questions"][number_]
                yield _Case(question, reference, ours[-1], theirs[-1])
                break


def _written(segments: Segments, writers: Sequence[str]) -> str:
    """A response with its writers in their order."""
    names = [writers[segment[0]] for segment in segments]
    order = [name for index, name in enumerate(names) if index == 0 or names[index - 1] != name]
    by = f" ({' → '.join(map(line_of, order))})" if len(order) > 1 else ""
    return f"{by}: {quoted(''.join(segment[1] for segment in segments))}"
