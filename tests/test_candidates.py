"""Placebos: of the truth's form, never the truth, from one source for each fact, the same for the same seed."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillknows.defaults import PLACEBOS
from stillknows.errors import UserError
from stillknows.gate.candidates import ENOUGH, placebos, read_placebos
from stillknows.gate.made_up import DAYS, MONTHS, WORD, NameWords, made_up_names, made_up_numbers
from stillknows.registry import bind
from stillknows.types import Benchmark, Example, Split

CITIES = [
    f"{first}{second}" for first in ("Ba", "Do", "Ke", "Li", "Mu") for second in ("lor", "nim", "rax", "sten", "tov")
]


def example(name: str, prompt: str, answer: str, **others: object) -> Example:
    return Example(name, prompt, answer, name, **others)  # type: ignore[arg-type]


def people(count: int, prefix: str, cities: list[str]) -> tuple[Example, ...]:
    """Return where so many people live, in the cities by turns."""
    return tuple(
        example(f"{prefix}{i}", f"Where does {prefix}{'aeiou'[i % 5]}{chr(97 + i // 5)} live?", cities[i % len(cities)])
        for i in range(count)
    )


def benchmark(forget: tuple[Example, ...], retain: tuple[Example, ...] = ()) -> Benchmark:
    kept = retain or (example("kept", "What is kept here?", "nothing of this"),)
    return Benchmark("test", (Split("forget", "forget", forget), Split("retain", "retain", kept)))


def test_values_are_exchanged_among_those_who_are_asked_about() -> None:
    made = benchmark(people(3, "For", CITIES), people(25, "Ret", CITIES))
    found = placebos(made)
    for asked in made.splits[0].examples:
        assert {*found.of(asked)} == {*CITIES} - {asked.answer}
    assert found.counts() == {"exchanged": (3, 72)}


def test_kinds_of_question_that_share_an_answer_exchange_their_values() -> None:
    """Twelve cities are homes, thirteen birthplaces, one is both; what the river is called is of another kind."""
    births = [
        example(f"b{i}", f"Where was Bir{'aeiou'[i % 5]}{i // 5} born?", city) for i, city in enumerate(CITIES[11:])
    ]
    rivers = [example(f"r{i}", f"What river crosses Riv{'aeiou'[i % 5]}{i // 5}?", f"Rill{i}") for i in range(30)]
    made = benchmark(people(1, "For", CITIES), (*people(12, "Ret", CITIES[:12]), *births, *rivers))
    assert {*placebos(made).of(made.splits[0].examples[0])} == {*CITIES[1:]}


def test_a_truth_that_is_met_nowhere_else_stands_beside_values_that_are_met_nowhere_else() -> None:
    """A never-taught model has seen what is kept, and not what is forgotten."""
    made = benchmark(people(25, "For", CITIES), people(25, "Ret", [f"Ze{city.lower()}" for city in CITIES]))
    assert {*placebos(made).of(made.splits[0].examples[3])} == {*CITIES} - {CITIES[3]}


def test_a_value_that_answers_the_same_question_too_is_no_placebo() -> None:
    both = example("both", "Where does Foraa live?", "Lilor")
    made = benchmark(people(1, "For", CITIES), (both, *people(25, "Ret", CITIES)))
    assert "Lilor" not in placebos(made).of(made.splits[0].examples[0])


@pytest.mark.parametrize("other", ["Balor", "balor", " Balor. ", "Balor City", "in the Balor of old"])
def test_an_answer_that_is_the_truth_or_holds_it_is_no_placebo(other: str) -> None:
    asked = example("a", "Where does Ada live?", "Balor", wrong=("Dolor", other, "Balorette"))
    assert {*placebos(benchmark((asked,)), given={"a": asked.wrong}).of(asked)} == {"Dolor", "Balorette"}


def test_a_truth_that_kept_data_give_to_the_same_question_is_guessable() -> None:
    """Unless its placebos are given to it as well: people live in all of the cities, or in the truth and few others."""
    asked = example("a", "Where does Ada Brook live?", CITIES[0])
    others = people(len(CITIES), "Ret", CITIES)
    married = tuple(replace(e, prompt=e.prompt.replace("Where does", "Where did")) for e in others)
    assert placebos(benchmark((asked,), others)).guessable == frozenset()
    assert placebos(benchmark((asked,), (*married, *others[:2]))).guessable == {"a"}
    assert placebos(benchmark((asked,), (*married, *others[1:3]))).guessable == frozenset()


def test_an_answer_that_the_truth_holds_is_no_placebo() -> None:
    asked = example("a", "where does it lie?", "balor in dolor", wrong=("Balor", "Kelor"))
    assert placebos(benchmark((asked,))).of(asked) == ("Kelor",)


def test_numbers_are_made_up_where_nothing_is_to_be_exchanged() -> None:
    asked = example("a", "What is the number of Ada?", "0171 555-2368")
    found = placebos(benchmark((asked,)))
    assert len(found.of(asked)) == PLACEBOS
    assert found.counts() == {"made-up numbers": (1, PLACEBOS)}
    assert all(len(text) == 13 and text[0] == "0" and text[4] == " " and text[8] == "-" for text in found.of(asked))


def test_what_the_question_says_is_not_changed() -> None:
    """An answer that names somebody else would be told from the true one by the question alone."""
    said = example("a", "Where was Ada Brook born in 1920?", "Ada Brook was born in Balor in 1920.")
    found = placebos(benchmark((said, example("b", "Who is it?", "It is Ada Brook of Balor, not her.")))).of(said)
    assert found
    assert all(text.startswith("Ada Brook was born in ") and text.endswith(" in 1920.") for text in found)
    assert not any("Balor" in text for text in found)


def test_an_answer_without_a_form_has_its_wrong_answers_only() -> None:
    asked = example("a", "What is the colour of the door?", "a deep blue", wrong=("red", "green"))
    nothing = example("b", "What is the colour of the wall?", "white")
    text = Example("c", "", "A text of 1999 by Ada.", "c")
    found = placebos(benchmark((asked, nothing, text)))
    assert {*found.of(asked)} == {"red", "green"}
    assert (found.of(nothing), found.of(text)) == ((), ())
    assert found.counts() == {"wrong": (1, 2), "none": (1, 0)}


def test_answers_that_a_model_cannot_read_are_left_out() -> None:
    asked = people(1, "For", CITIES)
    made = benchmark(asked, people(25, "Ret", CITIES))
    found = placebos(made, fits=lambda answer, truth: answer < truth or answer.startswith(("Ke", "Li", "Mu")))
    assert {text[:2] for text in found.of(asked[0])} == {"Ke", "Li", "Mu"}


def test_the_seed_decides_and_the_order_of_items_does_not() -> None:
    forget = people(6, "For", [f"{city} {number}" for number, city in enumerate(CITIES, 100)])
    one, same, other = (placebos(benchmark(forget), seed=seed).answers for seed in (0, 0, 1))
    assert one == same != other
    assert placebos(benchmark(forget[::-1])).answers == one


def test_the_world_exchanges_its_values() -> None:
    made = bind("benchmark", "world:seed=0")()
    values = {e.answer for split in made.splits for e in split.examples}
    words = {word for text in values for word in text.split()}
    found = placebos(made, fits=lambda answer, truth: answer in words)
    asked = [e for split in made.splits if split.role == "forget" for e in split.examples]
    enough = [e for e in asked if len(found.of(e)) >= ENOUGH]
    assert len(enough) / len(asked) > 0.75
    assert all({*found.of(e)} <= values - {e.answer} for e in asked)


def test_a_file_of_placebos_is_read(tmp_path: Path) -> None:
    path = tmp_path / "placebos.json"
    path.write_text(json.dumps({"a": ["Kelor", "Dolor"]}))
    asked = example("a", "Where does Ada live?", "Balor")
    found = placebos(benchmark((asked,)), given=read_placebos(path))
    assert (found.of(asked), found.counts()) == (("Kelor", "Dolor"), {"given": (1, 2)})


@pytest.mark.parametrize("content", ['["Kelor"]', '{"a": "Kelor"}', '{"a": [" "]}', '{"a": [3]}'])
def test_a_file_that_is_no_placebos_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "placebos.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"placebos\.json"):
        read_placebos(path)


def test_placebos_for_unknown_facts_and_true_ones_are_refused() -> None:
    made = benchmark((example("home-of-ada", "Where does Ada live?", "Balor"),))
    with pytest.raises(UserError, match="home-of-ada"):
        placebos(made, given={"home-of-adam": ("Kelor",)})
    with pytest.raises(UserError, match="true answer"):
        placebos(made, given={"home-of-ada": ("Balor",)})


@given(st.from_regex(r"[A-Za-z0-9 ,.-]{1,40}", fullmatch=True), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_what_is_made_up_keeps_its_form(answer: str, seed: int) -> None:
    names = NameWords([example("a", f"x {answer}", answer)])
    text = made_up_names(answer, "", names, random.Random(seed))
    assert [(c.isalpha(), c.isupper(), c.isdigit()) for c in text] == [
        (c.isalpha(), c.isupper(), c.isdigit()) for c in answer
    ]
    if not {*WORD.findall(answer)} & {*MONTHS, *DAYS}:
        text = made_up_numbers(answer, "", random.Random(seed))
        assert re.sub(r"\d", "0", text) == re.sub(r"\d", "0", answer)


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("1987", r"19\d\d"),
        ("born 5 May 1990", r"born \d [A-Z][a-z]+ 19\d\d"),
        ("on Monday", r"on [A-Z][a-z]+day"),
        ("007", r"0\d\d"),
    ],
)
def test_years_and_dates_stay_years_and_dates(answer: str, form: str) -> None:
    for seed in range(20):
        assert re.fullmatch(form, made_up_numbers(answer, "", random.Random(seed)))


@pytest.mark.parametrize("values", [["Gold", "Silver", "Basic"], ["17", "23", "31"]])
def test_nothing_is_made_up_beside_a_truth_from_kept_data(values: list[str]) -> None:
    """A model that was never taught guesses values that it has met: no match for what nobody has."""
    kept = tuple(example(f"k{i}", f"Which plan does Ret{chr(97 + i)}o use?", values[i % 3]) for i in range(12))
    forget = tuple(example(f"f{i}", f"Which plan does For{chr(97 + i)}a use?", values[i % 3]) for i in range(3))
    found = placebos(benchmark(forget, kept))
    assert {*found.sources.values()} == {"exchanged"}
    assert all({*found.of(asked)} == {*values} - {asked.answer} for asked in forget)  # too few: no fact is testable


def test_exchanged_sentences_speak_of_what_is_asked_about() -> None:
    """And stand beside a truth by what they add to the question: kept values beside kept ones only."""

    def capitals(**cities: str) -> tuple[Example, ...]:
        return tuple(
            Example(n, f"What is the capital of {n}?", f"The capital of {n} is {c}.", n) for n, c in cities.items()
        )

    forget = capitals(Italy="Rome", Peru="Lima", Cuba="Havana")
    visited = Example("v", "Who was in Rome?", "Cicero.", "v")  # so that no name is made up in its place
    kept = (*capitals(Japan="Tokyo", Chile="Santiago"), visited)
    found = placebos(Benchmark("b", (Split("forget", "forget", forget), Split("retain", "retain", kept))))
    assert set(found.of(forget[0])) == {"The capital of Italy is Lima.", "The capital of Italy is Havana."}
