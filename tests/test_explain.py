"""What a diagnosis says in words."""

from __future__ import annotations

from typing import Any

import pytest

from stillknows.analysis import explain

SMALL = "it is smaller than the format's steps (0.25 of a step)"
LARGE = "it is as large as the format's steps"
EXACT = "the format holds the original's weights exactly"
CROSSING = "2 % of the weights change bins"
ZERO_BIN = "87 % of the changed weights lie in the zero bin, as do 15 % of all weights"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"surviving": 0.9, "update_steps": 1.0}, f"the update survives: {LARGE} (1 steps)"),
        (
            {"surviving": 0.9},
            f"the update survives: {SMALL}, but the 2 % of the weights that change bins carry it over",
        ),
        ({"surviving": 0.5, "zero_bin_changed": 0.1}, f"part of the update is lost: {SMALL}; {CROSSING}"),
        ({"surviving": 0.49, "update_steps": None}, f"most of the update is lost: {EXACT}; {CROSSING}; {ZERO_BIN}"),
        ({"surviving": 0.1}, f"most of the update is lost: {SMALL}; {CROSSING}; {ZERO_BIN}"),
        (
            {"surviving": -0.1, "update_steps": 3.0, "zero_bin_changed": 0.15},
            f"nearly all of the update is lost: {LARGE} (3 steps); {CROSSING}",
        ),
        ({"surviving": None, "zero_bin_changed": None}, "no weight that this format quantizes was changed"),
    ],
)
def test_causes_are_made_of_the_numbers(changes: dict[str, Any], words: str) -> None:
    shares = {"crossing": 0.02, "update_steps": 0.25, "zero_bin": 0.15, "zero_bin_changed": 0.87}
    assert explain.cause(shares | changes) == words


def test_what_a_step_moves_is_said_of_bfloat16_alone() -> None:
    record = {"weights": "float32", "lr": 1e-5, "steps": 40}
    assert explain.storage(record) == "Run record: weights kept as float32 between steps, learning rate 1e-05."
    words = explain.storage(record | {"weights": "bfloat16", "movable": 0.25, "half_movable_lr": 6e-5})
    assert "A step of that size moves 25 % of the weights in bfloat16; above 6e−05 it moves half of them." in words


def test_a_rate_is_named_only_where_an_update_is_lost() -> None:
    assert explain.remedy({"least_lr": None}) == ""
    assert explain.remedy({"least_lr": 4e-5}).startswith("At a learning rate of 4e−05 a typical change would be half")
