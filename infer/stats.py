"""Intervals and tests for comparing policies on the same questions.

Scores arrive as ``values_SQ``: one row per run seed, one column per question. A question is the unit of sampling: the
seeds of one question share its difficulty, so each resample draws questions with replacement and takes all seeds of a
drawn question with it (a cluster bootstrap). Drawing anew in each seed would treat S answers to one question as S
questions and give intervals that are too narrow. Several tasks are resampled each on its own and weigh the same.

Shapes: S run seeds, Q questions, R resamples, K distinct values.
Sources: bootstrap percentiles widened for small samples, Hesterberg 2015 (arXiv 1411.5279, §4.2); sign-flip test for
pairs, Fisher 1935 (for 0/1 scores of one seed it is the exact McNemar test); step-down correction, Holm 1979.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

FloatArray = npt.NDArray[np.float64]

_CHUNK_ELEMENTS = 4_000_000  # a resampling block stays below 32 MB
_MAX_LATTICE = 200_000  # longest distribution that is convolved exactly
_TIE = 1e-12  # sums within this relative distance are the same sum


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its confidence interval, in the unit of the scores."""

    value: float
    low: float
    high: float
    n: int  # questions


@dataclass(frozen=True, slots=True)
class Comparison:
    """Mean of a − b on the same questions; positive means a is better."""

    difference: float
    low: float
    high: float
    p: float  # two-sided, paired, before any correction
    n: int  # questions
    effect: float  # Cohen's d_z: difference / standard deviation of the questions' differences; 0 without spread
    wins: int  # questions on which a is better
    losses: int  # questions on which b is better


@dataclass(frozen=True, slots=True)
class SolvedAlone:
    """Questions that switching solves and no single candidate solves, against what luck would give."""

    observed: float  # share of (seed, question): solved by switching, by no candidate in the other seeds
    by_chance: float  # the same share for one more sample of the best single candidate
    excess: Comparison  # observed − by chance, paired by question
    best_single: str
    questions: tuple[int, ...]  # columns solved by switching in some seed and by no candidate in any


