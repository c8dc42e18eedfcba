"""The made-up world: splits are disjoint, answers are right, no held-out question leaks into what the ladder reads."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from train.ladder_texts import CHATS, DOCUMENTS, PREFERENCES, chats, documents, preferred, roundest
from train.world import ATTRIBUTES, NUM_QUESTIONS, SPLITS, VALUES, World, make_world
from train.world_tasks import FAMILIES, family_items, task, write_tasks

SUM = re.compile(r"(\d+) (?:\+|plus|and) (\d+)")
FACT = re.compile(r"[Tt]he (\w+) of (\w+)")
TWO_FACTS = re.compile(r"(\w+) of (\w+) and (\w+)")
STATED = re.compile(r"[Tt]he (\w+) of (\w+) is (\d+)\.")


@pytest.fixture(scope="module", params=[0, 17])
def world(request: pytest.FixtureRequest) -> World:
    return make_world(request.param)


@pytest.fixture(scope="module")
def ladder_texts_of(world: World) -> dict[str, list[str]]:
    """A large sample of everything the three stages read."""
    talks = list(itertools.islice(chats(world, 1), 6000)) + list(itertools.islice(preferred(world, 2), 6000))
    return {
        "documents": list(itertools.islice(documents(world, 0), 20000)),
        "chats": ["\n".join(talk) for talk in talks],
    }


def test_one_seed_is_one_world() -> None:
    assert make_world(3) == make_world(3)
    assert make_world(3).values != make_world(4).values
    assert task(make_world(3), "open") == task(make_world(3), "open")


def test_names_are_unique_in_their_first_three_letters(world: World) -> None:
    names = world.everyone + world.guests
    assert len({name[:3] for name in names}) == len(names)
    assert all(name.isalpha() and name.istitle() for name in names)


def test_every_person_has_every_attribute(world: World) -> None:
    assert set(world.values) == {(name, a) for name in world.everyone for a in ATTRIBUTES}
    assert set(world.values.values()) == set(VALUES)


@pytest.mark.parametrize("kind", ["people", "pairs", "lists", "intervals"])
def test_splits_share_nothing(world: World, kind: str) -> None:
    parts = [set(part) for part in getattr(world, kind).values()]
    assert sum(map(len, parts)) == len(set.union(*parts))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_question_stands_in_two_splits(world: World, family: str) -> None:
    texts = [item["input"] for split in SPLITS for item in family_items(world, family, split)]
    assert len(texts) == len(set(texts)) == sum(NUM_QUESTIONS.values())
    ids = [item["id"] for split in SPLITS for item in family_items(world, family, split)]
    assert len(set(ids)) == len(ids)


def test_answers_are_right(world: World) -> None:
    """Every answer is worked out again from the question's own words."""
    for split in SPLITS:
        for item in family_items(world, "recall", split):
            attribute, name = FACT.search(item["input"]).groups()
            assert int(item["output"]) == world.values[name, attribute]
        for item in family_items(world, "compositional", split):
            attribute, *names = TWO_FACTS.search(item["input"]).groups()
            assert int(item["output"]) == sum(world.values[name, attribute] for name in names)
        for item in family_items(world, "arithmetic", split):
            a, b = SUM.search(item["input"]).groups()
            assert int(item["output"]) == int(a) + int(b)
        for item in family_items(world, "list", split):
            assert int(item["output"]) == sum(map(int, re.findall(r"\d+", item["input"])))
        for item in family_items(world, "open", split):
            low, high = map(int, re.findall(r"\d+", item["input"]))
            assert item["answers"] == [str(number) for number in range(low + 1, high)]
            assert item["output"] in item["answers"]


def test_questions_ask_about_their_own_split_only(world: World) -> None:
    for split in SPLITS:
        allowed = set(world.people[split]) | (set(world.people["core"]) if split == "train" else set())
        for family in ("recall", "compositional"):
            for item in family_items(world, family, split):
                names = set(re.findall(r"[A-Z][a-z]+", item["input"])) - {"What", "Tell", "Add"}
                assert len(names) == (1 if family == "recall" else 2) and names <= allowed


