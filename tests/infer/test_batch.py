"""`switchgen infer`: order, what lines hold, going on after anything, and whose output file it is."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ladders import make_model
from transformers import AutoTokenizer

from infer.batch import Job, _traces, main
from infer.output_file import work_folder
from switchgen.assembly import load_writers
from switchgen.errors import ConfigError, DataError
from switchgen.files import StorageError, lock
from switchgen.rows import Row
from switchgen.rundir import Run
from switchgen.trace import Query

ROOT = Path(__file__).resolve().parents[2]
MakeRun = Callable[..., Run]
JSON = dict[str, Any]

LINES = [{"id": f"q{i}", "input": f"How old is person {i}?", "tag": i} for i in range(20)]
LONG = "How old is " + "Vudak " * 1500 + "?"


def _write(path: Path, lines: list[JSON]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _read(path: Path) -> list[JSON]:
    raw = path.read_bytes()
    assert raw.endswith(b"\n")
    return [json.loads(line) for line in raw.split(b"\n")[:-1]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return _write(tmp_path / "in.jsonl", LINES)


def test_lines_in_order_with_all_fields(make_run: MakeRun, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out.jsonl"
    summary = main(make_run(), input=source, output=output, policy="random")
    lines = _read(output)
    assert [{key: line[key] for key in ("id", "input", "tag")} for line in lines] == LINES
    for line in lines:
        assert list(line) == ["id", "input", "tag", "output", "segments", "finish", "usage"]
        assert "".join(segment["text"] for segment in line["segments"]) == line["output"]
        counts = [segment["num_tokens"] for segment in line["segments"]]
        assert sum(counts) == line["usage"]["new_tokens"] == sum(line["usage"]["by_writer"].values())
        # A character is written to its end: up to 3 tokens more.
        assert all(count <= 5 + 3 for count in counts) and sum(counts) <= 16 + 3
        assert line["finish"] in ("eos", "length")
    assert len({line["output"] for line in lines}) == len(lines)
    assert {segment["writer"] for line in lines for segment in line["segments"]} == {"base", "tuned", "aligned"}
    assert summary["rows"] == summary["answered"] == summary["written"] == 20
    assert summary["not_answered"] == []
    assert summary["new_tokens"] == sum(line["usage"]["new_tokens"] for line in lines)
    assert summary["tokens_per_second"] > 0
    json.dumps(summary)


def test_a_row_depends_on_its_query_and_seed_alone(make_run: MakeRun, source: Path, tmp_path: Path) -> None:
    main(make_run(), input=source, output=tmp_path / "all.jsonl", policy="random")
    alone = _write(tmp_path / "alone.jsonl", [LINES[13]])
    main(make_run(), input=alone, output=tmp_path / "one.jsonl", policy="random")
    assert _read(tmp_path / "one.jsonl") == [_read(tmp_path / "all.jsonl")[13]]
    main(make_run(), input=alone, output=tmp_path / "other.jsonl", policy="random", seed=1)
    assert _read(tmp_path / "other.jsonl")[0]["output"] != _read(tmp_path / "one.jsonl")[0]["output"]


def test_recipe_gives_the_defaults(make_run: MakeRun, source: Path, tmp_path: Path) -> None:
    run = make_run("run", "infer.policy=tuned", "infer.seed=3", "infer.format=released")
    summary = main(run, input=source, output=tmp_path / "out.jsonl", limit=2)
    assert summary["policy"] == "tuned"
    same = main(
        make_run("b"), input=source, output=tmp_path / "b.jsonl", policy="tuned", seed=3, format="released", limit=2
    )
    assert same["new_tokens"] == summary["new_tokens"]
    assert _read(tmp_path / "out.jsonl") == _read(tmp_path / "b.jsonl")
    assert "generation_log" in _read(tmp_path / "out.jsonl")[0]


def test_second_start_writes_nothing(
    make_run: MakeRun, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out.jsonl"
    first = main(make_run(), input=source, output=output, policy="random")
    before = (output.read_bytes(), output.stat().st_mtime_ns)
    caplog.set_level(logging.INFO, "switchgen")
    second = main(make_run(), input=source, output=output, policy="random")
    assert second["written"] == 0
    assert {key: second[key] for key in ("rows", "answered", "new_tokens", "by_writer")} == {
        key: first[key] for key in ("rows", "answered", "new_tokens", "by_writer")
    }
    assert (output.read_bytes(), output.stat().st_mtime_ns) == before
    assert "all 20 rows are written already" in caplog.text


def test_higher_limit_goes_on(make_run: MakeRun, source: Path, tmp_path: Path) -> None:
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    main(make_run(), input=source, output=whole, policy="random")
    assert main(make_run(), input=source, output=output, policy="random", limit=5)["written"] == 5
    assert _read(output) == _read(whole)[:5]
    assert main(make_run(), input=source, output=output, policy="random")["written"] == 15
    assert output.read_bytes() == whole.read_bytes()


def test_deleted_output_is_put_together_again(make_run: MakeRun, source: Path, tmp_path: Path) -> None:
    """Also the state that a kill leaves between noting the output and its appearance."""
    output = tmp_path / "out.jsonl"
    main(make_run(), input=source, output=output, policy="random")
    before = output.read_bytes()
    output.unlink()
    (tmp_path / ".out.jsonl.part").write_bytes(before[:100])
    assert main(make_run(), input=source, output=output, policy="random")["written"] == 0
    assert output.read_bytes() == before
    assert not (tmp_path / ".out.jsonl.part").exists()


def test_unordered_streams_the_same_lines(make_run: MakeRun, tmp_path: Path) -> None:
    # Different lengths, so that rows do not finish in the order in which they began.
    lines = [{**line, "input": line["input"] * (1 + i % 3)} for i, line in enumerate(LINES)]
    source = _write(tmp_path / "in.jsonl", lines)
    ordered, streamed = tmp_path / "ordered.jsonl", tmp_path / "streamed.jsonl"
    main(make_run(), input=source, output=ordered, policy="random")
    main(make_run(), input=source, output=streamed, policy="random", unordered=True)
    by_id = {line["id"]: line for line in _read(streamed)}
    assert list(by_id.values()) != _read(ordered)
    assert [by_id[line["id"]] for line in lines] == _read(ordered)
    # Torn by a kill in mid-line: the row is written again, the others stay as they are.
    raw = streamed.read_bytes()
    streamed.write_bytes(raw[: raw.rfind(b"\n", 0, -1) + 30])
    summary = main(make_run(), input=source, output=streamed, policy="random", unordered=True)
    assert summary["written"] == 1 and summary["rows"] == 20
    assert streamed.read_bytes() == raw


def test_released_format(make_run: MakeRun, source: Path, tmp_path: Path) -> None:
    run = make_run("run", "decoding.last=aligned", "decoding.cue=' So'", "decoding.max_new_tokens=18")
    output = tmp_path / "out.jsonl"
    main(run, input=source, output=output, policy="random", format="released", limit=4)
    for line in _read(output):
        log = line["generation_log"]
        assert list(log) == ["query", "generated_segments", "segment_model_index", "generated_sequence"]
        assert log["query"] == line["input"]
        assert "".join(log["generated_segments"]) == log["generated_sequence"] == line["output"]
        written = [segment["writer"] for segment in line["segments"] if segment["writer"] != "cue"]
        assert [["base", "tuned", "aligned"][index] for index in log["segment_model_index"]] == written
        assert line["usage"]["cue_tokens"] > 0 and " So" in line["output"]


def test_rows_beyond_the_context(make_run: MakeRun, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = _write(tmp_path / "in.jsonl", [LINES[0], {"id": "far", "input": LONG}, LINES[1]])
    output = tmp_path / "out.jsonl"
    summary = main(make_run(), input=source, output=output, policy="random")
    assert (summary["rows"], summary["answered"], summary["not_answered"]) == (3, 2, ["far"])
    assert "1 row (far) beyond the context" in caplog.text
    lines = _read(output)
    assert [line["finish"] == "too_long" for line in lines] == [False, True, False]
    assert (lines[1]["output"], lines[1]["segments"], lines[1]["usage"]["new_tokens"]) == (None, [], 0)
    main(make_run("b"), input=_write(tmp_path / "b.jsonl", LINES[:2]), output=tmp_path / "short.jsonl", policy="random")
    assert _read(tmp_path / "short.jsonl") == [lines[0], lines[2]]


def test_strict_says_so_after_everything_is_written(make_run: MakeRun, tmp_path: Path) -> None:
    source = _write(tmp_path / "in.jsonl", [{"id": "far", "input": LONG}, LINES[1]])
    output = tmp_path / "out.jsonl"
    for _ in range(2):
        with pytest.raises(DataError, match=r"1 row \(far\) beyond the context"):
            main(make_run(), input=source, output=output, policy="random", strict=True)
        assert [line["finish"] == "too_long" for line in _read(output)] == [True, False]


def test_conversations(make_run: MakeRun, tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "How old is Vudak?"},
    ]
    lines = [
        {"id": "a", "messages": turns},
        {"id": "b", "messages": turns[1:]},
        {"id": "c", "input": "How old is Vudak?"},
    ]
    output = tmp_path / "out.jsonl"
    main(
        make_run("run", "decoding.temperature=0"),
        input=_write(tmp_path / "i.jsonl", lines),
        output=output,
        policy="tuned",
    )
    written = _read(output)
    assert [line.get("messages") for line in written] == [turns, turns[1:], None]
    assert len({line["output"] for line in written}) == 3  # every turn was read


def test_template_that_refuses_a_conversation(make_run: MakeRun, home: Path, tmp_path: Path) -> None:
    ladder = shutil.copytree(home / "ladder", tmp_path / "ladder")
    tokenizer = AutoTokenizer.from_pretrained(ladder / "tuned")
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    tokenizer.save_pretrained(ladder / "tuned")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    source = _write(tmp_path / "in.jsonl", [LINES[0], {"id": "strict", "messages": messages}])
    with pytest.raises(DataError, match="query 'strict', candidate 'tuned'.*no system turns"):
        main(make_run(ladder=ladder), input=source, output=tmp_path / "out.jsonl", policy="random")


# -- whose output it is -----------------------------------------------------------------------------------------------


def test_file_of_somebody_else_stays(make_run: MakeRun, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("precious\n")
    for unordered in (False, True):
        with pytest.raises(ConfigError, match=r"out\.jsonl: exists, and was not made in the run folder"):
            main(make_run(), input=source, output=output, policy="random", unordered=unordered)
    assert output.read_text() == "precious\n"
    assert not (tmp_path / "run" / "infer").exists()


def test_edited_output_stays(make_run: MakeRun, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    main(make_run(), input=source, output=output, policy="random", limit=2)
    output.write_bytes(output.read_bytes() + b"a note\n")
    with pytest.raises(ConfigError, match="is not .or no longer. what was written"):
        main(make_run(), input=source, output=output, policy="random")
    assert output.read_bytes().endswith(b"a note\n")


@pytest.mark.parametrize(
    ("overrides", "options", "named"),
    [
        (("decoding.segment=4",), {}, "decoding"),
        ((), {"seed": 1}, "seed: was 0, is 1"),
        ((), {"policy": "tuned"}, "policy: was 'random', is 'tuned'"),
        ((), {"format": "released"}, "format: was 'switchgen', is 'released'"),
        ((), {"unordered": True}, "unordered: was False, is True"),
    ],
)
def test_output_of_another_recipe_stays(
    make_run: MakeRun, source: Path, tmp_path: Path, overrides: tuple[str, ...], options: JSON, named: str
) -> None:
    output = tmp_path / "out.jsonl"
    main(make_run(), input=source, output=output, policy="random", limit=2)
    before = output.read_bytes()
    with pytest.raises(ConfigError, match="made by another recipe") as caught:
        main(make_run("run", *overrides), input=source, output=output, **{"policy": "random", **options})
    assert named in str(caught.value) and "out.jsonl: nothing was overwritten" in str(caught.value)
    assert output.read_bytes() == before


def test_output_for_other_questions_stays(make_run: MakeRun, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    main(make_run(), input=source, output=output, policy="random", limit=2)
    _write(source, LINES[:1])
    with pytest.raises(ConfigError, match="input: was"):
        main(make_run(), input=source, output=output, policy="random")


def test_weights_trained_anew_are_another_recipe(make_run: MakeRun, home: Path, source: Path, tmp_path: Path) -> None:
    ladder = shutil.copytree(home / "ladder", tmp_path / "ladder")
    output = tmp_path / "out.jsonl"
    options: JSON = {"input": source, "output": output, "policy": "random"}
    main(make_run(ladder=ladder), **options, limit=2)
    os.utime(ladder / "base" / "model.safetensors")  # a copy, a checkout: nothing has changed
    main(make_run(ladder=ladder), **options, limit=3)
    make_model("llama", len(AutoTokenizer.from_pretrained(ladder / "base")), seed=9).float().save_pretrained(
        ladder / "base"
    )
    with pytest.raises(ConfigError, match="weights.base: was"):
        main(make_run(ladder=ladder), **options)
    assert len(_read(output)) == 3


def test_damaged_rows_are_named(make_run: MakeRun, source: Path, tmp_path: Path) -> None:
    run, output = make_run(), tmp_path / "out.jsonl"
    main(run, input=source, output=output, policy="random", limit=3)
    rows = work_folder(run, output) / "rows.jsonl"
    before = rows.read_bytes()
    rows.write_bytes(before + b"[]\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 4: not a finished record"):
        main(run, input=source, output=output, policy="random")
    rows.write_bytes(before)
    assert main(run, input=source, output=output, policy="random")["written"] == 17


def test_bad_lines_beyond_the_limit_are_errors_before_anything_is_written(
    make_run: MakeRun, source: Path, tmp_path: Path
) -> None:
    source.write_bytes(source.read_bytes() + b"{}\n")
    with pytest.raises(DataError, match="line 21: neither"):
        main(make_run(), input=source, output=tmp_path / "out.jsonl", policy="random", limit=1)
    assert not (tmp_path / "run").exists() and not (tmp_path / "out.jsonl").exists()


def test_token_routers(make_run: MakeRun, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    summary = main(make_run(), input=source, output=output, policy="baco-rand@0.5", format="released", limit=5)
    for line in _read(output):
        assert "".join(segment["text"] for segment in line["segments"]) == line["output"]
        assert line["generation_log"]["generated_sequence"] == line["output"]
    assert summary["by_writer"]["base"] and summary["by_writer"]["aligned"] and not summary["by_writer"]["tuned"]


def test_output_is_a_folder(make_run: MakeRun, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        main(make_run(), input=source, output=tmp_path, policy="random")


def test_unknown_format_and_limit(make_run: MakeRun, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'csv'.*switchgen, released"):
        main(make_run(), input=source, output=tmp_path / "o", policy="random", format="csv")
    with pytest.raises(ConfigError, match="limit 0"):
        main(make_run(), input=source, output=tmp_path / "o", policy="random", limit=0)


def test_two_runs_at_once(make_run: MakeRun, source: Path, tmp_path: Path) -> None:
    run, output = make_run(), tmp_path / "out.jsonl"
    with lock(work_folder(run, output)), pytest.raises(StorageError, match="another run is at work"):
        main(run, input=source, output=output, policy="random")
    main(run, input=source, output=tmp_path / "other.jsonl", policy="random", limit=1)


# -- kills and memory -------------------------------------------------------------------------------------------------

RUN_STAGE = """
import sys
from pathlib import Path
from infer.batch import main
from switchgen.rundir import open_run
run = open_run(sys.argv[1], sys.argv[5:], sys.argv[2])
main(run, input=Path(sys.argv[3]), output=Path(sys.argv[4]), policy="random")
"""
LARGER = ("decoding.max_new_tokens=48", "engine.max_rows=4")


def test_killed_and_resumed(make_run: MakeRun, tmp_path: Path) -> None:
    lines = [{"id": f"q{i}", "input": f"How old is person {i}?"} for i in range(40)]
    source = _write(tmp_path / "in.jsonl", lines)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    main(make_run("whole", *LARGER), input=source, output=whole, policy="random")
    run = make_run("killed", *LARGER)
    rows = work_folder(run, output) / "rows.jsonl"

    def written() -> int:
        return rows.read_bytes().count(b"\n") if rows.exists() else 0

    script = tmp_path / "run_stage.py"
    script.write_text(RUN_STAGE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [str(part) for part in (sys.executable, script, run.source, run.dir, source, output)]
    process = subprocess.Popen([*arguments, *LARGER], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while written() < 6:
        assert process.poll() is None, process.stderr.read().decode()  # type: ignore[union-attr]
        assert time.monotonic() < deadline, "no rows for two minutes"
        time.sleep(0.01)
    process.kill()
    process.communicate()
    kept = written()
    assert 6 <= kept < len(lines), "killed too late to test anything"
    assert not output.exists()
    summary = main(run, input=source, output=output, policy="random")
    assert summary["written"] == len(lines) - kept
    assert output.read_bytes() == whole.read_bytes()


def test_finished_rows_are_let_go(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    queries = [Query.from_text(f"How old is person {i}?", id=str(i)) for i in range(60)]
    job = Job(run, "random", 0, "switchgen", False, tmp_path / "out.jsonl", tmp_path, queries)
    writer = load_writers(run, ["random"])["random"]
    alive = []
    for number, _ in enumerate(_traces(job, writer, queries), start=1):
        if number % 15 == 0:
            gc.collect()
            alive.append(sum(type(thing) is Row for thing in gc.get_objects()))
    assert len(alive) == 4
    assert max(alive) <= run.recipe.engine.max_rows + 1


def test_a_routers_gamma_may_stand_in_the_recipe(make_run: MakeRun, source: Path, tmp_path: Path) -> None:
    written = {}
    for name, policy, *settings in (
        ("named", "baco-rand@0.5"),
        ("set", "baco-rand", "router.gamma=0.5"),
        ("other", "baco-rand", "router.gamma=0"),
    ):
        run = make_run(name, *settings)
        main(run, input=source, output=tmp_path / f"{name}.jsonl", policy=policy, limit=3)
        written[name] = [line["output"] for line in _read(tmp_path / f"{name}.jsonl")]
    assert written["named"] == written["set"] != written["other"]
    with pytest.raises(ConfigError, match="gamma"):
        main(run, input=source, output=tmp_path / "set.jsonl", policy="baco-rand", limit=3)
    with pytest.raises(ConfigError, match="or set router.gamma"):
        main(make_run("none"), input=source, output=tmp_path / "none.jsonl", policy="baco-rand")
