"""The metrics of a sweep: which there are, which way they point, and their figures per prompt and operating point.

Figures are kept in RUN/sweep/metrics/<split>/<point>.jsonl, one line per prompt, and computed again when the responses
or what they are measured with have changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from infer import diversity, semantic
from infer.embeddings import Embedder
from infer.quality import mean, mean_log_probs
from infer.semantic import Equivalence
from infer.sweep_methods import Point
from infer.sweep_responses import JSON, Prompt, Writers, read_responses
from switchgen.candidates import Pool
from switchgen.files import json_line, write_atomic
from switchgen.ids import content_hash
from switchgen.rundir import Run
from switchgen.scoring import RewardModelScorer
from switchgen.vocabulary import Vocabulary
from switchgen.weights import candidate_weights, weights_hash


@dataclass(frozen=True)
class Metric:
    """One axis of the planes."""

    label: str
    kind: Literal["lexical", "semantic", "quality"]
    sign: int = 1
    """1 where more is more diverse or better, -1 where less is."""


METRICS: dict[str, Metric] = {
    "distinct_1": Metric("distinct-1", "lexical"),
    "distinct_2": Metric("distinct-2", "lexical"),
    "distinct_3": Metric("distinct-3", "lexical"),
    "adjusted_distinct": Metric("expectation-adjusted distinct", "lexical"),
    "self_bleu": Metric("self-BLEU", "lexical", -1),
    "ngram_overlap": Metric("n-gram overlap", "lexical", -1),
    "compression_ratio": Metric("compression ratio", "lexical", -1),
    "pairwise_distance": Metric("pairwise distance", "semantic"),
    "vendi_score": Metric("Vendi score", "semantic"),
    "num_clusters": Metric("clusters", "semantic"),
    "semantic_entropy": Metric("semantic entropy (nats)", "semantic"),
    "validity": Metric("validity", "quality"),
    "likelihood": Metric("log-likelihood under the aligned model (nats per token)", "quality"),
    "reward": Metric("reward", "quality"),
}
DIVERSITY = [name for name, metric in METRICS.items() if metric.kind != "quality"]
QUALITY = [name for name, metric in METRICS.items() if metric.kind == "quality"]


PREFERRED_QUALITY = ("validity", "reward", "likelihood")
"""Whose first one that is there, and of which shares mean something, stands for quality where one figure must do."""
PREFERRED_DIVERSITY = ("num_clusters", "vendi_score", "adjusted_distinct", "distinct_2")


def has_shares(metric: str, aligned: float) -> bool:
    """Whether "95% of the aligned model's" means something; a likelihood is compared as a probability.

    Args:
        aligned: the aligned model's mean.
    """
    return metric == "likelihood" or aligned > 0


class Measures:
    """What a sweep measures with: the aligned model and its vocabulary, encoder, reward model, equivalence."""

    def __init__(self, run: Run, prompts: Sequence[Prompt], writers: Writers) -> None:
        self.run = run
        self.settings = run.recipe.sweep
        self.writers = writers
        self.by_answer = self.settings.equivalence in ("auto", "answer") and all(
            prompt.questions.task.marker is not None and prompt.questions.scored_singly for prompt in prompts
        )
        self.is_scored = all(prompt.questions.scored_singly for prompt in prompts)
        self.by_embedding = self.settings.equivalence == "embedding" or (
            self.settings.equivalence == "auto" and not self.by_answer
        )
        self.own_equivalence = (
            semantic.load_equivalence(self.settings.equivalence) if ":" in self.settings.equivalence else None
        )
        self._tokens: dict[str, list[int]] = {}

    @property
    def absent(self) -> dict[str, str]:
        """Why a metric has no figures, by name."""
        reasons: dict[str, str] = {}
        if (reason := diversity.self_bleu_missing()) is not None:
            reasons["self_bleu"] = reason
        if self.settings.embedding_model is None:
            reasons |= dict.fromkeys(("pairwise_distance", "vendi_score"), "sweep.embedding_model is not set")
        reason = None
        if self.settings.equivalence == "answer" and not self.by_answer:
            reason = "sweep.equivalence is answer, and a task has no marker that announces answers"
        elif self.by_embedding and self.settings.embedding_model is None:
            reason = "no answers to compare (a task without a marker), and sweep.embedding_model is not set"
        if reason is not None:
            reasons |= dict.fromkeys(("num_clusters", "semantic_entropy"), reason)
        if not self.is_scored:
            reasons["validity"] = "a task's responses are not scored one by one"
        if self.settings.reward_model is None:
            reasons["reward"] = "sweep.reward_model is not set"
        return reasons

    @cached_property
    def pool(self) -> Pool:
        """The candidates; loaded if writing has not loaded them."""
        return self.writers.pool

    @property
    def vocabulary(self) -> Vocabulary:
        """The aligned model's."""
        return self.pool.candidates[-1].vocabulary

    @cached_property
    def embedder(self) -> Embedder | None:
        """The encoder, if there is one."""
        return None if self.settings.embedding_model is None else Embedder(self.settings.embedding_model)

    @cached_property
    def reward(self) -> RewardModelScorer | None:
        """The reward model, if there is one."""
        name = self.settings.reward_model
        return None if name is None else RewardModelScorer(name, too_long="nan")

    def tokens(self, text: str) -> list[int]:
        """A response in the aligned model's tokens."""
        if text not in self._tokens:
            self._tokens[text] = self.vocabulary.encode_text(text)
        return self._tokens[text]

    @cached_property
    def fingerprint(self) -> str:
        """What figures depend on beside the responses and their scores; models count by their weights."""
        settings = self.settings
        models = [m and weights_hash(m) for m in (settings.embedding_model, settings.reward_model)]
        aligned = candidate_weights(self.run.recipe.pool[-1])
        equivalence = [settings.equivalence, settings.embedding_threshold, self.by_answer]
        return content_hash([aligned, models, equivalence, self.absent])


