"""The verb `lab`: builds a world's ladder and tasks from scratch, stage by stage, and resumes where it was stopped."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchgen.config import LabConfig
from train.ladder import LadderShape, chat_tokenizer, load_rung, new_model, save_rung, train_tokenizer
from train.stages import StageProgress, StageSteps, align, finetune, pretrain
from train.world import World, make_world
from train.world_tasks import FAMILIES, write_tasks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_log = logging.getLogger("switchgen")

RUNGS = ("pretrained", "finetuned", "aligned")
_RECORD = "stage.json"


@dataclass(frozen=True)
class LabSize:
    """How large a ladder is, and how long each of its stages trains."""

    shape: LadderShape
    pretrained: StageSteps
    finetuned: StageSteps
    aligned: StageSteps


SIZES: Mapping[str, LabSize] = {
    # The shipped ladder.
    "small": LabSize(
        LadderShape(),
        pretrained=StageSteps(2400, 16, 0.02, 1e-2),
        finetuned=StageSteps(400, 32, 0.02, 2e-3),
        aligned=StageSteps(160, 32, 0.0025, 5e-4),
    ),
    # For tests: every stage runs and moves in the right direction; nothing is learned well.
    "tiny": LabSize(
        LadderShape(hidden_size=64, intermediate_size=192, num_layers=2),
        pretrained=StageSteps(120, 16, 0.02, 1e-2),
        finetuned=StageSteps(120, 16, 0.02, 4e-3),
        aligned=StageSteps(60, 16, 0.02, 3e-3, warmup=5),
    ),
}


def build_lab(config: LabConfig, out: Path, progress: StageProgress | None = None) -> None:
    """Trains the ladder of one world seed into `out`, or finishes what an earlier start left there.

    Leaves `pretrained/`, `finetuned/` and `aligned/` (bfloat16 models with tokenizers), `tasks/*.json`, and `lab.json`
    (seed, size, versions, seconds and losses of each stage). A stage's folder appears only when it is complete.

    Args:
        config: world seed and size.
        out: the folder to fill; made if missing.
        progress: called with (stage, done, total) as the work goes on.

    Raises:
        ValueError: `config.size` is no key of `SIZES`.
    """
    if config.size not in SIZES:
        raise ValueError(f"lab.size: got {config.size!r}, allowed are {', '.join(SIZES)}")
    size = SIZES[config.size]
    report = progress or _silent
    out.mkdir(parents=True, exist_ok=True)
    world = make_world(config.seed)
    identity = {"world_seed": config.seed, "size": config.size, "settings": asdict(size)}

    trained: dict[str, Callable[[], _Trained]] = {
        "pretrained": lambda: _pretrained(world, size, report),
        "finetuned": lambda: _finetuned(world, size, out, report),
        "aligned": lambda: _aligned(world, size, out, report),
    }
    records = {}
    changed = False
    for rung in RUNGS:
        record = None if changed else _finished(out / rung, identity)
        if record is None:
            changed = True  # whatever stands on this rung is of another training now
            record = _build(out / rung, identity, trained[rung])
        records[rung] = record
    write_tasks(world, out / "tasks")
    _write_json(out / "lab.json", _summary(identity, records))


@dataclass(frozen=True)
class _Trained:
    """What a stage hands back."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    losses: list[float]


def _pretrained(world: World, size: LabSize, progress: StageProgress) -> _Trained:
    tokenizer = train_tokenizer(world, size.shape)
    model = new_model(size.shape, tokenizer, seed=world.seed)
    losses = pretrain(model, tokenizer, world, size.pretrained, size.shape.row_tokens, progress)
    return _Trained(model, tokenizer, losses)


def _finetuned(world: World, size: LabSize, out: Path, progress: StageProgress) -> _Trained:
    model, base_tokenizer = load_rung(out / "pretrained")
    tokenizer = chat_tokenizer(base_tokenizer)
    return _Trained(model, tokenizer, finetune(model, tokenizer, world, size.finetuned, progress))


def _aligned(world: World, size: LabSize, out: Path, progress: StageProgress) -> _Trained:
    model, tokenizer = load_rung(out / "finetuned")
    return _Trained(model, tokenizer, align(model, tokenizer, world, size.aligned, progress))


def _build(folder: Path, identity: dict[str, Any], train: Callable[[], _Trained]) -> dict[str, Any]:
    """Trains one rung and moves it to `folder` as a whole; a killed build leaves only a folder named `*.partial`."""
    started = time.perf_counter()
    with _quiet_libraries():
        trained = train()
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        save_rung(trained.model, trained.tokenizer, partial)
    record = {**identity, "seconds": round(time.perf_counter() - started, 1), "losses": trained.losses}
    _write_json(partial / _RECORD, record)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    _log.info("lab: %s trained in %.0f s, loss %.3f", folder.name, record["seconds"], trained.losses[-1])
    return record


def _finished(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a finished stage of this very config, else None."""
    path = folder / _RECORD
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record if all(record.get(key) == value for key, value in identity.items()) else None


def _summary(identity: dict[str, Any], records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "schema": 1,
        **identity,
        "families": list(FAMILIES),
        "seconds": {rung: record["seconds"] for rung, record in records.items()},
        "losses": {rung: [round(loss, 4) for loss in record["losses"]] for rung, record in records.items()},
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "tokenizers")},
    }


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keeps the libraries' own bars and notices off the terminal: progress is reported by the callback."""
    import datasets  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    data_bars = not datasets.are_progress_bars_disabled()
    # TRL's bar over the reference model's log-probabilities looks at this, when it begins; tqdm itself did at import.
    switch, there = "TQDM_DISABLE", os.environ.get("TQDM_DISABLE")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ[switch] = "1"
    try:
        yield
    finally:
        if there is None:
            del os.environ[switch]
        else:
            os.environ[switch] = there
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
        if data_bars:
            datasets.enable_progress_bars()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes beside and renames, so that a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _silent(stage: str, done: int, total: int) -> None:
    """Reports nothing."""
