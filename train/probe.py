"""The probe's fit: labels from rollouts → a linear head on a candidate's hidden state, in RUN/switcher.

The state is what the host's LM head reads after the trace (`policies.probe`). The head is a multinomial logistic
regression on standardised states, fitted to its minimum, which is unique; how much large weights cost is chosen by
cross-validation over queries. Traces of the label records are tokenized segment by segment.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from switchgen.candidates import Candidate, Pool
from switchgen.config import CandidateConfig, TrainConfig
from switchgen.engines.base import Context
from switchgen.errors import ConfigError
from switchgen.files import finished_folder, lock, write_atomic, write_json
from switchgen.ids import content_hash, derive_seed
from switchgen.policies.probe import Probe
from switchgen.records import query_of
from switchgen.rundir import Run, claim_stage, provenance
from switchgen.weights import weights_hash
from train.cards import probe_card
from train.label_data import LabelExample, gather, read_labels, soft_targets

logger = logging.getLogger("switchgen")

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
"""Of half the squared weights of standardised states, beside the mean loss."""
_FOLDS = 4
_BATCH = 64
_STEPS = 500


@dataclass(frozen=True)
class Labelled:
    """States of N examples, and what to learn from them."""

    examples: Sequence[LabelExample]
    states_NH: torch.Tensor
    targets_NC: torch.Tensor
    folds_N: torch.Tensor
    """Which part of the cross-validation an example's query belongs to."""


def fit_probe(run: Run) -> dict[str, Any]:
    """Fit and leave RUN/switcher (`probe.safetensors`, `switchgen.json`, card), as a whole or not at all.

    Returns:
        The facts of `switchgen.json`.

    Raises:
        DataError, ConfigError, ModelError: no labels, none that can be learned from, another pool's, a missing model.
    """
    settings, recipe = run.recipe.train, run.recipe
    fresh = TrainConfig()
    if settings.args or settings.lora != fresh.lora:
        logger.warning("train.args and train.lora have no effect: switcher.kind is probe")
    started = time.monotonic()
    records = read_labels(run)
    config = host_of(run)
    host = Pool.load([config], max_slots=_BATCH).candidates[0]
    data = gather(records, lambda record: _example(record, host, settings.max_length), settings)
    if not data.train:
        raise ConfigError(f"{run.dir / 'rollout'}: none of {data.num_records} label records can be learned from; left "
                          f"out: {dict(data.left_out)}")  # fmt: skip
    folds = {str(record["id"]): _fold(record) for record in records}
    train, held_out = (_labelled(part, host, settings, folds) for part in (data.train, data.held_out))
    losses = {penalty: _validation_loss(train, penalty) for penalty in PENALTIES}
    penalty = min(losses, key=lambda value: losses[value])
    probe = fit_head(train.states_NH, train.targets_NC, penalty)
    facts = {
        "schema": 1,
        "kind": "probe",
        "candidates": recipe.names,
        "base": config.model,
        "host": config.name,
        "labels": data.counts(len(recipe.pool)),
        **_measured(probe, held_out),
        "penalty": penalty,
        "validation_losses": {str(key): round(value, 6) for key, value in losses.items()},
        "parameters": probe.weight_CH.numel() + probe.bias_C.numel(),
        "settings": settings.model_dump(mode="json", exclude={"lora", "args"}),
        "versions": provenance(run)["versions"],
        "seconds": round(time.monotonic() - started, 1),
    }
    with lock(run.dir), finished_folder(run.switcher_adapter) as folder:
        probe.save(folder)
        write_atomic(folder / "README.md", probe_card(facts))
        claim_stage(folder, "train", dependencies(run))
        write_json(folder / "switchgen.json", facts)
    return facts


def host_of(run: Run) -> CandidateConfig:
    """The candidate whose states the probe reads."""
    name = run.recipe.switcher.base or run.recipe.names[-1]
    return next(config for config in run.recipe.pool if config.name == name)


def dependencies(run: Run) -> dict[str, Any]:
    """What the probe depends on; another start with the same settings finds it finished."""
    config = host_of(run)
    labels = [[record[key] for key in ("id", "means", "label", "segments", "messages")] for record in read_labels(run)]
    return {
        "kind": "probe",
        "host": config.model_dump(mode="json", exclude={"device", "device_map"}),
        "weights": [weights_hash(path) for path in (config.model, config.adapter) if path is not None],
        "candidates": run.recipe.names,
        "labels": content_hash(labels),
        "train": run.recipe.train.model_dump(mode="json", exclude={"lora", "args", "seed"}),
    }


