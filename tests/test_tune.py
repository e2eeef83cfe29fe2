"""The search: what can be searched, that it goes on where it was, and that it finds settings that forget and keep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import WORLD, World

from stillknows.errors import UserError
from stillknows.experiments import tune
from stillknows.experiments.tune import Range, best, configured, parse_range
from stillknows.registry import bind
from stillknows.training.settings import Settings
from stillknows.unlearning import unlearn

Case = Callable[..., Any]
METHOD = "npo:beta=0.5 + nll"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr=1e-6..1e-4", Range("lr", 1e-6, 1e-4)),
        ("max_steps=2..10", Range("max_steps", 2, 10, whole=True)),
        ("npo.beta=0.05|0.5", Range("npo.beta", choices=("0.05", "0.5"))),
        ("weights=float32|bfloat16", Range("weights", choices=("float32", "bfloat16"))),
    ],
)
def test_ranges(text: str, expected: Range) -> None:
    assert parse_range(text, METHOD) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr", "says no values"),
        ("lrr=1..2", "did you mean 'lr'"),
        ("kl.weight=1..2", "nothing to search is called 'kl.weight'"),
        ("lr=2..1", "the range is empty"),
        ("lr=low..high", "must be numbers"),
        ("weights=float16", "is not known"),
        ("npo.beta=much", "is not of type float"),
    ],
)
def test_what_cannot_be_searched(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_range(text, METHOD)


def test_settings_and_options_take_the_values_of_a_trial() -> None:
    request = unlearn.UnlearnConfig("m", bind("benchmark", WORLD)(), METHOD, Settings(lr=1.0))
    found = configured(request, {"lr": 1e-3, "weights": "bfloat16", "npo.beta": 0.1, "nll.weight": 2.0})
    assert (found.settings.lr, found.settings.weights) == (1e-3, "bfloat16")
    assert found.method == "npo:beta=0.1 + nll:weight=2.0"
    assert configured(request, {"nll.weight": 2.0}).method == "npo:beta=0.5 + nll:weight=2.0"


def test_the_best_trial_keeps_what_must_stay() -> None:
    def trial(high: float, allowed: bool) -> dict[str, Any]:
        return {"worst": [0.0, 0.0, high], "allowed": allowed}

    assert best([trial(0.1, False), trial(0.9, True), trial(0.4, True)]) == 2
    assert best([trial(0.1, False)]) is None
    assert best([]) is None


def test_a_search_forgets_keeps_and_goes_on_where_it_was(
    cli: Case, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate that changes nothing is beaten; a finished search grows; its trials are the same bits again."""
    base = ["tune", world.original, "--control", world.control, "--benchmark", WORLD, "--variants", "full,rtn:group=32"]
    base += ["--metrics", "answer_probability,extraction_strength", "--method", METHOD, "--epochs", 12]
    base += ["--search", "lr=1e-4..1e-2", "--search", "nll.weight=0.5|2", "--least-retained", 0.5, "--json"]
    out = tmp_path / "tune"
    first = json.loads(cli(*base, "--trials", 2, "--out", out).out)
    ran: list[str] = []
    run = unlearn.unlearn
    monkeypatch.setattr(unlearn, "unlearn", lambda *given, **named: ran.append("") or run(*given, **named))
    result = json.loads(cli(*base, "--trials", 5, "--out", out).out)
    assert len(ran) == 3
    assert result["trials"][:2] == first["trials"]
    assert result == json.loads((out / tune.JSON).read_text())
    number = result["best"]
    allowed = [t["worst"][2] for t in result["trials"] if t["allowed"]]
    assert result["trials"][number]["worst"][2] == min(allowed) < 1
    assert [folder.name for folder in (out / "trials").iterdir()] == [f"trial-{number:03d}"]
    table = tune.text(result)
    assert f"retain score is {number}." in table
    again = json.loads(cli(*base, "--trials", 2, "--out", tmp_path / "again").out)
    assert [t["settings"] for t in again["trials"]] == [t["settings"] for t in first["trials"]]
    assert [t["worst"] for t in again["trials"]] == [t["worst"] for t in first["trials"]]
    refused = cli(*base, "--variants", "int4:group=128", "--trials", 2, "--out", tmp_path / "refused")
    assert (refused.code, len(ran)) == (2, 5)
    assert "groups of 128 do not divide 64 inputs" in refused.err
    other = cli(*base, "--trials", 2, "--out", out, "--seed", 1)
    assert other.code == 2
    assert "--overwrite" in other.err
