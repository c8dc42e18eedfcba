"""Diversity metrics: cases worked by hand, published examples, sacrebleu and scipy."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ladders import make_tokenizer
from scipy.spatial.distance import pdist
from scipy.stats import entropy

from infer.diversity import (
    adjusted_distinct,
    compression_ratio,
    distinct,
    ngram_overlap,
    ngrams,
    self_bleu,
    words,
)
from infer.embeddings import Embedder
from infer.semantic import (
    cluster,
    load_equivalence,
    num_clusters,
    pairwise_distance,
    same_answer,
    semantic_entropy,
    vendi_of_kernel,
    vendi_score,
)
from switchgen.errors import ConfigError

JSON = dict[str, Any]


def test_words() -> None:
    assert words("It's 3.5, Größe!\n") == ["it", "'", "s", "3", ".", "5", ",", "größe", "!"]
    assert words(" \n") == []
    assert ngrams(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]


# "a b a" and "a b": unigrams a b a a b (2 of 5 different), bigrams ab ba ab (2 of 3), trigrams aba (1 of 1).
@pytest.mark.parametrize(("n", "expected"), [(1, 2 / 5), (2, 2 / 3), (3, 1.0), (4, None)])
def test_distinct_by_hand(n: int, expected: float | None) -> None:
    assert distinct(["a b A", "a b"], n) == expected


def test_adjusted_distinct_by_hand() -> None:
    # V = 4, C = 3: three uniform draws from four hold 4 (1 - (3/4)^3) = 37/16 different ones on average.
    assert adjusted_distinct([[1, 2], [1]], 4) == pytest.approx(2 / (37 / 16))
    # One draw holds one.
    assert adjusted_distinct([[3]], 1000) == pytest.approx(1.0)
    assert adjusted_distinct([[], []], 10) is None


def test_adjusted_distinct_does_not_fall_with_length() -> None:
    """Liu et al. 2022, fig. 1: on uniform draws it stays at 1 whatever the length, while distinct-1 falls."""
    generator = np.random.default_rng(0)
    values, plain = [], []
    for length in (50, 400, 3000):
        tokens = generator.integers(500, size=length).tolist()
        values.append(adjusted_distinct([tokens], 500))
        plain.append(len(set(tokens)) / length)
    assert values == pytest.approx([1, 1, 1], abs=0.06)
    assert plain[0] > 0.9 and plain[2] < 0.2


def test_self_bleu_against_sacrebleu() -> None:
    from sacrebleu import sentence_bleu

    texts = ["the cat sat on the mat .", "the cat sat on a mat .", "dogs run very fast in the park today ."]
    expected = [
        sentence_bleu(text, [other for j, other in enumerate(texts) if j != i], use_effective_order=True).score / 100
        for i, text in enumerate(texts)
    ]
    assert self_bleu(texts) == pytest.approx(sum(expected) / 3)


def test_self_bleu_by_hand() -> None:
    assert self_bleu(["one two three four"] * 3) == pytest.approx(1.0)
    # Two words, both matched, one bigram of one not matched ("b a" against "a b"): orders 1 and 2 only; the bigram
    # precision 0/1 is smoothed to 1/2 of 1/1: BLEU = sqrt(1 · 1/2).
    assert self_bleu(["a b", "b a"]) == pytest.approx(math.sqrt(0.5))
    assert self_bleu(["alone"]) is None


def test_ngram_overlap_by_hand() -> None:
    # {a, b, ab} and {a, c, ac}: 1 of 5. Either with an equal one: 1.
    assert ngram_overlap(["a b", "a c"]) == pytest.approx(1 / 5)
    assert ngram_overlap(["a b", "a b", "a c"]) == pytest.approx((1 + 1 / 5 + 1 / 5) / 3)
    assert ngram_overlap(["", ""]) == 1.0
    assert ngram_overlap(["", "a"]) == 0.0
    assert ngram_overlap(["a"]) is None


def test_compression_ratio() -> None:
    texts = ["the same line again"] * 20
    raw = "\n".join(texts).encode()
    assert compression_ratio(texts) == len(raw) / len(gzip.compress(raw, 9, mtime=0))
    generator = np.random.default_rng(1)
    varied = ["".join(chr(97 + c) for c in generator.integers(26, size=19)) for _ in range(20)]
    assert compression_ratio(texts) > 3 * compression_ratio(varied)
    assert (
        compression_ratio(
            [
                "",
            ]
        )
        is None
    )


def test_pairwise_distance_against_scipy() -> None:
    embeddings = np.random.default_rng(2).normal(size=(9, 5))
    assert pairwise_distance(embeddings) == pytest.approx(pdist(embeddings, "cosine").mean())
    assert pairwise_distance(np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])) == pytest.approx((1 + 2 + 1) / 3)
    assert pairwise_distance(embeddings[:1]) is None


def test_vendi_score_by_hand_and_against_scipy() -> None:
    assert vendi_score(np.tile([3.0, 4.0], (6, 1))) == pytest.approx(1.0)
    assert vendi_score(np.eye(4) * 2) == pytest.approx(4.0)
    # Two groups of two: eigenvalues of K/4 are 1/2, 1/2, 0, 0.
    assert vendi_score(np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])) == pytest.approx(2.0)
    # Cosine c between two: eigenvalues (1 ± c) / 2.
    kernel = np.array([[1.0, 0.6], [0.6, 1.0]])
    assert vendi_of_kernel(kernel) == pytest.approx(math.exp(entropy([0.8, 0.2])))
    embeddings = np.random.default_rng(3).normal(size=(7, 4))
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    spectrum = np.linalg.svd(unit)[1] ** 2 / 7
    assert vendi_score(embeddings) == pytest.approx(math.exp(entropy(spectrum)))


def test_clusters_are_greedy_and_compare_with_the_first_member() -> None:
    # 1 ~ 2 ~ 3 but not 1 ~ 3: 2 joins 1; 3 is compared with 1, not with 2, and opens a cluster; 4 joins 3's.
    assert cluster([1, 2, 3, 4], lambda a, b: abs(a - b) < 2) == [0, 0, 1, 1]
    assert cluster(["x", None, "y", None, "x"], same_answer) == [0, 1, 2, 1, 0]
    assert num_clusters([0, 1, 2, 1, 0]) == 3
    assert num_clusters([]) is None


def test_semantic_entropy_against_scipy() -> None:
    assert semantic_entropy([0, 1, 2, 1, 0]) == pytest.approx(entropy([2, 2, 1]))
    assert semantic_entropy([0] * 5) == 0.0
    assert semantic_entropy(list(range(8))) == pytest.approx(math.log(8))
    assert semantic_entropy([]) is None


def test_own_equivalence_function() -> None:
    same = load_equivalence("operator:eq")
    assert cluster(["a", "b", "a"], same) == [0, 1, 0]
    for name in ("operator", "operator:nothing", "no_such_module:f", "math:pi"):
        with pytest.raises(ConfigError, match=r"sweep\.equivalence"):
            load_equivalence(name)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with random weights."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = make_tokenizer()
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).double().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_embeddings_are_the_mean_over_a_texts_own_tokens(encoder: Path) -> None:
    import torch

    embedder = Embedder(str(encoder), device="cpu", batch_size=2)
    texts = ["How old is Vudak?", "plums", "How old is Vudak?", "Größe, naïve café"]
    together = embedder.embed(texts)
    model, tokenizer = embedder.load()
    for text, row in zip(texts, together, strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        assert row == pytest.approx(hidden.mean(0).double().numpy(), abs=1e-6)
    assert embedder.embed([]).shape == (0, 0)
    assert np.isfinite(embedder.embed(["", "word " * 500])).all()


def described(folder: Path, encoder: Path, pooling: JSON, **settings: int) -> Embedder:
    """The encoder, with the files of sentence-transformers beside it."""
    copy = shutil.copytree(encoder, folder / "described")
    (copy / "1_Pooling").mkdir()
    (copy / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (copy / "sentence_bert_config.json").write_text(json.dumps(settings))
    return Embedder(str(copy), device="cpu")


@pytest.mark.parametrize(
    "pooling",
    [
        {"word_embedding_dimension": 8, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        {"word_embedding_dimension": 8, "pooling_mode": "cls"},
    ],
)
def test_sentence_transformers_say_how_they_pool(encoder: Path, tmp_path: Path, pooling: JSON) -> None:
    import torch

    embedder = described(tmp_path, encoder, pooling, max_seq_length=3)
    texts = ["How old is Vudak?", "plums"]
    model, tokenizer = embedder.load()
    for text, row in zip(texts, embedder.embed(texts), strict=True):
        with torch.inference_mode():
            cut = tokenizer(text, return_tensors="pt", truncation=True, max_length=3)
            assert row == pytest.approx(model(**cut).last_hidden_state[0, 0].double().numpy(), abs=1e-6)


def test_another_pooling_is_an_error(encoder: Path, tmp_path: Path) -> None:
    embedder = described(tmp_path, encoder, {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False})
    with pytest.raises(ConfigError, match="pools by pooling_mode_max_tokens; allowed: mean or cls"):
        embedder.embed(["a"])


def test_a_missing_encoder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="embedding model .* cannot be loaded"):
        Embedder(str(tmp_path / "nothing")).embed(["a"])
