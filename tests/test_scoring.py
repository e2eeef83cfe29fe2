"""What a metric is given, what it may give back, and reasons where there is nothing to give."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from stillknows import scoring
from stillknows.errors import NotMeasured, UserError
from stillknows.registry import Bound, Plugin
from stillknows.types import Observations

NAN = math.nan


def observations() -> Observations:
    names = tuple("01234")
    rows = tuple(np.log([0.5, 0.25]) for _ in names)
    return Observations(
        names, names, names, names,
        log_probs=rows,
        hits=tuple(np.array([True, False]) for _ in names),
        ends=np.array([True, True, True, False, True]),
        wrong_log_probs=tuple(rows[:2] for _ in names),
    )  # fmt: skip


def mine(function: Any) -> Bound:
    return Bound(Plugin("metric", "mine", function, "", 1), {}, "mine")


@pytest.mark.parametrize(
    "given",
    [None, "high", 0.5, np.zeros((5, 5)), np.zeros(4), [[0.0]] * 5],
    ids=["nothing", "text", "number", "table", "too few", "column"],
)
def test_scores_that_are_not_one_number_for_each_example_are_refused(given: Any) -> None:
    with pytest.raises(UserError, match="the metric mine does not give one number for each of 5 examples"):
        scoring.score(mine(lambda hits: given), observations())


@pytest.mark.parametrize("value", [-0.1, 1.1, math.inf, -math.inf])
def test_knowledge_outside_its_range_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"the metric mine gives knowledge outside 0\.\.1"):
        scoring.score(mine(lambda hits: [0, 1, 0.5, NAN, value]), observations())


def test_a_metric_cannot_change_what_the_next_one_reads() -> None:
    seen = observations()

    def erases(hits: Any, wrong_log_probs: Any, ends: Any) -> Any:
        for array in (ends, *hits, *(row for rows in wrong_log_probs for row in rows)):
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0
        return ends.astype(float)

    assert scoring.score(mine(erases), seen).tolist() == [1, 1, 1, 0, 1]
    assert seen.hits
    assert seen.hits[0].flags.writeable


def test_what_a_metric_asks_for_is_taken_from_the_subject_and_from_the_control() -> None:
    seen = observations()
    other = replace(seen, log_probs=tuple(np.log([0.125]) for _ in seen.ids))
    given: list[Any] = []

    def compares(log_probs: Any, reference_log_probs: Any, reference_hits: Any, answers: Any) -> Any:
        given.append((log_probs, reference_log_probs, reference_hits, answers))
        return np.arange(5) / 5

    assert scoring.score(mine(compares), seen, other).tolist() == [0, 0.2, 0.4, 0.6, 0.8]
    [(own, control, hits, answers)] = given
    assert [row.tolist() for row in own] == [row.tolist() for row in seen.log_probs or ()]
    assert [row.tolist() for row in control] == [[math.log(0.125)]] * 5
    assert hits[0].tolist() == [True, False]
    assert answers == seen.answers


def test_without_a_control_of_the_same_examples_there_is_no_score() -> None:
    seen, needs = observations(), mine(lambda reference_hits: np.ones(5))
    for reference in (None, replace(seen, ids=seen.ids[::-1])):
        with pytest.raises(NotMeasured) as told:
            scoring.score(needs, seen, reference)
        assert str(told.value) == "there is no control with the same examples"
    assert scoring.score(mine(lambda hits: np.ones(5)), seen, replace(seen, ids=seen.ids[::-1])).tolist() == [1] * 5


def test_what_was_not_observed_is_named() -> None:
    seen = observations()
    with pytest.raises(NotMeasured, match=r"^samples were not observed$"):
        scoring.score(mine(lambda hits, samples: np.ones(5)), seen)
    with pytest.raises(NotMeasured, match=r"^hits were not observed$"):
        scoring.score(mine(lambda reference_hits: np.ones(5)), seen, replace(seen, hits=None))


def test_an_example_with_a_probability_that_is_no_number_has_no_score() -> None:
    seen = observations()
    assert seen.log_probs
    broken = replace(seen, log_probs=(*seen.log_probs[:3], np.array([-1.0, NAN]), np.array([])))
    found = scoring.score(mine(lambda hits: np.ones(5)), broken)
    assert np.isnan(found).tolist() == [False, False, False, True, False]
    assert scoring.score(mine(lambda hits: np.ones(5)), replace(seen, log_probs=None)).tolist() == [1] * 5


@pytest.mark.parametrize("value", [-1e-7, 1 + 1e-7, 0, 1, True])
def test_scores_are_numbers_in_double_precision_and_may_be_rounded(value: float) -> None:
    found = scoring.score(mine(lambda hits: [value] * 5), observations())
    assert found.dtype == np.float64
    assert found.tolist() == [float(value)] * 5
    single = scoring.score(mine(lambda hits: np.full(5, 0.1, dtype=np.float32)), observations())
    assert single.dtype == np.float64
    assert scoring._checked(mine(lambda hits: None), [1, 0, 1], 3).dtype == np.float64


@pytest.mark.parametrize("value", [-2e-6, 1 + 2e-6])
def test_knowledge_beyond_rounding_is_refused_with_what_to_do(value: float) -> None:
    with pytest.raises(UserError) as told:
        scoring.score(mine(lambda hits: [value] * 5), observations())
    assert str(told.value).splitlines() == [
        "the metric mine gives knowledge outside 0..1",
        '  mend it, or register it as another: measures="behaviour"',
    ]
    behaviour = Bound(replace(mine(lambda hits: [value] * 5).plugin, measures="behaviour"), {}, "mine")
    assert scoring.score(behaviour, observations()).tolist() == [value] * 5
    with pytest.raises(UserError, match=r"for each of 5 examples\n  mend the metric$"):
        scoring.score(mine(lambda hits: []), observations())


def test_fields_of_a_split_are_returned_or_missed_by_name() -> None:
    splits = {"forget": observations(), "retain": replace(observations(), hits=None, ends=None)}
    assert scoring.observed(splits, "forget", "hits", "ids") == [splits["forget"].hits, splits["forget"].ids]
    for split, fields, reason in (
        ("holdout", ["hits"], "the split 'holdout' was not measured"),
        ("retain", ["hits", "ids", "ends"], "hits, ends were not observed on the split 'retain'"),
    ):
        with pytest.raises(NotMeasured) as told:
            scoring.observed(splits, split, *fields)
        assert str(told.value) == reason


def test_scores_that_are_nothing_are_dropped_with_their_facts() -> None:
    scores, facts = scoring.drop_unscored(np.array([0.5, NAN, 0.25, 0.0]), ["a", "b", "c", "d"], "forget")
    assert (scores.tolist(), facts) == ([0.5, 0.25, 0.0], ["a", "c", "d"])
    with pytest.raises(NotMeasured) as told:
        scoring.drop_unscored(np.array([NAN, NAN]), ["a", "b"], "forget")
    assert str(told.value) == "no example of the split 'forget' could be judged"
    with pytest.raises(ValueError, match="longer"):
        scoring.drop_unscored(np.array([0.5, 0.5]), ["a"], "forget")
