"""What a step moves of weights kept as bfloat16: counted by rounding them."""

from __future__ import annotations

import pytest
import torch

from stillknows.analysis import bf16_updates
from stillknows.analysis.bf16_updates import (
    BIAS,
    EXPONENTS,
    count_exponents,
    least_rate,
    movable,
    rate_that_moves_half,
)


def test_exponents_by_hand() -> None:
    counts = count_exponents(torch.tensor([[1.0, -1.5, 2.0], [0.25, 0.0, -3.9]]))
    assert {i - BIAS: int(n) for i, n in enumerate(counts) if n} == {-BIAS: 1, -2: 1, 0: 2, 1: 2}


def test_exponents_of_a_transposed_matrix_longer_than_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.randn(7, 9, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = torch.bincount(torch.frexp(weights.float().flatten())[1].int() + BIAS - 1, minlength=EXPONENTS)
    monkeypatch.setattr(bf16_updates, "SLICE", 10)
    assert torch.equal(count_exponents(weights.T), expected)


def test_a_step_moves_what_rounding_to_bfloat16_lets_through() -> None:
    weights = torch.randn(4000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    exponents = count_exponents(weights)
    for rate in (1e-4, 3e-3, 0.1):
        moved = torch.stack([(weights + step).bfloat16().float() != weights for step in (rate, -rate)]).all(0)
        assert movable(exponents, rate) == pytest.approx(float(moved.float().mean()), abs=2e-3)


def test_half_of_the_weights_move_above_a_rate() -> None:
    exponents = count_exponents(torch.tensor([0.3, 1.0, 1.9, 5.0]))
    assert rate_that_moves_half(exponents) == 2**-8  # half the spacing of bfloat16 from 1 to 2
    assert movable(exponents, 2**-8) == 1 / 4
    assert movable(exponents, 1.001 * 2**-8) == 3 / 4


@pytest.mark.parametrize(("steps", "rate"), [(0.25, 2e-5), (0.05, 1e-4), (0.5, 1e-5), (3.0, 1e-5)])
def test_half_a_step_needs_a_rate_in_proportion(steps: float, rate: float) -> None:
    assert least_rate(1e-5, steps) == pytest.approx(rate)
