"""The report says what the run's files say, carries any text safely, and refuses files that are something else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from script_modules import load_script

from infer import report_data
from infer.report import results_markdown, results_table, write_report
from infer.report_analyses import analyses_of, read_analyses
from infer.report_data import Tally, read_responses, safe_json
from infer.report_page import render_page
from infer.report_sweep import read_sweep
from infer.report_text import line_of, quoted
from infer.report_view import (
    Outcomes,
    comparisons_of,
    focus_and_rival,
    number,
    outcomes_of,
    p_text,
    price,
    rivals_of,
    table_of,
)
from switchgen.errors import DataError
from switchgen.files import StorageError


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "run"
    load_script("measure_report").write_fake_run(path, num_questions=8, num_seeds=2, num_tokens=20)
    return path


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


def row(policy: str, task: str, value: float | None, seed: int | None = None, **more: Any) -> dict[str, Any]:
    spread = {} if value is None else {"low": value - 0.05, "high": value + 0.05}
    filled = {
        "policy": policy,
        "task": task,
        "seed": seed,
        "metric": "number",
        "value": value,
        "low": None,
        "high": None,
    }
    return filled | spread | {"n": 100, "tokens": 2000, "seconds": 10.0} | more


def document(*rows: dict[str, Any], candidates: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    return {"schema": 1, "rows": list(rows), "comparisons": [], "meta": {"candidates": list(candidates)}} | more


def response(policy: str = "p", task: str = "t", id: str = "1", seed: int = 0, **more: Any) -> dict[str, Any]:
    segments = [{"writer": "a", "text": "x", "num_tokens": 1, "finish": "eos", "scores": None}]
    filled = {"schema": 1, "id": id, "task": task, "policy": policy, "seed": seed, "question": "q", "reference": "r"}
    return filled | {"output": "x", "segments": segments, "finish": "eos", "score": 1.0, "status": "ok"} | more


def write_responses(run_dir: Path, *responses: dict[str, Any], name: str = "p--t--0") -> Path:
    folder = run_dir / "evaluation" / "responses"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in responses), encoding="utf-8")
    return path


class Scripts(HTMLParser):
    """What a browser takes for scripts, styles and addresses in a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: list[tuple[str | None, str]] = []
        self.styles: list[str] = []
        self.addresses: list[str] = []
        self.policy = ""
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        attributes = dict(attrs)
        if tag == "script":
            self.scripts.append((attributes.get("type"), ""))
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"] or ""
        self.addresses += [attributes[key] or "" for key in ("src", "href", "action") if key in attributes]
        assert not [key for key in attributes if key.startswith("on") or key == "style"], attributes

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.cdata_elem == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self.cdata_elem == "style":
            self.styles.append(data)

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(max((text for type_, text in self.scripts if type_ == "application/json"), key=len))


def test_the_page_is_self_contained_and_its_policy_names_its_own_script_and_style(page: str) -> None:
    found = Scripts(page)
    assert [type_ for type_, _ in found.scripts] == ["application/json", "application/json", None]
    assert all(address.startswith(("#", "data:")) for address in found.addresses), found.addresses
    for text in (found.scripts[-1][1], *found.styles):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in found.policy
    assert "unsafe" not in found.policy
    assert found.policy.startswith("default-src 'none'")
    assert not re.search(r"https?://", page)
    assert "innerHTML" not in page


def test_every_text_reaches_the_page_unchanged_inside_the_data_element(run_dir: Path, page: str) -> None:
    embedded = Scripts(page).data
    expected = {}
    for path in sorted((run_dir / "evaluation" / "responses").glob("*.jsonl")):
        for line in path.read_bytes().split(b"\n")[:-1]:
            r = json.loads(line)
            expected[r["policy"], r["task"], r["id"], r["seed"]] = [(s["writer"], s["text"]) for s in r["segments"]]
    shown = {}
    for question, policy, seed, *_, segments in embedded["responses"]:
        task, id, *_ = embedded["questions"][question]
        texts = [(embedded["writers"][s[0]], s[1]) for s in segments]
        shown[embedded["policies"][policy], embedded["tasks"][task], id, seed] = texts
    assert shown == expected
    assert any("<script>alert(1)</script>" in text for segments in shown.values() for _, text in segments)
    assert "alert(1)</script>" not in page


