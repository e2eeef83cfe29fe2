"""Even grids as torchao has them, in the environment of `make oracles`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stillknows.variants.compress import parse_variant, quantize

pytestmark = pytest.mark.oracle("torchao")
GROUP = 32
every_width = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def weights() -> Tensor:
    return 0.02 * torch.randn(16, 256, generator=torch.Generator().manual_seed(0))


def in_torchao(weight_OI: Tensor, bits: int, mapping: str) -> Tensor:
    """Quantize a linear map's weights and give them back."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
    linear.weight = nn.Parameter(weight_OI.clone())
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(GROUP), mapping_type=MappingType[mapping]
    )
    quantize_(linear, config)
    return linear.weight.dequantize()


def ours(weight_OI: Tensor, bits: int, options: str) -> Tensor:
    return quantize(weight_OI, parse_variant(f"rtn:bits={bits}:group={GROUP}:{options}")).values_OI


@every_width
def test_ranges_equal_torchaos_bit_by_bit(bits: int) -> None:
    assert torch.equal(ours(weights(), bits, "symmetric=false"), in_torchao(weights(), bits, "ASYMMETRIC"))


@every_width
def test_the_full_grid_is_torchaos_but_for_ties(bits: int) -> None:
    """A group's largest weight lies half a step beyond the last code or between two: here to even, there by 1/Δ."""
    weight_OI = weights()
    found_OI, theirs_OI = ours(weight_OI, bits, "grid=full"), in_torchao(weight_OI, bits, "SYMMETRIC")
    differ = found_OI != theirs_OI
    assert differ.float().mean() < 1 / GROUP
    is_largest = weight_OI.abs().unflatten(1, (-1, GROUP))
    is_largest = (is_largest == is_largest.amax(-1, keepdim=True)).flatten(1)
    assert bool(is_largest[differ].all())
    errors = ((values_OI - weight_OI)[differ].abs() for values_OI in (found_OI, theirs_OI))
    torch.testing.assert_close(*errors, rtol=1e-4, atol=0)


def test_int4_for_accelerators_is_refused_on_a_cpu() -> None:
    """Why what is compared with above is IntxWeightOnlyConfig."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    with pytest.raises((ImportError, AssertionError, NotImplementedError, RuntimeError)):
        quantize_(nn.Linear(256, 16, bias=False), Int4WeightOnlyConfig(group_size=GROUP))
