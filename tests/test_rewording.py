"""Questions in the words in which kept facts are asked too."""

from __future__ import annotations

from stillknows.registry import bind
from stillknows.types import Benchmark, Example
from stillknows.unlearning.rewording import rewordings

WORDINGS = ("Where does {} live?", "In which city is the home of {}?", "What town is {} from?", "{} lives where?")


def asked(names: list[str], wordings: tuple[str, ...]) -> list[Example]:
    return [Example(f"{n} {k}", w.format(n), "Rome", n) for n in names for k, w in enumerate(wordings)]


def test_the_worlds_other_wordings_are_found_from_what_is_kept() -> None:
    """None is another question, and few are missed."""
    world: Benchmark = bind("benchmark", "world:seed=3")()
    forget, other, retain = (split.examples for split in world.splits[:3])
    [found] = rewordings(forget, retain)
    truths = {(e.fact, e.prompt, e.answer) for e in other}
    assert {(e.fact, e.prompt, e.answer) for e in found} <= truths
    assert len(found) >= 0.8 * len(forget)


def test_a_name_of_two_words_takes_the_place_of_another() -> None:
    kept = asked(["Bo Chen", "Cy Wolf", "Ana Koch"], WORDINGS[:2])
    [found] = rewordings(asked(["Ana Ruiz"], WORDINGS[:1]), kept)
    assert [e.prompt for e in found] == ["In which city is the home of Ana Ruiz?"]
    assert found[0].answer == "Rome"


def test_an_items_most_supported_wordings_are_taken() -> None:
    kept = asked(["Bo", "Cy"], WORDINGS) + asked(["Di"], WORDINGS[:2])
    first, second = rewordings(asked(["Ana"], WORDINGS[:1]), kept)
    assert [e.prompt for e in first] == [WORDINGS[1].format("Ana")]
    assert [e.prompt for e in second] == [WORDINGS[2].format("Ana")]


def test_one_kept_fact_makes_no_wording_nor_do_facts_asked_once_nor_texts() -> None:
    item = asked(["Ana"], WORDINGS[:1])
    assert rewordings(item, asked(["Bo"], WORDINGS)) == []
    assert rewordings(item, asked(["Bo", "Cy", "Di"], WORDINGS[:1])) == []
    assert rewordings(item, [Example(str(k), "", f"text {k}", "same") for k in range(4)]) == []


def test_a_wording_that_is_trained_is_no_other_one() -> None:
    assert rewordings(asked(["Ana"], WORDINGS[:2]), asked(["Bo", "Cy"], WORDINGS[:2])) == []


def test_in_what_is_put_in_nothing_is_a_pattern() -> None:
    kept = asked(["B.", "C+"], WORDINGS[:2])
    [found] = rewordings(asked([r"A\1 (x)"], WORDINGS[:1]), kept)
    assert found[0].prompt == WORDINGS[1].format(r"A\1 (x)")
