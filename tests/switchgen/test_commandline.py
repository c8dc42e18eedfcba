"""Settings of the recipe on the command line: before options, between them, behind them."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from switchgen.__main__ import VERBS, main
from switchgen.commandline import build_parser, parse_with_settings
from switchgen.errors import WorkerError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--names", nargs="*", choices=["a", "b"], default=[])
    parser.add_argument("--out")
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("overrides", nargs="*")
    return parser


@pytest.mark.parametrize(
    "line",
    [
        "lab.seed=7 tasks=[x] --seeds 1 2 --names a --out f --strict",
        "--seeds 1 2 lab.seed=7 tasks=[x] --names a --out f --strict",
        "--seeds 1 2 lab.seed=7 --names a tasks=[x] --out f --strict",
        "--names a --seeds 1 2 --out f lab.seed=7 --strict tasks=[x]",
        "--strict lab.seed=7 --out f tasks=[x] --seeds 1 2 --names a",
        "--seeds 1 2 --names a --out=f --strict lab.seed=7 tasks=[x]",
    ],
)
def test_settings_stand_anywhere(line: str) -> None:
    """Behind `--seeds 1 2` a setting used to be taken for a third seed, which is no number."""
    found = parse_with_settings(make_parser(), line.split())
    assert found.overrides == ["lab.seed=7", "tasks=[x]"]
    assert (found.seeds, found.names, found.out, found.strict) == ([1, 2], ["a"], "f", True)


def test_their_order_is_kept() -> None:
    """Of two values of one setting the later one counts."""
    line = "a.b=1 --strict a.b=2 --seeds 3 a.b=4"
    assert parse_with_settings(make_parser(), line.split()).overrides == ["a.b=1", "a.b=2", "a.b=4"]


def test_what_is_no_setting() -> None:
    found = parse_with_settings(make_parser(), ["--out", "runs=1/x=2", "a.b=c d = e\nf"])
    assert found.out == "runs=1/x=2" and found.overrides == ["a.b=c d = e\nf"]
    assert parse_with_settings(make_parser(), ["decoding"]).overrides == ["decoding"], "the recipe says what is wrong"


@pytest.mark.parametrize("line", ["--seed 1 x", "--nothing a.b=1", "--seeds a.b=1", "--seeds 1 x", "--names a c=1 d"])
def test_wrong_words_are_errors(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_with_settings(make_parser(), line.split())
    assert raised.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "option", "value"),
    [
        ("merge lab --methods soup expo@0.3 {}", "methods", ["soup", "expo@0.3"]),
        ("segments lab --tokens 10 {} --ends line", "tokens", [10]),
        ("segments lab --tokens 10 --ends line p@0.3 {}", "ends", ["line", "p@0.3"]),
        ("lm-eval lab --tasks one two {}", "tasks", ["one", "two"]),
        ("infer lab --input i=1.jsonl {} --output o", "input", Path("i=1.jsonl")),
    ],
)
def test_the_front_door_s_options_of_several_values(line: str, option: str, value: object) -> None:
    found = parse_with_settings(build_parser(), line.format("decoding.max_new_tokens=9").split())
    assert found.overrides == ["decoding.max_new_tokens=9"] and getattr(found, option) == value


def test_a_verb_without_a_recipe_has_no_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_with_settings(build_parser(), ["bench", "--size", "tiny", "a.b=1"])
    assert "unrecognized arguments: a.b=1" in capsys.readouterr().err


def test_every_verb_does_something() -> None:
    (verbs,) = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    assert list(verbs.choices) == list(VERBS)


def test_every_script_that_takes_settings_takes_them_anywhere() -> None:
    takers = [path for path in sorted(SCRIPTS.glob("*.py")) if 'add_argument("overrides"' in path.read_text()]
    assert len(takers) >= 6
    for path in takers:
        assert "parse_with_settings(parser)" in path.read_text(), path.name


def test_a_lost_worker_is_a_message_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(_: argparse.Namespace) -> None:
        raise WorkerError("rollout-0 (process 7) died with exit code -9; what is finished is kept")

    monkeypatch.setitem(VERBS, "report", lose)
    assert main(["report", "lab"]) == 1
    assert (
        capsys.readouterr().err == "switchgen: rollout-0 (process 7) died with exit code -9; what is finished is kept\n"
    )


def test_a_result_that_nobody_reads_to_its_end() -> None:
    """`switchgen doctor lab | head -1` is no failure."""
    program = "from switchgen.__main__ import say\nfor _ in range(9): say('x' * 99999)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    process.stderr.close()
