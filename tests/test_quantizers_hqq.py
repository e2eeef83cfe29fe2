"""hqq: equal to the library's solver, bit by bit on a CPU, and what the solver is for.

What the library gives is in golden/hqq_solver.json; comparisons with the library itself need
`pip install -e '.[oracles]'`.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stillknows.errors import UserError
from stillknows.transforms.compression import hqq as module
from stillknows.transforms.compression.hqq import hqq
from stillknows.variants import fitting
from stillknows.variants.compress import parse_variant, quantize


def sample(seed: int = 0, outputs: int = 24, inputs: int = 192) -> Tensor:
    return 0.05 * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


# the library uses what will go from torch; transformers imports it where it finds it
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CASES = {
    "normal": sample(),
    "bfloat16 values": sample(1).bfloat16().float(),
    "heavy tails": sample(2).abs().pow(3) * sample(3).sign() * 100,
    "constant": torch.full((24, 192), 0.3),
    "one row": sample(4) * (torch.arange(24) == 5)[:, None],
    "tiny": sample(5) * 1e-6,
    "huge": sample(6) * 1e30,
}


def test_equal_to_what_the_library_gave() -> None:
    """The codes exactly; the values to what another order of the sums in a mean may change."""
    golden = json.loads((Path(__file__).parent / "golden/hqq_solver.json").read_text())
    weight_OI = torch.tensor(golden["inputs"])
    assert len(golden["forms"]) == 20
    for form in golden["forms"]:
        codes, values = (base64.b64decode(form.pop(part)) for part in ("codes", "values"))
        found = hqq(weight_OI, **form)
        assert bytes(found.codes_OI.flatten().tolist()) == codes, form
        theirs = torch.tensor(np.frombuffer(values, "<f4").copy()).reshape(weight_OI.shape)
        torch.testing.assert_close(found.values_OI, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.oracle("hqq")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_equal_to_the_library_bit_by_bit(bits: int, group: int, axis: int) -> None:
    """Its configuration for 4 bits begins at a rounded zero, for others not."""
    from hqq.core.quantize import Quantizer as library

    for weight_OI in CASES.values():
        codes, meta = library.quantize(
            weight_OI,
            nbits=bits,
            group_size=group or None,
            axis=axis,
            round_zero=bits == 4,
            optimize=True,
            bitpack=False,
            device="cpu",
        )
        theirs_OI = library.dequantize(codes, meta | {"compute_dtype": torch.float32})
        found = hqq(weight_OI, bits=bits, group=group, axis=axis)
        assert torch.equal(found.codes_OI, codes.reshape(weight_OI.shape).int())
        assert torch.equal(found.values_OI, theirs_OI)


def test_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 bits, range 0..3: Δ = 1 and z = 0 at first, codes are 0, 1, 1, 3 and r = 0, .2, 0, 0. The proximal step leaves
    nothing of r where .2 < .2^−.3/10 = .162 does not hold: e = .2 − .162 at the second weight, so z = mean of
    c − (w − e) = (1 − 1.2 + .0379)/4."""
    monkeypatch.setattr(module, "ROUNDS", 1)
    found = hqq(torch.tensor([[0.0, 1.2, 1.0, 3.0]]), bits=2, group=0)
    zero = (1 - 1.2 + 0.2 - 0.1 * 0.2**-0.3) / 4
    torch.testing.assert_close(found.values_OI, torch.tensor([[0.0, 1.0, 1.0, 3.0]]) - zero)
    assert found.codes_OI.tolist() == [[0, 1, 1, 3]]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_no_group_is_worse_than_at_the_start(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Residuals below .17 are not split off, so that codes and z in turn only lower a group's squared error."""

    def squared_errors(weight_OI: Tensor) -> Tensor:
        return (hqq(weight_OI, bits=bits, group=64).values_OI - weight_OI).double().reshape(-1, 64).square().sum(1)

    for weight_OI in (CASES["normal"], CASES["bfloat16 values"]):
        fitted = squared_errors(weight_OI)
        with monkeypatch.context() as patch:
            patch.setattr(module, "ROUNDS", 0)
            at_the_start = squared_errors(weight_OI)
        assert bool((fitted <= at_the_start * (1 + 1e-5)).all())
        assert fitted.mean() < 0.99 * at_the_start.mean()


def test_groups_of_axis_0_lie_apart() -> None:
    """[2, 4] in groups of 2 along axis 0: weights 4 apart in the order of the rows, here a column."""
    weight_OI = torch.tensor([[0.0, 10.0, 20.0, 30.0], [1.0, 11.0, 21.0, 31.0]])
    torch.testing.assert_close(hqq(weight_OI, bits=8, group=2, axis=0).values_OI, weight_OI, rtol=0, atol=1e-3)
    changed_OI = weight_OI.clone()
    changed_OI[1, 2] = 25.0
    codes_OI = hqq(changed_OI, bits=8, group=2, axis=0).codes_OI
    assert codes_OI.tolist() == [[0] * 4, [255] * 4]


def test_a_group_without_spread_becomes_its_mean() -> None:
    """The limit is 10⁻⁴; the next group is just above it."""
    weight_OI = torch.tensor([[1e-5, 1e-4, 1e-5, 1e-4, 0.0, 1.2e-4, 0.4e-4, 0.8e-4]])
    found_OI = hqq(weight_OI, bits=2, group=4, axis=1).values_OI
    torch.testing.assert_close(found_OI[0, :4], torch.full((4,), 5.5e-5), rtol=1e-4, atol=0)
    assert found_OI[0, 4:].unique().numel() > 1


def test_a_step_is_never_below_5e_5() -> None:
    """8 bits for a range of .005 would be steps of 2·10⁻⁵; they are 5·10⁻⁵, so that 100 of the 255 steps are used."""
    codes_OI = hqq(torch.linspace(0, 0.005, 64)[None], bits=8).codes_OI
    assert int(codes_OI.max() - codes_OI.min()) == 100


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_codes_use_the_bits_and_no_more(bits: int) -> None:
    codes = {code for seed in range(4) for code in hqq(sample(seed), bits=bits, group=64).codes_OI.flatten().tolist()}
    assert (min(codes), max(codes)) == (0, 2**bits - 1)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_does_not_become_a_number(value: float) -> None:
    weight_OI = sample()
    weight_OI[2, 40] = value
    assert not bool(hqq(weight_OI).values_OI[2, 40].isfinite())


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("hqq:bits=7", r"hqq: bits=7 is not one of 1, 2, 3, 4, 5, 6, 8"),
        ("hqq:bits=0", r"hqq: bits=0 is not one of"),
        ("hqq:axis=2", r"hqq:axis=2 is out of range"),
        ("hqq:group=80", r"hqq: groups of 80 do not divide 192 inputs\n.*group=0"),
        ("hqq:group=-1", r"hqq: groups of -1 do not divide 192 inputs"),
    ],
)
def test_impossible_options_are_the_users_to_mend(form: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        quantize(sample(), parse_variant(form))


def test_a_model_whose_layers_do_not_suit_is_refused_before_it_is_changed(model: Any) -> None:
    with pytest.raises(UserError, match=r"mine: layer .*hqq: groups of 64 do not divide 16 inputs"):
        fitting.check(model, parse_variant("hqq"), "mine")
    fitting.check(model, parse_variant("hqq:group=8"), "mine")
