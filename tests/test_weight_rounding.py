"""What is kept of weights after a step: rounding at random and what compensated storage still owes."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillknows.training.weight_rounding import Storage, WeightStorage, stochastic_bfloat16

STORAGES: tuple[WeightStorage, ...] = get_args(WeightStorage)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**100, min_value=-(2.0**100))


def rounded(values: Tensor, seed: int = 0) -> Tensor:
    return stochastic_bfloat16(values, torch.Generator().manual_seed(seed))


def neighbours(value: float) -> tuple[float, float]:
    """The bfloat16 values at or towards zero, and next away from zero, from the bits of a float32."""
    bits = int(np.float32(value).view(np.uint32))
    inner = bits & 0xFFFF0000
    outer = inner + 0x10000 if bits != inner else inner
    return tuple(float(np.uint32(b).view(np.float32)) for b in (inner, outer))  # type: ignore[return-value]


@settings(deadline=None, max_examples=200)
@given(floats, st.integers(0, 2**32))
def test_stochastic_rounding_hits_only_the_two_neighbours(value: float, seed: int) -> None:
    assert set(rounded(torch.full((16,), value), seed).tolist()) <= set(neighbours(value))


@settings(deadline=None, max_examples=100)
@given(floats, st.integers(0, 2**32))
def test_stochastic_rounding_leaves_bfloat16_values_alone(value: float, seed: int) -> None:
    exact = torch.full((16,), value).bfloat16().float()
    assert torch.equal(rounded(exact, seed), exact)


@pytest.mark.parametrize("value", [1.001, -1.001, 0.7499, 3e-5, -123.456, 1 + 2**-8, 1e-40, 2 - 2**-20])
def test_stochastic_rounding_is_unbiased(value: float) -> None:
    """The mean of n draws lies within 4.5 standard errors, which are known: spacing · sqrt(p(1 − p)/n)."""
    n = 200_000
    exact = float(np.float32(value))
    inner, outer = neighbours(exact)
    p = (exact - inner) / (outer - inner)
    mean = rounded(torch.full((n,), exact)).double().mean().item()
    assert abs(mean - exact) <= 4.5 * abs(outer - inner) * math.sqrt(p * (1 - p) / n)
    assert abs(mean - exact) < abs(outer - inner) / 50


def test_stochastic_rounding_keeps_infinity_nan_zero_shape_and_strides() -> None:
    odd_nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    special = torch.cat([torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0]), odd_nans])
    for seed in range(20):
        torch.testing.assert_close(rounded(special, seed), special, equal_nan=True, rtol=0, atol=0)
    table = torch.randn(3, 5).T
    assert rounded(table).shape == (5, 3)
    assert bool(((rounded(table) - table).abs() <= 2**-7 * table.abs()).all())


def test_stochastic_rounding_draws_anew_for_every_weight_and_step() -> None:
    def kept(count: int, step: int) -> list[Tensor]:
        weights = {str(i): torch.full((64,), 1.002) for i in range(count)}
        storage = Storage(weights, "stochastic", 0)
        for p in weights.values():
            p.fill_(1.002)
        storage.keep(step)
        return list(weights.values())

    a, b = kept(2, 1)
    assert not torch.equal(a, b)
    [again], [later] = kept(1, 1), kept(1, 2)
    assert torch.equal(a, again)
    assert not torch.equal(a, later)


def test_the_smallest_distance_from_below_still_rounds_up_and_the_largest_down() -> None:
    """One step of float32 off a bfloat16 value, up in 1 of 65,536 draws: 64 of 4 million are expected."""
    below = torch.full((1 << 22,), 1 + 2**-23)
    assert 20 < int((rounded(below) > 1).sum()) < 130
    above = torch.full((1 << 22,), 1 + 2**-7 - 2**-23)
    assert 20 < int((rounded(above) == 1).sum()) < 130


def test_what_is_rounded_keeps_its_type() -> None:
    for kind in (torch.float32, torch.bfloat16, torch.float64):
        assert rounded(torch.ones(3, dtype=kind)).dtype == kind


@pytest.mark.parametrize("how", STORAGES)
def test_weights_are_rounded_at_the_start_to_the_nearest(how: WeightStorage) -> None:
    given = torch.tensor([1 + 2**-8 + 2**-20, 1 + 2**-8 - 2**-20])
    weights = {"p": given.clone()}
    Storage(weights, how, 0)
    assert weights["p"].tolist() == (given.tolist() if how == "float32" else [1 + 2**-7, 1.0])


def test_random_bits_depend_on_the_seed() -> None:
    kept = []
    for seed in (0, 1, 0):
        weights = {"p": torch.ones(64)}
        storage = Storage(weights, "stochastic", seed)
        weights["p"].fill_(1.002)
        storage.keep(3)
        kept.append(weights["p"])
    assert torch.equal(kept[0], kept[2])
    assert not torch.equal(kept[0], kept[1])


def test_compensated_storage_by_hand() -> None:
    """Steps of 2⁻¹⁰ at 1, where bfloat16 has spacing 2⁻⁷: the eighth part is owed until it is more than half of it."""
    kept: dict[str, list[float]] = {}
    for how in ("bfloat16", "compensated"):
        weights = {"p": torch.ones(1)}
        storage = Storage(weights, how, 0)  # type: ignore[arg-type]
        kept[how] = []
        for step in range(12):
            weights["p"].add_(2**-10)
            storage.keep(step)
            kept[how].append(float(weights["p"]))
            if storage.rest:
                assert float(weights["p"] + storage.rest["p"]) == 1 + (step + 1) * 2**-10
    assert kept["bfloat16"] == [1.0] * 12
    assert kept["compensated"] == [1.0] * 4 + [1 + 2**-7] * 7 + [1 + 2**-6]  # 4/8 goes to the even one, 12/8 up to it


def test_small_steps_add_up_in_compensated_storage_as_in_float32() -> None:
    """300 steps of a thousandth of a weight's spacing and less: bfloat16 loses all of them."""
    start = {"p": torch.randn(500, generator=torch.Generator().manual_seed(0)).bfloat16().float()}
    update = 2**-9 * 1e-2 * start["p"].abs()
    kept = {}
    for how in STORAGES[:2] + STORAGES[3:]:
        weights = {"p": start["p"].clone()}
        storage = Storage(weights, how, 0)
        for step in range(300):
            weights["p"] += update
            storage.keep(step)
        kept[how] = weights["p"]
    spacing = 2.0 ** (start["p"].abs().log2().floor() - 7)
    assert torch.equal(kept["bfloat16"], start["p"])
    assert bool(((kept["compensated"] - kept["float32"]).abs() <= 0.55 * spacing).all())
    assert float((kept["compensated"] != start["p"]).float().mean()) == 1


@pytest.mark.parametrize("how", STORAGES)
def test_what_is_owed_is_kept_in_bfloat16_and_by_compensated_storage_alone(how: WeightStorage) -> None:
    weights = {"p": torch.full((3,), 1.001)}
    storage = Storage(weights, how, 0)
    for step in range(2):
        assert storage.rest.keys() == ({"p"} if how == "compensated" else set())
        assert all(rest.dtype == torch.bfloat16 for rest in storage.rest.values())
        weights["p"].add_(0.001)
        storage.keep(step)
