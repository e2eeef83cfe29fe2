"""The array formulas that metrics and figures share, by hand and against published logs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillknows.likelihood import lowest_mean, mean_log_probs, normalised_probability, truth_ratio

NONE = np.array([])


def answer(*probabilities: float) -> np.ndarray:
    return np.log(np.array(probabilities))


def test_mean_log_probs() -> None:
    """ln P of ½ and ⅛ is ln ¼; an answer without tokens has none."""
    found = mean_log_probs([answer(1 / 2, 1 / 8), answer(1.0), NONE])
    assert found.tolist() == pytest.approx([math.log(1 / 4), 0, math.nan], nan_ok=True, abs=1e-15)
    assert mean_log_probs([]).shape == (0,)


def test_normalised_probability() -> None:
    """¼ against ⅛ and ⅜ is a third; two equal answers share; an example without wrong answers is NaN."""
    true = [answer(1 / 2, 1 / 8), answer(0.1), answer(0.5), NONE]
    wrong = [(answer(1 / 8), answer(3 / 8)), (answer(0.1, 0.1),), (), (answer(0.5),)]
    found = normalised_probability(true, wrong)
    assert found.tolist() == pytest.approx([1 / 3, 1 / 2, math.nan, math.nan], nan_ok=True, rel=1e-12)


def test_improbable_answers_still_compare() -> None:
    """e^−800 is 0 in float64; against e^−800 it is a half and against e^−810 nearly all."""
    true = [np.array([-800.0])] * 3
    wrong = [(np.array([-800.0]),), (np.array([-810.0]),), (np.array([-10.0]),)]
    expected = [1 / 2, 1 / (1 + math.exp(-10)), 0]
    assert normalised_probability(true, wrong).tolist() == pytest.approx(expected, abs=1e-300)
    assert truth_ratio(true, [NONE] * 3, wrong).tolist() == pytest.approx([1, math.exp(-10), math.inf])


def test_truth_ratio() -> None:
    """Wrong ½ and ⅛ over a paraphrase of ¼: geometric ¼/¼ = 1, arithmetic (5/16)/¼ = 5/4; no paraphrase: over ½."""
    true, wrong = [answer(1 / 2)] * 3, [(answer(1 / 2), answer(1 / 8, 1 / 8))] * 2 + [()]
    paraphrase = [answer(1 / 2, 1 / 8), NONE, answer(1 / 2)]
    for mean, expected in (("geometric", [1, 1 / 2, math.nan]), ("arithmetic", [5 / 4, 5 / 8, math.nan])):
        found = truth_ratio(true, paraphrase, wrong, mean=mean)  # type: ignore[arg-type]
        assert found.tolist() == pytest.approx(expected, nan_ok=True, rel=1e-12)


def test_the_arithmetic_ratio_is_never_the_smaller_one() -> None:
    rng = np.random.default_rng(0)
    true = [np.log(rng.random(4)) for _ in range(200)]
    wrong = [tuple(np.log(rng.random(n)) for n in (2, 3, 5)) for _ in true]
    arithmetic = truth_ratio(true, true, wrong, mean="arithmetic")
    assert (arithmetic >= truth_ratio(true, true, wrong)).all()


@pytest.mark.parametrize(
    ("n", "k", "expected"),
    [(10, 0.4, 1.5), (10, 0.25, 0.5), (10, 0.0, 0), (2, 0.4, 0), (1, 0.4, 0), (7, 0.3, 0.5), (4, 1.0, 1.5)],
)
def test_lowest_mean_takes_the_whole_part_of_the_share_but_one_value_at_least(
    n: int, k: float, expected: float
) -> None:
    """Of 0..n−1 in falling order: int(2.5) = 2 values are 0 and 1."""
    assert lowest_mean([np.arange(n - 1.0, -1, -1), NONE], k).tolist() == pytest.approx(
        [expected, math.nan], nan_ok=True
    )


def spread(loss: float, tokens: int) -> np.ndarray:
    """The log-probabilities of an answer whose loss is shared evenly by its tokens."""
    return np.full(tokens, -loss / tokens)


def tofu_logs(shared: Path, model: str) -> dict[str, Any]:
    return json.loads((shared / "gold" / "tofu" / f"llama2-7b_{model}.json").read_text())


@pytest.mark.gold
@pytest.mark.parametrize("model", ["full", "retain90"])
def test_truth_ratio_equals_the_published_tofu_logs(shared: Path, model: str) -> None:
    """All 817 items, geometric; the logs hold float32, hence 2e-6."""
    checked = 0
    for log in tofu_logs(shared, model).values():
        items = list(log["truth_ratio"])
        stated = [spread(log["paraphrased_loss"][i], log["num_token_paraphrased"][i]) for i in items]
        wrong = [
            [spread(*pair) for pair in zip(log["perturb_loss"][i], log["num_token_perturb"][i], strict=True)]
            for i in items
        ]
        expected = [log["truth_ratio"][i] for i in items]
        for paraphrase in (stated, [NONE] * len(items)):
            assert truth_ratio(stated, paraphrase, wrong).tolist() == pytest.approx(expected, rel=2e-6)
        checked += len(items)
    assert checked == 817


@pytest.mark.gold
@pytest.mark.parametrize("model", ["full", "retain90"])
def test_normalised_probability_equals_the_published_tofu_logs(shared: Path, model: str) -> None:
    checked = 0
    for log in tofu_logs(shared, model).values():
        items = list(log.get("normalized_gt_loss", {}))
        true = [np.array([-log["avg_gt_loss"][i]]) for i in items]
        wrong = [[np.array([-loss]) for loss in log["average_perturb_loss"][i]] for i in items]
        expected = [math.exp(-log["normalized_gt_loss"][i]) for i in items]
        assert normalised_probability(true, wrong).tolist() == pytest.approx(expected, rel=1e-12)
        checked += len(items)
    assert checked == 217


def test_a_paraphrase_that_is_missing_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        truth_ratio([answer(0.5)] * 2, [answer(0.5)], [[answer(0.25)]] * 2)
