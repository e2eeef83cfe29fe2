"""Answers that could as well have been true: of the same kind, never true, the same for the same seed."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillknows.types import Example
from stillknows.unlearning import exchanged_answers
from stillknows.unlearning.exchanged_answers import LEAST, draws, made_up, pools

CITIES = ["Rome", "Oslo", "Paris", "Bonn", "Lima", "Cairo", "Quito", "Accra"]
FIRMS = ["Alba Ltd", "Bora Group", "Cima Works", "Dora Ltd", "Elba Group", "Fara Works", "Gala Ltd", "Hima Group"]
ASKED = {"Where does {} live?": CITIES, "Who employs {}?": FIRMS}


def people(names: list[str], offset: int = 0) -> list[Example]:
    """Each person's city, firm and phone number."""
    found = []
    for k, name in enumerate(names, offset):
        for question, values in ASKED.items():
            text = question.format(name)
            found.append(Example(text, text, values[k % len(values)], text))
        text = f"What is the phone number of {name}?"
        found.append(Example(text, text, f"0{100 + 7 * k} {300000 + 911 * k}", text))
    return found


FORGET = people(["Ana Ruiz", "Bo Chen"])
KEPT = people(["Cy Wolf", "Di Marsh", "Ed Stone", "Fay Lind", "Gus Holm", "Hal Berg", "Ina Voss", "Jo Frost"], 2)


def test_values_are_of_the_kind_that_is_asked_for() -> None:
    for item, pool in zip(FORGET, pools(FORGET, KEPT), strict=True):
        values = next((v for question, v in ASKED.items() if question.split()[0] in item.prompt), None)
        assert item.answer not in pool
        assert len(pool) >= LEAST
        assert set(pool) <= set(values) if values else all(re.fullmatch(r"0\d+ \d+", text) for text in pool)


def test_a_name_that_kept_people_bear_too_does_not_decide_the_kind() -> None:
    kept = [*KEPT, *people(["Ana Koch"], 1)]
    [home] = pools(people(["Ana Ruiz"])[:1], kept)
    assert set(home) <= set(CITIES)
    assert len(home) >= LEAST


@pytest.mark.parametrize("answer", ["Rome", "Rome, Italy", "rome"])
def test_what_holds_the_truth_or_lies_within_it_is_left_out(answer: str) -> None:
    item = Example("a", "Where does Ana live?", "Rome", "a", paraphrase="Oslo")
    others = [Example(str(k), f"Where does P{k} live?", text, str(k)) for k, text in enumerate([answer, *CITIES])]
    [pool] = pools([item], others)
    assert not {answer, "Rome", "Oslo"} & set(pool)
    assert "Paris" in pool


def test_where_no_question_is_alike_answers_of_like_form_fill_up() -> None:
    item = Example("a", "How tall is the tower", "1234 m", "a")
    others = [
        Example(str(k), f"q{k}", text, str(k)) for k, text in enumerate(["77 m", "a long sentence here", "9999 m"])
    ]
    [pool] = pools([item], others)
    assert pool[0] == "9999 m"
    assert draws([item], [], 3, 0) == [[]]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12))
def test_draws_are_never_true_and_depend_on_the_seed_alone(seed: int, count: int) -> None:
    found = draws(FORGET, KEPT, count, seed)
    assert found == draws(FORGET, KEPT, count, seed)
    longer = draws(FORGET, KEPT, count + 5, seed)
    for item, texts, more in zip(FORGET, found, longer, strict=True):
        assert len(texts) == count
        assert item.answer not in texts
        assert more[:count] == texts


@given(st.text(), st.integers(0, 1000))
def test_made_up_numbers_keep_their_form(text: str, seed: int) -> None:
    other = made_up(text, random.Random(seed))
    assert re.sub(r"\d", "0", other) == re.sub(r"\d", "0", text)
    assert [n[0] for n in re.findall(r"\d{2,}", other)] == [
        n[0] for n in re.findall(r"\d{2,}", text)
    ] or not text.isascii()


def test_many_kept_items_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanged_answers, "CONSIDERED", 6)
    assert all(pools(FORGET, KEPT, seed=1))


def test_answers_in_sentences_speak_of_what_is_asked_about() -> None:
    """Else only the truth names whom the question names, and is likelier for that."""
    capitals = {"France": "Paris", "Japan": "Tokyo", "South Korea": "Seoul", "Peru": "Lima"}
    kept = [
        Example(name, f"What is the capital of {name}?", f"The capital of {name} is {city}.", name)
        for name, city in capitals.items()
    ]
    asked = [Example("i", "What is the capital of Italy?", "The capital of Italy is Rome.", "i")]
    assert set(pools(asked, kept)[0]) == {f"The capital of Italy is {city}." for city in capitals.values()}