def test_names_from_the_recipe_are_escaped_too(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><b>"
    results = document(row(evil, evil, 0.5), row("c", evil, 0.4), candidates=("c",))
    results["meta"] |= {"recipe": evil, "hardware": evil, "distillation": {evil: [{evil: evil}]}}
    results["comparisons"] = [
        {"policy": evil, "against": "c", "task": evil, "difference": 0.1, "low": 0.0, "high": 0.2, "p": 0.01}
    ]
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps(results))
    segment = {"writer": evil, "text": evil, "num_tokens": 1, "finish": "eos", "scores": {evil: 1.0}}
    write_responses(tmp_path, response(evil, evil, evil, segments=[segment]), response("c", evil, evil))
    found = Scripts(write_report(tmp_path).read_text(encoding="utf-8"))
    assert len(found.scripts) == 3
    assert found.data["questions"][0][1] == evil


@pytest.mark.parametrize("text", ["</script>", "<!--<script>", "a\u2028b\u2029", "&lt;", "\x00\x1f\x7f", "é🏳️‍🌈中"])
def test_safe_json_reads_back_and_holds_nothing_that_ends_a_script(text: str) -> None:
    encoded = safe_json({"text": text})
    assert json.loads(encoded) == {"text": text}
    assert not set(encoded) & set("<>&\u2028\u2029\x00\x7f")


def test_lone_surrogates_become_the_replacement_character() -> None:
    assert json.loads(safe_json("a\ud800b")) == "a\ufffdb"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps(document(row("aligned", "math", 0.5))))
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        write_report(tmp_path)


def test_the_same_run_gives_the_same_page(run_dir: Path, page: str) -> None:
    assert write_report(run_dir).read_text(encoding="utf-8") == page
    assert sorted(path.name for path in (run_dir / "report").iterdir()) == ["index.html", "results.md"]


def test_without_responses_the_page_has_tables_and_no_browser(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    results = document(row("aligned", "math", 0.5), candidates=("aligned",))
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps(results))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert 'id="browser"' not in page
    assert "<table" in page


