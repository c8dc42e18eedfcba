"""Semantic diversity of several responses to one prompt: four metrics.

    pairwise_distance   mean of 1 − cosine over pairs of embeddings
    vendi_score         effective number of different responses, from the embeddings' similarities
    num_clusters        number of kinds of response, by an equivalence function
    semantic_entropy    entropy (nats) of the shares of those kinds

The first two need an embedding model, the last two an equivalence function (by equal answer where a task's answers can
be read, or by embedding, or the user's own). What is needed and not there is reported as absent, never filled in by
something lexical.

Shapes: R responses, D embedding size.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from switchgen.errors import ConfigError

FloatArray = npt.NDArray[np.float64]
T = TypeVar("T")
Equivalence = Callable[[T, T], bool]


def pairwise_distance(embeddings_RD: FloatArray) -> float | None:
    """Mean over pairs of 1 − cosine similarity (Tevet and Berant 2021, arXiv 2004.02990, §4), 0 to 2.

    Returns:
        None for fewer than two responses.
    """
    count = len(embeddings_RD)
    if count < 2:
        return None
    similarity_RR = _cosine(embeddings_RD)
    pairs = count * (count - 1)
    return float(1 - (similarity_RR.sum() - np.trace(similarity_RR)) / pairs)


def vendi_score(embeddings_RD: FloatArray) -> float | None:
    """exp(−Σ λ log λ) over the eigenvalues λ of K / R, K the cosine similarities (Friedman and Dieng 2023, def. 3.1).

    1 for R equal responses, R for R orthogonal ones (arXiv 2210.02410).

    Returns:
        None for no response.
    """
    if not len(embeddings_RD):
        return None
    return vendi_of_kernel(_cosine(embeddings_RD))


def vendi_of_kernel(kernel_RR: FloatArray) -> float:
    """The Vendi score of a positive semidefinite similarity matrix with ones on its diagonal."""
    eigenvalues = np.linalg.eigvalsh(kernel_RR / len(kernel_RR))
    positive = eigenvalues[eigenvalues > 1e-12]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def _cosine(embeddings_RD: FloatArray) -> FloatArray:
    norms_R1 = np.linalg.norm(embeddings_RD, axis=1, keepdims=True)
    unit_RD = embeddings_RD / np.where(norms_R1 == 0, 1.0, norms_R1)
    similarity_RR: FloatArray = unit_RD @ unit_RD.T
    np.fill_diagonal(similarity_RR, 1.0)
    return similarity_RR


def cluster(items: Sequence[T], equivalent: Equivalence[T]) -> list[int]:
    """Greedy clusters (NoveltyBench, Zhang et al. 2025, arXiv 2504.05228, §3): the cluster of each item, from 0.

    In order, each item joins the first cluster whose first member it is equivalent to, else it opens a new one.
    """
    first: list[T] = []
    labels = []
    for item in items:
        label = next((index for index, member in enumerate(first) if equivalent(member, item)), len(first))
        if label == len(first):
            first.append(item)
        labels.append(label)
    return labels


def num_clusters(labels: Sequence[int]) -> int | None:
    """NoveltyBench's distinct_k: the number of clusters among k responses. None for none."""
    return len(set(labels)) or None


def semantic_entropy(labels: Sequence[int]) -> float | None:
    """−Σ p log p in nats, p the clusters' shares of the responses; None for no response.

    Kuhn et al. 2023 (arXiv 2302.09664), in the discrete form of Farquhar et al. 2024.
    """
    if not labels:
        return None
    shares = [count / len(labels) for count in Counter(labels).values()]
    return -sum(share * math.log(share) for share in shares) + 0.0


def same_answer(a: str | None, b: str | None) -> bool:
    """Equal answers as the task reads them; responses without an answer are one kind."""
    return a == b


def load_equivalence(name: str) -> Equivalence[str]:
    """The user's own equivalence function, `package.module:function`, called with two responses' texts.

    Raises:
        ConfigError: there is no such function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"sweep.equivalence: {name!r} cannot be imported: {error}") from None
    if not callable(function):
        raise ConfigError(f"sweep.equivalence: {name!r} is not a function")
    return lambda a, b: bool(function(a, b))
