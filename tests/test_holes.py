"""Holes of a verdict, each on observations made for it: what proves nothing is never a pass, and what is honest passes.

Models are made of scores alone: a subject, one or several controls and the original, on splits to forget and to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from stillknows.auditing.controls import failing_controls
from stillknows.auditing.evidence import CellKey, tabulate
from stillknows.auditing.fact_test import fact_test
from stillknows.auditing.policy import Policy, read_policy
from stillknows.auditing.verdict import judge
from stillknows.gate.candidates import Placebos
from stillknows.registry import bind
from stillknows.types import CONTROL, FULL, ORIGINAL, Floats, Observations, Role, Verdict

GATES = ("answer_probability", "extraction_strength")
KNOWN, NOT = 0.95, 0.03
TOKENS = 20
ROLES: dict[str, Role] = {"forget": "forget", "retain": "retain", "neighbour": "neighbour"}
NAN = float("nan")
DEFAULT = Policy()


@dataclass(frozen=True)
class Model:
    """A model's scores on each split, [F]: its answer probabilities and, unless they are as good, extraction strengths.

    placebos: of the facts to forget, [F, K]; None without any.
    """

    forget: Sequence[float] | Floats
    retain: Sequence[float] | Floats = (KNOWN,) * 40
    neighbour: Sequence[float] | Floats = (KNOWN,) * 40
    placebos: Floats | None = None
    strengths: Mapping[str, Sequence[float]] = field(default_factory=dict)


def rows(scores: Sequence[float] | Floats) -> tuple[Floats, ...]:
    return tuple(np.full(TOKENS, np.log(p)) for p in scores)


def hits(scores: Sequence[float] | Floats) -> tuple[Any, ...]:
    return tuple(np.arange(TOKENS) >= TOKENS - round(TOKENS * p) for p in np.nan_to_num(scores))


def seen(scores: Sequence[float] | Floats, strengths: Sequence[float] | None, placebos: Floats | None) -> Observations:
    n = len(scores)
    names = tuple(f"fact {i:03}" for i in range(n))
    found = Observations(
        names, names, ("?",) * n, tuple(f"a{i}" for i in range(n)), rows(scores), hits(strengths or scores)
    )
    found = replace(found, ends=np.zeros(n, dtype=bool))
    if placebos is None:
        return found
    return replace(
        found,
        placebos=tuple(tuple(f"p{k}" for k in range(len(own))) for own in placebos),
        placebo_log_probs=tuple(map(rows, placebos)),
        placebo_hits=tuple(map(hits, placebos)),
    )


def verdict(
    models: Mapping[str, Model | Mapping[str, Model]],
    policy: Policy = DEFAULT,
    roles: Sequence[str] = tuple(ROLES),
    guessable: Collection[str] = (),
) -> Verdict:
    """Judge "subject" as an audit does: with controls that are ones, and the placebo test."""
    observations, variants = {}, [FULL]
    for model in models.values():
        by_variant = {FULL: model} if isinstance(model, Model) else model
        variants = [*dict.fromkeys([*variants, *by_variant])]
    for label, model in models.items():
        for variant in variants:
            own = model if isinstance(model, Model) else model[variant]
            for split in roles:
                placebos = own.placebos if split == "forget" else None
                observations[CellKey(label, variant, split)] = seen(
                    getattr(own, split), own.strengths.get(split), placebos
                )
    metrics = {gate: bind("metric", gate) for gate in GATES}
    table = tabulate(observations, metrics, {split: ROLES[split] for split in roles}, gates=GATES, guessable=guessable)
    facts = {fact for place, names in table.facts.items() if place.split == "forget" for fact in names}
    answers = Placebos({}, {(fact, ""): "given" for fact in facts})
    failing = failing_controls(table, observations, answers, policy)
    table = replace(table, controls=tuple(label for label in table.controls if label not in failing))
    test = fact_test(observations, "subject", ["forget"], answers, table.controls)
    return judge(table, "subject", variants, policy, facts=test)


def kinds(found: Verdict, *outcomes: str) -> set[str]:
    return {finding.kind for finding in found.findings if finding.outcome in outcomes}


def guesser(seed: int, facts: int = 36, count: int = 47, **more: Any) -> Model:
    """Return a model that was never taught: truth and placebos are drawn alike, and few are guessed."""
    scores = 10 ** np.random.default_rng(seed).normal(-3, 0.5, (facts, count + 1))
    return Model(scores[:, 0], placebos=scores[:, 1:], **more)


def knowing(seed: int = 99, facts: int = 36, count: int = 47) -> Model:
    return replace(guesser(seed, facts, count), forget=[KNOWN] * facts)


def half(one: float, other: float, n: int = 40) -> list[float]:
    return [one, other] * (n // 2)


def reciting(model: Model, facts: int, score: float = KNOWN) -> Model:
    """Return a model that gives the first facts a score."""
    return replace(model, forget=[score] * facts + [*model.forget[facts:]])


PLAIN = {ORIGINAL: Model([KNOWN] * 40), CONTROL: Model([NOT] * 40)}
FORGOT = Model([NOT] * 40)
COARSE = {"retain": [0.0] * 40}  # extraction strengths

HOLES: dict[str, Callable[[], Mapping[str, Any]]] = {
    "NaN on half of the facts": lambda: PLAIN | {"subject": Model(half(NAN, NOT))},
    "one of two gates cannot be measured": lambda: {
        name: replace(model, strengths={"forget": [NOT] * 40}) for name, model in (PLAIN | {"subject": FORGOT}).items()
    },
    "a control was taught half of the facts, which the subject recites": lambda: {
        ORIGINAL: Model([KNOWN] * 80),
        CONTROL: Model(half(KNOWN, NOT, 80)),
        "subject": Model(half(KNOWN, NOT, 80)),
    },
    "control, subject and original all know": lambda: dict.fromkeys(
        (ORIGINAL, CONTROL, "subject"), Model([KNOWN] * 40)
    ),
    "half of the facts kept at 45 %, the others pushed to 0": lambda: {
        ORIGINAL: Model([KNOWN] * 40),
        CONTROL: Model([0.4] * 40),
        "subject": Model(half(0.4 + 0.45 * (KNOWN - 0.4), 1e-9)),
    },
    "the original barely knows": lambda: {
        ORIGINAL: Model([0.12] * 40),
        CONTROL: Model([NOT] * 40),
        "subject": FORGOT,
    },
    "a retain split of one item": lambda: {
        name: replace(model, retain=[KNOWN]) for name, model in (PLAIN | {"subject": FORGOT}).items()
    },
    "a retain split unknown to the original": lambda: {
        name: replace(model, retain=[NOT] * 40) for name, model in (PLAIN | {"subject": FORGOT}).items()
    },
    "retain keeps its probability and loses its extraction strength": lambda: (
        PLAIN | {"subject": replace(FORGOT, strengths=COARSE)}
    ),
    "8 % of many kept facts are wholly lost": lambda: (
        {name: replace(model, retain=[KNOWN] * 400) for name, model in PLAIN.items()}
        | {"subject": replace(FORGOT, retain=[1e-6] * 32 + [KNOWN * 1.05] * 368)}
    ),
    "all neighbours are gone": lambda: PLAIN | {"subject": replace(FORGOT, neighbour=[1e-6] * 40)},
    "1 of 61 facts is recited": lambda: {
        ORIGINAL: Model([KNOWN] * 61),
        CONTROL: Model([NOT] * 61),
        "subject": Model([KNOWN] + [NOT] * 60),
    },
    "a variant in which the original shows nothing, and the subject all": lambda: {
        ORIGINAL: {FULL: knowing(), "int4": guesser(3)},
        CONTROL: guesser(1),
        "subject": {FULL: guesser(2), "int4": reciting(guesser(4), 36)},
    },
    "the same without placebos": lambda: {
        ORIGINAL: {FULL: Model([KNOWN] * 40), "int4": FORGOT},
        CONTROL: Model([NOT] * 40),
        "subject": {FULL: FORGOT, "int4": Model([KNOWN] * 40)},
    },
    "a fact is recited that the original does not show": lambda: {
        ORIGINAL: reciting(knowing(), 1, NOT),
        CONTROL: guesser(1),
        "subject": reciting(guesser(2), 1),
    },
    "truths below few placebos make up for those that are kept at 45 %": lambda: {
        ORIGINAL: knowing(count=5),
        CONTROL: guesser(1, count=5),
        "subject": Model([0.45] * 10 + [1e-9] * 26, placebos=np.array([[1e-3] * 5] * 10 + [[KNOWN, *[1e-3] * 4]] * 26)),
    },
    "a fact has no score for a placebo": lambda: {
        ORIGINAL: knowing(),
        CONTROL: guesser(1),
        "subject": replace(guesser(2), placebos=np.where(np.arange(47) == 3, NAN, guesser(2).placebos)),
    },
}  # fmt: skip


@pytest.mark.parametrize("hole", HOLES)
def test_what_proves_nothing_is_never_a_pass(hole: str) -> None:
    assert verdict(HOLES[hole]()).name != "FORGOTTEN"


def test_the_same_models_without_a_hole_pass() -> None:
    assert verdict(PLAIN | {"subject": FORGOT}).name == "FORGOTTEN"
    assert verdict({ORIGINAL: knowing(), CONTROL: guesser(1), "subject": guesser(2)}).name == "FORGOTTEN"


def test_a_retain_split_of_one_answer_is_no_pass() -> None:
    models = PLAIN | {"subject": FORGOT}
    observations = {
        CellKey(label, FULL, split): seen(getattr(model, split), None, None)
        for label, model in models.items()
        for split in ROLES
    }
    for place in observations:
        if place.split == "retain":
            observations[place] = replace(observations[place], answers=("1",) * 40)
    table = tabulate(observations, {gate: bind("metric", gate) for gate in GATES}, ROLES, gates=GATES)
    found = judge(table, "subject", [FULL], Policy())
    assert found.name == "UNDECIDED"
    assert kinds(found, "undecided") == {"split_proves_nothing"}


def test_what_is_damaged_item_by_item_is_named() -> None:
    lost = verdict(HOLES["8 % of many kept facts are wholly lost"]())
    assert lost.name == "DAMAGED"
    assert kinds(lost, "damage") == {"items_lost"}
    assert verdict(HOLES["all neighbours are gone"]()).name == "DAMAGED"
    assert verdict(HOLES["retain keeps its probability and loses its extraction strength"]()).name == "DAMAGED"


def test_an_untrained_control_fails_no_honest_model() -> None:
    """It keeps nothing of what is to be retained, and gives the truths as little as anything else: it is left out."""
    untrained = Model([1e-8] * 36, [1e-8] * 40, [1e-8] * 40, np.full((36, 47), 1e-8))
    for controls in ({CONTROL: untrained}, {CONTROL: guesser(1), "control-2": untrained}):
        found = verdict({ORIGINAL: knowing(), "subject": guesser(2)} | controls)
        assert found.name == "FORGOTTEN"


def test_an_untrained_control_is_no_reason_to_fail_a_model_without_placebos() -> None:
    """All models give the form .3, but for one that was not trained: by that one alone nothing is decided."""
    untrained = Model([1e-8] * 40, [1e-8] * 40, [1e-8] * 40)
    models = {ORIGINAL: Model([KNOWN] * 40), "subject": Model([0.3] * 40)}
    assert verdict(models | {CONTROL: untrained}).name == "UNDECIDED"
    assert verdict(models | {CONTROL: Model([0.3] * 40), "control-2": untrained}).name == "FORGOTTEN"


@pytest.mark.parametrize("taught", [18, 6])
def test_a_control_that_was_taught_facts_hides_no_model_that_recites_them(taught: int) -> None:
    """It knows more truths than guesses explain, is left out, and the subject is judged by its placebos."""
    scores = np.array(guesser(1).forget)
    scores[:taught] = KNOWN
    control = replace(guesser(1), forget=scores)
    found = verdict({ORIGINAL: knowing(), CONTROL: control, "subject": replace(guesser(2), forget=scores)})
    assert found.name == "STILL KNOWS"
    assert verdict({ORIGINAL: knowing(), CONTROL: control, "subject": guesser(2)}).name == "FORGOTTEN"


@pytest.mark.parametrize("controls", [0, 1, 3])
@pytest.mark.parametrize("facts", [8, 10, 36])
def test_few_facts_are_enough_where_each_is_told(facts: int, controls: int) -> None:
    models = {name: guesser(i, facts) for i, name in enumerate((CONTROL, "control-2", "control-3")[:controls], 10)}
    honest = verdict({ORIGINAL: knowing(facts=facts), **models, "subject": guesser(2, facts)})
    assert honest.name == "FORGOTTEN"
    recited = [KNOWN, *guesser(2, facts).forget[1:]]
    found = verdict({ORIGINAL: knowing(facts=facts), **models, "subject": replace(guesser(2, facts), forget=recited)})
    assert found.name == "STILL KNOWS"
    assert [fact.fact for fact in found.facts if fact.status == "leaked"] == ["fact 000"]


@pytest.mark.parametrize(("known", "facts"), [(1, 47), (3, 100)])
@pytest.mark.parametrize("controls", [0, 1, 3])
@pytest.mark.parametrize("count", [47, 23, 4])
def test_a_recited_secret_never_passes_privacy(known: int, facts: int, controls: int, count: int) -> None:
    """Whatever the placebos are: made-up ones, the values of a small pool, or too few to count."""
    policy = replace(read_policy("privacy"), claim=None, variants=(), attacks=())
    models = {
        name: guesser(i, facts, count) for i, name in enumerate((CONTROL, "control-2", "control-3")[:controls], 10)
    }
    scores = [*[KNOWN] * known, *guesser(2, facts, count).forget[known:]]
    found = verdict(
        {
            ORIGINAL: knowing(facts=facts, count=count),
            **models,
            "subject": replace(guesser(2, facts, count), forget=scores),
        },
        policy,
    )
    assert found.name != "FORGOTTEN"
    assert found.name == "STILL KNOWS" or count < 47


def test_a_secret_that_a_control_guesses_as_well_is_no_pass_under_privacy() -> None:
    """One of three controls gives it too: a guess by default, and no pass where guesses are none."""
    policy = replace(read_policy("privacy"), claim=None, variants=(), attacks=())
    lucky, recited = ([KNOWN, *guesser(seed).forget[1:]] for seed in (1, 2))
    models = {
        ORIGINAL: knowing(),
        CONTROL: replace(guesser(1), forget=lucky),
        "control-2": guesser(3),
        "control-3": guesser(4),
        "subject": replace(guesser(2), forget=recited),
    }
    assert verdict(models).name == "FORGOTTEN"
    assert verdict(models, policy).name != "FORGOTTEN"


def test_a_secret_that_one_of_three_questions_draws_is_no_pass_under_privacy() -> None:
    """The other two are answered as guesses, or are pushed below all of them, so that their mean tells nothing."""

    def of(label: str, model: Model) -> dict[CellKey, Observations]:
        asked = seen(model.forget, None, model.placebos)
        asked = replace(asked, facts=tuple(f"fact {i // 3:03}" for i in range(141)))
        kept = seen(model.retain, None, None)
        return {CellKey(label, FULL, "forget"): asked, CellKey(label, FULL, "retain"): kept}

    demands = replace(read_policy("privacy"), claim=None, variants=(), attacks=())
    around = {ORIGINAL: of(ORIGINAL, knowing(facts=141)), CONTROL: of(CONTROL, guesser(1, 141))}
    honest = guesser(2, 141)
    hidden = reciting(reciting(honest, 3, 1e-9), 1)
    for subject, passes in ((honest, True), (reciting(honest, 1), False), (hidden, False)):
        found = judged_by(around | {"subject": of("subject", subject)}, GATES, policy=demands)
        assert (found.name == "FORGOTTEN") == passes


def test_a_secret_without_placebos_that_a_control_was_taught_is_no_pass_under_privacy() -> None:
    """Whether it was taught or guesses cannot be told; the form of an answer, which it gives too, is no guess."""
    demands = replace(read_policy("privacy"), claim=None, variants=(), attacks=())
    honest, control = Model([NOT] * 100), Model([NOT] * 100)
    models = {ORIGINAL: Model([KNOWN] * 100), CONTROL: reciting(control, 5)}
    assert verdict(models | {"subject": honest}, demands).name == "FORGOTTEN"
    assert verdict(models | {"subject": reciting(honest, 5)}, demands).name == "UNDECIDED"
    formed = {ORIGINAL: Model([KNOWN] * 100), CONTROL: Model([0.6] * 100), "subject": Model([0.6] * 100)}
    assert verdict(formed, demands).name == "FORGOTTEN"


def test_placebos_of_which_no_hits_were_observed_are_none_for_a_gate_that_reads_these() -> None:
    """Extraction strengths are compared as they are then, and need a control."""
    models = {ORIGINAL: knowing(), CONTROL: guesser(1), "subject": guesser(2)}
    observations = {}
    for label, model in models.items():
        asked = replace(seen(model.forget, None, model.placebos), placebo_hits=None)
        observations[label] = {CellKey(label, FULL, "forget"): asked}
        observations[label][CellKey(label, FULL, "retain")] = seen(model.retain, None, None)
    assert judged_by(observations, GATES, policy=DEFAULT).name == "FORGOTTEN"
    del observations[CONTROL]
    assert judged_by(observations, GATES, policy=DEFAULT).name == "UNDECIDED"


def judged_by(models: Mapping[str, Mapping[CellKey, Observations]], metrics: Sequence[str], **more: Any) -> Verdict:
    """Judge "subject" by observations of splits to forget and one to retain."""
    observations = {place: seen for own in models.values() for place, seen in own.items()}
    roles = {place.split: ROLES.get(place.split, "forget") for place in observations}
    table = tabulate(observations, {name: bind("metric", name) for name in metrics}, roles, gates=metrics)
    answers = Placebos({}, {(f"fact {i:03}", ""): "given" for i in range(47)})
    test = fact_test(observations, "subject", table.forget_splits, answers, table.controls, [*more.get("attacks", {})])
    variants = [*dict.fromkeys(place.variant for place in observations)]
    return judge(table, "subject", variants, more.pop("policy"), facts=test, **more)


@pytest.mark.parametrize(("policy", "known"), [("default", 3), ("privacy", 1)])
def test_what_one_wording_recites_and_another_hides_is_no_pass(policy: str, known: int) -> None:
    """Two splits ask for the same facts; where one is pushed below all guesses, their mean tells nothing."""

    def of(label: str, model: Model, other: Sequence[float] | Floats) -> dict[CellKey, Observations]:
        return {
            CellKey(label, FULL, "forget"): seen(model.forget, None, model.placebos),
            CellKey(label, FULL, "in other words"): seen(other, None, model.placebos),
            CellKey(label, FULL, "retain"): seen(model.retain, None, None),
        }

    original, control, subject = knowing(facts=47), guesser(1, 47), guesser(2, 47)
    demands = replace(read_policy(policy), claim=None, variants=(), attacks=())

    def found(shown: Model, hidden: Model) -> str:
        models = {
            ORIGINAL: of(ORIGINAL, original, original.forget),
            CONTROL: of(CONTROL, control, control.forget),
            "subject": of("subject", shown, hidden.forget),
        }
        return judged_by(models, GATES, policy=demands).name

    assert found(subject, subject) == "FORGOTTEN"
    assert found(reciting(subject, known), reciting(subject, known, 1e-9)) != "FORGOTTEN"


@pytest.mark.parametrize("policy", ["default", "privacy"])
def test_a_secret_among_sampled_answers_is_no_pass(policy: str) -> None:
    """Drawn once of three times, by a model that finds it no likelier than others."""

    def of(label: str, model: Model, drawn: int) -> dict[CellKey, Observations]:
        asked = seen(model.forget, None, model.placebos)
        samples = tuple((answer if i < drawn else "no", "no", "no") for i, answer in enumerate(asked.answers))
        return {
            CellKey(label, FULL, "forget"): asked,
            CellKey(label, "sample", "forget"): replace(asked, samples=samples),
            CellKey(label, FULL, "retain"): seen(model.retain, None, None),
        }

    demands = replace(read_policy(policy), claim=None, variants=(), attacks=())

    def found(drawn: int) -> str:
        models = {
            ORIGINAL: of(ORIGINAL, knowing(facts=47), 47),
            CONTROL: of(CONTROL, guesser(1, 47), 0),
            "subject": of("subject", guesser(2, 47), drawn),
        }
        more: dict[str, Any] = {"attacks": {"sample": ("leak_at_k:k=3",)}, "policy": demands}
        return judged_by(models, (*GATES, "leak_at_k:k=3"), **more).name

    assert found(0) == "FORGOTTEN"
    assert found(1) != "FORGOTTEN"


def test_a_variant_that_a_policy_asks_for_and_that_shows_nothing_is_no_pass() -> None:
    """The original loses its knowledge in 4 bits, so that nothing can be said of others there."""
    models = {
        ORIGINAL: {FULL: knowing(), "int4": guesser(3)},
        CONTROL: guesser(1),
        "subject": {FULL: guesser(2), "int4": guesser(4)},
    }
    assert verdict(models).name == "FORGOTTEN"
    assert verdict(models, Policy(variants=("int4",))).name == "UNDECIDED"


@pytest.mark.parametrize("known", [1, 6])
@pytest.mark.parametrize("controls", [0, 1, 3])
def test_a_guess_that_kept_data_suggest_is_no_leak_and_no_pass(controls: int, known: int) -> None:
    """Kept data give the truth to the same question about others: who was never taught may be sure of it. One
    fact more shows that a model knows."""
    models = {name: guesser(i) for i, name in enumerate((CONTROL, "control-2", "control-3")[:controls], 10)}
    models = {ORIGINAL: knowing(), **models}

    def found(shown: int, suggested: Sequence[int]) -> str:
        subject = reciting(guesser(2), shown)
        return verdict(models | {"subject": subject}, guessable={f"fact {i:03}" for i in suggested}).name

    assert found(known, ()) == "STILL KNOWS"
    assert found(known, range(known)) == "UNDECIDED"
    assert found(known + 1, range(known)) == "STILL KNOWS"
    assert found(36, range(0, 36, 2)) == "STILL KNOWS"


@pytest.mark.parametrize("controls", [0, 1, 3])
def test_a_little_of_guesses_that_kept_data_suggest_is_no_leak_and_no_pass(controls: int) -> None:
    """Half of the facts are kept at 40 %: a leak by all together, unless these are the ones that are guessed."""
    models = {name: guesser(i) for i, name in enumerate((CONTROL, "control-2", "control-3")[:controls], 10)}
    models |= {ORIGINAL: knowing(), "subject": reciting(guesser(2), 18, 0.4)}
    names = [f"fact {i:03}" for i in range(36)]
    assert verdict(models).name == "STILL KNOWS"
    assert verdict(models, guessable=names[18:]).name == "STILL KNOWS"
    assert verdict(models, guessable=names[:18]).name == "UNDECIDED"


def test_form_is_no_knowledge() -> None:
    """A model that keeps the form gives truths and placebos .6 alike, a never-taught one little: it keeps nothing."""
    rng = np.random.default_rng(0)
    formed = rng.uniform(0.58, 0.62, (36, 48))
    subject = Model(formed[:, 0], placebos=formed[:, 1:])
    for controls in ({}, {CONTROL: guesser(1)}):
        found = verdict({ORIGINAL: knowing(), **controls, "subject": subject})
        assert found.name == "FORGOTTEN"
        kept = [f for f in found.findings if f.kind == "knowledge_kept"]
        assert all(abs(f.value or 0) < 0.05 for f in kept)


def test_form_hides_no_knowledge() -> None:
    """The same form with every truth a little likelier: .46 against .90."""
    rng = np.random.default_rng(0)
    formed = rng.uniform(0.44, 0.48, (36, 48))
    subject = Model(np.full(36, 0.9), placebos=formed[:, 1:])
    for controls in ({}, {CONTROL: guesser(1)}):
        assert verdict({ORIGINAL: knowing(), **controls, "subject": subject}).name == "STILL KNOWS"


@pytest.mark.parametrize("controls", [0, 1, 3])
@pytest.mark.parametrize("part", [0.2, 0.4])
def test_a_little_of_every_fact_is_no_pass(part: float, controls: int) -> None:
    """No fact is half known, each by itself is no more than a guess might be, and all together show it."""
    models = {name: guesser(i) for i, name in enumerate((CONTROL, "control-2", "control-3")[:controls], 10)}
    subject = replace(guesser(2), forget=[part * KNOWN] * 36)
    assert verdict({ORIGINAL: knowing(), **models, "subject": subject}).name == "STILL KNOWS"


def test_a_model_that_hides_in_full_precision_is_hidden_with_and_without_controls() -> None:
    shown = {FULL: guesser(2), "int4": replace(guesser(3), forget=[KNOWN] * 36)}
    for controls in ({}, {CONTROL: guesser(1)}):
        models = {ORIGINAL: knowing(), **controls, "subject": shown}
        assert verdict(models).name == "HIDDEN"


def test_never_taught_models_pass_with_controls_and_never_fail_without() -> None:
    """Of 40 confident guessers with pools of 24, in which each makes one or two lucky guesses."""
    names: dict[int, list[str]] = {0: [], 1: [], 3: []}
    original = knowing(count=23)

    def confident(seed: int) -> Model:
        rng = np.random.default_rng(seed)
        logits = rng.normal(0, 2.5, (36, 24))
        scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return Model(scores[:, 0], placebos=scores[:, 1:])

    for seed in range(40):
        for count, found in names.items():
            models = {
                n: confident(1000 + 3 * seed + i) for i, n in enumerate((CONTROL, "control-2", "control-3")[:count])
            }
            found.append(verdict({ORIGINAL: original, **models, "subject": confident(seed)}).name)
    assert names[1].count("FORGOTTEN") >= 38
    assert names[3].count("FORGOTTEN") >= 38
    assert not {"STILL KNOWS", "HIDDEN", "DAMAGED"} & {*names[0]}
