"""Distillation: what the candidates write together becomes SFT data for one of them (arXiv 2510.09913, distillation).

    RUN/distill-data/responses.jsonl   the collaboration's responses, scored
    RUN/distilled/                     the student: a whole model, or an adapter (`distill.lora`)

`switchgen distill RECIPE` writes and fits in one process. The fit alone runs under a launcher, as `train/switcher.py`
does; the responses are written before, by `switchgen distill RECIPE --launcher deepspeed --num-gpus N` or without one.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # A launcher starts this file by its path, which puts the stage's folder first on the path instead of the project's.
    sys.path[:] = [str(Path(__file__).resolve().parents[1]), *sys.path[1:]]

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from switchgen.config import CandidateConfig, Recipe
from switchgen.errors import ConfigError, DataError
from switchgen.files import finished_folder, write_atomic, write_json
from switchgen.ids import content_hash
from switchgen.loading import check_model, load_vocabulary
from switchgen.ranks import is_launched, is_main_process, world_size
from switchgen.rundir import Run, claim_stage, provenance
from switchgen.vocabulary import Vocabulary
from switchgen.weights import weights_hash
from switchgen.workers import num_workers_of
from train.launch import Launcher, launch
from train.responses import (
    StudentData,
    check_responses,
    read_responses,
    student_data,
    training_questions,
    write_responses,
)

logger = logging.getLogger("switchgen")

_CHECKPOINTS = "distilled-checkpoints"


@dataclass
class StudentPlan:
    """A fit that has been checked and can begin."""

    base: CandidateConfig
    vocabulary: Vocabulary
    data: StudentData
    settings: dict[str, Any]
    """What the student depends on; another start with the same settings finds it finished."""


def main(
    run: Run,
    *,
    launcher: Launcher | None = None,
    num_gpus: int | None = None,
    deepspeed: str | None = None,
    command: Sequence[str] = (),
    workers: int | None = None,
) -> dict[str, Any]:
    """Write the collaboration's responses, fit the student on the good ones, leave RUN/distilled.

    Args: see `train.switcher.main`; `workers` write the responses (default `distill.workers`).

    Returns:
        Counts of the responses, tokens spent, seconds.

    Raises:
        ConfigError, DataError, ModelError: the recipe or the data cannot be used; found before any model is loaded.
    """
    from train.arguments import check_arguments  # noqa: PLC0415
    from train.sft import remove_leftovers  # noqa: PLC0415

    num_workers = num_workers_of(run.recipe.distill.workers, workers)
    check_arguments("distill", run.recipe.distill.args)
    base = student_base(run.recipe)
    check_model(base)
    questions = training_questions(run)
    if is_launched():
        check_responses(run, questions)
    else:
        write_responses(run, questions, workers=num_workers)
    plan = prepare(run, base, read_responses(run, questions))
    folder = run.dir / "distilled"
    if (folder / "switchgen.json").is_file():
        claim_stage(folder, "distill", plan.settings)
        remove_leftovers(run.dir / _CHECKPOINTS)
        logger.info("%s is finished; delete it to distill again", folder)
    elif launcher is not None and not is_launched():
        launch(run, Path(__file__), launcher, num_gpus=num_gpus, deepspeed=deepspeed, command=command)
    else:
        fit_student(run, plan, deepspeed=deepspeed)
    return summary_of(run)


def student_base(recipe: Recipe) -> CandidateConfig:
    """The candidate that learns.

    Raises:
        ConfigError: an adapter was asked for over a candidate that is itself one.
    """
    name = recipe.distill.base or recipe.names[-1]
    base = next(config for config in recipe.pool if config.name == name)
    if base.adapter is not None and recipe.distill.lora is not None:
        raise ConfigError(
            f"distill.lora: {name!r} is itself an adapter ({base.adapter}); train the whole student "
            "(distill.lora: null), or choose another distill.base"
        )
    return base


def prepare(run: Run, base: CandidateConfig, records: Sequence[dict[str, Any]]) -> StudentPlan:
    """Filter the responses and make the examples; loads a tokenizer, no model.

    Raises:
        DataError: nothing is left to learn from.
        ModelError: the base has no end of text.
    """
    settings = run.recipe.distill
    vocabulary = load_vocabulary(base.model, revision=base.revision, trust_remote_code=base.trust_remote_code)
    end_id, max_positions = _end_and_context(base, vocabulary)
    data = student_data(
        records, base, vocabulary, end_id, min_score=settings.min_score,
        max_length=min(settings.max_length, max_positions or settings.max_length),
    )  # fmt: skip
    if not data.rows:
        raise DataError(
            f"{run.dir / 'distill-data'}: none of {len(records)} responses is left to learn from: "
            f"{data.counts()['left_out']}; allowed: more questions or samples, or a smaller distill.min_score"
        )
    return StudentPlan(base, vocabulary, data, {
        "base": base.model,
        "weights": weights_hash(base.model, base.revision),
        "adapter": base.adapter,
        "responses": content_hash([[row["input_ids"], row["labels"].count(-100)] for row in data.rows]),
        "distill": {**settings.model_dump(mode="json", exclude={"workers"}),
                    "args": {key: value for key, value in settings.args.items() if key != "deepspeed"}},
    })  # fmt: skip


def _end_and_context(base: CandidateConfig, vocabulary: Vocabulary) -> tuple[int, int | None]:
    """The base's end-of-text token and the longest context it takes."""
    from transformers import AutoConfig  # noqa: PLC0415

    config = AutoConfig.from_pretrained(
        base.model, revision=base.revision, trust_remote_code=base.trust_remote_code
    ).get_text_config()
    end = vocabulary.tokenizer.eos_token_id
    if end is None:
        end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    if end is None:
        raise ConfigError(f"distill.base: {base.model} has no end of text; a student must learn where to stop")
    return end, getattr(config, "max_position_embeddings", None)


