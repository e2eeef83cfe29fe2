"""The placebo test: exact for any scores, whatever is chosen in hindsight, and explicit about what it cannot tell."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillknows.gate.candidate_scores import CandidateScores, logit, standing_out
from stillknows.gate.placebo import PlaceboTest, diffuse_knowledge, placebo_test, placebos_needed, step_down

LEVEL = 0.05


def scores(values: np.ndarray, *, asked: np.ndarray | None = None, counts: Any = None) -> CandidateScores:
    """Return [F, C, W, V] values as scores; of fact i the first counts[i] candidates are there."""
    facts, candidates, wordings, variants = values.shape
    there = np.arange(candidates) < np.array(candidates if counts is None else counts).reshape(-1, 1)
    return CandidateScores(
        tuple(f"fact-{i}" for i in range(facts)),
        tuple(f"variant-{i}" for i in range(variants)),
        values,
        np.broadcast_to(there, (facts, candidates)).copy(),
        np.ones((facts, wordings, variants), bool) if asked is None else asked,
    )


def guesses(seed: int, facts: int = 12, candidates: int = 24, kind: str = "confident") -> np.ndarray:
    """Return what a never-taught model may give: two correlated wordings, two correlated variants, [F, C, 2, 2]."""
    rng = np.random.default_rng(seed)
    shape = (facts, candidates, 1, 1)
    own = {
        "normal": lambda: rng.normal(size=shape),
        "skewed": lambda: rng.exponential(1.5, shape) ** 1.5,
        "confident": lambda: np.where(
            rng.random(shape) < 1 / candidates, rng.exponential(8, shape), rng.normal(size=shape)
        ),
        "uneven": lambda: rng.normal(size=shape) * rng.lognormal(0, 1, (facts, 1, 1, 1)),
    }[kind]()
    return (
        own + 0.7 * rng.normal(size=(facts, candidates, 2, 1)) + 0.4 * rng.normal(size=(facts, candidates, 2, 2))
    ) * [1, 2]


def planted(values: np.ndarray, *facts: int, size: float = 40.0) -> np.ndarray:
    """Return the scores of a model that knows these facts in every wording and variant."""
    changed = values.copy()
    changed[list(facts), 0] = np.median(values[list(facts)], axis=1) + size
    return changed


def names(test: PlaceboTest) -> list[str]:
    return [fact.fact for fact in test.named]


@pytest.mark.parametrize("kind", ["normal", "skewed", "confident", "uneven"])
@pytest.mark.parametrize("controls", [0, 1])
def test_exchanging_truth_and_placebos_in_every_way_names_facts_no_oftener_than_the_level(
    kind: str, controls: int
) -> None:
    """Not a simulation: all 576 places that two truths may have. Whatever the scores are, the level holds."""
    given = [guesses(seed, 2, 24, kind) for seed in range(1 + controls)]
    named = 0
    for places in itertools.product(range(24), repeat=2):
        moved = [values.copy() for values in given]
        for values in moved:
            for fact, place in enumerate(places):
                values[fact, [0, place]] = values[fact, [place, 0]]
        above = standing_out(scores(moved[0]), [scores(values) for values in moved[1:]]).d
        named += bool((step_down(above.max(2), above[:, 0])[0] <= LEVEL + 1e-12).any())
    assert 0 < named / 576 <= LEVEL


@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(2, 4))
@settings(max_examples=30, deadline=None)
def test_p_values_are_those_of_counting_all_exchanges(seed: int, facts: int, candidates: int) -> None:
    values = np.random.default_rng(seed).integers(0, 6, (facts, candidates)).astype(float)  # with ties
    largest = [max(values[range(facts), places]) for places in itertools.product(range(candidates), repeat=facts)]
    expected = np.mean(np.array(largest) >= values[:, 0].max())
    assert step_down(values, values[:, :1])[0].min() == pytest.approx(expected)


@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
@settings(max_examples=8, deadline=None)
def test_no_order_matters(seed: int, random: Any) -> None:
    values, control = planted(guesses(seed), 3), guesses(seed + 1)
    plain = placebo_test(scores(values), [scores(control)], scores(values))
    order = [random.sample(range(n), n) for n in values.shape]
    order[1] = [0, *[c for c in order[1] if c]]  # the truth stays the first candidate
    moved, moved_control = (x[np.ix_(*order)] for x in (values, control))
    other = placebo_test(scores(moved), [scores(moved_control)], scores(moved))
    found = [(f.p, f.p_below, f.likelier, f.found, f.found_half) for f in plain.facts]
    moved_found = [(f.p, f.p_below, f.likelier, f.found, f.found_half) for f in other.facts]
    assert np.array(moved_found) == pytest.approx(np.array([found[i] for i in order[0]], dtype=float))
    assert other.diffuse is not None
    assert plain.diffuse is not None
    assert other.diffuse.mean_rank == pytest.approx(plain.diffuse.mean_rank)


@given(st.integers(0, 10_000), st.floats(0.1, 50), st.integers(0, 4))
@settings(max_examples=50, deadline=None)
def test_a_truth_that_stands_out_more_is_never_less_suspicious(seed: int, more: float, fact: int) -> None:
    """By its own placebos: a fact that overtakes another is compared with the candidates of that one too."""
    values = np.random.default_rng(seed).normal(size=(5, 6))
    raised = values.copy()
    raised[fact, 0] += more
    one, one_raised = values[[fact]], raised[[fact]]
    assert step_down(one_raised, one_raised[:, :1])[0] <= step_down(one, one[:, :1])[0]
    before, after = diffuse_knowledge(values, exchanges=499), diffuse_knowledge(raised, exchanges=499)
    assert after.mean_rank >= before.mean_rank


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_only_the_order_of_what_stands_out_counts(seed: int) -> None:
    """p-values are unchanged by one strictly increasing function of all values, ranks by one for each fact."""
    values = np.random.default_rng(seed).normal(size=(5, 8))
    assert step_down(np.exp(values), np.exp(values[:, :1]))[0] == pytest.approx(step_down(values, values[:, :1])[0])
    assert diffuse_knowledge(np.exp(values) * np.arange(1, 6)[:, None]) == diffuse_knowledge(values)


@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-50, 50))
@settings(max_examples=30, deadline=None)
def test_the_unit_of_a_variant_and_what_all_answers_of_a_fact_share_do_not_count(
    seed: int, unit: float, shared: float
) -> None:
    """A model that answers in the right form, whatever it says, is not more suspicious."""
    values = guesses(seed, 4)
    changed = values * [unit, 1]
    changed[2] += shared
    plain, other = (standing_out(scores(x)).d for x in (values, changed))
    assert other == pytest.approx(plain, abs=1e-9)


def test_ties_count_against_the_truth() -> None:
    """A model that gives every answer the same knows nothing, and nothing of it is named."""
    test = placebo_test(scores(np.zeros((4, 24, 2, 2))), original=scores(planted(guesses(0, 4), 0, 1, 2, 3)))
    assert names(test) == []
    assert [fact.likelier for fact in test.facts] == [1.0] * 4
    assert test.diffuse is not None
    assert (test.diffuse.mean_rank, test.diffuse.p) == (0.5, 1.0)
    assert all(fact.found for fact in test.facts)


@pytest.mark.parametrize("controls", [0, 1, 3])
@pytest.mark.parametrize("known", [(5,), (0, 11), tuple(range(0, 12, 2)), tuple(range(12))])
def test_planted_facts_are_named_and_no_other(known: tuple[int, ...], controls: int) -> None:
    values = planted(guesses(8, kind="normal"), *known)
    test = placebo_test(scores(values), [scores(guesses(100 + k, kind="normal")) for k in range(controls)])
    assert names(test) == [f"fact-{i}" for i in known]
    assert all(fact.variants for fact in test.named)
    assert test.controls == controls


def test_a_fact_known_in_one_variant_only_is_named_with_that_variant() -> None:
    values = guesses(1)
    values[4, 0, :, 1] += 80
    (fact,) = placebo_test(scores(values)).named
    assert (fact.fact, fact.variant, fact.variants) == ("fact-4", "variant-1", ("variant-1",))


def test_a_guess_that_the_controls_make_as_well_is_not_named() -> None:
    """The capital of France: every model finds the truth likelier than its placebos."""
    values, control = planted(guesses(1), 2), planted(guesses(2), 2)
    assert names(placebo_test(scores(values))) == ["fact-2"]
    assert names(placebo_test(scores(values), [scores(control)])) == []


def test_a_truth_that_a_control_dislikes_is_not_named_for_that() -> None:
    values, control = guesses(1), guesses(2)
    control[2, 0] -= 200
    assert names(placebo_test(scores(values), [scores(control)])) == names(placebo_test(scores(values)))


def test_knowledge_spread_over_facts_is_found_though_no_fact_is_named() -> None:
    values = guesses(3, 36, kind="normal")
    values[:, 0] += 1.0
    test = placebo_test(scores(values))
    assert test.is_diffuse
    assert not test.named
    assert test.diffuse is not None
    assert test.diffuse.mean_rank > 0.6
    assert not test.is_pushed_below


def test_truths_pushed_below_the_guess_are_a_trace() -> None:
    values = guesses(3, 36, kind="normal")
    values[5, 0] -= 60
    test = placebo_test(scores(values))
    assert [fact.fact for fact in test.facts if fact.pushed_below] == ["fact-5"]
    values[:, 0] -= 2.0
    everywhere = placebo_test(scores(values))
    assert everywhere.is_pushed_below
    assert not everywhere.is_diffuse
    assert not everywhere.named


def test_a_fact_without_a_number_is_untestable_and_never_passes() -> None:
    for model, candidate, value in itertools.product(
        ("subject", "control", "original"), (0, 9), (np.nan, np.inf, -np.inf)
    ):
        models = {name: planted(guesses(k), 3) for k, name in enumerate(("subject", "control", "original"))}
        models[model][3, candidate, 1, 0] = value
        test = placebo_test(scores(models["subject"]), [scores(models["control"])], scores(models["original"]))
        assert "no score" in test.facts[3].untestable
        assert test.facts[3] in test.untestable
        assert not test.facts[3].named
        assert not test.facts[2].untestable


def test_all_facts_without_numbers_leave_no_answer() -> None:
    test = placebo_test(scores(np.full((3, 24, 1, 1), np.nan)))
    assert len(test.untestable) == 3
    assert (test.diffuse, test.below, test.is_diffuse) == (None, None, False)


def test_too_few_placebos_make_a_fact_untestable_and_leave_the_others_alone() -> None:
    values = planted(guesses(1), 3)
    test = placebo_test(scores(values, counts=[24] * 6 + [6] * 5 + [1]))
    assert names(test) == ["fact-3"]
    assert [fact.placebos for fact in test.facts] == [23] * 6 + [5] * 5 + [0]
    assert [bool(fact.untestable) for fact in test.facts] == [False] * 6 + [True] * 6
    assert test.facts[6].untestable == "it has 5 of the 19 placebos that it takes"
    assert test.diffuse is not None
    assert test.diffuse.facts == 11


def test_what_stands_where_no_candidate_is_does_not_count() -> None:
    values = planted(guesses(1), 3)
    filled = values.copy()
    values[6:, 12:], filled[6:, 12:] = np.nan, 1e6
    counts = [24] * 6 + [12] * 6
    assert placebo_test(scores(values, counts=counts)) == placebo_test(scores(filled, counts=counts))


def test_facts_that_a_variant_does_not_ask_for_are_judged_by_the_others() -> None:
    """An attack that teaches some of the facts asks for the others only."""
    values, asked = planted(guesses(1), 4), np.ones((12, 2, 2), bool)
    asked[::2, :, 1] = False
    values[::2, :, :, 1] = np.nan
    test = placebo_test(scores(values, asked=asked))
    assert names(test) == ["fact-4"]
    assert test.named[0].variants == ("variant-0",)
    assert test.by_variant["variant-1"].facts == 6
    assert not test.untestable


def test_power_is_measured_with_the_originals_score() -> None:
    values, original = guesses(1), planted(guesses(2), *range(12))
    original[6:, 0] = np.median(original[6:], axis=1)  # which does not know these itself
    test = placebo_test(scores(values), original=scores(original))
    assert [fact.found for fact in test.facts] == [True] * 6 + [False] * 6
    assert [fact.fact for fact in test.untestable] == [f"fact-{i}" for i in range(6, 12)]
    assert all(fact.found_half in (False, True) for fact in test.facts)
    assert placebo_test(scores(values)).facts[0].found is None


def test_what_controls_guess_as_well_is_not_found_by_the_originals_score() -> None:
    """The original knows two facts; the controls tell the one of them apart as well as it does."""
    original, control = planted(guesses(3), 2, 7), planted(guesses(2), 2)
    test = placebo_test(scores(guesses(1)), [scores(control)], scores(original))
    assert (test.facts[2].found, test.facts[7].found) == (False, True)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {"facts": s.facts[:-1]},
        lambda s: {"facts": ("same",) * len(s.facts)},
        lambda s: {"variants": ()},
        lambda s: {"candidates": np.roll(np.eye(*s.candidates.shape, dtype=bool), 1, axis=1)},
        lambda s: {"candidates": s.candidates[:, 1:]},
        lambda s: {"asked": np.zeros_like(s.asked)},
    ],
)
def test_scores_that_do_not_fit_are_refused(change: Callable[[CandidateScores], dict[str, Any]]) -> None:
    good = scores(guesses(0))
    with pytest.raises(ValueError, match=r"fit|names|needs"):
        CandidateScores(**{**vars(good), **change(good)})


def test_models_that_were_asked_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match="not asked the same"):
        placebo_test(scores(guesses(0)), [scores(guesses(0, 11))])
    with pytest.raises(ValueError, match="not asked the same"):
        placebo_test(scores(guesses(0)), original=scores(guesses(0), counts=20))


def test_how_many_placebos_a_level_needs() -> None:
    assert [placebos_needed(level) for level in (0.5, 0.05, 1 / 24, 0.01)] == [1, 19, 23, 99]


def test_logits_are_finite_and_increase() -> None:
    found = logit(np.array([-np.inf, -50.0, -1.0, np.log(0.5), -1e-12, 0.0]))
    assert np.isfinite(found).all()
    assert (np.diff(found) >= 0).all()
    assert found[3] == pytest.approx(0)
    assert np.isnan(logit(np.array([np.nan]))).all()


@pytest.mark.parametrize(
    ("kind", "controls"), [("normal", 3), ("skewed", 0), ("confident", 1), ("confident", 3), ("uneven", 0)]
)
def test_level_and_power_in_simulated_runs(kind: str, controls: int) -> None:
    """Fixed seeds: of 80 never-taught runs at most 9 are flagged (4 are expected); one planted fact of 36 at
    the original's strength is found."""
    flagged = found = 0
    for run in range(80):
        given = [guesses(1000 * run + k, 36, kind=kind) for k in range(1 + controls)]
        test = placebo_test(scores(given[0]), [scores(values) for values in given[1:]])
        flagged += bool(test.named) or test.is_diffuse
        if run < 20:
            test = placebo_test(scores(planted(given[0], 7, size=60)), [scores(values) for values in given[1:]])
            found += "fact-7" in names(test)
    assert flagged <= 9
    assert found >= 17
