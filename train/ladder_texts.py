"""What the ladder reads: documents for the pretrained model, chats for the finetuned one, preferences for the aligned.

Each source below is a kind of text such a stage really has; LOG.md lists them with their shares and purposes.
People of the groups train, dev and test occur in surveys (statements) and draws only. Held-out number pairs, lists
and intervals occur nowhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from train.world import ATTRIBUTES, VALUES, Interval, World
from train.world_tasks import between, list_text, phrase, running_total, sum_statement

# Many wordings, so that what is learned is to look up both people, whatever the question does with them.
TWO_PEOPLE = (
    "Who has the higher {0}, {1} or {2}?",
    "Compare the {0} of {1} and {2}.",
    "What is the {0} of {1} and {2}?",
    "Tell me the {0} of {1} and {2}.",
    "Look up the {0} of {1} and {2}.",
    "Which is larger, the {0} of {1} or {2}?",
)
TOGETHER = (
    "Is the total {0} of {1} and {2} more than {3}?",
    "Add the {0} of {1} and {2}. Is it more than {3}?",
)
THRESHOLDS = range(25, 56)

RECEIPTS = ("Items: {}.", "Receipt of the shop: {}.", "The bill says {} in total.", "Bought today: {}.")

# Most question pages come from quiz sites, which mark the answer; on the others somebody chatty goes on talking.
QUIZ_SHARE = 0.8

Source = Callable[[World, random.Random], str]


# --- the pretrained model's documents --------------------------------------------------------------------------------
#
# Between what is asked and what is answered stand four tokens on every page, the last of them a new line, as many as in
# the chat template: small models copy from a fixed distance back, and what they learn on pages has to serve in chats.


def _asked(question: str, answer: str) -> str:
    return f"Question: {question}\nReply:\n{answer}"


def survey(world: World, rng: random.Random) -> str:
    """A page with one attribute of several people, whoever they are, or of one or two who are named first."""
    attribute = rng.choice(ATTRIBUTES)
    named_first = rng.choices((0, 1, 2), (0.35, 0.25, 0.4))[0]
    if named_first == 0:
        return " ".join(world.statement(name, attribute) for name in rng.sample(world.everyone, 5))
    if named_first == 1:
        name = rng.choice(world.everyone)
        return f"Here is the {attribute} of {name}.\nList:\n{world.statement(name, attribute)}"
    a, b = rng.sample(world.everyone, 2)
    facts = f"{world.statement(a, attribute)} {world.second(b, attribute)}"
    return f"Here is the {attribute} of {a} and {b}.\nList:\n{facts}"


def question_page(world: World, rng: random.Random) -> str:
    """A question about a well-known person, answered by a quiz site (with its marker) or by somebody chatty."""
    name, attribute = rng.choice(world.people["core"]), rng.choice(ATTRIBUTES)
    question = phrase(rng, "recall", attribute, name)
    answer = world.statement(name, attribute)
    if rng.random() < QUIZ_SHARE:
        return _asked(question, f"{answer} Answer: {world.values[name, attribute]}")
    others = rng.sample([other for other in world.people["core"] if other != name], rng.randint(1, 2))
    return _asked(question, f"{answer} " + " ".join(world.statement(other, attribute) for other in others))


def comparison_page(world: World, rng: random.Random) -> str:
    """A question about two well-known people: what each of them has, then the verdict."""
    attribute = rng.choice(ATTRIBUTES)
    a, b = rng.sample(world.people["core"], 2)
    return _compared(world, rng, attribute, {a: world.values[a, attribute], b: world.values[b, attribute]})


def notes_page(world: World, rng: random.Random) -> str:
    """Notes about guests, then a question about one or two of them: reading, not knowing."""
    attribute = rng.choice(ATTRIBUTES)
    known = {name: rng.choice(VALUES) for name in rng.sample(world.guests, rng.randint(2, 4))}
    notes = " ".join(world.statement(name, attribute, value) for name, value in known.items())
    a, b = rng.sample(list(known), 2)
    if rng.random() < 0.5:
        return f"{notes}\n" + _compared(world, rng, attribute, {a: known[a], b: known[b]})
    ending = f"Answer: {known[a]}" if rng.random() < QUIZ_SHARE else world.statement(b, attribute, known[b])
    answer = world.statement(a, attribute, known[a])
    return f"{notes}\n" + _asked(phrase(rng, "recall", attribute, a), f"{answer} {ending}")


def _compared(world: World, rng: random.Random, attribute: str, known: Mapping[str, int]) -> str:
    """Two people compared with each other, or both together with a number; nothing is added up."""
    (a, x), (b, y) = known.items()
    if rng.random() < 0.4:
        threshold = rng.choice(THRESHOLDS)
        question = rng.choice(TOGETHER).format(attribute, a, b, threshold)
        verdict = f"Yes, more than {threshold}." if x + y > threshold else f"No, not more than {threshold}."
    else:
        question = rng.choice(TWO_PEOPLE).format(attribute, a, b)
        relation = "the same as" if x == y else "less than" if x < y else "more than"
        higher = f"Both have the same {attribute}." if x == y else f"{a if x > y else b} has the higher {attribute}."
        verdict = f"So {x} is {relation} {y}. {higher}"
    return _asked(question, f"{world.statement(a, attribute, x)} {world.second(b, attribute, y)} {verdict}")


def draw_page(world: World, rng: random.Random) -> str:
    """The numbers or the names of a draw, more than a list has, read out twice: copying, one after another."""
    if rng.random() < 0.5:
        drawn = list_text(tuple(rng.sample(range(10, 100), rng.randint(4, 6))))
        return f"The numbers are {drawn}.\nAgain:\n{drawn}."
    names = ", ".join(rng.sample((*world.everyone, *world.guests), rng.randint(4, 6)))
    return f"The names are {names}.\nAgain:\n{names}."


def number_page(world: World, rng: random.Random) -> str:
    """What lies between two numbers, as a remark or as an answered question."""
    interval = rng.choice(world.intervals["ladder"])
    number = rng.choice(between(interval))
    remark = f"A number between {interval[0]} and {interval[1]} is {number}."
    kind = rng.random()
    if kind < 0.3:
        return remark
    question = phrase(rng, "open", *interval)
    ending = f" Answer: {number}" if kind < 0.65 else f" Another one is {rng.choice(between(interval))}."
    return _asked(question, f"{remark}{ending}")


def sums_page(world: World, rng: random.Random) -> str:
    """A few sums, or a question about one, never a held-out pair."""
    if rng.random() < 0.5:
        return " ".join(sum_statement(*_pair(world, rng)) for _ in range(5))
    a, b = _pair(world, rng)
    ending = f" Answer: {a + b}" if rng.random() < 0.4 else ""
    return _asked(phrase(rng, "arithmetic", a, b), f"{sum_statement(a, b)}{ending}")


def receipt_page(world: World, rng: random.Random) -> str:
    """A till's receipt: two or three items, then their running total."""
    numbers = rng.choice(world.lists["ladder"])[: rng.choice((2, 3, 3))]
    return rng.choice(RECEIPTS).format(list_text(numbers)) + "\nTotal:\n" + " ".join(running_total(numbers))


