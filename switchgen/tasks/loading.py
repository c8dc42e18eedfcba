"""A task from its spec: a shipped task's name, a file, or a hub data set."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from switchgen.errors import ConfigError, DataError
from switchgen.scoring import METRICS, metric_named
from switchgen.tasks.columns import renamed
from switchgen.tasks.reading import Problems, Row, Source, read_file, read_hub
from switchgen.tasks.rows import TASK_TYPES, build_examples, metric_by_rows, metric_by_type
from switchgen.tasks.task import Task

_log = logging.getLogger("switchgen")

DATA_VARIABLE = "SWITCHGEN_DATA"
_KEYS: dict[str, tuple[type, ...]] = {
    "shipped": (str,),
    "file": (str, Path),
    "hub": (str,),
    "config": (str,),
    "name": (str,),
    "split": (str,),
    "splits": (Mapping,),
    "limit": (int,),
    "metric": (str,),
    "prompt": (str,),
    "marker": (str,),
    "strict": (bool,),
    "confidence": (bool,),
    "fields": (Mapping,),
    "answer_after": (str,),
    "shuffle_choices": (bool,),
    "description": (str,),
}


def shipped_task_dir() -> Path:
    """The folder of the shipped task files: `configs/tasks`, beside the package in a checkout and in a wheel."""
    return Path(__file__).resolve().parents[2] / "configs" / "tasks"


def shipped_tasks() -> list[str]:
    """Names of the shipped tasks."""
    return sorted(path.stem for path in shipped_task_dir().glob("*.yaml"))


def load_task(spec: str | Mapping[str, Any], *, base_dir: Path | None = None) -> Task:
    """Load the queries and answers of one task.

    spec: a shipped task's name, or a mapping with one of `file` (path), `hub` (data set), `shipped` (name), and
    optionally `split` (default test), `splits` (its names in the source), `limit` (first N rows), `metric`, `name`,
    `prompt` (a text with `{field}`s of the row), `marker`, `strict`, `confidence`, `config` (hub), `fields` (`{input:
    column, output: column}`). Keys with the value None count as absent.
    base_dir: where relative files are looked for, before $SWITCHGEN_DATA and the working folder.

    Raises ConfigError where the spec is wrong, DataError with every problem of the source at once.
    """
    settings = _one_source(_settings(spec), base_dir)
    split = settings.get("split", "test")
    source, in_source = _source(settings, split, base_dir)
    problems = Problems(f"task {source.name!r}")
    name = str(settings.get("name") or source.meta.get("name") or source.meta.get("dataset") or Path(source.name).stem)
    rows = source.splits[in_source]
    shape = {key: settings[key] for key in ("answer_after", "shuffle_choices") if key in settings}
    fields = settings.get("fields") or source.meta.get("fields") or {}
    if shape or fields:
        rows = renamed(rows, fields, problems, **shape)
        problems.report()
    every = rows if fields else [row for split in source.splits.values() for row in split]
    metric = _metric(settings, source, name, every)
    marker = settings.get("marker", source.meta.get("marker"))
    strict = bool(settings.get("strict", source.meta.get("strict", False)))
    if strict and not marker:
        raise ConfigError(f"task {name!r}: strict needs a marker; give marker, e.g. 'Answer:', or leave strict out")
    confidence = bool(settings.get("confidence", source.meta.get("confidence", False)))
    if confidence and (METRICS[metric].score is None or metric == "choice_likelihood"):
        raise ConfigError(
            f"task {name!r}: confidence is compared with a written response's being right, which metric {metric!r} "
            "does not tell; give another metric, or leave confidence out"
        )
    examples, unanswered = build_examples(
        rows,
        metric,
        problems,
        prompt=settings.get("prompt", source.meta.get("prompt")),
        marker=marker,
        unique_ids=source.unique_ids,
    )
    if not rows:
        problems.add("", f"split {split!r} is empty")
    problems.report()
    if "limit" in settings:
        examples = examples[: settings["limit"]]
    if unanswered:
        _log.warning(
            "task %s: %d rows left out, their answer is null: %s", name, len(unanswered), ", ".join(unanswered[:10])
        )
    return Task(name, metric, examples, marker, strict, confidence, source.name, split, source.sha256, unanswered)


def _settings(spec: str | Mapping[str, Any]) -> dict[str, Any]:
    """The spec, checked, a shipped task's file merged under it."""
    if isinstance(spec, str):
        return _settings({"shipped": spec})
    if not isinstance(spec, Mapping):
        raise ConfigError(f"task {spec!r}: expected a shipped task's name or a mapping with 'file' or 'hub'")
    given = {key: value for key, value in spec.items() if value is not None}
    _check_keys(given)
    if "shipped" in given:
        shipped = _read_shipped(given.pop("shipped"))
        if sources := {"file", "hub"} & given.keys():
            raise ConfigError(f"task: 'shipped' and {', '.join(sorted(sources))} together; give one source")
        return {**shipped, **given}
    if not {"file", "hub"} & given.keys():
        raise ConfigError(
            f"task {dict(spec)!r}: no source; give 'file' (a path), 'hub' (a data set) or a shipped task's name"
        )
    if {"file", "hub"} <= given.keys():
        raise ConfigError(f"task {dict(spec)!r}: both 'file' and 'hub'; give one source")
    return given


