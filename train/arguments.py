"""Trainer arguments: our defaults, the machine's, the recipe's; unknown ones are found before models load."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from switchgen.config import CandidateConfig, nearest
from switchgen.errors import ConfigError
from switchgen.ranks import is_launched, world_size
from train.launch import deepspeed_file

if TYPE_CHECKING:
    from trl import SFTConfig

logger = logging.getLogger("switchgen")

# SFTConfig's settings that are ours to make, and what to use instead.
OWNED_ARGUMENTS = {
    "output_dir": "the run folder is --run-dir",
    "overwrite_output_dir": "the run folder is --run-dir",
    "max_length": "use the section's own max_length",
    "seed": "use the section's own seed",
    "data_seed": "use the section's own seed",
    "report_to": "use tracking.wandb",
    "run_name": "use tracking.name",
    "project": "use tracking.project",
    "resume_from_checkpoint": "the same command goes on by itself",
    "remove_unused_columns": "the tokens are prepared by switchgen",
    "dataset_kwargs": "the tokens are prepared by switchgen",
    "dataset_text_field": "the tokens are prepared by switchgen",
    "truncation_mode": "long traces lose their middle",
    "packing": "each row is an example of its own",
    "eval_packing": "each row is an example of its own",
    "padding_free": "each row is an example of its own",
    "completion_only_loss": "only what is to be learned has a loss",
    "assistant_only_loss": "only what is to be learned has a loss",
    "chat_template_path": "the base's own chat template is used",
    "eos_token": "the base's own end of text is used",
    "pad_token": "padding is masked",
    "model_init_kwargs": "the base is loaded with the candidate's settings",
    "push_to_hub": "use --push-to-hub ORG/NAME",
    "label_names": "the labels are prepared by switchgen",
    "use_cpu": "use the base's device",
}

# The defaults of the later toolkit (MoCo).
DEFAULT_ARGUMENTS: dict[str, Any] = {
    "learning_rate": 1e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "num_train_epochs": 5,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 32,
    "logging_steps": 10,
    "save_strategy": "epoch",
    "save_total_limit": 2,
}


def check_arguments(section: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """See that trainer arguments exist in `trl.SFTConfig` and have a fitting type, before anything is loaded.

    Numbers that YAML reads as text (`1e-5`) become numbers.

    Args:
        section: `train` or `distill`, for messages.

    Raises:
        ConfigError: lists every problem.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError  # noqa: PLC0415
    from trl import SFTConfig  # noqa: PLC0415

    hints = get_type_hints(SFTConfig)
    known = [entry.name for entry in fields(SFTConfig) if entry.init]
    allowed = [name for name in known if name not in OWNED_ARGUMENTS]
    checked: dict[str, Any] = {}
    problems = []
    for name, value in arguments.items():
        where = f"{section}.args.{name}"
        if name in OWNED_ARGUMENTS:
            problems.append(f"{where}: not allowed here: {OWNED_ARGUMENTS[name]}")
        elif name not in known:
            problems.append(f"{where}: trl.SFTConfig has no such argument{nearest(name, allowed)}")
        else:
            try:
                adapter = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True))
                read = adapter.validate_python(value)
            except ValidationError as error:
                reason = "; ".join(sorted({problem["msg"] for problem in error.errors()}))
                problems.append(f"{where}: got {value!r}: {reason}")
                continue
            checked[name] = read if isinstance(value, str) and isinstance(read, int | float) else value
    if problems:
        raise ConfigError("\n".join([f"{section}.args: trainer arguments that cannot be used", *problems]))
    return checked


def sft_config(
    section: str,
    arguments: Mapping[str, Any],
    *,
    output_dir: Path,
    seed: int,
    base: CandidateConfig,
    evaluates: bool,
    tracked: bool,
    defaults: Mapping[str, Any] | None = None,
) -> SFTConfig:
    """TRL's arguments: our defaults, the machine's, the recipe's, and the ones that are ours to make.

    Making it also joins the other ranks, and under ZeRO-3 makes models load in shards: it comes before the model.

    Raises:
        ConfigError: the arguments do not fit together, or deepspeed was asked for without its launcher.
    """
    from trl import SFTConfig  # noqa: PLC0415

    given = check_arguments(section, arguments)
    on_cpu = trains_on_cpu(base)
    machine: dict[str, Any] = {"use_cpu": on_cpu}
    if on_cpu:
        machine |= {"bf16": False, "dataloader_pin_memory": False}
        if world_size() > 1:
            machine["ddp_backend"] = "gloo"
    if world_size() > 1:
        # Every trained weight takes part in every step; looking for others costs a walk over the graph.
        machine["ddp_find_unused_parameters"] = False
    if evaluates:
        machine |= {"eval_strategy": "epoch", "eval_on_start": True, "per_device_eval_batch_size": 8}
    if not any("checkpointing" in name for name in given):
        machine[_checkpointing_argument()] = not on_cpu
    values = {**DEFAULT_ARGUMENTS, **(defaults or {}), **machine, **given}
    if values.get("deepspeed"):
        if not is_launched():
            raise ConfigError(
                f"{section}.args.deepspeed: deepspeed needs its launcher: --launcher deepspeed, or "
                "`deepspeed … train/switcher.py RECIPE`"
            )
        if isinstance(values["deepspeed"], str):
            values["deepspeed"] = deepspeed_file(values["deepspeed"])
        _join_deepspeed(on_cpu)
    values |= {
        "output_dir": str(output_dir),
        "seed": seed,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "report_to": ["wandb"] if tracked else [],
        "completion_only_loss": False,
    }
    # TRL tells its makers which kinds of models and trainers are used; nobody here asked for that.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        config = SFTConfig(**values)
        if config.n_gpu > 1:
            logger.warning("%s: one of %d GPUs is used; --launcher deepspeed uses them all", section, config.n_gpu)
            config._n_gpu = 1
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{section}.args: {' '.join(str(error).split())}") from None
    return config


def _checkpointing_argument() -> str:
    """What transformers calls recomputing activations in the backward pass; the older name warns where the newer is."""
    from trl import SFTConfig  # noqa: PLC0415

    names = {entry.name for entry in fields(SFTConfig)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


def _join_deepspeed(on_cpu: bool) -> None:
    """Meet the other ranks in deepspeed's way; on CPU it needs to be told the backend, before a model is loaded."""
    try:
        import deepspeed  # noqa: PLC0415
    except ImportError:
        raise ConfigError("deepspeed is not installed (pip install 'switchgen[deepspeed]')") from None
    deepspeed.init_distributed(dist_backend="gloo" if on_cpu else None)


def trains_on_cpu(base: CandidateConfig) -> bool:
    """Whether the fit runs on CPU: the base's device says so, or there is no GPU."""
    import torch  # noqa: PLC0415

    return base.device == "cpu" or not torch.cuda.is_available()