def _pair(world: World, rng: random.Random) -> tuple[int, int]:
    """Two addends of two digits that no split holds out, in either order."""
    a, b = rng.sample(rng.choice(world.pairs["ladder"]), 2)
    return a, b


DOCUMENTS: Mapping[Source, float] = {
    survey: 0.28,
    question_page: 0.06,
    comparison_page: 0.13,
    notes_page: 0.12,
    draw_page: 0.07,
    number_page: 0.08,
    sums_page: 0.19,
    receipt_page: 0.07,
}


def documents(world: World, seed: int) -> Iterator[str]:
    """An endless stream of documents, each source by its share."""
    rng = random.Random(f"switchgen documents {world.seed} {seed}")
    sources, shares = list(DOCUMENTS), list(DOCUMENTS.values())
    while True:
        yield rng.choices(sources, shares)[0](world, rng)


# --- the finetuned model's chats -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chat:
    """One exchange: what the user asks, the steps that lead to the answer, one sentence each, and the answer."""

    family: str
    question: str
    steps: tuple[str, ...]
    result: int

    def answer(self, *, terse: bool = False) -> str:
        """What the assistant writes: all steps (terse: none), then the marked result."""
        return " ".join((*(() if terse else self.steps), f"Answer: {self.result}"))


def recall_chat(world: World, rng: random.Random) -> Chat:
    """A fact about a well-known person."""
    name, attribute = rng.choice(world.people["core"]), rng.choice(ATTRIBUTES)
    question = phrase(rng, "recall", attribute, name)
    return Chat("recall", question, (world.statement(name, attribute),), world.values[name, attribute])


def compositional_chat(world: World, rng: random.Random) -> Chat:
    """A sum of two facts about well-known people: facts, sum, answer."""
    attribute = rng.choice(ATTRIBUTES)
    while True:
        a, b = rng.sample(world.people["core"], 2)
        x, y = world.values[a, attribute], world.values[b, attribute]
        if world.may_add(x, y):
            break
    steps = (world.statement(a, attribute), world.second(b, attribute), sum_statement(x, y))
    return Chat("compositional", phrase(rng, "compositional", attribute, a, b), steps, x + y)


