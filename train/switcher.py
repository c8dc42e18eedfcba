"""The switcher's fit: labels from rollouts → a LoRA adapter in RUN/switcher (arXiv 2510.09913, training).

`switchgen train RECIPE` runs it in one process. Under a launcher this file is the script:

    deepspeed --num_gpus 4 train/switcher.py RECIPE [a.b=c …] --run-dir DIR --deepspeed configs/deepspeed/zero2.json
    torchrun --standalone --nproc-per-node 2 train/switcher.py RECIPE [a.b=c …] --run-dir DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # A launcher starts this file by its path, which puts the stage's folder first on the path instead of the project's.
    sys.path[:] = [str(Path(__file__).resolve().parents[1]), *sys.path[1:]]

import json
import logging
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from switchgen.candidates import prompt_style
from switchgen.config import CandidateConfig, Recipe
from switchgen.errors import ConfigError, DataError
from switchgen.files import finished_folder, write_atomic, write_json
from switchgen.ids import content_hash
from switchgen.loading import load_vocabulary
from switchgen.prompts import FORMATS, SwitcherPrompt
from switchgen.ranks import is_launched, is_main_process, world_size
from switchgen.rundir import Run, claim_stage, provenance
from switchgen.weights import weights_hash
from train.label_data import LabelData, label_examples, read_labels
from train.launch import Launcher, launch

logger = logging.getLogger("switchgen")

_CHECKPOINTS = "switcher-checkpoints"
FEW_EXAMPLES = 330
"""Fits on fewer kept examples can collapse to one label (measured on the lab's ladder)."""


@dataclass
class SwitcherPlan:
    """A fit that has been checked and can begin."""

    base: CandidateConfig
    prompt: SwitcherPrompt
    data: LabelData
    settings: dict[str, Any]
    """What the adapter depends on; another start with the same settings finds it finished."""


def main(
    run: Run,
    *,
    launcher: Launcher | None = None,
    num_gpus: int | None = None,
    deepspeed: str | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Fit the switcher and leave RUN/switcher; a fit that was killed goes on from its last checkpoint.

    Args:
        launcher: start several processes; None fits in this one.
        num_gpus: processes for the launcher; default one per GPU.
        deepspeed: deepspeed settings (a file, or `zero2`, `zero3`, `zero3-offload`).
        command: recipe and overrides as given, for the launched processes.

    Returns:
        Counts, label accuracy against majority and random, seconds.

    Raises:
        ConfigError, DataError, ModelError: found before any model is loaded.
    """
    from train.sft import remove_leftovers  # noqa: PLC0415

    if run.recipe.switcher.kind == "probe":
        return _probe(run, launcher)
    plan = prepare(run)
    finished = finished_summary(run, plan.settings)
    if finished is not None:
        remove_leftovers(run.dir / _CHECKPOINTS)
        return finished
    if launcher is not None and not is_launched():
        launch(run, Path(__file__), launcher, num_gpus=num_gpus, deepspeed=deepspeed, command=command)
        return summary_of(run)
    return fit_switcher(run, plan, deepspeed=deepspeed)


def _probe(run: Run, launcher: Launcher | None) -> dict[str, Any]:
    """Fit a probe instead of an LM; seconds of work, in this process."""
    from train.probe import dependencies, fit_probe  # noqa: PLC0415

    if launcher is not None or is_launched():
        raise ConfigError("switcher.kind: probe: a probe is fitted in one process, in seconds; leave the launcher out")
    finished = finished_summary(run, dependencies(run))
    if finished is None:
        fit_probe(run)
    return finished or summary_of(run)


def prepare(run: Run) -> SwitcherPlan:
    """Check recipe and labels and make the examples; loads a tokenizer, no model.

    Raises:
        ConfigError, DataError, ModelError: what is wrong.
    """
    from transformers import AutoConfig  # noqa: PLC0415

    from train.arguments import check_arguments  # noqa: PLC0415

    recipe = run.recipe
    settings = recipe.train
    if not 2 <= len(recipe.pool) <= 10:
        raise ConfigError(f"pool: a switcher chooses between 2 and 10 candidates; got {len(recipe.pool)}")
    if settings.lora is None:
        raise ConfigError("train.lora: null: a switcher is a LoRA adapter over its base; allowed: r, alpha, dropout, …")
    check_arguments("train", settings.args)
    base = switcher_base(recipe)
    records = read_labels(run)
    vocabulary = load_vocabulary(base.model, revision=base.revision, trust_remote_code=base.trust_remote_code)
    chat = prompt_style(base, vocabulary) == "chat"
    prompt = SwitcherPrompt(vocabulary, len(recipe.pool), chat=chat, format=FORMATS[recipe.switcher.format])
    model_config = AutoConfig.from_pretrained(
        base.model, revision=base.revision, trust_remote_code=base.trust_remote_code
    ).get_text_config()
    max_positions = getattr(model_config, "max_position_embeddings", None) or settings.max_length
    data = label_examples(records, prompt, settings, min(settings.max_length, max_positions))
    if not data.train:
        counts = data.counts(len(recipe.pool))
        raise DataError(
            f"{run.dir / 'rollout'}: none of {data.num_records} label records can be trained on (held out: "
            f"{counts['held_out']}; left out: {counts['left_out']}); allowed: more states, a smaller train.min_margin "
            "or train.held_out, or train.keep_ties"
        )
    return SwitcherPlan(base, prompt, data, {
        "base": base.model,
        "weights": weights_hash(base.model, base.revision),
        "candidates": recipe.names,
        "format": recipe.switcher.format,
        "labels": content_hash([[r["id"], r["means"], r["segments"], r["messages"]] for r in records]),
        "train": {**settings.model_dump(mode="json"), "args": {key: value for key, value in settings.args.items()
                                                               if key != "deepspeed"}},
    })  # fmt: skip


def switcher_base(recipe: Recipe) -> CandidateConfig:
    """The model that the switcher's adapter goes over, with the settings it is loaded with at inference.

    Raises:
        ConfigError: it is itself an adapter.
    """
    wanted = recipe.switcher.base or recipe.names[-1]
    by_name = [config for config in recipe.pool if config.name == wanted]
    by_model = [config for config in recipe.pool if config.model == wanted and config.adapter is None]
    own = CandidateConfig(
        name="switcher-base", model=wanted, dtype=recipe.switcher.dtype, device=recipe.switcher.device,
        revision=recipe.switcher.revision, trust_remote_code=recipe.switcher.trust_remote_code,
    )  # fmt: skip
    base = next(iter([*by_name, *by_model, own]))
    if base.adapter is not None:
        raise ConfigError(
            f"switcher.base: {base.name!r} is itself an adapter ({base.adapter}); a switcher needs a whole "
            "model as its base"
        )
    return base


def finished_summary(run: Run, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The summary of a switcher that is there already, made with the same settings; None where there is none.

    Raises:
        ConfigError: there is one, made with other settings or other labels.
    """
    if not (run.switcher_adapter / "switchgen.json").is_file():
        return None
    try:
        claim_stage(run.switcher_adapter, "train", settings)
    except ConfigError:
        if not _other_labels_alone(run, settings):
            raise
        raise ConfigError(
            f"{run.switcher_adapter} was trained on other labels than those that are in {run.dir / 'rollout'} now. To "
            f"train on these, and to make anew what was made with the old switcher:\n  {_removal(run)}"
        ) from None
    logger.info("%s is finished; delete it to train again", run.switcher_adapter)
    return summary_of(run)


def _other_labels_alone(run: Run, settings: Mapping[str, Any]) -> bool:
    """Whether the finished switcher differs from the wanted one in its labels and nothing else."""
    made_with = json.loads((run.switcher_adapter / "stage.json").read_text(encoding="utf-8"))["settings"]
    wanted = json.loads(json.dumps(settings))
    return bool({**made_with, "labels": None} == {**wanted, "labels": None})


def _removal(run: Run) -> str:
    """The command that takes away a switcher, and what this run folder holds of its making."""
    made = ["switcher", "distill-data", "distilled"] if run.recipe.distill.policy == "switcher" else ["switcher"]
    places = [shlex.quote(str(run.dir / name)) for name in made if (run.dir / name).exists()]
    for policy in ("switcher", "routing", "distilled"):
        # The policy's claims and responses; names of masked policies begin with the policy's.
        if any(run.dir.glob(f"evaluation/*/{policy}*")):
            places.append(f"{shlex.quote(str(run.dir))}/evaluation/*/{policy}*")
    return f"rm -r {' '.join(places)}"


def summary_of(run: Run) -> dict[str, Any]:
    """The figures of RUN/switcher."""
    facts = json.loads((run.switcher_adapter / "switchgen.json").read_text(encoding="utf-8"))
    keys = ("accuracy", "majority", "random", "n_held_out", "labels", "seconds")
    return {"switcher": str(run.switcher_adapter), **{key: facts[key] for key in keys}}


def fit_switcher(run: Run, plan: SwitcherPlan, *, deepspeed: str | None = None) -> dict[str, Any]:
    """Fit in this process, or in this rank of several."""
    from train.sft import fit_folder  # noqa: PLC0415

    checkpoints = run.dir / _CHECKPOINTS
    arguments = {**run.recipe.train.args, **({} if deepspeed is None else {"deepspeed": deepspeed})}
    with fit_folder(checkpoints, "train", plan.settings, arguments.get("deepspeed")):
        if is_main_process():
            _warn(plan.data, run.recipe.train.held_out)
        facts = _train(run, plan, arguments, checkpoints)
        if is_main_process():
            _leave(run, plan, facts, checkpoints / "final")
    return summary_of(run)


def _warn(data: LabelData, share: float) -> None:
    if len(data.train) < FEW_EXAMPLES:
        logger.warning(
            "train: only %d labelled states are kept; fits on fewer than %d can collapse to one label: raise "
            "rollout.queries or rollout.states", len(data.train), FEW_EXAMPLES,
        )  # fmt: skip
    if share > 0 and not data.held_out:
        logger.warning("train: no query was held out of %d states; label accuracy is not measured", len(data.train))


def _train(run: Run, plan: SwitcherPlan, arguments: dict[str, Any], checkpoints: Path) -> dict[str, Any]:
    """Load, fit, measure, save the adapter into the checkpoints' folder; returns the facts for `switchgen.json`."""
    import time  # noqa: PLC0415

    from datasets import Dataset  # noqa: PLC0415

    from train.arguments import sft_config  # noqa: PLC0415
    from train.sft import fit, learning_curve, load_base, lora_config, training_losses  # noqa: PLC0415
    from train.switcher_trainer import LabelCollator, SwitcherTrainer, guess_metrics  # noqa: PLC0415
    from train.tracking import Tracker  # noqa: PLC0415

    settings, data = run.recipe.train, plan.data
    started = time.monotonic()
    counts = data.counts(len(run.recipe.pool))
    config = sft_config(
        "train", arguments, output_dir=checkpoints, seed=settings.seed, base=plan.base, evaluates=bool(data.held_out),
        tracked=run.recipe.tracking.wandb,
    )  # fmt: skip
    assert settings.lora is not None
    model = load_base(plan.base, full=False)
    tokenizer = plan.prompt.vocabulary.tokenizer
    rows = [[example.row(settings.tau) for example in part] for part in (data.train, data.held_out)]
    trainer = SwitcherTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows[0]),
        eval_dataset=Dataset.from_list(rows[1]) if rows[1] else None,
        data_collator=LabelCollator(tokenizer.pad_token_id or 0),
        processing_class=tokenizer,
        peft_config=lora_config(settings.lora, model),
        label_ids=plan.prompt.label_ids,
        soft=settings.labels == "soft",
    )
    tracker = Tracker(run, "train", {"labels": counts}, active=is_main_process())
    log = fit(trainer, checkpoints, "train")
    measured: dict[str, Any] = {"accuracy": None, "majority": None, "random": None, "n_held_out": len(data.held_out)}
    if data.held_out:
        figures = trainer.predict(trainer.eval_dataset, metric_key_prefix="held_out").metrics
        measured |= {key: round(float(figures[f"held_out_{key}"]), 6) for key in ("accuracy", "outcome", "loss")}
        guesses = guess_metrics([example.means for example in data.held_out])
        measured |= {key: round(value, 6) for key, value in guesses.items()}
    tracker.finish({**measured, **log})
    trainer.save_model(str(checkpoints / "final"))
    return {
        "schema": 1,
        "recipe": run.name,
        "candidates": run.recipe.names,
        "format": run.recipe.switcher.format,
        "base": plan.base.model,
        "labels": counts,
        **measured,
        "learning_curve": learning_curve(trainer.state.log_history),
        "training_losses": training_losses(trainer.state.log_history),
        **log,
        "processes": world_size(),
        "settings": plan.settings["train"],
        "versions": provenance(run)["versions"],
        "seconds": round(time.monotonic() - started, 1),
    }


def _leave(run: Run, plan: SwitcherPlan, facts: dict[str, Any], final: Path) -> None:
    """RUN/switcher, as a whole or not at all."""
    from train.cards import switcher_card  # noqa: PLC0415
    from train.sft import ADAPTER_FILES  # noqa: PLC0415

    with finished_folder(run.switcher_adapter) as folder:
        for name in ADAPTER_FILES:
            shutil.copyfile(final / name, folder / name)
        plan.prompt.vocabulary.tokenizer.save_pretrained(folder)
        write_atomic(folder / "README.md", switcher_card(facts))
        claim_stage(folder, "train", plan.settings)
        write_json(folder / "switchgen.json", facts)


if __name__ == "__main__":
    from train.launch import script

    sys.exit(script(main))
