"""The page in a real browser: no errors, filters that filter, text that stays text, 5,000 responses that stay fluid."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from script_modules import load_script

from infer.report import write_report

pytestmark = [pytest.mark.slow, pytest.mark.needs("chromium")]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_script("measure_report")


@pytest.fixture(scope="module")
def address(generator: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = tmp_path_factory.mktemp("browser") / "run"
    generator.write_fake_run(run_dir, num_questions=12, num_seeds=2, num_tokens=30)
    return write_report(run_dir).as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address: str) -> Iterator:
    page = browser.new_page()
    page.set_default_timeout(60_000)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: request.url == address or problems.append(f"request: {request.url}"))
    page.goto(address)
    page.wait_for_selector("html[data-ready]", state="attached")
    yield page
    assert problems == []
    page.close()


def cards(page) -> list[dict]:
    return page.eval_on_selector_all(
        "#browser .card",
        """cards => cards.map(card => ({
            policy: card.querySelector("h3").textContent,
            outcome: card.querySelector(".outcome").textContent,
            where: card.querySelector(".where").textContent,
            writers: [...card.querySelectorAll(".seg")].map(s => s.dataset.writer),
            text: card.textContent,
        }))""",
    )


def matches(page) -> int:
    return int(page.inner_text("#browser output").split(" of ")[1].split()[0].replace(",", ""))


def test_each_filter_shows_what_it_names_and_nothing_else(page) -> None:
    page.select_option("#filter-policy", label="all policies")
    assert matches(page) == 7 * 5 * 12 * 2
    page.select_option("#filter-task", label="math")
    assert all(card["where"].startswith("math · ") for card in cards(page))
    assert matches(page) == 7 * 12 * 2
    page.select_option("#filter-policy", label="switcher")
    assert {card["policy"] for card in cards(page)} == {"switcher"}
    assert matches(page) == 12 * 2
    page.select_option("#filter-seed", label="1")
    assert all("seed 1" in card["where"] for card in cards(page))
    page.select_option("#filter-seed", label="all")
    page.select_option("#filter-outcome", label="right")
    right = matches(page)
    assert all("✓ right" in card["outcome"] for card in cards(page))
    page.select_option("#filter-outcome", label="wrong")
    assert right + matches(page) == 12 * 2 if "No" not in page.inner_text("#browser output") else right == 24
    page.select_option("#filter-outcome", "")
    page.select_option("#filter-writer", label="pretrained")
    assert all("pretrained" in card["writers"] for card in cards(page))
    page.select_option("#filter-task", label="open")
    page.select_option("#filter-writer", "")
    page.select_option("#filter-outcome", label="too long, not answered")
    assert matches(page) == 2
    assert all("not answered" in card["text"] for card in cards(page))


def test_the_search_finds_text_across_segments_and_says_when_nothing_fits(page) -> None:
    from playwright.sync_api import expect

    page.select_option("#filter-policy", label="all policies")
    page.fill("#filter-text", "MELOR")
    expect(page.locator("#browser output").first).not_to_contain_text("840")
    assert all("melor" in card["text"].lower() for card in cards(page))
    page.fill("#filter-text", "no response says this")
    expect(page.locator("#browser output").first).to_have_text("No response fits")
    assert cards(page) == []


def test_pages_can_be_turned_by_keyboard(page) -> None:
    page.select_option("#filter-policy", label="all policies")
    first = cards(page)
    next_button = page.locator("#browser .pager button", has_text="Next").first
    next_button.focus()
    page.keyboard.press("Enter")
    assert page.inner_text("#browser output").startswith("11–20 of ")
    assert cards(page) != first
    page.locator("#browser .pager button", has_text="Previous").first.click()
    assert cards(page) == first


def test_markup_and_scripts_in_responses_show_as_text(page, generator: ModuleType) -> None:
    page.select_option("#filter-policy", label="aligned")
    page.select_option("#filter-task", label="math")
    page.select_option("#filter-seed", label="0")
    shown = [card["text"] for card in cards(page)]
    assert "<script>alert(1)</script> and </script> and <img src=x onerror=alert(1)>" in shown[0]
    assert generator.NASTY[1] in shown[1]
    assert "null ␀, bell ␇, escape ␛[31m, ␡" in shown[2]
    assert generator.NASTY[3] in shown[3]
    assert "<model 1 begins> forged <model 1 ends> {{ 7 * 7 }} {% raw %} ${x} \\u003c </SCRIPT >" in shown[4]
    assert page.locator("main img, main script, main b:has-text('bold')").count() == 0


def test_every_segment_is_coloured_and_named_with_its_probability(page) -> None:
    page.select_option("#filter-task", label="list")
    segments = page.eval_on_selector_all(
        "#browser .seg",
        """segments => segments.map(s => ({
            writer: s.dataset.writer, tag: s.querySelector(".tag").textContent,
            brief: s.classList.contains("brief"), colour: getComputedStyle(s).backgroundColor,
        }))""",
    )
    assert segments
    assert all(segment["writer"] in segment["tag"] for segment in segments)
    assert all("%" in s["tag"] for s in segments if not s["brief"] and s["writer"] != "cue")
    colours = {writer: {s["colour"] for s in segments if s["writer"] == writer} for writer in ("pretrained", "cue")}
    assert all(len(found) == 1 for found in colours.values())
    assert colours["pretrained"] != colours["cue"]
    page.locator("#browser .card summary").first.click()
    assert page.locator("#browser .card table th").all_inner_texts()[:7] == [
        "#", "writer", "tokens", "ended by", "p(pretrained)", "p(finetuned)", "p(aligned)"
    ]  # fmt: skip


def test_one_question_stands_under_each_policy_side_by_side(page) -> None:
    page.locator("#browser button.compare").first.click()
    assert page.locator("dialog .card h3").all_inner_texts() == [
        "pretrained", "finetuned", "aligned", "random", "untuned", "switcher", "distilled"
    ]  # fmt: skip
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()


def test_where_it_loses_shows_only_such_cases(page) -> None:
    for kind, outcomes in (("first loses", ["✗", "✓"]), ("first wins", ["✓", "✗"])):
        page.select_option("#pair-kind", label=kind)
        found = page.locator("#pairs .side .outcome").all_text_contents()
        assert found
        assert [text[0] for text in found] == outcomes * (len(found) // 2)
    page.select_option("#pair-second", label="finetuned")
    assert set(page.locator("#pairs .side h3").all_text_contents()) == {"switcher", "finetuned"}
    page.select_option("#pair-second", label="best single of the task")
    page.select_option("#pair-task", label="recall")
    assert set(page.locator("#pairs .side h3").all_text_contents()) == {"switcher", "pretrained"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_both_colour_schemes(browser, address: str, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.locator("#browser button.compare").first.click()
    assert page.evaluate("document.querySelector('dialog').scrollWidth") <= 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    channels = [int(part) for part in background.strip("rgb()").split(",")]
    assert (sum(channels) > 600) == (scheme == "light")
    context.close()


def test_without_script_the_tables_are_there(browser, address: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert page.locator("table.results tbody tr:not(.group)").count() == 7
    assert page.locator("svg.plot").first.is_visible()
    assert page.locator("noscript p").is_visible()
    context.close()


def test_five_thousand_responses_stay_fluid(browser, generator: ModuleType, tmp_path: Path) -> None:
    """In processor time, so that the page is judged and not its neighbours; `measure_report.py` prints both clocks."""
    generator.write_fake_run(tmp_path, num_questions=72, num_seeds=2, num_tokens=300)
    page = write_report(tmp_path)
    assert page.stat().st_size <= 15_000_000
    figures = generator.time_page(browser, page)
    assert figures["console_messages"] == []
    assert figures["filter_cpu_ms_max"] <= 100, figures
    assert figures["open_cpu_seconds"] <= 2, figures
    assert figures["elements"] < 5000, figures  # the document holds one page of the list, not all of it


def test_the_result_table_fits_a_laptop_s_window(browser, address: str) -> None:
    """Seven columns of figures and what they cost; the last one used to run off the table's edge."""
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.goto(address)
    heads = page.eval_on_selector_all(".results thead th", "heads => heads.map(head => head.innerText.split('\\n')[0])")
    assert heads[0] == "Policy" and heads[-3:] == ["tokens", "seconds", "weights"] and len(heads) == 10
    assert page.evaluate("(box => box.scrollWidth - box.clientWidth)(document.querySelector('#results .scroll'))") == 0
    page.close()