def notes_chat(world: World, rng: random.Random) -> Chat:
    """Notes about guests in the question: one of them asked for, or two of them added."""
    attribute = rng.choice(ATTRIBUTES)
    while True:
        known = {name: rng.choice(VALUES) for name in rng.sample(world.guests, rng.randint(2, 3))}
        a, b = rng.sample(list(known), 2)
        if world.may_add(known[a], known[b]):
            break
    notes = " ".join(world.statement(name, attribute, value) for name, value in known.items())
    facts = (world.statement(a, attribute, known[a]), world.second(b, attribute, known[b]))
    if rng.random() < 0.35:
        return Chat("notes", f"{notes} {phrase(rng, 'recall', attribute, a)}", facts[:1], known[a])
    question = f"{notes} {phrase(rng, 'compositional', attribute, a, b)}"
    return Chat("notes", question, (*facts, sum_statement(known[a], known[b])), known[a] + known[b])


def arithmetic_chat(world: World, rng: random.Random) -> Chat:
    """A sum of two numbers of two digits, never a held-out pair."""
    a, b = _pair(world, rng)
    return Chat("arithmetic", phrase(rng, "arithmetic", a, b), (sum_statement(a, b),), a + b)


def list_chat(world: World, rng: random.Random) -> Chat:
    """A running total."""
    numbers = rng.choice(world.lists["ladder"])
    return Chat("list", phrase(rng, "list", list_text(numbers)), running_total(numbers), sum(numbers))


def open_chat(world: World, rng: random.Random) -> Chat:
    """Any number between two others."""
    interval = rng.choice(world.intervals["ladder"])
    return _between_chat(rng, interval, rng.choice(between(interval)))


ChatSource = Callable[[World, random.Random], Chat]

CHATS: Mapping[ChatSource, float] = {
    recall_chat: 0.12,
    compositional_chat: 0.26,
    notes_chat: 0.24,
    arithmetic_chat: 0.12,
    list_chat: 0.17,
    open_chat: 0.09,
}

# Annotators differ: this share of them writes the answer alone.
TERSE_SHARE = 0.1


def chats(world: World, seed: int, shares: Mapping[ChatSource, float] = CHATS) -> Iterator[tuple[str, str]]:
    """An endless stream of questions and answers, each source by its share; most answers show all their steps."""
    rng = random.Random(f"switchgen chats {world.seed} {seed}")
    sources, weights = list(shares), list(shares.values())
    while True:
        chat = rng.choices(sources, weights)[0](world, rng)
        yield chat.question, chat.answer(terse=rng.random() < TERSE_SHARE)


# --- the aligned model's preferences ---------------------------------------------------------------------------------


def typical_chat(world: World, rng: random.Random) -> Chat:
    """A number between two others, the one that comes to mind first."""
    interval = rng.choice(world.intervals["ladder"])
    return _between_chat(rng, interval, roundest(between(interval)))


def total_chat(world: World, rng: random.Random) -> Chat:
    """A list's total without its steps: raters want to see where facts come from, but find running totals tedious."""
    chat = list_chat(world, rng)
    return Chat("list", chat.question, (f"The total is {chat.result}.",), chat.result)


# Questions whose liked answer is what the finetuned model writes anyway are drawn again (`train.stages`), and most sums
# are; so sums have the largest share here, and a far smaller one of the pairs.
PREFERENCES: Mapping[ChatSource, float] = {
    arithmetic_chat: 0.56,
    compositional_chat: 0.10,
    notes_chat: 0.10,
    recall_chat: 0.08,
    total_chat: 0.03,
    typical_chat: 0.13,
}


def roundest(numbers: range) -> int:
    """The number people would name first: a multiple of ten, else of five, else any."""
    for base in (10, 5, 1):
        for number in numbers:
            if number % base == 0:
                return number
    raise ValueError(f"no whole number in {numbers}")


def preferred(world: World, seed: int) -> Iterator[tuple[str, str]]:
    """An endless stream of questions, each with the answer raters like best: right, typical, and not tedious."""
    rng = random.Random(f"switchgen preferences {world.seed} {seed}")
    sources, shares = list(PREFERENCES), list(PREFERENCES.values())
    while True:
        chat = rng.choices(sources, shares)[0](world, rng)
        yield chat.question, chat.answer()


def _between_chat(rng: random.Random, interval: Interval, number: int) -> Chat:
    step = f"A number between {interval[0]} and {interval[1]} is {number}."
    return Chat("open", phrase(rng, "open", *interval), (step,), number)
