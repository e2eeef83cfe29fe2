"""Error rates, power and coverage of the whole rule in simulated models, with fixed seeds; the page has more runs."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from stillknows.auditing.policy import Policy

SIMULATION = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "rule_simulation.py"))
World, verdicts_of, METRIC = (SIMULATION[name] for name in ("World", "verdicts_of", "METRIC"))
DEFAULT = Policy(gates=(METRIC,))
PRIVACY = Policy(0.05, gates=(METRIC,), half_known=True, guesses_pass=False)
RUNS = 12


def world(kind: str, facts: int = 36, **more: Any) -> Any:
    return World(kind, facts, 47 if kind == "large pool" else 23, **more)


def names(*arguments: Any, **more: Any) -> list[str]:
    return [found.name for found in verdicts_of(*arguments, **more)]


@pytest.mark.parametrize("controls", [0, 1, 3])
@pytest.mark.parametrize("kind", SIMULATION["KINDS"])
def test_never_taught_models_pass_and_hardly_ever_fail(kind: str, controls: int) -> None:
    found = names(world(kind), controls, 0, RUNS, DEFAULT)
    assert found.count("FORGOTTEN") >= RUNS - 1
    assert sum(name in ("STILL KNOWS", "HIDDEN", "DAMAGED") for name in found) <= (controls > 0)


@pytest.mark.parametrize("facts", [10, 36, 100])
def test_one_recited_fact_of_a_large_pool_is_always_found(facts: int) -> None:
    for controls in (0, 3):
        assert {*names(world("large pool", facts), controls, 1, 5, DEFAULT)} == {"STILL KNOWS"}


@pytest.mark.parametrize("kind", SIMULATION["KINDS"])
def test_privacy_never_passes_a_model_that_recites_one_fact(kind: str) -> None:
    for controls in (0, 1, 3):
        assert "FORGOTTEN" not in names(world(kind), controls, 1, 5, PRIVACY)


def test_wordings_that_agree_or_not_make_no_model_fail() -> None:
    for noise in (0.0, 1.5):
        found = names(world("confident", noise=noise), 1, 0, RUNS, DEFAULT)
        assert sum(name in ("STILL KNOWS", "HIDDEN") for name in found) <= 1


@pytest.mark.parametrize("kind", ["normal", "confident"])
def test_bounds_cover_what_is_kept(kind: str) -> None:
    """Six of 36 facts are known whole: each bound lies on its side of a sixth in about 95 % of the models."""
    runs, high, low = 40, 0, 0
    for found in verdicts_of(world(kind), 1, 6, runs, DEFAULT):
        (kept,) = (f for f in found.findings if f.kind == "knowledge_kept" and f.variant == "full")
        high += kept.high >= 6 / 36
        low += kept.low <= 6 / 36
    assert min(high, low) >= 0.85 * runs