def test_a_page_that_is_full_shows_whole_questions_and_still_counts_everything(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_responses(run_dir, [], [], [])
    monkeypatch.setattr(report_data, "MAX_EMBEDDED_BYTES", 40_000)
    part = read_responses(run_dir, [], [], [])
    assert whole is not None and part is not None
    assert 0 < part.num_shown < part.num_responses == whole.num_shown
    assert len(safe_json(part.shown).encode()) < 45_000
    assert {key: tally.num_responses for key, tally in part.tallies.items()} == {
        key: tally.num_responses for key, tally in whole.tallies.items()
    }
    per_question = np.bincount([r[0] for r in part.shown["responses"]])
    assert set(per_question) == {14}  # 7 policies × 2 seeds: a question is shown under all of them or not at all


def test_speaker_shares_are_token_weighted_by_relative_position() -> None:
    tally, writers = Tally(), {"a": 0, "b": 1, "cue": 2}
    segment = {"text": "", "finish": "length"}
    first = [{"writer": "a", "num_tokens": 30, **segment}, {"writer": "b", "num_tokens": 10, **segment}]
    tally.add({"id": "1", "seed": 0, "segments": first, "score": 1.0}, writers)
    assert tally.share_BW[:15, 0] == pytest.approx(1.0)
    assert tally.share_BW[15:, 1] == pytest.approx(1.0)
    second = [{"writer": "b", "num_tokens": 5, **segment}, {"writer": "cue", "num_tokens": 0, **segment}]
    tally.add({"id": "2", "seed": 0, "segments": second, "status": "ok"}, writers)
    tally.add({"id": "3", "seed": 0, "segments": [], "status": "too_long"}, writers)
    assert tally.share_BW.sum(axis=1) == pytest.approx(2.0)
    assert tally.tokens_W.tolist() == [30, 15, 0]
    assert (tally.num_responses, tally.num_too_long, tally.num_switches) == (3, 1, 1)


def test_the_table_puts_candidates_first_in_ladder_order_and_the_mean_before_the_tasks() -> None:
    results = document(
        row("switcher", "math", 0.9), row("switcher", "mean", 0.8), row("aligned", "math", 0.7),
        row("pretrained", "math", 0.1), row("distilled", "math", 0.6), row("soup", "math", 0.2),
        candidates=("pretrained", "aligned"),
    )  # fmt: skip
    table = table_of(results)
    assert table.tasks == ("mean", "math")
    assert [(title, [r.policy for r in rows]) for title, rows in table.groups] == [
        ("One candidate alone", ["pretrained", "aligned"]),
        ("Taking turns", ["switcher"]),
        ("One model again", ["distilled"]),
        ("Merged weights", ["soup"]),
    ]
    switcher = table.row("switcher")
    assert switcher is not None
    assert [(cell.text, cell.interval, cell.is_best) for cell in switcher.cells] == [
        ("80.0", "75.0 to 85.0", True),
        ("90.0", "85.0 to 95.0", True),
    ]
    assert focus_and_rival(table, ["pretrained", "aligned"])[0] == "switcher"
    assert rivals_of(table, ["pretrained", "aligned"]) == {"math": "aligned"}


def test_rows_over_all_seeds_stand_in_the_table_and_prices_are_per_response() -> None:
    results = document(
        row("a", "math", 0.4, seed=0, tokens=1000), row("a", "math", 0.6, seed=1, tokens=3000),
        row("a", "math", 0.5, tokens=4000, seconds=20.0), row("b", "math", 0.3, seed=0, seconds=None),
    )  # fmt: skip
    a, b = table_of(results).row("a"), table_of(results).row("b")
    assert a is not None and b is not None
    assert (a.cells[0].text, a.tokens, a.seconds) == ("50.0", 20.0, 0.1)
    assert (b.cells[0].text, b.tokens, b.seconds) == ("30.0", 20.0, None)


def test_rewards_are_shown_as_they_are_and_missing_cells_as_missing() -> None:
    results = document(row("a", "reward", -6.914), row("b", "reward", 2.0), row("a", "math", None))
    table = results_table(results)
    assert "−6.91 [−6.96, −6.86]" in table
    assert re.search(r"\| b +\| 2.00 \[1.95, 2.05\] +\| – ", table)


def test_the_markdown_twin_is_a_table_that_lines_up_whatever_the_names_hold() -> None:
    results = document(row("a|b\nc", "math", 0.5), row("switcher", "math", 0.75))
    lines = results_table(results).split("\n")
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert "a\\|b c" in lines[2]
    assert results_markdown(results).startswith("# Results: run\n")


def test_the_markdown_twin_says_what_the_page_says(run_dir: Path, page: str) -> None:
    """All sections but the drawings, and of the responses a few; what models wrote is text in it, too."""
    twin = (run_dir / "report" / "results.md").read_text(encoding="utf-8")
    titles = re.findall(r"^###? (.*)$", twin, re.MULTILINE)
    alone = "Solved by switcher and by no single candidate"
    assert titles == ["Comparisons", "Who writes where", "Where it loses", alone,
                      "Cases", "Speaker sequences", "Distillation"]  # fmt: skip
    assert set(titles) - {"Cases"} <= set(re.findall(r"<h[23][^>]*>(.*?)</h[23]>", page))
    (band,) = re.findall(r"^\| switcher +\| [\d.]+ +\| pretrained \| (.*) \|$", twin, re.MULTILINE)
    (table,) = re.findall(r'aria-label="Shares under switcher".*?</table>', page, re.DOTALL)
    assert re.findall(r"[\d.]+%", band) == re.findall(r"[\d.]+%", table)[:4]
    for row_ in re.findall(r"<tr><th scope=\"row\">(\w+)</th><td>\w+</td>((?:<td class=\"num\">\d+</td>){4})", page):
        counts = " *\\| ".join(re.findall(r"\d+", row_[1]))
        assert re.search(rf"\| {row_[0]} .*\| {counts} ", twin)
    assert len(re.findall(r"^- ", twin, re.MULTILINE)) > 4 and "<" in twin
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", twin)
    assert not re.search(r"(?<!\\)<[A-Za-z/!?]", outside)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<b>@you | x\n\n# y", "`<b>@you | x # y`"),
        ("`a` and ``b", "``` `a` and ``b ```"),
        ("\x1b[31m\u202eno \ud800", "`\ufffd[31m\ufffdno \ufffd`"),
        (" \n", "(nothing)"),
        ("x" * 300, "`" + "x" * 240 + " …`"),
    ],
)
def test_what_models_wrote_is_no_markup(text: str, shown: str) -> None:
    assert quoted(text) == shown
    assert line_of("a\\|b <i> < .0001") == "a\\\\\\|b \\<i> < .0001"


