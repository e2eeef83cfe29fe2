"""Metrics are judged by models whose knowledge is known: formulas and whole judgements with values made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from stillknows.registry import bind
from stillknows.reporting import ranking
from stillknows.reporting.ranking import RELEARNED, Trial
from stillknows.types import CONTROL, FULL, Observations

ONES = np.ones((1, 2))
FORMAT = "nf4"


def row(*values: float) -> np.ndarray:
    return np.array([values], dtype=np.float64)


def test_faithfulness_is_the_share_of_pairs_in_order() -> None:
    """.9 beats .5 and .1, .5 beats .1 and ties with .5: 3.5 of 4."""
    assert ranking.pool_auc(row(0.9, 0.5), row(0.5, 0.1), ONES, ONES).tolist() == [3.5 / 4]


def test_faithfulness_counts_models_as_often_as_they_are_drawn() -> None:
    assert ranking.pool_auc(row(0.9, 0.5), row(0.7, 0.1), row(0, 2), row(2, 0)).tolist() == [0.0]
    assert ranking.pool_auc(row(0.9, 0.5), row(0.7, 0.1), row(1, 1), row(2, 0)).tolist() == [0.5]


@pytest.mark.parametrize(
    ("taught", "untaught", "expected"),
    [
        ([0.9, 0.5], [0.3, 0.1], 0.4),
        ([0.9, 0.2], [0.3, 0.1], 0.15),  # .15 and .6 both take three of four rightly: the stricter one
        ([0.5, 0.5], [0.5], 0.5),
    ],
)
def test_threshold_parts_the_pools_best(taught: list[float], untaught: list[float], expected: float) -> None:
    assert ranking.best_threshold(np.array(taught), np.array(untaught)) == pytest.approx(expected)


def test_resistance_measures_the_rise_in_units_of_the_gap() -> None:
    found = ranking.resistance(np.array([[0.1, 0.5, -1.0, 2.0], [0.1, 0.5, -1.0, 2.0]]), np.array([0.5, 1.0]))
    np.testing.assert_allclose(found, [[0.8, 0, 1, 0], [0.9, 0.5, 1, 0]])


@pytest.mark.parametrize("gap", [0.0, -0.1])
def test_resistance_has_no_value_where_the_pools_are_not_apart(gap: float) -> None:
    assert np.isnan(ranking.resistance(row(0.1), np.array([gap]))).all()


def test_published_ratios() -> None:
    before, after = np.array([0.2, 0.4, 0.0, 0.0]), np.array([0.4, 0.2, 0.1, 0.0])
    np.testing.assert_allclose(ranking.published_quantization(before, after), [0.5, 1, 0, 1])
    rises = np.array([0.5, 0.1, -0.1, 0.0])
    np.testing.assert_allclose(ranking.published_relearning(rises, 0.25), [0.5, 1, 1, 1])
    np.testing.assert_allclose(ranking.published_relearning(rises, -0.1), [0, 0, 1, 1])


def observed(*probabilities: float, split: str = "forget") -> Observations:
    """One item of one token for each probability, each a fact of its own."""
    ids = tuple(f"{split}-{i}" for i in range(len(probabilities)))
    return Observations(ids, ids, ids, ids, log_probs=tuple(np.log([p]) for p in probabilities))


def trial(unlearned: Mapping[str, Mapping[str, Sequence[float]]], **retain: float) -> Trial:
    """Four facts, the last two relearned. Taught models score .9, untaught ones .1; the control rises to .2."""
    states: dict[str, Mapping[str, Sequence[float]]] = {
        "knows-0": {FULL: [0.9] * 4},
        "knows-1": {FULL: [0.9] * 4},
        "never-0": {FULL: [0.1] * 4},
        "never-1": {FULL: [0.1] * 4},
        CONTROL: {FULL: [0.1] * 4, FORMAT: [0.1] * 4, RELEARNED: [0.2, 0.2, 0.9, 0.9]},
    }
    seen = {}
    for model, scores in (states | dict(unlearned)).items():
        for state, probabilities in scores.items():
            seen[model, state, "forget"] = observed(*probabilities)
            seen[model, state, "holdout"] = observed(0.5, 0.5, split="holdout")
            seen[model, state, "retain"] = observed(retain.get(model.replace("-", "_"), 0.8), split="retain")
    return Trial(
        taught=("knows-0", "knows-1"),
        untaught=("never-0", "never-1"),
        unlearned=dict.fromkeys(unlearned, "knows-0"),
        formats=(FORMAT,),
        measured=np.array([True, True, False, False]),
        seen=seen,
    )


def test_aggregate_is_the_harmonic_mean_of_faithfulness_and_robustness() -> None:
    """HM(½, 1) = ⅔ and HM(1, ⅔) = ⅘; nothing makes up for a 0."""
    np.testing.assert_allclose(ranking.aggregate(np.ones(2), np.array([0.5, 0.0]), np.ones(2)), [0.8, 0])
    assert ranking.aggregate(2 / 3, 1.0, 1.0) == pytest.approx(0.8)


HIDDEN = {FULL: [0.1] * 4, FORMAT: [0.3] * 4, RELEARNED: [0.5, 0.5, 1.0, 1.0]}
PROBABILITY = bind("metric", "answer_probability")


def test_a_judgement_with_every_number_made_by_hand() -> None:
    """Gap .8. Quantized .1 -> .3: 1 − .2/.8. Relearned .1 -> .5, the control .1 -> .2: 1 − .3/.8. As published:
    .1/.3 and .1/.4."""
    found = ranking.judge(trial({"hidden": HIDDEN}), PROBABILITY)
    assert found["faithfulness"].value == 1
    assert found["quantization"].value == pytest.approx(0.75)
    assert found["relearning"].value == pytest.approx(0.625)
    assert found["aggregate"].value == pytest.approx(2 / (1 + (1 / 0.75 + 1 / 0.625) / 2))
    assert found["published"] == pytest.approx(2 / (1 + (3 + 4) / 2))
    assert found["faithfulness"].n == 4
    assert found["quantization"].n == 1


def test_bounds_come_from_facts_and_hold_the_value() -> None:
    """Quantization brings one of four facts back: a resample without it sees none."""
    found = ranking.judge(trial({"hidden": HIDDEN | {FORMAT: [0.9, 0.1, 0.1, 0.1]}}), PROBABILITY)
    assert found["quantization"].value == pytest.approx(0.75)
    assert found["quantization"].low <= 0.5
    assert found["quantization"].high == pytest.approx(1)


def test_facts_that_were_relearned_do_not_count() -> None:
    other = HIDDEN | {RELEARNED: [0.5, 0.5, 0.1, 0.1]}
    assert ranking.judge(trial({"hidden": other}), PROBABILITY) == ranking.judge(trial({"hidden": HIDDEN}), PROBABILITY)


def test_models_that_are_not_unlearned_or_not_useful_do_not_count() -> None:
    known = {FULL: [0.6] * 4, FORMAT: [0.1] * 4, RELEARNED: [0.1] * 4}
    useless = {FULL: [0.01] * 4, FORMAT: [0.01] * 4, RELEARNED: [0.01] * 4}
    models = {"hidden": HIDDEN, "known": known, "useless": useless}
    found = ranking.judge(trial(models, useless=0.63, hidden=0.65), PROBABILITY)
    assert found["quantization"].n == 1
    assert found["quantization"].value == pytest.approx(0.75)


def test_without_a_model_that_it_takes_for_unlearned_robustness_is_not_measured() -> None:
    found = ranking.judge(trial({"known": {FULL: [0.6] * 4}}), PROBABILITY)
    assert found["faithfulness"].value == 1
    assert "takes none of the 1 unlearned models" in found["quantization"]
    assert found["aggregate"] == found["relearning"] == found["quantization"]
    assert found["published"] is None


def test_a_metric_that_ranks_the_pools_the_wrong_way_is_not_judged_robust() -> None:
    right = trial({"hidden": HIDDEN})
    found = ranking.judge(replace(right, taught=right.untaught, untaught=right.taught), PROBABILITY)
    assert found["faithfulness"].value == 0
    assert "no higher on average" in found["aggregate"]


def test_a_membership_score_is_compared_with_facts_that_nobody_was_taught() -> None:
    """Forget items at .9, .9, .1, .1 against two at .5: half of the pairs."""
    seen = trial({"half": {FULL: [0.9, 0.9, 0.1, 0.1]}})
    assert seen.knowledge(bind("metric", "loss"), "half")[0] == 0.5
    assert seen.knowledge(bind("metric", "loss"), "half", measured_only=True)[0] == 1.0


def test_what_was_not_observed_is_last_without_a_rank() -> None:
    metrics = {name: bind("metric", name) for name in ("rouge_l", "answer_probability", "loss")}
    rows = ranking.rank(trial({"hidden": HIDDEN}), metrics, ["rouge_l"])
    assert [row["name"] for row in rows][-1] == "rouge_l"
    assert [row["rank"] for row in rows] == [1, 2, None]
    assert rows[-1]["aggregate"] == {"not_measured": "generations were not observed"}
    assert [row["gate"] for row in rows] == [False, False, True]
    assert "[1] generations were not observed" in ranking.table(rows)


def judged(name: str, value: float, low: float, *reads: str) -> dict[str, Any]:
    return {"name": name, "reads": list(reads), "aggregate": {"value": value, "low": low, "high": 1.0, "n": 3}}


def test_gates_within_the_bounds_of_the_best_are_supported() -> None:
    rows = [judged("a", 0.9, 0.7, "hits"), judged("b", 0.7, 0.6, "log_probs"), judged("c", 0.69, 0.5, "entropies")]
    assert ranking.objections(rows, ["a", "b"]) == []
    assert ranking.objections(rows, ["a", "c"]) == [
        "c has the aggregate 0.69, below the bounds of the best, a (0.70 to 1.00)"
    ]


def test_a_better_metric_that_needs_more_than_the_true_answer_is_no_measure_for_gates() -> None:
    rows = [judged("a", 0.8, 0.7, "hits"), judged("b", 0.95, 0.9, "wrong_log_probs"), judged("c", 0.9, 0.85, "samples")]
    assert ranking.objections(rows, ["a"]) == []


def test_gates_that_read_the_same_observation_are_not_supported() -> None:
    rows = [judged("a", 0.9, 0.7, "ends", "hits"), judged("b", 0.9, 0.7, "ends", "hits")]
    assert ranking.objections(rows, ["a", "b"]) == ["a and b both read ends, hits"]


def test_a_gate_that_was_not_judged_is_not_supported() -> None:
    unmeasured = {"name": "b", "reads": [], "aggregate": {"not_measured": "because"}}
    assert ranking.objections([judged("a", 0.9, 0.7, "hits"), unmeasured], ["a", "b"]) == ["b was not judged"]
    assert ranking.objections([], ["a"]) == ["a was not judged"]


def varied(*, hidden: Mapping[str, Sequence[float]] = HIDDEN, **others: Mapping[str, Sequence[float]]) -> Trial:
    """A trial in which every model's score depends on the facts, so that resamples differ from what was observed."""
    made = trial({"hidden": hidden} | others)
    seen = dict(made.seen)
    for model, mean in (("knows-0", 0.9), ("knows-1", 0.8), ("never-0", 0.1), ("never-1", 0.2)):
        seen[model, FULL, "forget"] = observed(*(mean + change for change in (0.08, -0.08, 0.04, -0.04)))
    return replace(made, seen=seen)


