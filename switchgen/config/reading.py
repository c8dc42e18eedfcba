"""Reading a recipe: one YAML file with overrides, checked as a whole before anything is loaded.

All problems are reported at once, each with file, line, key path, what was got and the nearest allowed spelling.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from switchgen.config.recipe import Recipe
from switchgen.config.section import CONFIGS_DIR, Section, nearest
from switchgen.errors import ConfigError

_SHORTHANDS = {"segment": "tokens", "tasks": "shipped"}


def shipped_recipes() -> dict[str, Path]:
    """Names of the recipes in configs/ and where they are."""
    return {path.stem: path for path in sorted(CONFIGS_DIR.glob("*.yaml"))}


def find_recipe(name_or_path: str) -> Path:
    """The file behind a recipe argument: an existing file, or a shipped recipe's name.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return shipped[name_or_path]
    hint = nearest(name_or_path, list(shipped))
    raise ConfigError(
        f"recipe {name_or_path!r}: no such file, and no shipped recipe of that name{hint}. "
        f"Allowed: a YAML file, or one of {', '.join(shipped) or '(none shipped)'}"
    )


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides such as `decoding.segment.tokens=25`, check everything.

    Raises:
        ConfigError: lists every problem, one a line.
    """
    path = find_recipe(name_or_path)
    data, lines = _read_yaml(path)
    for override in overrides:
        _apply_override(data, override)
    return check_recipe(data, str(path), lines)


def check_recipe(data: Mapping[str, Any], source: str, lines: Mapping[tuple[str, ...], int] | None = None) -> Recipe:
    """The recipe that plain values make.

    Args:
        source: where they are from, for the message.
        lines: where each key path stands.

    Raises:
        ConfigError: lists every problem, one a line.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = [_describe(problem, lines or {}) for problem in error.errors()]
        head = f"{source}: {len(problems)} problem{'s' if len(problems) > 1 else ''} in the recipe"
        raise ConfigError("\n".join([head, *(f"  {problem}" for problem in problems)])) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start}); a recipe is UTF-8 YAML") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: a recipe is a mapping with the sections {', '.join(Recipe.model_fields)}; "
            f"got {'an empty file' if data is None else type(data).__name__}"
        )
    lines: dict[tuple[str, ...], int] = {}
    try:
        _collect_lines(node, (), lines)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return data, lines


def _collect_lines(node: Any, path: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            if here in lines:
                raise ConfigError(
                    f"line {key.start_mark.line + 1}, {'.'.join(here)}: stands twice; first in line {lines[here]}"
                )
            lines[here] = key.start_mark.line + 1
            _collect_lines(value, here, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            here = (*path, str(index))
            lines[here] = value.start_mark.line + 1
            _collect_lines(value, here, lines)


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: allowed is a.b=value, e.g. decoding.max_new_tokens=256")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise ConfigError(
            f"override {override!r}: the value is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    parts = key.split(".")
    target: Any = data
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if isinstance(target, list):
            if not part.isdigit() or int(part) >= len(target):
                where = ".".join(parts[:index])
                raise ConfigError(f"override {override!r}: {where} is a list; allowed here: 0 to {len(target) - 1}")
            if last:
                target[int(part)] = value
            else:
                target[int(part)] = target = _long_form("tasks", target[int(part)])
        elif isinstance(target, dict):
            if last:
                target[part] = value
            else:
                target[part] = target = _long_form(part, target.get(part))
        else:
            where = ".".join(parts[:index])
            raise ConfigError(f"override {override!r}: {where} is {target!r} in the recipe and has no keys")


def _long_form(key: str, value: Any) -> Any:
    """What an override may go into: a null becomes a section, a shorthand such as `segment: 50` its long form."""
    if value is None:
        return {}
    if key in _SHORTHANDS and not isinstance(value, (dict, list)):
        return {_SHORTHANDS[key]: value}
    return value


def _describe(problem: Mapping[str, Any], lines: Mapping[tuple[str, ...], int]) -> str:
    location = tuple(str(part) for part in problem["loc"])
    key_path = ".".join(location) or "recipe"
    line = next((lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines), None)
    where = f"line {line}, {key_path}" if line else key_path
    if problem["type"] == "extra_forbidden":
        allowed = _allowed_keys(location[:-1])
        return f"{where}: unknown key{nearest(location[-1], allowed)}; allowed: {', '.join(allowed)}"
    if problem["type"] == "missing":
        return f"{where}: required and not given"
    message = problem["msg"].removeprefix("Value error, ")
    got = problem.get("input")
    shown = "" if isinstance(got, (dict, BaseModel)) else f"; got {got!r}"
    hint = ""
    if problem["type"] == "literal_error" and isinstance(got, str):
        hint = nearest(got, re.findall(r"'([^']+)'", problem["ctx"]["expected"]))
    return f"{where}: {message}{shown}{hint}"


def _allowed_keys(location: Sequence[str]) -> list[str]:
    model: Any = Recipe
    for part in location:
        if part.isdigit():
            continue
        annotation = model.model_fields[part].annotation
        model = next((kind for kind in _section_types(annotation)), None)
        if model is None:
            return []
    return list(model.model_fields)


def _section_types(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _section_types(argument)]