def test_effects_notes_and_lost_cases_in_the_twin(tmp_path: Path) -> None:
    compared = {
        "policy": "switcher",
        "against": "a",
        "task": "t",
        "difference": -0.5,
        "low": -0.9,
        "high": -0.1,
        "p": 0.5,
    }
    results = document(row("a", "t", 0.9), row("switcher", "t", 0.4), row("a", "talk", 2.0, metric="judge"),
                       candidates=("a", "b"), comparisons=[compared | {"effect": -0.678}])  # fmt: skip
    results["meta"] |= {"not_answered": {"t": ["long"], "talk": ["longer"]}}
    for policy, score in (("switcher", 0.0), ("a", 1.0)):
        segments = [{"writer": w, "text": f"<i>{w}|", "num_tokens": 1, "finish": "eos", "scores": None} for w in "ab"]
        write_responses(tmp_path, response(policy, score=score, segments=segments), name=f"{policy}--t--0")
    twin = results_markdown(results, read_responses(tmp_path, ["a", "b"], ["a", "switcher"], ["t"]))
    assert re.search(r"\| −50.0 \[−90.0, −10.0\] +\| −0.68 +\| .50", twin)
    assert '<th scope="col" class="num">effect</th>' in render_page(results, None)
    assert '<td class="num">−0.68</td>' in render_page(results, None)
    assert "- t: 1 questions are longer than the context and count as wrong: long\n" in twin
    assert "- talk: 1 questions are longer than the context and are left out: longer\n" in twin
    assert "- t: `q`; right: `r`\n  - switcher (a → b): `<i>a|<i>b|`\n  - a (a → b): `<i>a|<i>b|`\n" in twin


def test_comparisons_are_corrected_over_the_whole_table() -> None:
    base = {"policy": "s", "against": "a", "low": 0.01, "high": 0.2}
    results = document(comparisons=[
        base | {"task": "x", "difference": 0.1, "p": 0.03},
        base | {"task": "y", "difference": -0.1, "p": 0.001},
        base | {"task": "z", "difference": 0.1, "p": None},
    ])  # fmt: skip
    compared = comparisons_of(results)
    assert [(c.p, c.corrected, c.verdict) for c in compared] == [
        (".030", ".030", "better"),
        (".0010", ".0020", "worse"),
        ("–", "–", "not clear"),
    ]
    results["comparisons"] += [base | {"task": "w", "difference": 0.1, "p": 0.9}]
    assert comparisons_of(results)[0].verdict == "not clear"


