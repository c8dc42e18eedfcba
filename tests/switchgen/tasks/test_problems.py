"""What is wrong with a file or a spec is said at once, with where and what is allowed, before anything else runs."""

# ruff: noqa: E501  (one case a line)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from switchgen.errors import ConfigError, DataError
from switchgen.tasks import load_task

GOOD = {"input": "1 + 1 =", "output": "2"}


def jsonl(*lines: object) -> bytes:
    return b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)


def layout(test: list[Any], **meta: Any) -> bytes:
    return json.dumps({"name": "x", "task_type": "exact_match", **meta, "test": test}).encode()


def choice(**changes: Any) -> dict[str, Any]:
    return {"question": "q", "choices": {"A": "x", "B": "y"}, "answer": "A", **changes}


CASES: list[tuple[str, bytes, dict[str, Any], list[str]]] = [
    ("x.jsonl", jsonl(GOOD, b'{"input": ', GOOD | {"input": "b"}, b"{'a': 1}"), {}, ["2 problems", "line 2: bad JSON: ", "line 4: bad JSON"]),
    ("x.jsonl", jsonl(GOOD, b'{"input": "\xff"}', b"nope"), {}, ["line 2: not UTF-8: byte 0xff at column 12", "line 3: bad JSON"]),
    ("x.jsonl", jsonl(GOOD, [1], 3, None, "text"), {}, ["line 2: expected a JSON object, got a list", "line 4: expected a JSON object, got null"]),
    ("x.jsonl", jsonl(GOOD, b'{"input": "a\\ud83d", "output": "1"}'), {}, ["line 2: holds half a surrogate pair, \\ud83d, which is no text"]),
    ("x.jsonl", jsonl(GOOD, b'{"input": "a", "output": ' + b"9" * 5000 + b"}"), {}, ["line 2: bad JSON: Exceeds the limit"]),
    ("x.json", b'{"test": [{"input": "a", "output": "\\udc00"}]}', {}, ["test row 0: holds half a surrogate pair, \\udc00"]),
    ("x.json", b'{"test": [' + b"9" * 5000 + b"]}", {}, ["bad JSON: Exceeds the limit"]),
    ("x.jsonl", b"", {}, ["the file is empty; expected one JSON object a line"]),
    ("x.jsonl", b" \n\n", {}, ["the file is empty"]),
    ("x.jsonl", jsonl({"input": "", "output": "1"}, {"input": " \n", "output": "1"}), {}, ["line 1: 'input' is empty", "line 2: 'input' is empty"]),
    ("x.jsonl", jsonl({"output": "1"}), {}, ["line 1: no query: expected one of 'messages', 'input', 'question', 'prompt', got 'output'"]),
    ("x.jsonl", jsonl({}), {}, ["got an empty object"]),
    ("x.jsonl", jsonl({"input": 3, "output": "1"}), {}, ["'input' must be a text, got 3"]),
    ("x.jsonl", jsonl(GOOD, {"input": "b"}), {"metric": "number"}, ["line 2: no answer: metric 'number' needs 'output'"]),
    ("x.jsonl", jsonl(GOOD, {"input": "b", "output": ""}), {}, ["line 2: no answer"]),
    ("x.jsonl", jsonl({"input": "a", "output": None}), {"metric": "f1"}, ["no row has an answer, which metric 'f1' needs"]),
    ("x.jsonl", jsonl(GOOD, {"input": "b", "output": "some"}), {"metric": "number"}, ["line 2: metric 'number': the answer 'some' is no number"]),
    ("x.jsonl", jsonl(GOOD, GOOD), {}, ["line 2: repeats line 1 word for word"]),
    ("x.jsonl", jsonl(GOOD | {"id": "a"}, {"id": "a", "input": "b", "output": "2"}), {}, ["line 2: id 'a' was used before, in line 1"]),
    ("x.jsonl", jsonl(GOOD | {"id": [1]}, {"id": True, "input": "b", "output": "2"}), {}, ["line 1: 'id' must be a text or a whole number, got [1]", "line 2: 'id'"]),
    ("x.jsonl", jsonl({"messages": [], "output": "1"}), {}, ["'messages' must be a list of"]),
    ("x.jsonl", jsonl({"messages": [{"role": "assistant", "content": "a"}], "output": "1"}), {}, ["must be a non-empty turn of role 'user'"]),
    ("x.jsonl", jsonl({"messages": [{"role": "user", "content": "a"}], "output": "1"}), {"prompt": "{input}"}, ["where the task's 'prompt' cannot apply"]),
    ("x.jsonl", jsonl(choice(answer="C")), {}, ["'answer' is 'C', which is none of the choices A, B"]),
    ("x.jsonl", jsonl(choice(choices={"A": "x"})), {}, ["'choices' must be at least two non-empty texts"]),
    ("x.jsonl", jsonl(choice(choices={"A": "x", "B": " "})), {}, ["'choices' must be at least two"]),
    ("x.jsonl", jsonl(choice(choices="A, B")), {}, ["'choices' must be at least two"]),
    ("x.jsonl", jsonl(choice(answer=7)), {}, ["'answer' is '7', which is none of the choices"]),
    ("x.jsonl", jsonl({k: v for k, v in choice().items() if k != "answer"}), {}, ["line 1: no answer: metric 'multiple_choice' needs 'answer'"]),
    ("x.jsonl", jsonl(GOOD), {"fields": {"input": "nope"}}, ["no row has a field 'nope'; there are: input, output"]),
    ("x.jsonl", jsonl({"p": "a", "output": "1"}, {"output": "2"}), {"fields": {"input": "p"}}, ["line 2: no field 'p'; there are: output"]),
    ("x.jsonl", jsonl(GOOD), {"answer_after": "####"}, ["line 1: 'output' does not hold '####'"]),
    ("x.json", b'{"name": "x",\n "test": [}', {}, ["line 2: bad JSON: "]),
    ("x.json", b"", {}, ["line 1: the file is empty"]),
    ("x.json", b'{"test": [\n{"input": "\xe9"}]}', {}, ["line 2: not UTF-8: byte 0xe9"]),
    ("x.json", b'"text"', {}, ["expected {", "got a string"]),
    ("x.json", b'{"name": "x"}', {}, ["no split: expected lists of rows such as 'dev' and 'test', got the keys ['name']"]),
    ("x.json", b"[" * 100_000, {}, ["bad JSON"]),
    ("x.json", layout([]), {}, ["split 'test' is empty"]),
    ("x.json", layout([GOOD, 5]), {}, ["test row 1: expected a JSON object, got a number"]),
    ("x.json", layout([GOOD, GOOD]), {}, ["test row 1: repeats test row 0 word for word"]),
    ("x.json", layout([GOOD]), {"split": "train"}, ["no split 'train'; there are: test (1 rows)"]),
    ("x.json", layout([GOOD], task_type="exact"), {}, ["unknown task_type 'exact'; did you mean 'exact_match'?", "or state a metric (number, string,"]),
    ("x.json", layout([GOOD], metric="numbr"), {}, ["unknown metric 'numbr'; did you mean 'number'?"]),
    ("x.parquet", b"PAR1 nope", {}, ["not a parquet file"]),
    ("x.csv", b"a,b", {}, ["unknown kind '.csv'; there are: .json, .jsonl, .parquet"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "spec", "said"), CASES)
def test_a_bad_file(name: str, content: bytes, spec: dict[str, Any], said: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        load_task({"file": name, **spec}, base_dir=tmp_path)
    for words in [name, *said]:
        assert words in str(error.value), str(error.value)


def test_a_long_list_of_problems_is_shown_in_part_and_counted(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"{\n" * 50)
    with pytest.raises(DataError, match=r"50 problems(.|\n)*line 20: (.|\n)*… and 30 more") as error:
        load_task({"file": tmp_path / "x.jsonl"})
    assert len(str(error.value).splitlines()) == 22


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHGEN_DATA", "/somewhere")
    with pytest.raises(DataError) as error:
        load_task({"file": "nope.json"}, base_dir=tmp_path)
    for words in (f"{tmp_path}/nope.json", "/somewhere/nope.json", "$SWITCHGEN_DATA"):
        assert words in str(error.value)
    with pytest.raises(DataError, match="is a folder; expected a .json, .jsonl or .parquet file"):
        load_task({"file": tmp_path})


SPECS: list[tuple[Any, str]] = [
    (5, "expected a shipped task's name or a mapping"),
    ({}, "no source; give 'file'"),
    ({"file": "a", "hub": "b"}, "both 'file' and 'hub'"),
    ({"shipped": "gsm8k", "file": "b"}, "'shipped' and file together"),
    ({"fil": "a"}, "unknown key 'fil'; did you mean 'file'?"),
    ({"file": "a", "zzz": 1}, "unknown key 'zzz' (there are: shipped, file, hub,"),
    ({"file": "a", "limit": 0}, "'limit' must be at least 1, got 0"),
    ({"file": "a", "limit": "5"}, "'limit' must be int, got '5'"),
    ({"file": "a", "limit": True}, "'limit' must be int, got True"),
    ({"file": "a", "strict": "yes"}, "'strict' must be bool"),
    ({"file": "a", "metric": "f2"}, "unknown metric 'f2'; did you mean 'f1'?"),
    ({"file": " "}, "'file' is empty"),
    ({"file": "a", "limit": 0, "fil": 1}, "unknown key 'fil'"),
]


@pytest.mark.parametrize(("spec", "said"), SPECS)
def test_a_bad_spec(spec: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_task(spec)
    assert said in str(error.value)


def test_settings_that_do_not_fit_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl(GOOD))
    with pytest.raises(ConfigError, match="strict needs a marker"):
        load_task({"file": tmp_path / "x.jsonl", "strict": True})
    with pytest.raises(ConfigError, match=r"no field 'inptu' in the rows; there are: input, output"):
        load_task({"file": tmp_path / "x.jsonl", "prompt": "Q: {inptu}"})


def test_a_data_set_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="split 'test', cannot be loaded: "):
        load_task({"hub": str(tmp_path / "nowhere")})
    (tmp_path / "train.jsonl").write_bytes(jsonl(GOOD))
    with pytest.raises(DataError, match=r"cannot be loaded: .*train"):
        load_task({"hub": str(tmp_path)})
    with pytest.raises(DataError, match="no split 'test'; there are: train"):
        load_task({"hub": str(tmp_path), "splits": {"train": "train"}})