def test_models_are_taken_for_unlearned_by_what_was_observed_and_not_by_a_resample() -> None:
    """Means just below and above the threshold .5; whichever facts a resample draws more often, one of them moves."""
    below, above = [0.9, 0.09, 0.7, 0.3], [0.11, 0.9, 0.3, 0.7]
    made = varied(hidden={FULL: below}, above={FULL: above}, turned={FULL: [0.09, 0.9, 0.3, 0.7]})
    assert ranking._taken_for_unlearned(made, PROBABILITY, 0.5) == ["hidden", "turned"]
    for score, taken in ((0.499, True), (0.501, False)):  # the threshold is of the observed scores, .2 to .8
        states = dict.fromkeys((FULL, FORMAT, RELEARNED), [score] * 4)
        found = ranking.judge(varied(hidden=states), PROBABILITY)["quantization"]
        assert taken == (not isinstance(found, str))


def test_two_models_count_alike_and_each_by_its_own_rise() -> None:
    """Quantized by .2 and .4 of .8, relearned by .3 and .1 beyond the control's rise."""
    other = {FULL: [0.1] * 4, FORMAT: [0.5] * 4, RELEARNED: [0.3, 0.3, 0.9, 0.9]}
    found = ranking.judge(trial({"hidden": HIDDEN, "other": other}), PROBABILITY)
    assert found["quantization"].value == pytest.approx(1 - (0.25 + 0.5) / 2)
    assert found["relearning"].value == pytest.approx(1 - (0.375 + 0.125) / 2)
    assert found["quantization"].n == found["relearning"].n == found["aggregate"].n == 2
    q, r = (1 / 3 + 1 / 5) / 2, (1 / 4 + 1 / 2) / 2
    assert found["published"] == pytest.approx(2 / (1 + (1 / q + 1 / r) / 2))


