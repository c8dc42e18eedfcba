"""Run folders: the resolved recipe, where things came from, and which settings each stage's files were made with.

RUN/
  recipe.yaml         the recipe of the latest command, resolved
  run.json            versions and machine
  <stage>/stage.json  which settings the stage's files were made with
  <stage>/*.jsonl     shards: one line per finished piece of work, appended at once
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from switchgen.baselines import all_policies
from switchgen.config import DATA_DIR, LabConfig, Recipe, dump_recipe, find_recipe, load_recipe
from switchgen.errors import ConfigError
from switchgen.files import write_atomic, write_json

logger = logging.getLogger("switchgen")

SHIPPED_LAB = DATA_DIR / "lab"


def claim_stage(folder: Path, stage: str, settings: Mapping[str, Any], *, may_grow: Collection[str] = ()) -> None:
    """Note the settings that a stage's files depend on, or see that they are still the same.

    Args:
        may_grow: paths of numbers that may be raised: more work is asked for, what is there stays as it is.

    Raises:
        ConfigError: the folder holds work made with other settings.
    """
    path = folder / "stage.json"
    wanted = json.loads(json.dumps({"schema": 1, "stage": stage, "settings": settings}))
    if not path.is_file():
        write_json(path, wanted)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        raise ConfigError(f"{path}: not a stage file; delete {folder} to start this stage anew") from None
    differences = []
    grown = False
    for line, old, new in _differences(found, wanted["settings"]):
        if line.partition(":")[0] not in may_grow:
            differences.append(line)
        elif isinstance(old, int) and isinstance(new, int) and new > old:
            grown = True
        else:
            differences.append(f"{line} (it may be raised)")
    if differences:
        raise ConfigError(
            f"{folder} was made by another recipe:\n"
            + "\n".join(f"  {line}" for line in differences[:12])
            + "\nUse another --run-dir, go back to those settings, or delete that folder to start this stage anew"
        )
    if grown:
        write_json(path, wanted)


def _differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(in words, old value, new value) of every key that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            path = f"{where}.{key}" if where else key
            if key not in old:
                yield f"{path}: was not set, is {new[key]!r}", None, new[key]
            elif key not in new:
                yield f"{path}: was {old[key]!r}, is not set", old[key], None
            else:
                yield from _differences(old[key], new[key], path)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, after, f"{where}.{index}")
    elif old != new:
        yield f"{where}: was {old!r}, is {new!r}", old, new


@dataclass(frozen=True)
class Run:
    """One command's run: the recipe with its paths resolved, and its folder."""

    name: str
    recipe: Recipe
    dir: Path
    source: Path
    """The recipe's file."""
    round: int = 0
    """Which round of labels, switcher and evaluation this is (`rollout.rounds`), from 1; 0 where there is but one."""

    def task_specs(self, split: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """The recipe's tasks as `switchgen.tasks.load_task` takes them, with another split or limit if given."""
        specs = []
        for task in self.recipe.tasks:
            spec = task.model_dump(exclude_none=True)
            if split is not None:
                spec["split"] = split
            if limit is not None:
                spec["limit"] = min(limit, spec.get("limit", limit))
            specs.append(spec)
        return specs

    @property
    def switcher_adapter(self) -> Path:
        """Where `train` leaves the switcher."""
        return self.dir / "switcher"


def open_run(recipe: str, overrides: list[str] | tuple[str, ...] = (), run_dir: str | Path | None = None) -> Run:
    """Load a recipe and resolve its paths against its own folder, the working folder and the run folder.

    `{lab}` becomes RUN/lab if that is there, else the shipped ladder where it is the same (world seed 0, size small).

    Raises:
        ConfigError: the recipe is wrong.
    """
    source = find_recipe(recipe)
    loaded = load_recipe(recipe, overrides)
    name = source.stem
    folder = Path(run_dir) if run_dir is not None else Path("runs") / name
    lab = lab_folder(loaded, folder)

    def place(text: str | None) -> str | None:
        if text is None:
            return None
        if "{lab}" in text:
            return text.replace("{lab}", str(lab))
        for base in (source.parent, Path.cwd()):
            candidate = base / Path(text).expanduser()
            if candidate.exists():
                return str(candidate.resolve())
        return text

    data = loaded.model_dump()
    for candidate in data["pool"]:
        candidate["model"], candidate["adapter"] = place(candidate["model"]), place(candidate["adapter"])
    if loaded.evaluate.baselines:
        data["evaluate"]["policies"] = all_policies(loaded.names, loaded.evaluate.policies)
    for policy in loaded.evaluate.leave_one_out:
        left = [policy, *(f"{policy}~{name}" for name in loaded.names)]
        listed = data["evaluate"]["policies"]
        data["evaluate"]["policies"] = [*listed, *(name for name in left if name not in listed)]
    switcher = data["switcher"]
    switcher["adapter"] = place(switcher["adapter"])
    if switcher["base"] not in (None, *loaded.names):
        switcher["base"] = place(switcher["base"])
    if data["router"]["judge"] not in (None, *loaded.names):
        data["router"]["judge"] = place(data["router"]["judge"])
    for key in ("embedding_model", "reward_model"):
        data["sweep"][key] = place(data["sweep"][key])
    for section in ("evaluate", "rollout", "baselines"):
        data[section]["reward_model"] = place(data[section]["reward_model"])
    for task in data["tasks"]:
        task["file"] = place(task["file"])
    return Run(name, Recipe.model_validate(data), folder, source)


def lab_folder(recipe: Recipe, run_dir: Path) -> Path:
    """The lab ladder's folder: RUN/lab once it is built, or the shipped one where it is the one the recipe asks for."""
    built = run_dir / "lab"
    settings = recipe.lab
    if (built / "aligned").is_dir() or settings is None:
        return built.resolve()
    return SHIPPED_LAB if shipped_lab_fits(settings) else built.resolve()


def check_lab(run: Run) -> None:
    """See that the lab ladder is there, where the pool is of it.

    Raises:
        ConfigError: it is not built yet.
    """
    folder = lab_folder(run.recipe, run.dir)
    models = [Path(candidate.model) for candidate in run.recipe.pool]
    if any(model.is_relative_to(folder) and not model.is_dir() for model in models):
        raise ConfigError(f"the small ladder is not in {folder}; `switchgen lab` with the same recipe, settings and "
                          "--run-dir builds it")  # fmt: skip


def shipped_lab_fits(settings: LabConfig) -> bool:
    """Whether the ladder that is shipped is the one that these settings ask for."""
    return settings.seed == 0 and settings.size == "small" and not settings.rebuild


def write_provenance(run: Run) -> None:
    """Leave the resolved recipe and the versions in the run folder."""
    write_atomic(run.dir / "recipe.yaml", dump_recipe(run.recipe))
    write_json(run.dir / "run.json", provenance(run))


def provenance(run: Run) -> dict[str, Any]:
    """What a run depends on beside its recipe."""
    packages = ("switchgen", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "schema": 1,
        "recipe": run.name,
        "versions": versions,
        "python": platform.python_version(),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cpus": os.cpu_count()},
    }