def summary_of(run: Run) -> dict[str, Any]:
    """The figures of RUN/distilled."""
    folder = run.dir / "distilled"
    facts = json.loads((folder / "switchgen.json").read_text(encoding="utf-8"))
    counts = {key: facts["responses"][key] for key in ("written", "kept", "left_out")}
    return {"student": str(folder), "responses": counts, **{key: facts[key] for key in ("tokens", "steps", "seconds")}}


def fit_student(run: Run, plan: StudentPlan, *, deepspeed: str | None = None) -> None:
    """Fit in this process, or in this rank of several."""
    from train.sft import fit_folder  # noqa: PLC0415

    checkpoints = run.dir / _CHECKPOINTS
    arguments = {**run.recipe.distill.args, **({} if deepspeed is None else {"deepspeed": deepspeed})}
    with fit_folder(checkpoints, "distill", plan.settings, arguments.get("deepspeed")):
        facts = _train(run, plan, arguments, checkpoints)
        if is_main_process():
            _leave(run, plan, facts, checkpoints / "final")


def _train(run: Run, plan: StudentPlan, arguments: dict[str, Any], checkpoints: Path) -> dict[str, Any]:
    """Load, fit, save into the checkpoints' folder; returns the facts for `switchgen.json`."""
    from datasets import Dataset  # noqa: PLC0415
    from trl import SFTTrainer  # noqa: PLC0415

    from train.arguments import sft_config  # noqa: PLC0415
    from train.sft import RowCollator, fit, load_base, lora_config  # noqa: PLC0415
    from train.tracking import Tracker  # noqa: PLC0415

    settings, data = run.recipe.distill, plan.data
    started = time.monotonic()
    config = sft_config(
        "distill", arguments, output_dir=checkpoints, seed=settings.seed, base=plan.base, evaluates=False,
        tracked=run.recipe.tracking.wandb,
    )  # fmt: skip
    model = load_base(plan.base, full=settings.lora is None)
    tokenizer = plan.vocabulary.tokenizer
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(data.rows),
        data_collator=RowCollator(tokenizer.pad_token_id or 0),
        processing_class=tokenizer,
        peft_config=None if settings.lora is None else lora_config(settings.lora, model),
    )
    counts = data.counts()
    tracker = Tracker(run, "distill", {"responses": counts}, active=is_main_process())
    log = fit(trainer, checkpoints, "distill")
    tracker.finish(log)
    trainer.save_model(str(checkpoints / "final"))
    losses = [
        {"epoch": round(entry["epoch"], 4), "step": entry["step"], "loss": entry["loss"]}
        for entry in trainer.state.log_history if "loss" in entry
    ]  # fmt: skip
    return {
        "schema": 1,
        "recipe": run.name,
        "base": plan.base.model,
        "base_name": plan.base.name,
        "candidates": run.recipe.names,
        "policy": settings.policy,
        "adapter": settings.lora is not None,
        "responses": counts,
        "tokens": data.tokens,
        "learning_curve": losses,
        **log,
        "processes": world_size(),
        "settings": plan.settings["distill"],
        "versions": provenance(run)["versions"],
        "seconds": round(time.monotonic() - started, 1),
    }


def _leave(run: Run, plan: StudentPlan, facts: dict[str, Any], final: Path) -> None:
    """RUN/distilled, as a whole or not at all."""
    from train.cards import student_card  # noqa: PLC0415
    from train.sft import ADAPTER_FILES, copy_weights  # noqa: PLC0415

    with finished_folder(run.dir / "distilled") as folder:
        if facts["adapter"]:
            for name in ADAPTER_FILES:
                shutil.copyfile(final / name, folder / name)
        else:
            copy_weights(final, folder, plan.base)
        plan.vocabulary.tokenizer.save_pretrained(folder)
        write_atomic(folder / "README.md", student_card(facts))
        claim_stage(folder, "distill", plan.settings)
        write_json(folder / "switchgen.json", facts)


if __name__ == "__main__":
    from train.launch import script

    sys.exit(script(main))
