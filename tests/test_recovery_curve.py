"""Recovery to expect: the curve and its errors by hand, and what is published against its measured pairs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from stillknows.analysis.recovery_curve import Curve, Error, fit, held_out
from stillknows.stats import bootstrap_counts

ROOT = Path(__file__).parents[1]
CURVE = Curve(
    knots=((0.0, 1.0), (0.5, 0.2), (1.0, 0.0)),
    errors=(Error(None, -0.1, 0.05, 40), Error(0.1, -0.3, 0.4, 20), Error(0.9, -0.01, 0.02, 60)),
    weights=(1_000_000, 4_000_000),
)


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("validate_diagnosis", ROOT / "examples/validate_diagnosis.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("surviving", "expected"),
    [(0.0, (1, 0.9, 1.05)), (0.1, (0.84, 0.54, 1.24)), (0.25, (0.6, 0.3, 1.0)), (0.9, (0.04, 0.03, 0.06))],
)
def test_a_prediction_lies_on_the_curve_with_the_errors_of_its_part(
    surviving: float, expected: tuple[float, ...]
) -> None:
    assert CURVE.predict(surviving, 2_000_000)[:3] == pytest.approx(expected)


def test_what_was_not_measured_is_said() -> None:
    beyond = CURVE.predict(1.25, 7_000_000_000)
    assert beyond.recovery == 0
    assert beyond.outside == (
        "1.25 of the update survives, measured were 0.00 to 1.00; "
        "7e+03 million weights are quantized, measured were 1 to 4 million"
    )
    assert "0.5 million weights" in str(CURVE.predict(0.5, 500_000).outside)


def test_the_curve_falls_and_is_nearest_in_least_squares() -> None:
    """.8 and 1 in the wrong order are joined at .9; two models with one surviving share are averaged first."""
    surviving = np.array([0.0, 0.2, 0.6, 0.6])
    recovery = np.array([0.8, 1.0, 0.1, 0.3])
    curve = fit(surviving, recovery, ["a", "b", "a", "b"], [5, 7, 6, 5])
    assert curve.knots == ((0.0, 0.9), (0.2, 0.9), (0.6, 0.2))
    assert curve.weights == (5, 7)


def test_errors_are_those_of_models_that_the_curve_was_not_fitted_to() -> None:
    surviving = np.array([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    recovery = np.array([1.0, 0.0, 0.8, 0.1, 0.6, 0.2])
    originals = ["a", "a", "b", "b", "c", "c"]
    assert held_out(surviving, recovery, originals) == pytest.approx([0.7, 0.15, 0.8, 0.1, 0.9, 0.05])
    found = fit(surviving, recovery, originals, [5] * 6).errors
    assert [error.start for error in found] == [None, 0.9]  # nothing was measured between
    assert found[0][1:] == pytest.approx((-0.3, 0.3, 3))  # too few for 95 %: the outermost
    assert found[1][1:] == pytest.approx((-0.15, 0.15, 3))


def test_bounds_hold_for_a_further_model() -> None:
    """39 pairs of an original: the 38th of them bounds 95 % of what is drawn alike, however many lie closer by."""
    generator = np.random.default_rng(0)
    far, near = generator.permutation(np.linspace(0.3, 0.7, 39)), generator.permutation(np.linspace(0.45, 0.55, 99))
    recovery, originals = np.concatenate([far, near]), ["far"] * 39 + ["near"] * 99
    [error] = fit(np.full(138, 0.5), recovery, originals, [5] * 138).errors
    ordered = np.sort(far - near.mean())
    assert (error.low, error.high) == pytest.approx((ordered[1], ordered[37]), abs=1e-5)


def test_a_gap_between_measured_models_is_said() -> None:
    curve = Curve(((0.0, 1.0), (0.4, 1.0), (0.7, 0.0), (1.2, 0.0)), CURVE.errors, CURVE.weights)
    assert curve.predict(0.5, 2_000_000).outside == "0.50 of the update survives, none was measured from 0.40 to 0.70"
    assert [curve.predict(share, 2_000_000).outside for share in (0.0, 0.2, 0.4, 0.7, 0.9, 1.2)] == [None] * 6


def test_the_published_curve_is_what_the_published_pairs_give(script: Any) -> None:
    pairs = script.load(ROOT / "docs/diagnose.json")
    assert len(pairs) >= 60
    curve = script.curve(pairs)
    assert curve == Curve.published() == Curve.from_json(json.loads(json.dumps(curve.to_json())))


def test_the_page_and_its_plot_are_what_the_pairs_give(script: Any) -> None:
    pairs = script.load(ROOT / "docs/diagnose.json")
    assert (ROOT / "docs/diagnose.md").read_text(encoding="utf-8") == script.page(pairs)
    assert (ROOT / "docs/diagnose.svg").read_text(encoding="utf-8") == script.plot(pairs)


def test_resampled_correlations_are_spearman_s(script: Any) -> None:
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 6, 12).astype(float), generator.integers(0, 6, 12).astype(float)
    drawn = bootstrap_counts([f"model {i // 3}" for i in range(12)])[:20]
    found = script._correlations_of(script._ranks(x, drawn), script._ranks(y, drawn), drawn)
    for row, value in zip(drawn, found, strict=True):
        rows = np.repeat(np.arange(12), row.astype(int))
        expected: Any = spearmanr(x[rows], y[rows])
        assert value == pytest.approx(expected.statistic)


def test_a_model_in_two_audits_counts_once(script: Any) -> None:
    def cell(variant: str, split: str, metric: str, value: float) -> dict[str, Any]:
        return {"variant": variant, "split": split, "metric": metric, "value": value, "n": 9}

    cells = [
        cell("int4", "weights", "update.surviving", 0.25),
        cell("int4", "weights", "update.crossing", 0.01),
        cell("int4", "forget", "answer_probability.recovery", 0.75),
        cell("int8", "weights", "update.surviving", 1.0),  # nothing to recover there
    ]
    subjects = [
        {"name": "original", "fingerprint": "o", "cells": []},
        {"name": "npo", "fingerprint": "n", "cells": cells},
    ]
    audit = {"variants": ["full", "int4", "int8"], "subjects": subjects}
    renamed = audit | {"subjects": [subjects[0], subjects[1] | {"name": "again"}]}
    assert script.collect([audit, renamed]) == [script.Pair("original 0", "npo", "int4", 9, 0.25, 0.01, 0.75)]
