#!/usr/bin/env python3
"""Writes docs/recipe.md, every field of a recipe, from the models in switchgen/config.

python scripts/recipe_fields.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from switchgen.config import Recipe  # noqa: E402

PAGE = ROOT / "docs" / "recipe.md"
HEAD = (
    "# Every field of a recipe\n\n"
    "Made by `python scripts/recipe_fields.py` from the models in `switchgen/config/`. A recipe needs a `pool`; what "
    "else it says depends on the verb. Any field can be set on the command line, too (`decoding.max_new_tokens=256 "
    "'evaluate.policies=[aligned, switcher]' pool.0.device=cuda:1`; numbers count a list's entries from 0). Unknown "
    "keys are errors, and all that is wrong with a recipe is said at once."
)
_KINDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true, false",
    "object": "mapping",
}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}

JSON = Mapping[str, Any]


def main() -> int:
    PAGE.write_text(page(), encoding="utf-8")
    return 0


def page() -> str:
    """The whole page."""
    schema = Recipe.model_json_schema()
    parts = [HEAD]
    for path, section in sections(schema, schema["$defs"]):
        fields = [(name, field) for name, field in section["properties"].items() if path or inner(field) is None]
        if fields:
            parts += [f"\n## {path or 'recipe'}\n", f"{' '.join(section.get('description', '').split())}\n"]
            parts += ["| field | value | default | |", "|---|---|---|---|"]
            parts += [row(name, field, name in section.get("required", ())) for name, field in fields]
    return "\n".join(parts) + "\n"


def sections(section: JSON, known: JSON, path: str = "") -> Iterator[tuple[str, JSON]]:
    """(key path, schema) of every section, in the recipe's order; `pool[]` is each entry of the list `pool`."""
    yield path, section
    for name, field in section["properties"].items():
        found = inner(field)
        if found is not None:
            where = ".".join(filter(None, [path, name])) + ("[]" if _of_list(field) else "")
            yield from sections(known[found], known, where)


def inner(field: JSON) -> str | None:
    """The name of the section that a field holds, or a list of."""
    for part in [field, *field.get("anyOf", ()), *field.get("allOf", ()), field.get("items", {})]:
        if "$ref" in part:
            return str(part["$ref"]).rsplit("/", 1)[1]
    return None


def _of_list(field: JSON) -> bool:
    return field.get("type") == "array"


def row(name: str, field: JSON, required: bool) -> str:
    """A line of a section's table."""
    if inner(field) is not None:
        value, default = ("a list, see below" if _of_list(field) else "see below"), ""
        if {"type": "null"} in field.get("anyOf", ()):
            value, default = "null, or see below", "" if field.get("default") else "null"
    else:
        value, default = kind(field), "" if required else f"`{json.dumps(field.get('default'), ensure_ascii=False)}`"
    cells = [f"`{name}`", value, "required" if required else default, field.get("description", "")]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def kind(field: JSON) -> str:
    """What a field's value may be, in words."""
    if "anyOf" in field:
        return ", or ".join(kind(part) for part in field["anyOf"] if part.get("type") != "null")
    if "enum" in field or "const" in field:
        return ", ".join(map(str, field.get("enum", [field.get("const")])))
    if field.get("type") == "array":
        if "prefixItems" in field:
            return f"[{', '.join(kind(part) for part in field['prefixItems'])}]"
        return f"list of: {kind(field['items'])}"
    words = [_KINDS[field["type"]], *(f"{sign} {field[key]:g}" for key, sign in _BOUNDS.items() if key in field)]
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())
