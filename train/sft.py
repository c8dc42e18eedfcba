"""What the switcher's and the student's fits share: the base model, checkpoints that survive a kill, progress.

Tokens and labels are prepared by our own code and handed to TRL's SFTTrainer as they are: it truncates nothing, adds
nothing and drops nothing (`max_length=None`, preparation skipped).
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchgen.config import CandidateConfig, LoraSection
from switchgen.errors import ConfigError, ModelError
from switchgen.files import lock, storage
from switchgen.loading import adapter_folder, check_model, missing_weights
from switchgen.ranks import is_main_process, world_size
from switchgen.rundir import claim_stage
from train.arguments import trains_on_cpu
from train.launch import barrier, deepspeed_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback

logger = logging.getLogger("switchgen")

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

_COMPLETE = "complete"
_IGNORED = -100


@contextmanager
def fit_folder(checkpoints: Path, stage: str, settings: Mapping[str, Any], deepspeed: Any) -> Iterator[None]:
    """The folder of a fit's checkpoints: held while the block works, kept if it fails, removed once it has succeeded.

    Args:
        settings: what the result depends on; checkpoints of another fit, or of another kind of launch, are refused.
        deepspeed: the deepspeed settings of this launch (a name, a path, or what they say), or None.
    """
    launched = {"processes": world_size(), "deepspeed": deepspeed_settings(deepspeed)}
    with library_notices_off(), lock(checkpoints) if is_main_process() else nullcontext():
        if is_main_process():
            claim_stage(checkpoints, stage, {**settings, **launched})
        yield
        barrier()
        if is_main_process():
            shutil.rmtree(checkpoints)


def remove_leftovers(checkpoints: Path) -> None:
    """Remove the checkpoints of a fit that was killed after it had left its result: no other fit may go on from them.

    Raises:
        StorageError: a run is at work with them.
    """
    if is_main_process() and checkpoints.is_dir():
        with lock(checkpoints):
            shutil.rmtree(checkpoints)


@contextmanager
def library_notices_off() -> Iterator[None]:
    """Hide what the libraries say to each other's developers: deprecations inside transformers, TRL and PEFT."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def load_base(base: CandidateConfig, *, full: bool) -> PreTrainedModel:
    """The model that is trained, or that an adapter is trained on.

    Whole models are trained on float32 weights (mixed precision where SFTConfig says so); under an adapter the weights
    keep their own type on a GPU and are float32 on CPU. An adapter of the base itself is merged in.

    Raises:
        ModelError: it cannot be loaded.
    """
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    check_model(base)
    if base.quantization is not None:
        logger.warning("%s: quantization %s is for inference; the fit loads all weights", base.name, base.quantization)
    wanted: Any = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16,
                   "float16": torch.float16}.get(base.dtype, "auto")  # fmt: skip
    if wanted == "auto":
        wanted = torch.float32 if full or trains_on_cpu(base) else "auto"
    elif full and wanted in (torch.bfloat16, torch.float16):
        wanted = torch.float32
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            base.model, dtype=wanted, use_safetensors=True, revision=base.revision,
            trust_remote_code=base.trust_remote_code, output_loading_info=True,
        )  # fmt: skip
        if base.adapter is not None:
            from peft import PeftModel  # noqa: PLC0415

            model = PeftModel.from_pretrained(model, adapter_folder(base.adapter)).merge_and_unload()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{base.name}: model {base.model!r} cannot be loaded: {reason}") from None
    if incomplete := missing_weights(info):
        raise ModelError(f"{base.name}: model {base.model!r} {incomplete}")
    return model


def lora_config(lora: LoraSection, model: PreTrainedModel) -> Any:
    """PEFT's settings for the recipe's LoRA.

    Raises:
        ConfigError: none of the target modules is in the model, or lm_head is among them.
    """
    from peft import LoraConfig  # noqa: PLC0415

    targets = lora.target_modules
    if isinstance(targets, list):
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        missing = [target for target in targets if target.rpartition(".")[2] not in names]
        if missing:
            layers = sorted({name.rpartition(".")[2] for name, module in model.named_modules()
                             if hasattr(module, "weight") and getattr(module.weight, "ndim", 0) == 2})  # fmt: skip
            raise ConfigError(
                f"lora.target_modules: {type(model).__name__} has no {', '.join(missing)}; its layers: "
                f"{', '.join(layers)}"
            )
        if any(target.rpartition(".")[2] == "lm_head" for target in targets):
            raise ConfigError("lora.target_modules: TRL cannot train an adapter on lm_head; leave it out")
    return LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip


