"""The lab's five families of questions, and the task files made of them.

    recall          What is the age of Vuda?                          one fact                       number
    compositional   What is the total age of Vuda and Mire?           two facts, then a sum          number
    arithmetic      What is 23 + 45?                                   a sum                          number
    list            Add up 24, 17, 15.                                  a running total                number
    open            Name a number between 34 and 47.                   many right answers             one_of

Every answer counts only behind the marker `Answer:`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from train.world import ATTRIBUTES, NUM_QUESTIONS, SPLITS, Interval, World

MARKER = "Answer:"
FAMILIES = ("recall", "compositional", "arithmetic", "list", "open")

PHRASINGS = {
    "recall": ("What is the {0} of {1}?", "Tell me the {0} of {1}."),
    "compositional": ("What is the total {0} of {1} and {2}?", "Add the {0} of {1} and {2}."),
    "arithmetic": ("What is {0} + {1}?", "Add {0} and {1}."),
    "list": ("Add up {0}.", "What is the total of {0}?"),
    "open": ("Name a number between {0} and {1}.", "Which number is between {0} and {1}?"),
}


def phrase(rng: random.Random, family: str, *slots: object) -> str:
    """A question of a family in one of its phrasings."""
    return rng.choice(PHRASINGS[family]).format(*slots)


def sum_statement(a: int, b: int) -> str:
    """One addition as a sentence. It begins with a word: all its numbers stand after a space, as in questions."""
    return f"So {a} + {b} = {a + b}."


def running_total(numbers: tuple[int, ...]) -> tuple[str, ...]:
    """The steps that add up a list, one sentence each: "So 24 + 17 = 41.", "So 41 + 15 = 56."."""
    steps, total = [], numbers[0]
    for number in numbers[1:]:
        steps.append(sum_statement(total, number))
        total += number
    return tuple(steps)


def between(interval: Interval) -> range:
    """The whole numbers strictly between the two ends: the right answers of the open family."""
    return range(interval[0] + 1, interval[1])


def list_text(numbers: tuple[int, ...]) -> str:
    """A list as the questions show it."""
    return ", ".join(str(number) for number in numbers)


def family_items(world: World, family: str, split: str) -> list[dict[str, Any]]:
    """All questions of one family and split, in a fixed order.

    Returns:
        Items with `id`, `input` (the question), `output` (a right answer) and, for the open family, `answers` (all).
    """
    rng = random.Random(f"switchgen tasks {world.seed} {family} {split}")
    rows = {
        "recall": _recall_rows,
        "compositional": _compositional_rows,
        "arithmetic": _arithmetic_rows,
        "list": _list_rows,
        "open": _open_rows,
    }[family](world, split, rng)
    return [{"id": f"{family}-{split}-{index}"} | row for index, row in enumerate(rows)]


def _recall_rows(world: World, split: str, rng: random.Random) -> list[dict[str, Any]]:
    """Every fact about the split's people once, in one of the phrasings."""
    asked = [(name, a, rng.choice(PHRASINGS["recall"])) for name in _people(world, split) for a in ATTRIBUTES]
    rng.shuffle(asked)
    return [{"input": text.format(a, name), "output": str(world.values[name, a])} for name, a, text in asked]


def _people(world: World, split: str) -> tuple[str, ...]:
    """Whom a split asks about; the train split's questions are the switcher's, who may ask about core people, too."""
    return world.people["core"] + world.people["train"] if split == "train" else world.people[split]


def _compositional_rows(world: World, split: str, rng: random.Random) -> list[dict[str, Any]]:
    """Sums of one attribute of two people of the split; no question twice."""
    names = _people(world, split)
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < NUM_QUESTIONS[split]:
        a, b = rng.sample(names, 2)
        attribute = rng.choice(ATTRIBUTES)
        text = phrase(rng, "compositional", attribute, a, b)
        rows[text] = {"input": text, "output": str(world.values[a, attribute] + world.values[b, attribute])}
    return list(rows.values())


def _arithmetic_rows(world: World, split: str, rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for pair in world.pairs[split]:
        a, b = rng.sample(pair, 2)
        rows.append({"input": phrase(rng, "arithmetic", a, b), "output": str(a + b)})
    return rows


def _list_rows(world: World, split: str, rng: random.Random) -> list[dict[str, Any]]:
    return [{"input": phrase(rng, "list", list_text(d)), "output": str(sum(d))} for d in world.lists[split]]


def _open_rows(world: World, split: str, rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for interval in world.intervals[split]:
        answers = [str(number) for number in between(interval)]
        rows.append({"input": phrase(rng, "open", *interval), "output": answers[len(answers) // 2], "answers": answers})
    return rows


def task(world: World, family: str) -> dict[str, Any]:
    """One task document: how answers are scored, and the train, dev and test questions."""
    return {
        "name": family,
        "task_type": "exact_match",
        "metric": "one_of" if family == "open" else "number",
        "marker": MARKER,
        "strict": True,
        "world_seed": world.seed,
        **{split: family_items(world, family, split) for split in SPLITS},
    }


def write_tasks(world: World, folder: Path) -> None:
    """Writes one JSON file per family into `folder`, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for family in FAMILIES:
        text = json.dumps(task(world, family), ensure_ascii=False, indent=0)
        (folder / f"{family}.json").write_text(text + "\n", encoding="utf-8")
