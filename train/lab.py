"""The verb `lab`: builds a world's ladder and tasks from scratch, stage by stage, and resumes where it was stopped.

`switchgen lab RECIPE` starts `lab.workers` processes that train each rung together; this file is what they run:

    torchrun --standalone --nproc-per-node 2 train/lab.py RECIPE [a.b=c …] --run-dir DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # A launcher starts this file by its path, which puts the stage's folder first on the path instead of the project's.
    sys.path[:] = [str(Path(__file__).resolve().parents[1]), *sys.path[1:]]

import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from switchgen.config import LabConfig
from switchgen.errors import ConfigError
from switchgen.files import lock
from switchgen.ids import content_hash
from switchgen.ranks import is_launched, is_main_process, world_size
from switchgen.rundir import Run
from train import ladder_texts
from train.ladder import MODEL_TYPE, LadderShape, chat_tokenizer, load_rung, new_model, save_rung, train_tokenizer
from train.launch import barrier, launch
from train.sft import library_notices_off
from train.stages import StageProgress, StageSteps, align, finetune, pretrain
from train.world import World, make_world
from train.world_tasks import FAMILIES, write_tasks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

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
        pretrained=StageSteps(2000, 16, 0.02, 1e-2),
        finetuned=StageSteps(400, 32, 0.02, 2e-3),
        aligned=StageSteps(240, 32, 0.0025, 5e-4),
    ),
    # For tests: every stage runs and moves in the right direction; nothing is learned well.
    "tiny": LabSize(
        LadderShape(hidden_size=64, intermediate_size=192, num_layers=2),
        pretrained=StageSteps(120, 16, 0.02, 1e-2),
        finetuned=StageSteps(120, 16, 0.02, 4e-3),
        aligned=StageSteps(60, 16, 0.02, 3e-3, warmup=5),
    ),
}


def main(run: Run, *, deepspeed: str | None = None) -> dict[str, Any]:
    """The ladder of the recipe's `lab` section in RUN/lab, by as many processes as `lab.workers` says.

    Returns:
        The ladder's folder, and each rung's seconds.

    Raises:
        ConfigError: the recipe has no `lab` section, it cannot be trained by so many processes, or deepspeed was
            asked for.
        WorkerError: the launched processes failed.
    """
    config = run.recipe.lab
    if config is None:
        raise ConfigError(f"{run.source}: the recipe has no `lab` section; the shipped recipe `lab` has one")
    if deepspeed is not None:
        raise ConfigError("the lab's models are far too small to be sharded; leave --deepspeed out")
    out = run.dir / "lab"
    _check_workers(world_size() if is_launched() else config.workers)
    if is_launched():
        import torch.distributed as dist  # noqa: PLC0415

        dist.init_process_group("gloo")
        try:
            build_lab(config, out)
        finally:
            dist.destroy_process_group()
    elif config.workers == 1 or is_built(config, out):
        build_lab(config, out)
    else:
        launch(run, Path(__file__), "torchrun", num_gpus=config.workers)
    return {"lab": str(out), **json.loads((out / "lab.json").read_text(encoding="utf-8"))["seconds"]}


def is_built(config: LabConfig, out: Path) -> bool:
    """Whether each rung in `out` is finished and of this very config."""
    return all(_finished(out / rung, _identity(config)) is not None for rung in RUNGS)


def build_lab(config: LabConfig, out: Path, progress: StageProgress | None = None) -> None:
    """Trains the ladder of one world seed into `out`, or finishes what an earlier start left there.

    Leaves `pretrained/`, `finetuned/` and `aligned/` (bfloat16 models with tokenizers), `tasks/*.json`, and `lab.json`
    (seed, size, versions, seconds and losses of each stage). A stage's folder appears only when it is complete. Under
    torchrun all ranks call this and train each rung together; the first one writes.

    Args:
        config: world seed and size.
        out: the folder to fill; made if missing.
        progress: called with (stage, done, total) as the work goes on; default: a bar for each.

    Raises:
        ValueError: `config.size` is no key of `SIZES`.
        StorageError: another build is at work in `out`.
    """
    identity = _identity(config)
    with lock(out) if is_main_process() else nullcontext():
        _build_rungs(identity, make_world(config.seed), SIZES[config.size], out, progress or _Bars())


def _build_rungs(identity: dict[str, Any], world: World, size: LabSize, out: Path, report: StageProgress) -> None:
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
    if is_main_process():
        write_tasks(world, out / "tasks")
        _write_json(out / "lab.json", _summary(identity, records))
    barrier()


def _identity(config: LabConfig) -> dict[str, Any]:
    """What a ladder depends on: its settings, and what the stages read, of which a sample is hashed.

    The number of processes is not among it: it changes roundings, not what is learned.
    """
    if config.size not in SIZES:
        raise ValueError(f"lab.size: got {config.size!r}, allowed are {', '.join(SIZES)}")
    world = make_world(config.seed)
    streams = (ladder_texts.documents(world, 0), ladder_texts.chats(world, 1), ladder_texts.preferred(world, 2))
    texts = content_hash([list(itertools.islice(stream, 100)) for stream in streams])
    settings = asdict(SIZES[config.size])
    return {"world_seed": config.seed, "size": config.size, "model": MODEL_TYPE, "settings": settings, "texts": texts}


def _check_workers(workers: int) -> None:
    """That they share every batch (16 or 32 rows), and that each has some of the smallest ladder's 14 matrices."""
    if workers not in (1, 2, 4, 8):
        raise ConfigError(f"lab.workers: got {workers} processes; allowed: 1, 2, 4 or 8")


@dataclass(frozen=True)
class _Trained:
    """What a stage hands back."""

    model: PreTrainedModel
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
    return _Trained(*align(out / "finetuned", world, size.aligned, progress))


def _build(folder: Path, identity: dict[str, Any], train: Callable[[], _Trained]) -> dict[str, Any]:
    """Trains one rung and moves it to `folder` as a whole; a killed build leaves only a folder named `*.partial`."""
    started = time.perf_counter()
    with _quiet_libraries():
        trained = train()
        record = {**identity, "seconds": round(time.perf_counter() - started, 1), "losses": trained.losses}
        if is_main_process():
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            save_rung(trained.model, trained.tokenizer, partial)
            _write_json(partial / _RECORD, record)
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
    barrier()  # the next rung is trained from this one's files
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
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with library_notices_off():
            yield
    finally:
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


class _Bars:
    """A bar for each stage, one after the other, on the main process's stderr."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm[Any]] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._bars:
            self._bars[stage] = tqdm(total=total, desc=f"lab: {stage}", disable=None)
        bar = self._bars[stage]
        bar.update(done - bar.n)
        if done >= total:
            bar.close()


if __name__ == "__main__":
    from train.launch import script

    sys.exit(script(main))
