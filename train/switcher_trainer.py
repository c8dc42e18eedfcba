"""TRL's SFTTrainer for one-token labels: soft targets if asked for, and label accuracy at every evaluation.

Shapes: B rows, T tokens, V vocabulary, C candidates, K positions kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction
from trl import SFTTrainer

from train.sft import RowCollator


class LabelCollator(RowCollator):
    """Batches of `LabelExample.row`s: tokens padded on the right, targets and mean scores."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            **super().__call__(rows),
            "targets": torch.tensor([row["targets"] for row in rows], dtype=torch.float32),
            "means": torch.tensor([row["means"] for row in rows], dtype=torch.float32),
        }


class SwitcherTrainer(SFTTrainer):
    """Fits the switcher.

    Hard labels: SFT's loss, the cross-entropy of the label's token over the whole vocabulary (the paper trains by plain
    SFT), computed at that one position instead of all of them. Soft labels: the cross-entropy to `targets` over the
    label tokens alone, the distribution that is read at inference. Evaluation predicts label logits; its "labels" are
    the candidates' mean scores.

    Args:
        label_ids: token of each candidate's label.
        soft: whether to train on `targets`.
    """

    def __init__(self, *args: Any, label_ids: Sequence[int], soft: bool, **kwargs: Any) -> None:
        super().__init__(*args, compute_metrics=label_metrics, **kwargs)
        self.label_ids = list(label_ids)
        self.soft = soft

    def answer_logits(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits where the answer starts, shape [B, V]."""
        # Right padding: the label is each row's last token, and the position before it predicts it.
        positions_B = inputs["attention_mask"].sum(dim=1) - 2
        rows_B = torch.arange(len(positions_B), device=positions_B.device)
        arguments = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        if self._keeps_positions(model):
            kept_K, index_B = positions_B.unique(return_inverse=True)
            logits_BKV = model(**arguments, logits_to_keep=kept_K).logits
            return logits_BKV[rows_B, index_B].float()
        return model(**arguments).logits[rows_B, positions_B].float()

    def _keeps_positions(self, model: Any) -> bool:
        """Whether the model computes logits at chosen positions only (a whole row of them is large)."""
        base = self.accelerator.unwrap_model(model)
        base = base.get_base_model() if hasattr(base, "get_base_model") else base
        return "logits_to_keep" in inspect.signature(type(base).forward).parameters

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one batch; see the class."""
        assert not return_outputs
        loss_B = self._losses(self.answer_logits(model, inputs), inputs)
        if num_items_in_batch is None:
            return loss_B.mean()
        # As in SFTTrainer: the count is over all ranks and accumulation steps, and gradients are averaged over ranks.
        loss = loss_B.sum() / num_items_in_batch
        return loss * self.accelerator.num_processes if self.args.average_tokens_across_devices else loss

    def _losses(self, logits_BV: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if not self.soft:
            ends = inputs["attention_mask"].sum(dim=1) - 1
            tokens_B = inputs["input_ids"].gather(1, ends[:, None])[:, 0]
            return torch.nn.functional.cross_entropy(logits_BV, tokens_B, reduction="none")
        logprobs_BC = torch.log_softmax(logits_BV[:, self.label_ids], dim=-1)
        return -(inputs["targets"] * logprobs_BC).sum(dim=-1)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Loss, label logits [B, C] and mean scores [B, C] of one evaluation batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits_BV = self.answer_logits(model, inputs)
            loss = self._losses(logits_BV, inputs).mean()
        if prediction_loss_only:
            return loss, None, None
        return loss, logits_BV[:, self.label_ids].contiguous(), inputs["means"]


def label_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`choice_metrics` of a trainer's predictions."""
    return choice_metrics(np.asarray(prediction.predictions), np.asarray(prediction.label_ids))


def choice_metrics(logits_NC: np.ndarray, means: Sequence[Sequence[float]] | np.ndarray) -> dict[str, float]:
    """Label accuracy and the mean score of the chosen candidates.

    A choice is right where no candidate's mean is better.
    """
    chosen_N, means_NC = logits_NC.argmax(axis=-1), np.asarray(means)
    got_N = means_NC[np.arange(len(chosen_N)), chosen_N]
    return {"accuracy": float((got_N == means_NC.max(axis=-1)).mean()), "outcome": float(got_N.mean())}


def guess_metrics(means: Sequence[Sequence[float]]) -> dict[str, float]:
    """What a switcher is measured against on the same states.

    Returns:
        `majority`: accuracy of the best constant choice (no constant can beat it); `random`: of a uniform one;
        `outcome_*`: the mean score of the best constant, a uniform and the best possible choice.
    """
    means_NC = np.asarray(means, dtype=np.float32)
    best_NC = means_NC == means_NC.max(axis=-1, keepdims=True)
    return {
        "majority": float(best_NC.mean(axis=0).max()),
        "random": float(best_NC.mean()),
        "outcome_constant": float(means_NC.mean(axis=0).max()),
        "outcome_random": float(means_NC.mean()),
        "outcome_best": float(means_NC.max(axis=-1).mean()),
    }