def test_the_start_of_relearning_is_of_the_facts_that_are_measured() -> None:
    hidden = HIDDEN | {FULL: [0.1, 0.1, 0.2, 0.2], FORMAT: [0.1, 0.1, 0.2, 0.2]}
    found = ranking.judge(trial({"hidden": hidden}), PROBABILITY)
    assert found["relearning"].value == pytest.approx(0.625)
    assert found["quantization"].value == 1


def test_as_published_only_what_was_observed_counts() -> None:
    """The formats' and the relearned scores vary from fact to fact around the means of the judgement by hand."""
    hidden = {FULL: [0.05, 0.15, 0.05, 0.15], FORMAT: [0.5, 0.1, 0.4, 0.2], RELEARNED: [0.6, 0.4, 1.0, 1.0]}
    found = ranking.judge(trial({"hidden": hidden}), PROBABILITY)
    assert found["published"] == pytest.approx(2 / (1 + (3 + 4) / 2))


def test_every_group_is_drawn_by_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn alike, a lucky half of the taught models would always meet the same half of the untaught."""
    seeds: dict[tuple[str, ...], set[int]] = {}
    with_all = ranking.with_all

    def watched(units: Sequence[str], seed: int) -> Any:
        seeds.setdefault(tuple(units), set()).add(seed)
        return with_all(units, seed)

    monkeypatch.setattr(ranking, "with_all", watched)
    ranking.judge(trial({"hidden": HIDDEN}), bind("metric", "loss"))
    ranking.judge(trial({"hidden": HIDDEN}), PROBABILITY)
    assert len(seeds) == 5  # forget, holdout, taught, untaught, unlearned
    assert sorted(seed for drawn in seeds.values() for seed in drawn) == sorted(set().union(*seeds.values()))


def test_rows_hold_what_was_judged_and_the_table_shows_it() -> None:
    metrics = {name: bind("metric", name) for name in ("answer_probability", "rouge_l")}
    good, unmeasured = ranking.rank(trial({"hidden": HIDDEN}), metrics, ["answer_probability"])
    found = ranking.judge(trial({"hidden": HIDDEN}), PROBABILITY)
    assert good == {
        "name": "answer_probability",
        "measures": "knowledge",
        "reads": ["log_probs"],
        "gate": True,
        **{part: found[part]._asdict() for part in ranking.PARTS},
        "published": found["published"],
        "rank": 1,
    }
    assert unmeasured["reads"] == ["answers", "generations"]
    lines = ranking.table([good, unmeasured]).splitlines()
    shown = [[cell.strip() for cell in lines[i].strip("|").split("|")] for i in (0, 2, 3)]
    assert shown[0] == ["rank", "metric", "measures", *ranking.PARTS, "as published", "gate"]
    assert shown[1][:3] + shown[1][7:] == ["1", "`answer_probability`", "knowledge", "0.44", "yes"]
    assert [words.split(" (")[0] for words in shown[1][3:7]] == ["1.00", "0.75", "0.62", "0.81"]
    assert shown[2] == ["–", "`rouge_l`", "knowledge", *["not measured [1]"] * 4, "–", ""]
    assert lines[4:] == ["", "[1] generations were not observed"]


def test_equal_aggregates_share_a_rank_in_the_order_of_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"extraction_strength": 0.5, "answer_probability": 0.5, "loss": 0.0, "zlib": 0.9}
    part = {name: ranking.Interval(value, value, value, 2) for name, value in values.items()}
    monkeypatch.setattr(
        ranking,
        "judge",
        lambda _, metric: dict.fromkeys(ranking.PARTS, part[metric.spec]) | {"published": 0.0},
    )
    rows = ranking.rank(trial({}), {name: bind("metric", name) for name in values}, [])
    assert [(row["name"], row["rank"]) for row in rows] == [
        ("zlib", 1),
        ("answer_probability", 2),
        ("extraction_strength", 2),
        ("loss", 4),
    ]


def test_a_gate_at_the_lower_bound_of_the_best_is_supported_and_every_one_below_is_not() -> None:
    rows = [judged("a", 0.9, 0.7, "hits"), judged("b", 0.7, 0.6, "log_probs"), judged("c", 0.6, 0.5, "ends")]
    assert ranking.objections(rows, ["b", "c", "a"]) == [
        "c has the aggregate 0.60, below the bounds of the best, a (0.70 to 1.00)"
    ]


def test_utility_of_exactly_the_least_counts() -> None:
    made = trial({"hidden": HIDDEN}, hidden=0.64)
    assert made.utility("hidden") == pytest.approx(0.8)
    with_least = trial({"hidden": HIDDEN}, hidden=0.8 * 0.8 * (1 + 1e-9))
    assert ranking.judge(with_least, PROBABILITY)["quantization"].n == 1
