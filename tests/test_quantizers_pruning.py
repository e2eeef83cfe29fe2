"""Pruning: which weights stay, against plain loops, torch's own pruning, and by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from stillknows.analysis.update_survival import tallies, total
from stillknows.errors import UserError
from stillknows.model.layers import linears
from stillknows.transforms.compression.pruning import magnitude, sparse
from stillknows.variants.compress import Quantized, parse_variant, quantize, weights


def apply(form: str, weight_OI: Tensor) -> Quantized:
    return quantize(weight_OI, parse_variant(form))


def sample(outputs: int = 6, inputs: int = 40, seed: int = 0) -> Tensor:
    return 0.05 * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


WEIGHTS = torch.tensor([[4.0, -3.0, 0.5, 1.0], [0.1, -0.2, 0.3, -0.4]])


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("magnitude", [[4, -3, 0, 0], [0, 0, 0.3, -0.4]]),
        ("magnitude:sparsity=0.5:scope=tensor", [[4, -3, 0.5, 1], [0, 0, 0, 0]]),
        ("magnitude:sparsity=0.25", [[4, -3, 0, 1], [0, -0.2, 0.3, -0.4]]),
        ("magnitude:sparsity=0", [[4, -3, 0.5, 1], [0.1, -0.2, 0.3, -0.4]]),
        ("magnitude:sparsity=0.9", [[0, 0, 0, 0], [0, 0, 0, 0]]),  # 3.6 of 4 are 4
        ("sparse", [[4, -3, 0, 0], [0, 0, 0.3, -0.4]]),
        ("sparse:n=1:m=2", [[4, 0, 0, 1], [0, -0.2, 0, -0.4]]),
        ("sparse:n=4:m=4", [[4, -3, 0.5, 1], [0.1, -0.2, 0.3, -0.4]]),
    ],
)
def test_by_hand(form: str, expected: list[list[float]]) -> None:
    assert torch.equal(apply(form, WEIGHTS).values_OI, torch.tensor(expected))


def test_of_equal_magnitudes_the_first_are_kept() -> None:
    ties_OI = torch.tensor([[1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0]])
    assert apply("sparse", ties_OI).values_OI.tolist() == [[1, -1, 0, 0, -1, 1, 0, 0]]
    assert apply("magnitude", ties_OI).values_OI.tolist() == [[1, -1, 1, 1, 0, 0, 0, 0]]
    many_OI = torch.ones(100, 100)
    for scope in ("row", "tensor"):
        kept_OI = apply(f"magnitude:scope={scope}", many_OI).values_OI.bool()
        first = 50 if scope == "row" else 5000
        assert bool((kept_OI.reshape(-1, 2 * first) == (torch.arange(2 * first) < first)).all())


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
def test_magnitude_over_the_matrix_is_torchs_l1_unstructured(sparsity: float) -> None:
    layer = nn.Linear(40, 6, bias=False)
    layer.weight.data = sample()
    prune.l1_unstructured(layer, "weight", amount=sparsity)
    assert torch.equal(magnitude(sample(), sparsity=sparsity, scope="tensor").values_OI, layer.weight.detach())


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([(2, 4), (1, 4), (4, 8), (3, 5)]))
def test_of_every_m_neighbours_the_n_largest_are_kept(seed: int, pattern: tuple[int, int]) -> None:
    n, m = pattern
    weight_OI = sample(3, 40, seed)
    found_OI = sparse(weight_OI, n=n, m=m).values_OI
    for given_m, found_m in zip(weight_OI.reshape(-1, m).tolist(), found_OI.reshape(-1, m).tolist(), strict=True):
        largest = sorted(given_m, key=abs, reverse=True)[:n]
        assert found_m == [w if w in largest else 0.0 for w in given_m]


@pytest.mark.parametrize("scope", ["row", "tensor"])
@pytest.mark.parametrize("sparsity", [0.05, 0.31, 0.5, 0.99])
def test_what_is_pruned_is_never_larger_than_what_is_kept(scope, sparsity: float) -> None:
    weight_OI = sample()
    found_OI = magnitude(weight_OI, sparsity=sparsity, scope=scope).values_OI
    pools = [(weight_OI.flatten(), found_OI.flatten())]
    if scope == "row":
        pools = list(zip(weight_OI, found_OI, strict=True))
    for before, after in pools:
        gone = after == 0
        assert int(gone.sum()) == round(sparsity * len(before))
        assert torch.equal(after[~gone], before[~gone])
        if not bool(gone.all()):
            assert before[gone].abs().amax() <= before[~gone].abs().amin()


def test_codes_differ_where_the_stored_weight_does(model) -> None:
    """Of an update by 1 % everywhere, what is pruned is lost and the other half is carried over."""
    original = weights(model)
    for layer in linears(model):
        layer.write(layer.read() * 1.01)
    damage = total(tallies(model, original, parse_variant("sparse")).values())
    assert damage.crossing == pytest.approx(0.5, abs=0.01)
    assert damage.surviving is not None
    assert 0.7 < damage.surviving < 1  # the larger half holds most of ‖θ‖²


def test_a_chain_prunes_what_the_link_before_it_gives() -> None:
    weight_OI = sample(4, 64)
    found_OI = apply("sparse+rtn:bits=4:group=32", weight_OI).values_OI
    assert torch.equal(found_OI, apply("rtn:bits=4:group=32", sparse(weight_OI).values_OI).values_OI)
    assert bool((found_OI.reshape(-1, 4).count_nonzero(1) <= 2).all())


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("form", ["magnitude", "sparse"])
def test_what_is_not_finite_is_kept(form: str, value: float) -> None:
    weight_OI = sample()
    weight_OI[2, 3] = value
    (link,) = parse_variant(form)
    assert not bool(link(weight_OI=weight_OI).values_OI[2, 3].isfinite())


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("magnitude:sparsity=1", r"magnitude:sparsity=1 is out of range\n.*below 1"),
        ("magnitude:sparsity=-0.1", r"sparsity=-0.1 is out of range"),
        ("magnitude:sparsity=nan", r"sparsity=nan is out of range"),
        ("magnitude:scope=rows", r"scope=rows is not known; did you mean 'row'"),
        ("sparse:m=3", r"sparse: m=3 does not divide 40 inputs"),
        ("sparse:n=5", r"sparse: n=5 is not in 1..4"),
        ("sparse:n=0", r"sparse: n=0 is not in 1..4"),
        ("sparse:n=1:m=-4", r"sparse: n=1 is not in 1..-4"),
    ],
)
def test_impossible_options_are_the_users_to_mend(form: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply(form, sample())
