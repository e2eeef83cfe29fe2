"""Mixtures of two states of a model: straight lines with exact ends, and the share that keeps a score."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stillknows.model import parameters
from stillknows.training import interpolate

Make = Callable[..., Any]


def moved(model: nn.Module) -> Any:
    """Return a copy some way off."""
    found, generator = copy.deepcopy(model), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in found.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=generator))
    return found


def test_mixtures_are_straight_lines_with_exact_ends(make_model: Make) -> None:
    original = make_model()
    unlearned = parameters.copies(moved(original))
    model = make_model(seed=5)
    for alpha in (0.0, 0.25, 1.0):
        interpolate.mix(model, parameters.copies(original), unlearned, alpha)
        for name, p in model.named_parameters():
            o, u = original.get_parameter(name), unlearned[name]
            torch.testing.assert_close(p, (1 - alpha) * o + alpha * u)
            assert alpha == 0.25 or torch.equal(p, u if alpha else o)


@pytest.mark.parametrize("bound", [1.0, 0.999, 0.7, 0.5, 1 / 16, 0.03, 0.0])
def test_the_largest_share_is_found_to_within_a_step(bound: float) -> None:
    found = interpolate.largest_share(lambda alpha: alpha <= bound)
    assert found <= bound
    assert bound - found < 1 / 256 or found == 1


def test_of_two_good_stretches_the_upper_one_counts() -> None:
    assert interpolate.largest_share(lambda alpha: alpha < 0.2 or 0.7 < alpha < 0.8) > 0.79
    assert interpolate.largest_share(lambda alpha: False) == 0


def test_calibrating_keeps_the_score_and_no_more(make_model: Make) -> None:
    """A score that falls evenly from 4 to 2 along the line: 95 % of 4 is 3.8, at α = 0.1."""
    original, model = make_model(), make_model()
    with torch.no_grad():
        model.lm_head.weight.copy_(original.lm_head.weight + 1)
    start = float(original.lm_head.weight.mean())
    alpha = interpolate.calibrate(
        model, parameters.copies(original), lambda: 4 - 2 * (float(model.lm_head.weight.mean()) - start), 0.95
    )
    assert 0.1 - 1 / 256 - 1e-4 < alpha <= 0.1 + 1e-4
    torch.testing.assert_close(model.lm_head.weight, original.lm_head.weight + alpha)


def test_states_in_another_type_are_mixed_in_the_models(make_model: Make) -> None:
    model, halves = make_model(), {name: p.bfloat16() for name, p in parameters.copies(make_model()).items()}
    interpolate.mix(model, halves, {name: p + 1 for name, p in halves.items()}, 0.25)
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, 0.75 * halves[name].float() + 0.25 * (halves[name] + 1).float())


def test_shares_are_looked_for_from_1_downwards_in_sixteenths_and_by_halving_the_last_step() -> None:
    asked = []

    def is_good(alpha: float) -> bool:
        asked.append(alpha)
        return alpha <= 0.8

    assert interpolate.largest_share(is_good) == 0.796875  # 204/256
    assert asked == [1, 15 / 16, 14 / 16, 13 / 16, 12 / 16, 25 / 32, 51 / 64, 103 / 128, 205 / 256]
    asked.clear()
    assert interpolate.largest_share(lambda alpha: not asked.append(alpha)) == 1
    assert asked == [1]


def test_a_score_at_the_floor_itself_is_good_and_the_model_ends_at_the_share(make_model: Make) -> None:
    """The score is 2 at the original and 1 at the other end, for a floor of ½."""
    original, model = make_model(), moved(make_model())
    end, start = parameters.copies(model), parameters.copies(original)
    shares = []

    def score() -> float:
        here, there = model.lm_head.weight, end["lm_head.weight"]
        shares.append(float(((here - start["lm_head.weight"]) / (there - start["lm_head.weight"])).median()))
        return 2.0 if not len(shares) - 1 else 1.0

    assert interpolate.calibrate(model, start, score, 0.5) == 1
    assert shares == [0, 1]
    assert all(torch.equal(p, end[name]) for name, p in model.named_parameters())


def test_a_model_that_keeps_no_score_ends_as_the_original(make_model: Make) -> None:
    original, model = make_model(), moved(make_model())
    scores = iter([1.0] + [0.0] * 99)
    assert interpolate.calibrate(model, parameters.copies(original), lambda: next(scores), 0.5) == 0
    assert all(torch.equal(p, original.get_parameter(name)) for name, p in model.named_parameters())
