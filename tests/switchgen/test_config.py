"""The recipe: every problem at once, where it is, what is allowed; overrides; round trips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from switchgen.config import (
    DecodingConfig,
    Recipe,
    dump_recipe,
    find_recipe,
    load_recipe,
    nearest,
    shipped_recipes,
)
from switchgen.errors import ConfigError, SwitchgenError

GOOD = """\
pool:
  - {name: base, model: models/base, prompt: "Q: {query}\\nA: {trace}"}
  - name: aligned
    model: models/aligned
decoding:
  segment: 25
tasks: [gsm8k, {file: x.json, limit: 3}]
train:
  lora: null
  args: {learning_rate: 1.0e-4}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path), overrides)
    return str(caught.value).splitlines()


def test_defaults_are_the_methods(recipe_file: Path) -> None:
    recipe = load_recipe(str(recipe_file))
    decoding = recipe.decoding
    assert (decoding.max_new_tokens, decoding.temperature, decoding.top_p) == (512, 0.7, 0.9)
    assert DecodingConfig().segment.tokens == 50 and decoding.segment.tokens == 25
    assert (decoding.first, decoding.last, decoding.cue) == (None, None, None)
    assert (decoding.eos, decoding.stop) == ("response", [])
    assert recipe.switcher.format == "released" and recipe.switcher.top_p == 0.9
    assert recipe.names == ["base", "aligned"]
    assert [task.shipped or task.file for task in recipe.tasks] == ["gsm8k", "x.json"]
    assert recipe.train.lora is None and recipe.train.args == {"learning_rate": 1e-4}