def _one_source(settings: dict[str, Any], base_dir: Path | None) -> dict[str, Any]:
    """A shipped task names a file and a data set: the file where it is found, else the data set and its columns."""
    if not {"file", "hub"} <= settings.keys():
        return settings
    of_hub = {"hub", "config", "splits", "fields", "answer_after", "shuffle_choices"}
    left_out = of_hub if _find(settings["file"], base_dir) else {"file"}
    if "file" in left_out:
        _log.info("%s; using the data set %s", _not_found(settings["file"], base_dir), settings["hub"])
    return {key: value for key, value in settings.items() if key not in left_out}


def _check_keys(given: Mapping[str, Any]) -> None:
    wrong = []
    for key, value in given.items():
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f" (there are: {', '.join(_KEYS)})"
            wrong.append(f"unknown key {key!r}{hint}")
        elif not isinstance(value, _KEYS[key]) or (isinstance(value, bool) and bool not in _KEYS[key]):
            wrong.append(f"{key!r} must be {_KEYS[key][0].__name__.lower()}, got {value!r:.80}")
        elif key == "limit" and int(str(value)) < 1:
            wrong.append(f"'limit' must be at least 1, got {value}")
        elif key in {"file", "hub", "marker", "metric", "split"} and not str(value).strip():
            wrong.append(f"{key!r} is empty")
    if wrong:
        raise ConfigError("task: " + "; ".join(wrong))
    if "metric" in given:
        metric_named(given["metric"])


def _read_shipped(name: str) -> dict[str, Any]:
    path = shipped_task_dir() / f"{name}.yaml"
    if name not in shipped_tasks():
        near = difflib.get_close_matches(name, shipped_tasks(), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"no shipped task {name!r}{hint} (there are: {', '.join(shipped_tasks())}); a file is {{file: PATH}}"
        )
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    _check_keys(settings)
    return {"name": name, **settings}


def _source(settings: Mapping[str, Any], split: str, base_dir: Path | None) -> tuple[Source, str]:
    """The source, and the name of the split in it ('' where it has none)."""
    names = settings.get("splits", {})
    if "file" in settings:
        path = _find(settings["file"], base_dir)
        if path is None:
            raise DataError(_not_found(settings["file"], base_dir))
        source = read_file(path)
        if list(source.splits) == [""]:
            if split != "test":
                _log.warning(
                    "task file %s has no splits: all its rows are taken as %r, the rows it is evaluated on too",
                    path,
                    split,
                )
            return source, ""
        wanted = split if split in source.splits else names.get(split, split)
        if wanted not in source.splits:
            there = ", ".join(f"{key} ({len(rows)} rows)" for key, rows in source.splits.items())
            raise DataError(f"task file {str(path)!r}: no split {split!r}; there are: {there}")
        return source, wanted
    if names and split not in names:
        raise DataError(f"data set {settings['hub']!r}: no split {split!r}; there are: {', '.join(names)}")
    wanted = names.get(split, split)
    return read_hub(settings["hub"], settings.get("config"), wanted), wanted


def _find(file: str | Path, base_dir: Path | None) -> Path | None:
    """The first that exists: under base_dir, under $SWITCHGEN_DATA, in the working folder."""
    return next((path for path in _places(file, base_dir) if path.exists()), None)


def _places(file: str | Path, base_dir: Path | None) -> list[Path]:
    path = Path(os.path.expanduser(file))
    if path.is_absolute():
        return [path]
    folders = [base_dir, os.environ.get(DATA_VARIABLE) or None, Path()]
    return [Path(folder) / path for folder in folders if folder is not None]


def _not_found(file: str | Path, base_dir: Path | None) -> str:
    looked = ", ".join(str(path) for path in _places(file, base_dir))
    return f"task file {str(file)!r} not found; looked for {looked} (${DATA_VARIABLE} may name a folder of task files)"


def _metric(settings: Mapping[str, Any], source: Source, name: str, rows: list[Row]) -> str:
    """The spec's metric, else the file's, else what its task_type stands for, else what its rows hold."""
    stated = settings.get("metric") or source.meta.get("metric")
    if stated:
        try:
            return metric_named(stated).name
        except ConfigError as error:
            raise DataError(f"task {source.name!r}: {error}") from None
    task_type = source.meta.get("task_type")
    if task_type is None:
        return metric_by_rows(rows)
    metric = metric_by_type(str(task_type), name, rows)
    if metric is None:
        near = difflib.get_close_matches(str(task_type), TASK_TYPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"task {source.name!r}: unknown task_type {task_type!r}{hint} (there are: {', '.join(TASK_TYPES)}); "
            f"or state a metric ({', '.join(METRICS)})"
        )
    return metric