def _example(record: Mapping[str, Any], host: Candidate, max_length: int) -> LabelExample | None:
    """What the host reads of a state; None where that does not fit."""
    ids = [*host.prompt_ids(query_of(record))]
    for segment in record["segments"]:
        ids.extend(host.vocabulary.encode_text(segment["text"]))
    if len(ids) > min(max_length, host.engine.max_positions):
        return None
    return LabelExample(str(record["id"]), ids, record["label"], list(record["means"]), cut=False)


def _fold(record: Mapping[str, Any]) -> int:
    return derive_seed("fold", content_hash([dict(message) for message in record["messages"]])) % _FOLDS


def _labelled(
    examples: Sequence[LabelExample], host: Candidate, settings: TrainConfig, folds: Mapping[str, int]
) -> Labelled:
    states = []
    for start in range(0, len(examples), _BATCH):
        contexts = [Context(list(example.input_ids)) for example in examples[start : start + _BATCH]]
        states.append(host.engine.hidden(contexts))
        for context in contexts:
            host.engine.release(context)
    targets = [_target(example, settings) for example in examples]
    return Labelled(
        examples,
        torch.cat(states) if states else torch.zeros(0, host.engine.hidden_size, dtype=torch.float64),
        torch.tensor(targets, dtype=torch.float64),
        torch.tensor([folds[example.state_id] for example in examples]),
    )


def _target(example: LabelExample, settings: TrainConfig) -> list[float]:
    if settings.labels == "soft":
        return soft_targets(example.means, settings.tau)
    return [float(index == example.label) for index in range(len(example.means))]


def fit_head(states_NH: torch.Tensor, targets_NC: torch.Tensor, penalty: float) -> Probe:
    """Logistic regression: mean cross-entropy to the targets plus penalty / 2 * squared weights; its minimum.

    Args:
        states_NH: [examples, hidden], float64; standardised inside, the scales folded into the weights.
        targets_NC: [examples, candidates], rows sum to 1.
    """
    mean_H, scale_H = states_NH.mean(dim=0), states_NH.std(dim=0, correction=0)
    # A number that never changes says nothing.
    scale_H = torch.where(scale_H > 1e-9, scale_H, torch.inf)
    inputs_NH = (states_NH - mean_H) / scale_H
    weight_CH = torch.zeros(targets_NC.shape[1], states_NH.shape[1], dtype=torch.float64, requires_grad=True)
    bias_C = torch.zeros(targets_NC.shape[1], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [weight_CH, bias_C], max_iter=_STEPS, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        search.zero_grad()
        loss = _cross_entropy(inputs_NH @ weight_CH.T + bias_C, targets_NC) + penalty / 2 * weight_CH.square().sum()
        loss.backward()
        return loss

    search.step(closure)
    weight_CH = (weight_CH / scale_H).detach()
    return Probe(weight_CH, (bias_C - weight_CH @ mean_H).detach())


def _cross_entropy(logits_NC: torch.Tensor, targets_NC: torch.Tensor) -> torch.Tensor:
    return -(targets_NC * torch.log_softmax(logits_NC, dim=-1)).sum(dim=-1).mean()


def _validation_loss(data: Labelled, penalty: float) -> float:
    """Mean loss on each part of the queries of a fit to the others; infinite where a part is all there is."""
    total, count = 0.0, 0
    for fold in range(_FOLDS):
        inside = data.folds_N == fold
        if not inside.any() or inside.all():
            continue
        probe = fit_head(data.states_NH[~inside], data.targets_NC[~inside], penalty)
        loss = _cross_entropy(probe.logits(data.states_NH[inside]), data.targets_NC[inside])
        total += float(loss) * int(inside.sum())
        count += int(inside.sum())
    return total / count if count else float("inf")


def _measured(probe: Probe, data: Labelled) -> dict[str, Any]:
    """On held-out queries, as the LM switcher is measured."""
    from train.switcher_trainer import choice_metrics, guess_metrics  # noqa: PLC0415

    measured: dict[str, Any] = {"accuracy": None, "majority": None, "random": None, "n_held_out": len(data.examples)}
    if not data.examples:
        return measured
    means = [example.means for example in data.examples]
    logits_NC = probe.logits(data.states_NH)
    loss = float(_cross_entropy(logits_NC, data.targets_NC))
    figures = {**choice_metrics(logits_NC.numpy(), means), **guess_metrics(means), "loss": loss}
    return measured | {key: round(value, 6) for key, value in figures.items()}