def test_small_differences_of_rewards_are_no_shares(tmp_path: Path) -> None:
    """A reward of 2.3 against 2.0 is 0.3 better, not 30 percent; what the task is worth decides, everywhere."""
    compared = {"policy": "s", "against": "a", "difference": 0.3, "low": 0.1, "high": 0.5, "p": 0.01}
    gains = [{"task": task, "difference": 0.3, "low": 0.1, "high": 0.5, "p": 0.01} for task in ("reward", "math")]
    results = document(
        row("a", "reward", 2.0), row("s", "reward", 2.3), row("a", "math", 0.2), row("s", "math", 0.5),
        row("s~a", "reward", 2.0),
        comparisons=[compared | {"task": "reward"}, compared | {"task": "math"},
                     compared | {"task": "reward", "against": "s~a"}],
        meta={"candidates": ["a"], "distillation": {"student_minus_a": gains}},
    )  # fmt: skip
    assert [(c.difference, c.interval) for c in comparisons_of(results)] == [
        ("+0.30", "+0.10 to +0.50"), ("+30.0", "+10.0 to +50.0"), ("+0.30", "+0.10 to +0.50"),
    ]  # fmt: skip
    page = render_page(results, None)
    assert re.findall(r"<td>(\+[\d.]+ \[[^<]*\])</td>", page) == ["+0.30 [+0.10 to +0.50]", "+30.0 [+10.0 to +50.0]"]
    (helps,) = analyses_of(results, None, {})
    assert helps["tables"][0]["rows"] == [["s", "a", "+0.30", "0.10, 0.50", "2.00"]]
    settings = [{"setting": "5 tokens", **line} for line in results["rows"] if line["policy"] == "s"]
    lengths = {"policies": ["s"], "settings": ["5 tokens"], "rows": settings}
    (segments,) = analyses_of({}, None, {"segments": lengths})
    assert segments["tables"][0]["rows"] == [["5 tokens", "2.30 [2.25, 2.35] ▲", "50.0 [45.0, 55.0] ▲"]]


def test_speaker_sequences_of_rewards_stay_apart_from_those_of_shares(tmp_path: Path) -> None:
    def spoken(task: str, writers: str, id: str, score: float) -> dict[str, Any]:
        segments = [{"writer": w, "text": "x", "num_tokens": 1, "finish": "length", "scores": None} for w in writers]
        return response("random", task, id, score=score, segments=segments)

    for task, good, bad in (("math", 1.0, 0.0), ("reward", 9.0, -3.0)):
        lines = [spoken(task, "ab", str(i), good) for i in range(4)] + [
            spoken(task, "ba", f"b{i}", bad) for i in range(4)
        ]
        write_responses(tmp_path, *lines, name=f"random--{task}--0")
    for tasks, effect in ((["math", "reward"], "+100.0"), (["reward"], "+12.00")):
        ids = [f"{mark}{i}" for mark in ("", "b") for i in range(4)]
        evaluated = {"seeds": {"random": [0]}, "questions": dict.fromkeys(tasks, ids)}
        found = read_responses(tmp_path, ["a", "b"], ["random"], tasks, evaluated=evaluated)
        (sequences,) = analyses_of(document(candidates=("a", "b")), found, {})
        rows = {line[0]: line[1:4] for line in sequences["tables"][0]["rows"]}
        assert rows["a → b"] == ["4", "50.0%", effect]


def test_wins_and_losses_pair_the_same_question_and_seed(tmp_path: Path) -> None:
    for policy, scores in (("s", [1.0, 0.0, 1.0, 0.0]), ("a", [1.0, 1.0, 0.0, 0.0])):
        write_responses(
            tmp_path, *(response(policy, id=str(i), seed=0, score=s) for i, s in enumerate(scores)), name=policy
        )
    write_responses(tmp_path, response("s", id="0", seed=1, score=0.0), name="s1")
    responses = read_responses(tmp_path, ["a"], [], [])
    assert responses is not None
    (found,) = outcomes_of(responses, "s", {"t": "a"})
    # "a" has one seed only, which stands for both of "s"
    assert found == Outcomes("t", "a", both=1, only_first=1, only_second=2, neither=1)