def test_dumped_recipes_load_again(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(recipe_file), ["decoding.stop=['\\n', '東京']"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(str(again)) == recipe


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_load(name: str) -> None:
    assert load_recipe(name).names
    assert find_recipe(name).stem == name


def test_all_problems_at_once_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "pool:\n"
        "  - name: base\n"
        "    modell: x\n"
        "  - {name: 'a b', model: y}\n"
        "decoding:\n"
        "  temperatur: 1\n"
        "  top_p: 0\n"
        "  segment: {tokens: 5, end: sentense}\n"
        "evaluat: {}\n"
        "train:\n"
        "  lora: {rank: 3}\n"
    )
    lines = problems(path)
    assert lines[0] == f"{path}: 8 problems in the recipe"
    expected = [
        "line 3, pool.0.modell: unknown key (did you mean 'model'?); allowed: name, model, adapter",
        "line 2, pool.0.model: required and not given",
        "line 4, pool.1.name: a name is letters, digits",
        "line 6, decoding.temperatur: unknown key (did you mean 'temperature'?)",
        "line 7, decoding.top_p: Input should be greater than 0; got 0",
        "line 8, decoding.segment.end: allowed: length, sentence, line, p@γ with 0 < γ <= 1, h@γ with γ >= 0 (nats) "
        "(did you mean 'sentence'?); got 'sentense'",
        "line 9, evaluat: unknown key (did you mean 'evaluate'?)",
        "line 11, train.lora.rank: unknown key; allowed: r, alpha, dropout, target_modules",
    ]  # fmt: skip
    for part in expected:
        assert any(part in line for line in lines[1:]), (part, lines)


@pytest.mark.parametrize(
    ("overrides", "path", "value"),
    [
        (["decoding.max_new_tokens=64"], "decoding.max_new_tokens", 64),
        (["decoding.segment.tokens=10"], "decoding.segment.tokens", 10),
        (["decoding.segment={tokens: 9, end: line}"], "decoding.segment.end", "line"),
        (["decoding.segment=9"], "decoding.segment.tokens", 9),
        (["pool.1.model=elsewhere"], "pool.1.model", "elsewhere"),
        (["decoding.first=base"], "decoding.first", "base"),
        (["decoding.first=base", "decoding.first=null"], "decoding.first", None),
        (["decoding.stop=[a, b]"], "decoding.stop", ["a", "b"]),
        (["decoding.stop=['a=b.c']"], "decoding.stop", ["a=b.c"]),
        (["switcher.adapter="], "switcher.adapter", ""),
        (["engine.max_rows=8"], "engine.max_rows", 8),  # a section that the file does not have
        (["train.args.num_train_epochs=3"], "train.args.num_train_epochs", 3),
        (["tasks.1.limit=7"], "tasks.1.limit", 7),
        (["lab.seed=3"], "lab.seed", 3),
    ],
)
def test_overrides(recipe_file: Path, overrides: list[str], path: str, value: Any) -> None:
    found: Any = load_recipe(str(recipe_file), overrides)
    for part in path.split("."):
        if isinstance(found, (list, dict)):
            found = found[int(part) if isinstance(found, list) else part]
        else:
            found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ("{end: p}", "allowed: length, sentence, line, p@γ with 0 < γ <= 1, h@γ with γ >= 0 (nats); got 'p'"),
        ("{end: p@0}", "p@γ with 0 < γ <= 1"),
        ("{end: p@1.5}", "p@γ with 0 < γ <= 1"),
        ("{end: p@nan}", "p@γ with 0 < γ <= 1"),
        ("{end: h@-1}", "h@γ with γ >= 0"),
        ("{end: h@inf}", "h@γ with γ >= 0"),
        ("{end: line@3}", "allowed: length"),
        ("{tokens: 8, end: p@0.3, min_tokens: 9}", "min_tokens (9) is above tokens (8)"),
        ("{tokens: 8, end: p@0.3, min_tokens: 0}", "greater than or equal to 1"),
    ],
)
def test_segments_that_cannot_end_so(recipe_file: Path, segment: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_recipe(str(recipe_file), [f"decoding.segment={segment}"])
    assert message in str(raised.value)


def test_segments_that_end_where_the_writer_is_unsure(recipe_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = load_recipe(str(recipe_file), ["decoding.segment={tokens: 100, end: h@1.5}"]).decoding.segment
    assert (found.unsure, found.min_tokens) == (("h", 1.5), 5)
    assert found.model_dump() == {"tokens": 100, "end": "h@1.5", "min_tokens": 5}
    plain = load_recipe(str(recipe_file), ["decoding.segment.end=line"]).decoding.segment
    assert plain.unsure is None and plain.model_dump() == {"tokens": 25, "end": "line"}, (
        "what was hashed stays the same"
    )
    assert not caplog.records
    load_recipe(str(recipe_file), ["decoding.segment.min_tokens=3"])
    assert "min_tokens has no effect: decoding.segment.end is length" in caplog.text
    server = ["pool.0.engine=openai", "pool.0.server={base_urls: ['http://localhost:1/v1']}"]
    with pytest.raises(ConfigError, match="'p@0.3' reads the writer's distribution, and candidate"):
        load_recipe(str(recipe_file), [*server, "decoding.segment.end=p@0.3"])


def test_overrides_into_nulls_and_shorthands(recipe_file: Path) -> None:
    """`train.lora: null` swallowed `train.lora.r=8` without a word; a shorthand refused to be refined."""
    overrides = ["train.lora.r=8", "decoding.segment.end=line", "tasks.0.limit=5", "distill.lora.r=4"]
    recipe = load_recipe(str(recipe_file), overrides)
    assert recipe.train.lora is not None and recipe.train.lora.r == 8
    assert (recipe.decoding.segment.tokens, recipe.decoding.segment.end) == (25, "line")
    assert (recipe.tasks[0].shipped, recipe.tasks[0].limit) == ("gsm8k", 5)
    assert recipe.distill.lora is not None and recipe.distill.lora.r == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("decoding", "allowed is a.b=value"),
        ("=3", "allowed is a.b=value"),
        ("decoding.stop=[a", "the value is not valid YAML"),
        ("pool.2.name=x", "pool is a list; allowed here: 0 to 1"),
        ("pool.x.name=x", "pool is a list; allowed here: 0 to 1"),
        ("pool.0.name.x=1", "pool.0.name is 'base' in the recipe and has no keys"),
        ("decodin.top_p=1", "decodin: unknown key (did you mean 'decoding'?)"),
    ],
)
def test_overrides_that_cannot_be(recipe_file: Path, override: str, message: str) -> None:
    text = "\n".join(problems(recipe_file, override))
    assert message in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pool.1.name=base"], "two candidates have the same name: base"),
        (["pool.0.name=switcher"], "is reserved"),
        (["decoding.last=nobody"], "decoding.last: no candidate is called 'nobody'; allowed: base, aligned"),
        (["distill.base=nobody"], "distill.base: no candidate is called 'nobody'"),
        (["decoding.cue=So"], "cue is set but last is not"),
        (["decoding.last=base", "decoding.max_new_tokens=25"], "must be above segment.tokens (25)"),
        (["decoding.stop=['']"], "an empty stop string"),
        (["pool.0.prompt='{query}'"], "a template that holds {query} once and ends with {trace}"),
        (["pool.0.prompt='{trace}{query}{trace}'"], "a template that holds {query} once"),
        (["rollout.prefix=[0.5, 1.0]"], "0 <= low <= high < 1"),
        (["evaluate.seeds=[1, 1]"], "listed twice: 1"),
        (["tasks=[{name: x}]"], "exactly one source"),
        (["pool=[]"], "at least 1 item"),
        (["decoding.temperature=.inf"], "finite number"),
        (["switcher.temperature=.nan"], "finite number"),
        (["evaluate.judge={url: 'localhost:8000', model: m}"], "'localhost:8000' is no base URL"),
    ],
)
def test_rules_between_settings(recipe_file: Path, overrides: list[str], message: str) -> None:
    assert message in "\n".join(problems(recipe_file, *overrides))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"- a\n", "got list"),
        (b"just words", "got str"),
        (b"pool: [", "not valid YAML"),
        (b"pool: \xff", "not UTF-8 (byte 6)"),
        (b"pool: []\ntrain: {}\npool: [{}]\n", "line 3, pool: stands twice; first in line 1"),
        (b"train:\n  seed: 1\n  seed: 2\n", "line 3, train.seed: stands twice; first in line 2"),
        (b"a: !!python/object/apply:os.system [true]", "not valid YAML"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert message in "\n".join(problems(path))
    assert str(path) in problems(path)[0]


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'labb': no such file, and no shipped recipe .* \(did you mean 'lab'"):
        find_recipe("labb")
    with pytest.raises(ConfigError, match="no such file"):
        load_recipe(str(tmp_path))


def test_users_mistakes_are_value_errors() -> None:
    assert issubclass(ConfigError, SwitchgenError) and issubclass(SwitchgenError, ValueError)


def test_nearest() -> None:
    assert nearest("aligne", ["base", "aligned"]) == " (did you mean 'aligned'?)"
    assert nearest("zzz", ["base", "aligned"]) == ""


def test_a_recipe_is_frozen(recipe_file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(str(recipe_file)).decoding.top_p = 1.0


def test_every_setting_survives_yaml(recipe_file: Path) -> None:
    recipe = load_recipe(str(recipe_file))
    assert Recipe.model_validate(yaml.safe_load(dump_recipe(recipe))) == recipe
