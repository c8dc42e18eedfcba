"""The three trainings that make the lab ladder: documents, chats, preferences.

Each stage is what its name says in the large pipelines too: causal language modelling on packed documents
(transformers' Trainer), supervised finetuning on chats (TRL's SFTTrainer), preference training (TRL's DPOTrainer).

Under torchrun the ranks train together: each takes its part of every batch, of the samples and of Muon's matrices.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchgen.api import generate
from switchgen.candidates import Pool
from switchgen.config import CandidateConfig, DecodingConfig
from switchgen.ranks import is_main_process, rank, world_size
from switchgen.trace import Query
from train import ladder_texts
from train.ladder import chat_rows, load_rung, packed_rows
from train.optimizer import linear_schedule, muon_and_adamw
from train.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

_ROWS = 256  # answers in flight while preferences are sampled

StageProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class StageSteps:
    """How long a stage trains, and how fast it learns."""

    steps: int
    batch: int  # rows, exchanges or preference pairs a step
    matrix_lr: float  # Muon's learning rate, for the matrices
    other_lr: float  # AdamW's, for embeddings and norms
    warmup: int = 20  # steps


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    size: StageSteps,
    row_tokens: int,
    progress: StageProgress,
) -> list[float]:
    """Trains on documents, in place.

    Returns:
        The training loss every few steps, in nats a token.
    """
    from datasets import Dataset  # noqa: PLC0415
    from transformers import Trainer, TrainingArguments, default_data_collator  # noqa: PLC0415

    rows = packed_rows(world, tokenizer, size.steps * size.batch, row_tokens, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**_common_arguments(size, scratch)),
            train_dataset=Dataset.from_list(rows),
            data_collator=default_data_collator,
            optimizers=_optimizers(model, size),
            callbacks=[_progress_callback("pretrained", size.steps, progress)],
        )
        return _train(trainer)


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    size: StageSteps,
    progress: StageProgress,
    shares: Mapping[ladder_texts.ChatSource, float] = ladder_texts.CHATS,
) -> list[float]:
    """Trains on chats, in place; only the assistant's answers are learned. Returns the losses."""
    from datasets import Dataset  # noqa: PLC0415
    from trl import SFTConfig, SFTTrainer  # noqa: PLC0415

    rows = chat_rows(world, tokenizer, size.steps * size.batch, seed=1, shares=shares)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**_common_arguments(size, scratch), max_length=None),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            optimizers=_optimizers(model, size),
            callbacks=[_progress_callback("finetuned", size.steps, progress)],
        )
        return _train(trainer)


def align(
    finetuned: Path, world: World, size: StageSteps, progress: StageProgress
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, list[float]]:
    """Trains the model in the folder `finetuned` on preferences: what raters like against what it says itself.

    Returns:
        The aligned model, its tokenizer, the losses.
    """
    from datasets import Dataset  # noqa: PLC0415
    from trl import DPOConfig, DPOTrainer  # noqa: PLC0415

    pairs = preference_pairs(finetuned, world, size.steps * size.batch, progress)
    model, tokenizer = load_rung(finetuned)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(
                **_common_arguments(size, scratch),
                beta=0.1,
                loss_type=["sigmoid", "sft"],
                loss_weights=[1.0, 1.0],
                max_length=None,
            ),
            ref_model=load_rung(finetuned)[0],
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            optimizers=_optimizers(model, size),
            callbacks=[_progress_callback("aligned", size.steps, progress)],
        )
        return model, tokenizer, _train(trainer)


def preference_pairs(finetuned: Path, world: World, count: int, progress: StageProgress) -> list[dict[str, Any]]:
    """Pairs in TRL's conversational form: chosen is what raters like best, rejected what `finetuned` itself writes.

    Questions where the two are the same text teach nothing and are drawn again.
    """
    sample = answer_sampler(finetuned)
    pairs: list[dict[str, Any]] = []
    stream = enumerate(ladder_texts.preferred(world, seed=2))
    round_size = 1024
    while len(pairs) < count:
        drawn = list(itertools.islice(stream, round_size))
        own = drawn[rank() :: world_size()]
        written = _of_all_ranks(sample([question for _, (question, _) in own], [str(index) for index, _ in own]))
        for (_, (question, chosen)), rejected in zip(drawn, written, strict=True):
            if rejected.strip() != chosen:
                pairs.append(
                    {
                        "prompt": [{"role": "user", "content": question}],
                        "chosen": [{"role": "assistant", "content": chosen}],
                        "rejected": [{"role": "assistant", "content": rejected}],
                    }
                )
        if is_main_process():
            progress("aligned: samples", min(len(pairs), count), count)
    return pairs[:count]


def answer_sampler(folder: Path, max_new_tokens: int = 56) -> Callable[[Sequence[str], Sequence[str]], list[str]]:
    """What samples answers (temperature 1) of the model in a folder: called with questions and their ids.

    An answer depends on its question's id, not on the other questions, so any number of ranks writes the same ones.
    """
    name = folder.name
    pool = Pool.load([CandidateConfig(name=name, model=str(folder), device="cpu")], max_slots=2 * _ROWS)
    decoding = DecodingConfig(max_new_tokens=max_new_tokens, segment=max_new_tokens, temperature=1.0, top_p=1.0)

    def sample(questions: Sequence[str], ids: Sequence[str]) -> list[str]:
        queries = [Query.from_text(question, id=id_) for question, id_ in zip(questions, ids, strict=True)]
        return [trace.text for trace in generate(pool, queries, name, decoding=decoding, max_rows=_ROWS)]

    return sample


def _of_all_ranks(own: list[str]) -> list[str]:
    """Every rank's texts, in the order they were dealt in: one to each rank in turn."""
    if world_size() == 1:
        return own
    import torch.distributed as dist  # noqa: PLC0415

    shares: list[list[str]] = [[]] * world_size()
    dist.all_gather_object(shares, own)
    dealt = itertools.zip_longest(*shares)
    return [text for texts in dealt for text in texts if text is not None]


def _common_arguments(size: StageSteps, scratch: str) -> dict[str, Any]:
    """Trainer arguments all stages share: CPU, bfloat16 autocast, no files, no prints."""
    return {
        **({"ddp_backend": "gloo", "ddp_find_unused_parameters": False} if world_size() > 1 else {}),
        "output_dir": scratch,
        "max_steps": size.steps,
        "per_device_train_batch_size": size.batch // world_size(),
        "use_cpu": True,
        "bf16": True,
        "activation_checkpointing": False,  # TRL turns it on by default
        "dataloader_pin_memory": False,
        "max_grad_norm": 1.0,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": max(1, size.steps // 20),
        "disable_tqdm": True,
        "seed": 0,
    }


def _optimizers(model: PreTrainedModel, size: StageSteps) -> tuple[Any, Any]:
    optimizer = muon_and_adamw(model, size.matrix_lr, size.other_lr, rank=rank(), world_size=world_size())
    return optimizer, linear_schedule(optimizer, size.steps, size.warmup)


def _train(trainer: Any) -> list[float]:
    from transformers import PrinterCallback  # noqa: PLC0415

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _progress_callback(stage: str, total: int, progress: StageProgress) -> TrainerCallback:
    from transformers import TrainerCallback  # noqa: PLC0415

    class Report(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                progress(stage, state.global_step, total)

    return Report()