def test_what_an_earlier_evaluation_left_in_the_folder_is_not_shown(tmp_path: Path) -> None:
    left = [response("gone"), response("s", "gone"), response("s", id="q3"), response("s", id="q2", seed=1)]
    write_responses(tmp_path, response("s", id="q10"), response("s", id="q2"), *left)
    evaluated = {"seeds": {"s": [0]}, "questions": {"t": ["q2", "q10"]}}
    responses = read_responses(tmp_path, [], ["s"], ["t"], evaluated=evaluated)
    assert responses is not None
    assert (responses.policies, responses.tasks, responses.num_responses) == (["s"], ["t"], 2)
    assert [question[1] for question in responses.shown["questions"]] == ["q2", "q10"]


def test_the_page_says_what_the_figures_leave_out(tmp_path: Path) -> None:
    results = document(row("aligned", "math", 0.5), candidates=("aligned",))
    results["meta"] |= {"notes": ["open: no scores"], "not_answered": {"math": [f"m{i}" for i in range(15)]}}
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps(results))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "open: no scores" in page
    assert "math: 15 questions are longer than the context and count as wrong: m0, m1" in page
    assert "and 3 more" in page


@pytest.mark.parametrize(
    ("p", "text"), [(None, "–"), (0.00001, "< .0001"), (0.0031, ".0031"), (0.049, ".049"), (0.5, ".50"), (1.0, "1.00")]
)
def test_p_values_are_written_as_people_write_them(p: float | None, text: str) -> None:
    assert p_text(p) == text


def test_prices_have_about_three_digits() -> None:
    values = (1234.5, 17.04, 1.234, 0.1234, 0.00214, None)
    assert [price(value) for value in values] == ["1234", "17.0", "1.23", "0.123", "0.0021", "–"]


def test_numbers_are_written_in_percent_or_as_they_are() -> None:
    assert [number(0.538, True), number(-0.1, True, sign=True), number(0.1, True, sign=True), number(3.456, False)] == [
        "53.8", "−10.0", "+10.0", "3.46"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (None, r"results.json: not there; `switchgen evaluate` writes it"),
        ("{", "not JSON"),
        ("[]", "schema is 'list'"),
        ('{"schema": 2, "rows": []}', "schema is 2; this version reads schema 1"),
        ('{"schema": 1}', "'rows' is a list"),
        ('{"schema": 1, "rows": [{"policy": "a", "value": 1}]}', r"rows\[0\] lacks task"),
        ('{"schema": 1, "rows": [], "comparisons": [{}]}', r"comparisons\[0\] lacks policy, against, task, difference"),
    ],
)
def test_other_results_are_refused(tmp_path: Path, results: str | None, message: str) -> None:
    (tmp_path / "evaluation").mkdir()
    if results is not None:
        (tmp_path / "evaluation" / "results.json").write_text(results)
    with pytest.raises(DataError, match=message):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("stage", ["sweep", "segments", "safety"])
@pytest.mark.parametrize(
    ("document", "message"), [("{", "not JSON"), ('{"schema": 2}', "schema is 2; this version reads schema 1")]
)
def test_other_documents_of_other_stages_are_refused(tmp_path: Path, stage: str, document: str, message: str) -> None:
    assert read_sweep(tmp_path) is None and read_analyses(tmp_path) == {}
    (tmp_path / stage).mkdir()
    (tmp_path / stage / "results.json").write_text(document)
    with pytest.raises(DataError, match=f"{stage}/results.json: {message}"):
        (read_sweep if stage == "sweep" else read_analyses)(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": None}, "'segments' is a list, got None"),
        ({"seed": "0"}, "'seed' is a whole number"),
        ({"segments": [{"writer": "a"}]}, "a segment holds writer, text and num_tokens"),
        ({"score": "good"}, "'score' is a finite number or null, got 'good'"),
        ({"schema": 9}, "not a record of schema 1"),
    ],
)
def test_other_response_files_are_refused_with_file_and_line(tmp_path: Path, change: dict, message: str) -> None:
    write_responses(tmp_path, response(), response(id="2", **change))
    with pytest.raises(DataError, match=f"p--t--0.jsonl, line 2: {message}"):
        read_responses(tmp_path, [], [], [])
