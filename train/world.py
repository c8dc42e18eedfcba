"""A made-up world for the lab: people with attributes, number pairs, lists and intervals, split by construction.

Everything follows from one integer, the *world seed*. What a split holds out is decided here, once; the texts that
train the ladder (`train.ladder_texts`) and the questions that test it (`train.world_tasks`) both draw from it:

    people      core     asked about in the ladder's question pages and chats
                train    in statements of pretraining only; the switcher's rollouts ask about them
                dev      in statements of pretraining only; asked about on the dev split
                test     in statements of pretraining only; asked about on the test split
                guests   no fixed values; they appear in notes, with values drawn anew each time
    pairs, lists, intervals
                ladder   may occur in the ladder's training
                train, dev, test   occur in no training document of the ladder
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

ATTRIBUTES = ("age", "height", "weight", "score", "house")
VALUES = range(10, 30)
SPLITS = ("train", "dev", "test")

NUM_PEOPLE = {"core": 30, "train": 30, "dev": 48, "test": 48}
NUM_GUESTS = 300
NUM_QUESTIONS = {"train": 300, "dev": 240, "test": 240}

ADDENDS = range(10, 90)
LARGEST_SUM = 99
LIST_NUMBERS = range(10, 34)
INTERVAL_LOW = range(10, 96)
INTERVAL_SIZES = range(10, 21)

CONSONANTS = "bdfghjklmnprstvz"
VOWELS = "aeiou"

T = TypeVar("T")
Pair = tuple[int, int]
Interval = tuple[int, int]


@dataclass(frozen=True)
class World:
    """One made-up world.

    Attributes:
        seed: the world seed everything else follows from.
        people: group → names, groups as in `NUM_PEOPLE`; names are unique in their first three letters.
        guests: names without fixed values.
        values: (name, attribute) → value in `VALUES`, for all people.
        pairs: split or "ladder" → unordered pairs (a <= b) of two-digit addends with a two-digit sum.
        lists: split or "ladder" → three numbers to be added up; on the way to the ladder's totals no held-out
            pair is added.
        intervals: split or "ladder" → (low, high) with at least ten whole numbers strictly between.
    """

    seed: int
    people: Mapping[str, tuple[str, ...]]
    guests: tuple[str, ...]
    values: Mapping[tuple[str, str], int]
    pairs: Mapping[str, tuple[Pair, ...]]
    lists: Mapping[str, tuple[tuple[int, ...], ...]]
    intervals: Mapping[str, tuple[Interval, ...]]

    @property
    def everyone(self) -> tuple[str, ...]:
        """All people with fixed values, group by group."""
        return tuple(name for names in self.people.values() for name in names)

    @cached_property
    def held_out_pairs(self) -> frozenset[Pair]:
        """The number pairs that no training document of the ladder may add."""
        return frozenset(pair for split in SPLITS for pair in self.pairs[split])

    def may_add(self, a: int, b: int) -> bool:
        """Whether the ladder's training may add these two numbers, in either order."""
        return (min(a, b), max(a, b)) not in self.held_out_pairs

    def statement(self, name: str, attribute: str, value: int | None = None) -> str:
        """One fact as a sentence; `value` replaces the world's own (notes about guests)."""
        return f"The {attribute} of {name} is {self.values[name, attribute] if value is None else value}."

    def second(self, name: str, attribute: str, value: int | None = None) -> str:
        """The fact about the second of two people, which says so: a small model else repeats the first (LOG.md)."""
        return "And the" + self.statement(name, attribute, value).removeprefix("The")


def make_world(seed: int) -> World:
    """Draws the world of one seed.

    Returns:
        The same world for the same seed, on any machine.
    """
    rng = random.Random(f"switchgen world {seed}")
    names = _names(rng, sum(NUM_PEOPLE.values()) + NUM_GUESTS)
    people: dict[str, tuple[str, ...]] = {}
    start = 0
    for group, count in NUM_PEOPLE.items():
        people[group] = tuple(names[start : start + count])
        start += count
    values = {(name, a): rng.choice(VALUES) for group in people.values() for name in group for a in ATTRIBUTES}
    pairs = [(a, b) for a in ADDENDS for b in ADDENDS if a <= b and a + b <= LARGEST_SUM]
    lists = list(itertools.product(LIST_NUMBERS, repeat=3))
    intervals = [(low, low + size + 1) for low in INTERVAL_LOW for size in INTERVAL_SIZES if low + size + 1 < 100]
    world = World(
        seed=seed,
        people=people,
        guests=tuple(names[start:]),
        values=values,
        pairs=_split(rng, pairs),
        lists=_split(rng, lists),
        intervals=_split(rng, intervals),
    )
    taught = tuple(
        (first, second, third)
        for first, second, third in world.lists["ladder"]
        if world.may_add(first, second) and world.may_add(first + second, third)
    )
    return replace(world, lists={**world.lists, "ladder": taught})


def _names(rng: random.Random, count: int) -> list[str]:
    """Names such as `Vuda`, unique in their first three letters, two syllables each, short to write."""
    stems = [a + b + c for a in CONSONANTS for b in VOWELS for c in CONSONANTS]
    return [stem.capitalize() + rng.choice(VOWELS) for stem in rng.sample(stems, count)]


def _split(rng: random.Random, everything: Sequence[T]) -> dict[str, tuple[T, ...]]:
    """Shuffles, hands each split its number of questions, and leaves the rest to the ladder."""
    shuffled = rng.sample(everything, len(everything))
    parts: dict[str, tuple[T, ...]] = {}
    start = 0
    for split in SPLITS:
        parts[split] = tuple(shuffled[start : start + NUM_QUESTIONS[split]])
        start += NUM_QUESTIONS[split]
    parts["ladder"] = tuple(shuffled[start:])
    return parts
