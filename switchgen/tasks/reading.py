"""Rows out of files and hub data sets, with every problem of the source found at once."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from switchgen.errors import DataError

MAX_SHOWN = 20
_META = ("name", "dataset", "task_type", "metric", "marker", "strict", "confidence", "prompt", "fields")


@dataclass
class Problems:
    """Collects what is wrong with one source; `report` raises it as one DataError."""

    source: str
    found: list[str] = field(default_factory=list)

    def add(self, where: str, what: str) -> None:
        """Note one problem: `where` is a line or a row."""
        self.found.append(f"{where}: {what}" if where else what)

    def report(self) -> None:
        """Raise DataError if anything was noted."""
        if self.found:
            shown = self.found[:MAX_SHOWN]
            more = [f"… and {len(self.found) - MAX_SHOWN} more"] if len(self.found) > MAX_SHOWN else []
            count = f"{len(self.found)} problem{'s' if len(self.found) > 1 else ''}"
            raise DataError("\n  ".join([f"{self.source}: {count}", *shown, *more]))


@dataclass(frozen=True)
class Row:
    """A record and where it stands in its source, for messages: `line 3`, `test row 3`."""

    where: str
    record: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """What was read: rows by split, and what the file says about itself."""

    name: str
    sha256: str
    splits: dict[str, list[Row]]
    """One entry, keyed by the empty string, where the source knows no splits."""
    unique_ids: bool
    """Its rows are meant to have ids of their own; published sets with splits number theirs by subject."""
    meta: dict[str, Any]
    """`name`, `task_type`, `metric`, `marker`, `strict` …, as far as the file has them."""


def read_file(path: Path) -> Source:
    """Read a task file by its kind: `.json` (splits, or a list of rows), `.jsonl`/`.ndjson`, `.parquet`.

    Raises DataError, with all problems of the file at once.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"task file {str(path)!r} {what}; expected a .json, .jsonl or .parquet file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"task file {str(path)!r} cannot be read: {error.strerror}") from None
    problems = Problems(f"task file {str(path)!r}")
    suffix = path.suffix.lower()
    meta: dict[str, Any] = {}
    if suffix == ".parquet":
        rows = {"": _parquet_rows(data, problems)}
    elif suffix in {".jsonl", ".ndjson"}:
        rows = {"": _jsonl_rows(data, problems)}
    elif suffix == ".json":
        rows, meta = _json_rows(data, problems)
    else:
        raise DataError(f"task file {str(path)!r}: unknown kind {suffix!r}; there are: .json, .jsonl, .parquet")
    problems.report()
    return Source(str(path), hashlib.sha256(data).hexdigest(), _by_split_field(rows), "" in rows, meta)


def read_hub(name: str, config: str | None, split: str) -> Source:
    """One split of a data set, by hub name or local folder, through `datasets`.

    Raises DataError where it cannot be loaded; the message names the splits there are.
    """
    import datasets  # noqa: PLC0415

    source = f"hub:{name}" + (f"/{config}" if config else "")
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:500]
        raise DataError(
            f"data set {source!r}, split {split!r}, cannot be loaded: {type(error).__name__}: {reason}"
        ) from error
    records = [dict(record) for record in loaded]
    digest = hashlib.sha256(json.dumps(records, sort_keys=True, default=str).encode()).hexdigest()
    return Source(source, digest, {split: [Row(f"row {i}", record) for i, record in enumerate(records)]}, False, {})


def _decode(data: bytes, problems: Problems) -> str | None:
    """UTF-8 text; every line that is none is a problem."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            problems.add(f"line {number}", f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}")
    return None


def _jsonl_rows(data: bytes, problems: Problems) -> list[Row]:
    rows = []
    text = data.decode("utf-8-sig", errors="surrogateescape")
    if not text.strip():
        problems.add("", "the file is empty; expected one JSON object a line")
    for number, line in enumerate(text.split("\n"), 1):
        where = f"line {number}"
        if not line.strip():
            continue
        try:
            raw = line.encode("utf-8", errors="surrogateescape")
            raw.decode("utf-8")
            record = json.loads(line)
        except UnicodeDecodeError as error:
            problems.add(where, f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}")
        except json.JSONDecodeError as error:
            problems.add(where, f"bad JSON: {error.msg} at column {error.colno}")
        except RecursionError:
            problems.add(where, "bad JSON: nested too deeply")
        except ValueError as error:  # an integer of thousands of digits
            problems.add(where, f"bad JSON: {error}")
        else:
            rows += _checked_rows("", [record], problems, where=where)
    return rows


def _json_rows(data: bytes, problems: Problems) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    text = _decode(data, problems)
    if text is None:
        return {}, {}
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        problems.add(
            f"line {error.lineno}",
            f"bad JSON: {error.msg} at column {error.colno}" if text.strip() else "the file is empty",
        )
        return {}, {}
    except RecursionError:
        problems.add("", "bad JSON: nested too deeply")
        return {}, {}
    except ValueError as error:  # an integer of thousands of digits
        problems.add("", f"bad JSON: {error}")
        return {}, {}
    if isinstance(document, list):
        return {"": _checked_rows("", document, problems)}, {}
    if not isinstance(document, dict):
        problems.add("", f'expected {{"name": …, "task_type": …, "dev": […], "test": […]}}, got {_kind(document)}')
        return {}, {}
    splits = {key: value for key, value in document.items() if isinstance(value, list)}
    if not splits:
        problems.add("", f"no split: expected lists of rows such as 'dev' and 'test', got the keys {sorted(document)}")
    rows = {split: _checked_rows(f"{split} ", value, problems) for split, value in splits.items()}
    return rows, {key: document[key] for key in _META if document.get(key) is not None}


def _checked_rows(prefix: str, values: list[Any], problems: Problems, *, where: str | None = None) -> list[Row]:
    """Rows of values that are objects of text.

    Args:
        where: of the only value; default: its number.
    """
    rows = []
    for index, value in enumerate(values):
        place = where or f"{prefix}row {index}"
        if not isinstance(value, Mapping):
            problems.add(place, f"expected a JSON object, got {_kind(value)}")
            continue
        try:
            # Half a surrogate pair is no character: no tokenizer and no file takes it.
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            problems.add(place, f"holds half a surrogate pair, \\u{code:04x}, which is no text")
        else:
            rows.append(Row(place, dict(value)))
    return rows


def _parquet_rows(data: bytes, problems: Problems) -> list[Row]:
    import pyarrow  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(data))
    except (pyarrow.ArrowException, OSError) as error:
        problems.add("", f"not a parquet file: {' '.join(str(error).split())[:200]}")
        return []
    return [Row(f"row {index}", record) for index, record in enumerate(table.to_pylist())]


def _by_split_field(rows: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Rows of a source without splits that name their split themselves (`"split": "train"`), by that name."""
    flat = rows.get("", [])
    if list(rows) != [""] or not flat or not all(isinstance(row.record.get("split"), str) for row in flat):
        return rows
    named: dict[str, list[Row]] = {}
    for row in flat:
        named.setdefault(row.record["split"], []).append(row)
    return named


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