class RowCollator:
    """Batches of `{"input_ids", "labels"}`, padded on the right."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import torch  # noqa: PLC0415

        longest = max(len(row["input_ids"]) for row in rows)

        def padded(values: Sequence[int], fill: int) -> list[int]:
            return [*values, *[fill] * (longest - len(values))]

        return {
            "input_ids": torch.tensor([padded(row["input_ids"], self.pad_id) for row in rows]),
            "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
            "labels": torch.tensor([padded(row["labels"], _IGNORED) for row in rows]),
        }


def fit(trainer: Any, checkpoints: Path, label: str) -> dict[str, Any]:
    """Train, going on from the last whole checkpoint; returns what the log says of it.

    Args:
        label: what the progress bar calls it.
    """
    from transformers import PrinterCallback, ProgressCallback  # noqa: PLC0415
    from transformers.trainer_utils import get_last_checkpoint  # noqa: PLC0415

    if is_main_process():
        drop_torn_checkpoints(checkpoints)
    barrier()
    last = get_last_checkpoint(str(checkpoints))
    if last is not None:
        logger.info("%s: going on from %s", label, last)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_mark_callback())
    trainer.add_callback(_progress_callback(label))
    with storage(checkpoints):
        result = trainer.train(resume_from_checkpoint=last)
    return {
        "steps": trainer.state.global_step,
        "train_loss": round(result.training_loss, 6),
        "resumed_from": None if last is None else Path(last).name,
    }


def learning_curve(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """One entry per evaluation of the trainer's log: epoch, step, held-out figures; epoch 0 is the untuned model."""
    curve: dict[int, dict[str, float]] = {}
    for entry in log_history:
        found = {key.removeprefix("eval_"): round(float(value), 6) for key, value in entry.items()
                 if key in ("eval_loss", "eval_accuracy", "eval_outcome")}  # fmt: skip
        if found:
            step = int(entry["step"])
            curve.setdefault(step, {"epoch": round(float(entry.get("epoch") or 0.0), 4), "step": step, **found})
    return [curve[step] for step in sorted(curve)]


def training_losses(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The trainer's log of the loss: one entry every `logging_steps`, the mean over those steps and all ranks."""
    return [{"step": int(entry["step"]), "loss": round(float(entry["loss"]), 8)}
            for entry in log_history if "loss" in entry]  # fmt: skip


def drop_torn_checkpoints(checkpoints: Path) -> None:
    """Remove checkpoints that were being written when the run was killed: they lack the mark."""
    for folder in checkpoints.glob("checkpoint-*"):
        if not (folder / _COMPLETE).is_file():
            logger.warning("%s was cut off by a kill; it is not used", folder)
            shutil.rmtree(folder)


def _mark_callback() -> TrainerCallback:
    from transformers import TrainerCallback  # noqa: PLC0415

    class Mark(TrainerCallback):
        """Marks a checkpoint once every rank has written its part."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            barrier()
            if state.is_world_process_zero:
                (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _COMPLETE).touch()

    return Mark()


def _progress_callback(label: str) -> TrainerCallback:
    from tqdm import tqdm  # noqa: PLC0415
    from transformers import TrainerCallback  # noqa: PLC0415

    class Progress(TrainerCallback):
        """One bar on stderr, by steps, with the latest loss and held-out accuracy."""

        bar: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=label, unit="step", disable=None)
                self.shown: dict[str, float] = {}

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.bar is not None:
                self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if self.bar is not None:
                self.shown |= {key: logs[key] for key in ("loss", "eval_accuracy") if key in (logs or {})}
                self.bar.set_postfix({key: f"{value:.3f}" for key, value in self.shown.items()})

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.bar is not None:
                self.bar.close()

    return Progress()


def copy_weights(source: Path, target: Path, base: CandidateConfig) -> None:
    """A trained model's weights in the type its base is stored in, with the base's own configuration.

    Trainers write end-of-text settings of the tokenizer into the model's configuration; the student keeps its base's.
    """
    import torch  # noqa: PLC0415
    from safetensors.torch import load_file, save_file  # noqa: PLC0415
    from transformers import AutoConfig, GenerationConfig  # noqa: PLC0415

    arguments = {"revision": base.revision, "trust_remote_code": base.trust_remote_code}
    config = AutoConfig.from_pretrained(base.model, **arguments)
    dtype = config.dtype or torch.float32
    for path in sorted(source.glob("*.safetensors")):
        tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor
                   for name, tensor in load_file(path).items()}  # fmt: skip
        save_file(tensors, target / path.name, metadata={"format": "pt"})
    for path in source.glob("*.safetensors.index.json"):
        shutil.copyfile(path, target / path.name)
    config.save_pretrained(target)
    try:
        GenerationConfig.from_pretrained(base.model, revision=base.revision).save_pretrained(target)
    except OSError:
        logger.info("%s has no generation config; neither has its student", base.model)