def point_metrics(measures: Measures, split: str, point: Point, prompts: Sequence[Prompt]) -> dict[str, JSON]:
    """Every metric of one operating point by prompt: {prompt id: {metric: figure or None}}; kept on disk."""
    run = measures.run
    responses = read_responses(run, split, point, prompts)
    told = [[[r[key] for key in ("output", "score", "extracted")] for r in own] for own in responses.values()]
    stamp = content_hash([measures.fingerprint, told])
    path = run.dir / "sweep" / "metrics" / split / f"{point.key}.jsonl"
    kept = _kept(path, stamp)
    if kept is None:
        kept = _measure(measures, prompts, responses)
        lines = [json_line({"stamp": stamp, "id": id, **figures}).decode() for id, figures in kept.items()]
        write_atomic(path, "".join(lines))
    return kept


def _kept(path: Path, stamp: str) -> dict[str, JSON] | None:
    if not path.is_file():
        return None
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if any(line.pop("stamp") != stamp for line in lines):
        return None
    return {line.pop("id"): line for line in lines}


def _measure(measures: Measures, prompts: Sequence[Prompt], responses: Mapping[str, list[JSON]]) -> dict[str, JSON]:
    # A prompt with a response beyond the context has no figures.
    whole = [prompt for prompt in prompts if all(r["output"] is not None for r in responses[prompt.id])]
    queries = [prompt.query for prompt in whole for _ in responses[prompt.id]]
    outputs = [record["output"] for prompt in whole for record in responses[prompt.id]]
    log_probs = mean_log_probs(measures.pool.candidates[-1], queries, outputs)
    rewards: list[float] = []
    if measures.reward is not None:
        rewards = measures.reward.score_batch([query.messages for query in queries], outputs)
    embeddings = None if measures.embedder is None else measures.embedder.embed(outputs)
    found: dict[str, JSON] = {prompt.id: dict.fromkeys(METRICS) for prompt in prompts}
    start = 0
    for prompt in whole:
        records = responses[prompt.id]
        own = slice(start, start + len(records))
        start += len(records)
        figures = found[prompt.id]
        figures |= lexical_metrics(
            outputs[own], [measures.tokens(text) for text in outputs[own]], len(measures.vocabulary)
        )
        if embeddings is not None:
            figures["pairwise_distance"] = semantic.pairwise_distance(embeddings[own])
            figures["vendi_score"] = semantic.vendi_score(embeddings[own])
        labels = _clusters(measures, records, None if embeddings is None else embeddings[own])
        if labels is not None:
            figures["num_clusters"] = semantic.num_clusters(labels)
            figures["semantic_entropy"] = semantic.semantic_entropy(labels)
        figures["validity"] = mean([record["score"] for record in records]) if measures.is_scored else None
        figures["likelihood"] = mean(log_probs[own])
        figures["reward"] = mean(rewards[own]) if rewards else None
    return found


def lexical_metrics(texts: Sequence[str], tokens: Sequence[Sequence[int]], vocabulary_size: int) -> JSON:
    """The seven lexical metrics of one prompt's responses.

    Args:
        tokens: the responses in tokens, for the expectation-adjusted metric.
    """
    return {
        **{f"distinct_{n}": diversity.distinct(texts, n) for n in (1, 2, 3)},
        "adjusted_distinct": diversity.adjusted_distinct(tokens, vocabulary_size),
        "self_bleu": diversity.self_bleu(texts) if diversity.self_bleu_missing() is None else None,
        "ngram_overlap": diversity.ngram_overlap(texts),
        "compression_ratio": diversity.compression_ratio(texts),
    }


def _clusters(measures: Measures, records: Sequence[JSON], embeddings: Any) -> list[int] | None:
    """The kind of each response, by the recipe's equivalence; None where that cannot be told."""
    if measures.own_equivalence is not None:
        return semantic.cluster([record["output"] for record in records], measures.own_equivalence)
    if measures.by_answer:
        return semantic.cluster([record["extracted"] for record in records], semantic.same_answer)
    if measures.by_embedding and embeddings is not None:
        threshold = measures.settings.embedding_threshold
        close: Equivalence[Any] = _close(threshold)
        return semantic.cluster(list(embeddings), close)
    return None


def _close(threshold: float) -> Callable[[Any, Any], bool]:
    def close(a: Any, b: Any) -> bool:
        norm = float((a @ a) ** 0.5 * (b @ b) ** 0.5)
        return norm > 0 and float(a @ b) / norm >= threshold

    return close
