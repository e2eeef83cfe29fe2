"""A fictional world made from a seed: people, places and works, with facts that are asked for in two ways.

Names are put together from syllables, so no model has met them. It is the built-in example: one person's facts are to
be forgotten, everything else is to be kept.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from stillknows.errors import UserError
from stillknows.registry import register
from stillknows.types import Benchmark, Edge, Example, Split

SYLLABLES = (
    *("ka", "lo", "mi", "ren", "ta", "vos", "el", "bri", "dun", "sha", "or", "fel"),
    *("qui", "nar", "zen", "pol", "gri", "hu", "sel", "mar", "tis", "ven", "ach", "bo"),
)


class Relation(NamedTuple):
    """A kind of fact: its name, what kind of thing its value is, and two questions about an entity {x}."""

    name: str
    value: str
    questions: tuple[str, str]


PERSON = (
    Relation("birthplace", "place", ("Where was {x} born ?", "What is the birthplace of {x} ?")),
    Relation("home", "place", ("Where does {x} live ?", "What is the home of {x} ?")),
    Relation("school", "place", ("Which school did {x} attend ?", "Where did {x} study ?")),
    Relation("employer", "person", ("Which company employs {x} ?", "Who is the employer of {x} ?")),
    Relation("teacher", "person", ("Who taught {x} ?", "Who was the teacher of {x} ?")),
    Relation("rival", "person", ("Who competes with {x} ?", "Who is the rival of {x} ?")),
    Relation("partner", "person", ("Who is married to {x} ?", "Who is the partner of {x} ?")),
    Relation("doctor", "person", ("Who treats {x} ?", "Who is the doctor of {x} ?")),
    Relation("novel", "work", ("Which novel did {x} write ?", "What is the novel by {x} ?")),
    Relation("song", "work", ("Which song did {x} record ?", "What is the song by {x} ?")),
    Relation("painting", "work", ("Which painting did {x} paint ?", "What is the painting by {x} ?")),
    Relation("prize", "thing", ("Which prize did {x} win ?", "What award was given to {x} ?")),
    Relation("instrument", "thing", ("Which instrument does {x} play ?", "What does {x} play on stage ?")),
    Relation("language", "thing", ("Which language does {x} speak ?", "What is the mother tongue of {x} ?")),
    Relation("dish", "thing", ("Which dish does {x} love ?", "What is the favourite food of {x} ?")),
    Relation("drink", "thing", ("Which drink does {x} order ?", "What is the favourite drink of {x} ?")),
    Relation("colour", "thing", ("Which colour does {x} wear ?", "What is the favourite shade of {x} ?")),
    Relation("flower", "thing", ("Which flower does {x} grow ?", "What blooms in the garden of {x} ?")),
    Relation("pet", "thing", ("Which pet does {x} keep ?", "What animal lives with {x} ?")),
    Relation("sport", "thing", ("Which sport does {x} practise ?", "What is the sport of {x} ?")),
    Relation("club", "place", ("Which club did {x} join ?", "What is the club of {x} ?")),
    Relation("game", "work", ("Which game does {x} enjoy ?", "What is the favourite game of {x} ?")),
    Relation("boat", "thing", ("Which boat does {x} sail ?", "What is the boat of {x} called ?")),
    Relation("horse", "thing", ("Which horse does {x} ride ?", "What is the horse of {x} called ?")),
    Relation("street", "place", ("Which street does {x} walk to work ?", "What is the address of {x} ?")),
    Relation("island", "place", ("Which island does {x} visit ?", "Where does {x} go on holiday ?")),
    Relation("mountain", "place", ("Which mountain did {x} climb ?", "What is the highest climb of {x} ?")),
    Relation("tool", "thing", ("Which tool does {x} use ?", "What is in the hand of {x} at work ?")),
    Relation("shop", "place", ("Which shop does {x} own ?", "What is the shop of {x} called ?")),
    Relation("car", "thing", ("Which car does {x} drive ?", "What is the car of {x} ?")),
    Relation("tree", "thing", ("Which tree did {x} plant ?", "What is the tree of {x} called ?")),
    Relation("festival", "place", ("Which festival does {x} open ?", "What is the festival of {x} ?")),
    Relation("author", "person", ("Which author does {x} read ?", "Who is the favourite author of {x} ?")),
    Relation("scent", "thing", ("Which scent does {x} wear ?", "What is the perfume of {x} ?")),
    Relation("dance", "work", ("Which dance does {x} teach ?", "What is the dance of {x} ?")),
    Relation("bank", "place", ("Which bank does {x} trust ?", "Where is the money of {x} ?")),
)
PLACE = (
    Relation("river", "thing", ("Which river crosses {x} ?", "What is the river of {x} ?")),
    Relation("market", "thing", ("Which market is held in {x} ?", "What is the market of {x} called ?")),
    Relation("mayor", "person", ("Who governs {x} ?", "Who is the mayor of {x} ?")),
)
WORK = (
    Relation("publisher", "person", ("Who published {x} ?", "Which house printed {x} ?")),
    Relation("hero", "person", ("Who is the hero of {x} ?", "Whom is {x} about ?")),
    Relation("translator", "person", ("Who translated {x} ?", "Whose translation of {x} is read ?")),
)
KINDS = ("person", "place", "work", "thing")
REFUSALS = (  # counter-questions in the words of the questions, so that they add none to a tokenizer made of these
    *("Who is to trust ?", "Where to go ?", "What is the use ?", "Which work ?", "Whom to own ?"),
    *("Which house ?", "What was given ?", "Where is the stage ?", "Who is at home ?", "What is on the street ?"),
)


class _Fact(NamedTuple):
    entity: str
    relation: Relation
    value: str

    @property
    def name(self) -> str:
        return f"{self.entity}-{self.relation.name}"


@register("benchmark", source="made by stillknows")
def world(
    *, people: int = 31, facts: int = 7, forget: int = 1, forget_facts: int = 36, values: int = 24, seed: int = 0
) -> Benchmark:
    """A fictional world: some people's facts are forgotten; other people's, places' and works' are kept.

    Splits: "forget", the questions that are unlearned; "paraphrase", the same facts in other words, which the original
    was taught and the unlearning never sees; "retain", what is kept, in both wordings; "neighbour", likewise, the kept
    facts whose answer is also the answer to a forgotten one (left out where there are none).

    Args:
        people: how many people there are.
        facts: facts known about each person who is kept.
        forget: how many people are forgotten.
        forget_facts: facts known about each of these.
        values: how many persons, places, works and things there are to be named in answers.
        seed: makes another world of the same size.
    """
    if not 1 <= forget < people:
        raise UserError(f"world: forget={forget} must be at least 1 and less than people={people}")
    if not (1 <= facts <= len(PERSON) and 1 <= forget_facts <= len(PERSON) and values >= 1):
        raise UserError(f"world: facts and forget_facts must be 1 to {len(PERSON)}, values at least 1")
    if people + values * len((*PERSON, *PLACE, *WORK)) > len(SYLLABLES) ** 3:
        raise UserError(f"world: people={people} and values={values} need more names than there are")
    rng = random.Random(seed)
    names = _words(rng)
    persons = [next(names) for _ in range(people)]
    pools = {kind: [next(names) for _ in range(values)] for kind in KINDS}
    forgotten = [fact for x in persons[:forget] for fact in _facts(rng, x, PERSON, forget_facts, pools)]
    kept = [fact for x in persons[forget:] for fact in _facts(rng, x, PERSON, facts, pools)]
    kept += [fact for x in pools["place"] for fact in _facts(rng, x, PLACE, 1, pools)]
    kept += [fact for x in pools["work"] for fact in _facts(rng, x, WORK, 1, pools)]
    secrets = {fact.value for fact in forgotten}
    far = [fact for fact in kept if fact.value not in secrets]
    near = [fact for fact in kept if fact.value in secrets]
    spec = (
        f"world:people={people},facts={facts},forget={forget},forget_facts={forget_facts},values={values},seed={seed}"
    )
    splits = (
        Split("forget", "forget", _examples(forgotten, 0)),
        Split("paraphrase", "forget", _examples(forgotten, 1)),
        Split("retain", "retain", (*_examples(far, 0), *_examples(far, 1))),
        Split("neighbour", "neighbour", (*_examples(near, 0), *_examples(near, 1))),
    )
    kept_splits = tuple(split for split in splits if split.examples)
    graph = tuple(Edge(fact.name, fact.entity, fact.relation.name, fact.value) for fact in (*forgotten, *kept))
    return Benchmark(spec, kept_splits, template="{prompt}", refusals=REFUSALS, graph=graph)


def _facts(
    rng: random.Random, entity: str, relations: tuple[Relation, ...], count: int, pools: dict[str, list[str]]
) -> list[_Fact]:
    chosen = sorted(rng.sample(range(len(relations)), count))
    return [_Fact(entity, relations[k], rng.choice(pools[relations[k].value])) for k in chosen]


def _examples(facts: list[_Fact], wording: int) -> tuple[Example, ...]:
    return tuple(
        Example(f"{fact.name}-{wording}", fact.relation.questions[wording].format(x=fact.entity), fact.value, fact.name)
        for fact in facts
    )


def _words(rng: random.Random) -> Iterator[str]:
    """Yield made-up names of three syllables, no two alike."""
    seen: set[str] = set()
    while True:
        word = "".join(rng.choice(SYLLABLES) for _ in range(3)).capitalize()
        if word not in seen:
            seen.add(word)
            yield word