def bootstrap_mean(
    values_SQ: npt.ArrayLike, *, num_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean over questions and seeds with a bootstrap interval.

    Args:
        values_SQ: scores [seeds, questions] or [questions]; finite.
        num_resamples: bootstrap resamples.
        level: coverage aimed at, between 0 and 1.
        seed: seed of the resampling; the same arguments give the same interval.

    Raises:
        ValueError: no questions, a value that is not finite, a level outside (0, 1).

    Where all questions score the same the bootstrap sees no spread; for scores in [0, 1] the exact binomial bound takes
    its place (0 of 100 right: high = 3.6%), so a cell of 0% never looks certain.
    """
    return mean_over_tasks([values_SQ], num_resamples=num_resamples, level=level, seed=seed)


def mean_over_tasks(
    values_by_task: Mapping[str, npt.ArrayLike] | Sequence[npt.ArrayLike],
    *,
    num_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of the tasks' means (each task weighs the same), questions resampled within their task.

    Args:
        values_by_task: scores [seeds, questions] of each task; seeds may differ in number.
        num_resamples, level, seed: as in `bootstrap_mean`.

    Raises:
        ValueError: as in `bootstrap_mean`, or no task at all.
    """
    tasks = _tasks(values_by_task)
    is_fraction = all(bool((values.min() >= 0) & (values.max() <= 1)) for values in tasks)
    means = [values.mean(axis=0) for values in tasks]
    low, high = _percentiles(means, num_resamples, level, seed, (0.0, 1.0) if is_fraction else None)
    return Interval(_mean_of_means(means), low, high, sum(m.size for m in means))


def bootstrap_statistic(
    statistic: Callable[[FloatArray], FloatArray],
    num_questions: int,
    *,
    num_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A statistic in [0, 1] that is no mean over questions, with its bootstrap interval.

    Args:
        statistic: weights_RQ, how often each question was drawn → values_R; not a number where it is not defined.
        num_questions: Q, at least one; the statistic of all of them is defined.
        num_resamples, level, seed: as in `bootstrap_mean`.

    Percentiles are widened, and a statistic without spread bounded, as in `bootstrap_mean`. The interval always holds
    the value: resamples of a statistic that counts absolute gaps lie above it.
    """
    value = float(statistic(np.ones((1, num_questions)))[0])
    rng = np.random.default_rng(seed)
    even_Q = np.full(num_questions, 1 / num_questions)
    rows = max(1, _CHUNK_ELEMENTS // num_questions)
    sizes = [min(rows, num_resamples - start) for start in range(0, num_resamples, rows)]
    blocks = [statistic(rng.multinomial(num_questions, even_Q, size=size).astype(np.float64)) for size in sizes]
    values_R = np.concatenate(blocks)
    values_R = values_R[np.isfinite(values_R)]
    if np.ptp(values_R) <= _TIE:
        low, high = _bounds_without_spread([np.full(num_questions, value)], level, (0.0, 1.0))
    else:
        freedom = num_questions - 1
        tail = special.ndtr(special.stdtrit(freedom, (1 - level) / 2) * np.sqrt(num_questions / freedom))
        low, high = np.quantile(values_R, [tail, 1 - tail])
    return Interval(value, min(float(low), value), max(float(high), value), num_questions)


def paired_difference(
    a_SQ: npt.ArrayLike,
    b_SQ: npt.ArrayLike,
    *,
    num_resamples: int = 2000,
    num_flips: int = 9999,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Difference of two policies on the same questions: mean of a − b, interval, paired permutation test.

    Args:
        a_SQ, b_SQ: scores [seeds, questions] or [questions], columns in the same order. The numbers of seeds may
            differ (a greedy candidate needs one): pairs are formed by question.
        num_resamples, level, seed: as in `bootstrap_mean`.
        num_flips: random sign flips of the test where it is not exact. It is exact (all 2^Q flips, by convolution)
            wherever the differences are multiples of one step, as with 0/1 scores.

    Raises:
        ValueError: as in `bootstrap_mean`, or different numbers of questions.
    """
    return paired_difference_over_tasks(
        [a_SQ], [b_SQ], num_resamples=num_resamples, num_flips=num_flips, level=level, seed=seed
    )


def paired_difference_over_tasks(
    a_by_task: Mapping[str, npt.ArrayLike] | Sequence[npt.ArrayLike],
    b_by_task: Mapping[str, npt.ArrayLike] | Sequence[npt.ArrayLike],
    *,
    num_resamples: int = 2000,
    num_flips: int = 9999,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """`paired_difference` of the means over several tasks; tasks are matched by name (mappings) or by order.

    Raises:
        ValueError: as in `paired_difference`, or different tasks.
    """
    if isinstance(a_by_task, Mapping) and isinstance(b_by_task, Mapping):
        if a_by_task.keys() != b_by_task.keys():
            raise ValueError(f"the two sides cover different tasks: {sorted(a_by_task)} and {sorted(b_by_task)}")
        b_by_task = [b_by_task[task] for task in a_by_task]
    a_tasks, b_tasks = _tasks(a_by_task), _tasks(b_by_task)
    if [a.shape[1] for a in a_tasks] != [b.shape[1] for b in b_tasks]:
        raise ValueError(
            f"a pair needs the same questions on both sides, got {[a.shape[1] for a in a_tasks]} "
            f"and {[b.shape[1] for b in b_tasks]} questions"
        )
    is_fraction = all(bool((v.min() >= 0) & (v.max() <= 1)) for v in [*a_tasks, *b_tasks])
    differences = [a.mean(axis=0) - b.mean(axis=0) for a, b in zip(a_tasks, b_tasks, strict=True)]
    low, high = _percentiles(differences, num_resamples, level, seed, (-1.0, 1.0) if is_fraction else None)
    flat_Q = np.concatenate(differences)
    # what each question contributes to the mean of means
    weighted_Q = np.concatenate([d / (d.size * len(differences)) for d in differences])
    spread = float(flat_Q.std(ddof=1)) if flat_Q.size > 1 else 0.0
    value = _mean_of_means(differences)
    return Comparison(
        difference=value,
        low=low,
        high=high,
        p=_sign_flip_p(weighted_Q, num_flips, seed),
        n=int(flat_Q.size),
        effect=value / spread if spread > _TIE else 0.0,
        wins=int((flat_Q > _TIE).sum()),
        losses=int((flat_Q < -_TIE).sum()),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that hold for the whole table at once, in the order given.

    Raises:
        ValueError: a p-value outside [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.size and not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values lie between 0 and 1, got {p_values}")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * (p.size - np.arange(p.size)))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in corrected]


def solved_by_none_else(
    switching_SQ: npt.ArrayLike,
    candidates: Mapping[str, npt.ArrayLike],
    *,
    threshold: float = 0.5,
    num_resamples: int = 2000,
    seed: int = 0,
) -> SolvedAlone:
    """How often switching solves what no single candidate solves, corrected for chance.

    A question that nobody solved once may be solved by anybody's next sample, so the plain count flatters whoever
    samples last. Each seed is therefore held out in turn: switching's sample of that seed, and the best single
    candidate's sample of that seed, are both checked against all candidates' samples of the other seeds.

    Args:
        switching_SQ: scores of the switching policy [seeds, questions], at least two seeds.
        candidates: scores of each candidate alone, same shape.
        threshold: a score from here on counts as solved.

    Raises:
        ValueError: fewer than two seeds, different shapes, no candidate.
    """
    switching = _checked(switching_SQ) >= threshold
    solved = {name: _checked(values) >= threshold for name, values in candidates.items()}
    if not solved:
        raise ValueError("no single candidate to compare with")
    for name, values in solved.items():
        if values.shape != switching.shape:
            raise ValueError(f"{name!r} has shape {values.shape}, the switching policy {switching.shape}")
    num_seeds = switching.shape[0]
    if num_seeds < 2:
        raise ValueError("the correction for chance needs at least two run seeds, got one")
    best = max(solved, key=lambda name: solved[name].mean())
    attempts_SQ = np.stack(list(solved.values())).any(axis=0)
    others_SQ = np.stack([np.delete(attempts_SQ, s, axis=0).any(axis=0) for s in range(num_seeds)])
    ours = switching & ~others_SQ
    luck = solved[best] & ~others_SQ
    excess = paired_difference(ours.astype(float), luck.astype(float), num_resamples=num_resamples, seed=seed)
    alone = np.flatnonzero(switching.any(axis=0) & ~attempts_SQ.any(axis=0))
    return SolvedAlone(float(ours.mean()), float(luck.mean()), excess, best, tuple(int(i) for i in alone))


def _checked(values: npt.ArrayLike) -> FloatArray:
    """Scores as a finite float array [seeds, questions]."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 1:
        array = array[None, :]
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"scores are an array [seeds, questions] with at least one of each, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("scores must be finite; give unanswered questions the score they are counted with")
    return array


def _tasks(values_by_task: Mapping[str, npt.ArrayLike] | Sequence[npt.ArrayLike]) -> list[FloatArray]:
    values = values_by_task.values() if isinstance(values_by_task, Mapping) else values_by_task
    tasks = [_checked(v) for v in values]
    if not tasks:
        raise ValueError("no task to average over")
    return tasks


def _mean_of_means(means: Sequence[FloatArray]) -> float:
    return float(np.mean([m.mean() for m in means]))


def _percentiles(
    tasks: Sequence[FloatArray], num_resamples: int, level: float, seed: int, bounds: tuple[float, float] | None
) -> tuple[float, float]:
    """Bootstrap percentiles of the mean of the tasks' means; `bounds` is the range that scores can take, if known."""
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval lies between 0 and 1, got {level}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be positive, got {num_resamples}")
    if all(np.ptp(m) <= _TIE for m in tasks):
        return _bounds_without_spread(tasks, level, bounds)
    rng = np.random.default_rng(seed)
    total_R = np.zeros(num_resamples)
    for means_Q in tasks:
        total_R += _resampled_means(means_Q, num_resamples, rng)
    tail = _tail(tasks, level)
    low, high = np.quantile(total_R / len(tasks), [tail, 1 - tail])
    return float(low), float(high)


def _resampled_means(means_Q: FloatArray, num_resamples: int, rng: np.random.Generator) -> FloatArray:
    values_K, counts_K = np.unique(means_Q, return_counts=True)
    if values_K.size <= 32:  # how often each value is drawn is all that matters: 0/1 scores cost next to nothing
        draws_RK = rng.multinomial(means_Q.size, counts_K / means_Q.size, size=num_resamples)
        return np.asarray(draws_RK @ values_K / means_Q.size)
    rows = max(1, _CHUNK_ELEMENTS // means_Q.size)
    blocks = []
    for start in range(0, num_resamples, rows):
        index = rng.integers(means_Q.size, size=(min(rows, num_resamples - start), means_Q.size))
        blocks.append(means_Q[index].mean(axis=1))
    return np.concatenate(blocks)


def _tail(tasks: Sequence[FloatArray], level: float) -> float:
    """Tail probability of the percentiles, widened as a t interval is wider than a normal one."""
    measured = [m for m in tasks if m.size > 1]
    unbiased = np.array([m.var(ddof=1) / m.size for m in measured])
    plain = np.array([m.var() / m.size for m in measured])
    freedom = unbiased.sum() ** 2 / (unbiased**2 / np.array([m.size - 1 for m in measured])).sum()
    normal = special.stdtrit(freedom, (1 - level) / 2) * np.sqrt(unbiased.sum() / plain.sum())
    return float(special.ndtr(normal))


def _bounds_without_spread(
    tasks: Sequence[FloatArray], level: float, bounds: tuple[float, float] | None
) -> tuple[float, float]:
    """If a share m of all questions scores as seen, n questions all do with probability m^n: the unseen rest is at
    most 1 − (α/2)^(1/n) of them and lies within the bounds. At 0 and 1 this is the Clopper–Pearson interval."""
    value = _mean_of_means(tasks)
    if bounds is None:
        return value, value
    unseen = [1 - ((1 - level) / 2) ** (1 / m.size) for m in tasks]
    low = np.mean([m[0] + u * (bounds[0] - m[0]) for m, u in zip(tasks, unseen, strict=True)])
    high = np.mean([m[0] + u * (bounds[1] - m[0]) for m, u in zip(tasks, unseen, strict=True)])
    return float(low), float(high)


def _sign_flip_p(parts_Q: FloatArray, num_flips: int, seed: int) -> float:
    """Two-sided p of the sum of `parts_Q` when each part's sign is a coin flip."""
    sizes_Q = np.abs(parts_Q)
    sizes_Q = sizes_Q[sizes_Q > _TIE * max(1.0, sizes_Q.max())]
    if sizes_Q.size == 0:
        return 1.0
    observed = abs(float(parts_Q.sum()))
    for divisor in range(1, 13):  # differences of S seeds' means are multiples of 1/S, and the smallest one may be k/S
        unit = sizes_Q.min() / divisor
        whole_Q = np.rint(sizes_Q / unit).astype(np.int64)
        if np.abs(sizes_Q / unit - whole_Q).max() < 1e-6 and int(whole_Q.sum()) <= _MAX_LATTICE:
            return _exact_p(whole_Q, round(observed / unit))
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK_ELEMENTS // sizes_Q.size)
    hits = 0
    for start in range(0, num_flips, rows):
        count = min(rows, num_flips - start)
        bits = np.unpackbits(rng.integers(0, 256, size=(count, -(-sizes_Q.size // 8)), dtype=np.uint8), axis=1)
        sums_R = 2 * (bits[:, : sizes_Q.size] @ sizes_Q) - sizes_Q.sum()
        hits += int((np.abs(sums_R) >= observed * (1 - 1e-9)).sum())
    return (hits + 1) / (num_flips + 1)


def _exact_p(steps_Q: npt.NDArray[np.int64], observed: int) -> float:
    """All sign flips at once: the sum's distribution is a convolution of binomials, one for each step size."""
    mass = np.ones(1)
    for step, count in zip(*np.unique(steps_Q, return_counts=True), strict=True):
        part = np.zeros(2 * int(step) * int(count) + 1)
        heads = np.arange(count + 1)
        log_ways = special.gammaln(count + 1) - special.gammaln(heads + 1) - special.gammaln(count - heads + 1)
        part[:: 2 * int(step)] = np.exp(log_ways - count * np.log(2))
        mass = np.convolve(mass, part)
    reach = int(steps_Q.sum())
    sums = np.abs(np.arange(-reach, reach + 1))
    return float(min(1.0, mass[sums >= observed].sum()))