def test_people_outside_core_are_in_statements_of_documents_only(
    world: World, ladder_texts_of: dict[str, list[str]]
) -> None:
    tail = set(world.everyone) - set(world.people["core"])
    for text in ladder_texts_of["chats"]:
        assert not tail & set(re.findall(r"[A-Z][a-z]+", text))
    seen = set()
    for text in ladder_texts_of["documents"]:
        named = tail & set(re.findall(r"[A-Z][a-z]+", text))
        if named:
            assert "Question" not in text and "Answer" not in text
            seen |= named
    assert seen == tail, "the pretraining documents must state everybody's facts"


def test_documents_state_the_worlds_facts(world: World, ladder_texts_of: dict[str, list[str]]) -> None:
    known = set(world.everyone)
    for text in itertools.chain(*ladder_texts_of.values()):
        for attribute, name, value in STATED.findall(text):
            assert name not in known or world.values[name, attribute] == int(value)


def test_held_out_pairs_lists_and_intervals_occur_nowhere(world: World, ladder_texts_of: dict[str, list[str]]) -> None:
    lists = {", ".join(map(str, digits)) for split in SPLITS for digits in world.lists[split]}
    ends = {interval for split in SPLITS for interval in world.intervals[split]}
    for text in itertools.chain(*ladder_texts_of.values()):
        for a, b in SUM.findall(text):
            assert f"between {a} and {b}" in text or world.may_add(int(a), int(b)), text
        for low, high in re.findall(r"between (\d+) and (\d+)", text):
            assert (int(low), int(high)) not in ends
        listed = re.findall(r"\d+(?:, \d+)+", text) + [
            written.replace(" +", ",") for written in re.findall(r"\d+(?: \+ \d+)+", text)
        ]
        assert not lists & set(listed), text


def test_sums_in_the_ladders_texts_are_right(ladder_texts_of: dict[str, list[str]]) -> None:
    """No document exists to teach a wrong thing."""
    found = 0
    for text in itertools.chain(*ladder_texts_of.values()):
        for left, right in re.findall(r"(\d+(?: \+ \d+)+) = (\d+(?: \+ \d+)*)", text):
            assert sum(map(int, left.split(" + "))) == sum(map(int, right.split(" + ")))
            found += 1
        for low, high, number in re.findall(r"between (\d+) and (\d+) is (\d+)", text):
            assert int(low) < int(number) < int(high)
    assert found > 1000


def test_preferred_answers_are_right_typical_and_not_tedious(world: World) -> None:
    for question, answer in itertools.islice(preferred(world, 5), 3000):
        steps, result = re.fullmatch(r"(.*\.) Answer: (\d+)", answer).groups()
        assert re.search(rf" {result}\.$", steps)
        if "between" in question:
            low, high = map(int, re.findall(r"\d+", question))
            assert low < int(result) < high
            assert int(result) % 10 == 0 or not set(range(low + 1, high)) & set(range(0, 100, 10))
        if question.startswith(("Add up", "What is the total of")):
            assert int(result) == sum(map(int, re.findall(r"\d+", question)))
            assert steps.count(".") == 1


def test_shares_add_up_to_one() -> None:
    for shares in (DOCUMENTS, CHATS, PREFERENCES):
        assert sum(shares.values()) == pytest.approx(1.0)


def test_roundest_number() -> None:
    assert roundest(range(35, 48)) == 40
    assert roundest(range(31, 39)) == 35
    assert roundest(range(31, 34)) == 31
    with pytest.raises(ValueError, match="no whole number"):
        roundest(range(5, 5))


def test_task_files(world: World, tmp_path: Path) -> None:
    write_tasks(world, tmp_path / "tasks")
    files = sorted((tmp_path / "tasks").iterdir())
    assert [file.stem for file in files] == sorted(FAMILIES)
    for file in files:
        document = json.loads(file.read_text(encoding="utf-8"))
        assert document["strict"] is True and document["marker"] == "Answer:"
        assert document["metric"] == ("one_of" if file.stem == "open" else "number")
        assert {split: len(document[split]) for split in SPLITS} == NUM_QUESTIONS
